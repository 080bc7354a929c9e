"""Every implementation of every operation against dense products in float64: as it is, and "cut",
with tiles so small that small inputs have several. Triton runs on a card, and on the CPU in its
interpreter, to which ``backends/test_triton.py`` gives this file."""

from typing import NamedTuple

import pytest
import sparse_cases as cases
import torch
from sparse_cases import BF16, ENCODINGS, F32, F64, INTERPRETED, SUMS, cast, integers, over, random

from llm_wsae.sparse import operations
from llm_wsae.sparse.backends import cpu
from llm_wsae.sparse.codes import (
    Codes,
    Latents,
    RaggedCodes,
    RawRows,
    SlotCapacity,
    SparseGradients,
    SubsetGradients,
    joined,
    padded,
    ragged,
)

TOLERANCE = {F64: 1e-12, F32: 5e-6, BF16: 1e-2}


class Way(NamedTuple):
    """One implementation and the number format that it gets."""

    name: str
    dtype: torch.dtype
    cut: bool

    @property
    def exact(self):
        return F64 if self.dtype == F64 else F32

    @property
    def device(self):
        return "cuda" if self.name == "triton" and not INTERPRETED else "cpu"

    def cast(self, case):
        return cast(case, self.dtype, self.device)

    def __str__(self):
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}{'-cut' * self.cut}"


def every_way(*dtypes):
    """A fixture: every implementation with every dtype that it takes, of which the first is for
    plain torch alone; of Triton's interpreter a few."""
    chosen = [Way("pytorch", dtype, cut) for dtype in dtypes for cut in (False, True)]
    chosen += [one._replace(name=name) for name in ("cpu", "triton") for one in chosen[2:]]
    if INTERPRETED:
        chosen = [Way("triton", F32, True), Way("triton", dtypes[-1], False)]
    marks = {"cuda": [pytest.mark.gpu], "cpu": []}

    @pytest.fixture(
        params=[pytest.param(way, id=str(way), marks=marks[way.device]) for way in chosen]
    )
    def way(request, monkeypatch):
        own = request.param
        if own.name == "cpu" and not cpu.available():
            pytest.skip("there is no C++ compiler here")
        if own.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        with cases.using(own.name):
            if own.cut:
                cases.cut_tiles(own.name, monkeypatch)
            yield own

    return way


way = every_way(F64, F32, BF16)  # of the operations with an encoder's product
summing = every_way(F64, F32)  # of the operations on codes


def encoding_of(name, way):
    """The case and its exact pre-activations; equal in all dtypes, but for the random one."""
    tolerance = TOLERANCE[way.dtype] * 20 if name == "random" else 0
    return way.cast(ENCODINGS[name]), ENCODINGS[name].pre(), tolerance


def assert_found(codes: RaggedCodes, way, pre, tolerance):
    """Slots of a row are different latents, and each has the value of its pre-activation."""
    assert codes.indices.dtype == codes.offsets.dtype == torch.int64
    assert codes.values.dtype == way.exact
    assert codes.num_rows == len(pre) and codes.offsets[0] == 0
    assert codes.offsets[-1] == len(codes.indices)
    codes = RaggedCodes(*(part.cpu() for part in codes))
    used = codes.values > 0
    rows, indices, values = codes.rows()[used], codes.indices[used], codes.values[used].double()
    assert len((rows * pre.shape[1] + indices).unique()) == len(rows)
    assert ((codes.indices >= 0) & (codes.indices < pre.shape[1])).all()
    assert torch.allclose(pre[rows, indices], values, rtol=0, atol=tolerance)
    assert not codes.values[~used].any()


@over(k=[7, 160] if INTERPRETED else [7, 1, 19, 20, 159, 160], name=ENCODINGS)
def test_encode_topk(name, k, way):
    product, pre, tolerance = encoding_of(name, way)
    k = min(k, pre.shape[1])
    codes = operations.encode_topk(product, k)
    assert codes.indices.shape == codes.values.shape == (len(pre), k)
    assert_found(ragged(codes), way, pre, tolerance)
    found = codes.values.cpu().double().sort(descending=True).values
    assert torch.allclose(found, pre.topk(k).values.relu(), rtol=0, atol=tolerance)


@over(threshold=["whole", "zero", "high"], name=ENCODINGS)
def test_encode_above(name, threshold, way):
    product, pre, tolerance = encoding_of(name, way)
    whole = integers(pre.shape[1], seed=9).abs() * 4
    level = {"zero": whole * 0, "whole": whole, "high": whole + 1e6}[threshold]
    codes = operations.encode_above(product, level.to(way.device, way.exact))
    assert_found(codes, way, pre, tolerance)
    expected = torch.where(pre > level, pre, 0)
    found = cases.dense(codes, codes.values.double(), len(level)).cpu()
    if name == "random":  # rounding may decide about an entry at the threshold
        away = (pre - level).abs() > tolerance
        expected, found = expected[away], found[away]
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)


BATCHES = [(7, 0.0, 1.0), (7, 1e6, 1.0), (160, 19.0, 1.0), (7, 0.5, 0.8), (7, 0.5, 0.0)]


@over(batch=BATCHES, name=ENCODINGS)
def test_encode_batch_topk(name, batch, way):
    """Rows that are not kept count nowhere, though their pre-activations may be the largest."""
    product, pre, tolerance = encoding_of(name, way)
    k, guess, share = batch
    kept = torch.rand(len(pre), generator=torch.Generator().manual_seed(3)) < share
    k, given = min(k, pre.shape[1]), None if share == 1 else kept.to(way.device)
    codes = operations.encode_batch_topk(product, k, guess, given)
    assert_found(codes, way, pre, tolerance)
    assert kept[codes.rows().cpu()][codes.values.cpu() > 0].all()
    expected = pre[kept].flatten().topk(k * int(kept.sum())).values.relu()
    positive = codes.values[codes.values > 0].cpu().double().sort(descending=True).values
    found = torch.zeros_like(expected)
    found[: len(positive)] = positive
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)


MANY = (2, 2100) if INTERPRETED else (3, 40_000)
DEAD = ENCODINGS | {
    "more than are counted at once": cases.whole(*MANY),
    "none here": cases.whole(5, 0),  # other processes have some
}


@over(share=[0.6, None, 0.0], k=[7, 1, 160, 80], name=DEAD)
def test_encode_dead(name, k, share, way):
    """Those that tie with the k-th largest are all there, and nothing else is."""
    pre, dead = DEAD[name].pre(), None
    if share is not None:
        dead = torch.rand(pre.shape[1], generator=torch.Generator().manual_seed(k)) < share
        pre = pre * dead
        dead = dead.to(way.device)
    found = operations.encode_dead(way.cast(DEAD[name]), dead, k)
    assert found.dtype == way.dtype and found.shape == pre.shape
    found, wanted = found.cpu().double(), pre.relu()
    smallest = wanted.topk(min(k, pre.shape[1])).values[:, -1:]
    if name == "random":
        tolerance = TOLERANCE[way.dtype] * 20
        assert torch.allclose(found[found > 0], pre[found > 0], rtol=0, atol=tolerance)
        assert (found[wanted > smallest + 2 * tolerance] > 0).all()
        assert not found[wanted < smallest - 2 * tolerance].any()
    else:
        assert torch.equal(found, wanted * (wanted >= smallest))


@over(name=[name for name in DEAD if name != "random"])
def test_dead_gradients(name, way):
    """Of small whole numbers, so that what is added up is exact but for the last rounding."""
    x, encoder, bias = DEAD[name]
    some = len(bias)
    active, by_output = DEAD[name].pre().relu(), integers(*x.shape, seed=7)
    rows = (random(some, cases.D_IN, seed=seed) for seed in (0, 1))
    start = SubsetGradients(torch.arange(some), *rows, random(some, seed=2))
    by_latent = (by_output @ encoder.T) * (active > 0)
    added = (by_latent.T @ x, active.T @ by_output, by_latent.sum(0))
    found = cast(start, way.exact, way.device)
    given = (part.to(way.device, way.dtype) for part in (active, x, encoder, by_output))
    operations.dead_gradients(*given, found)
    for one, before, more in zip(found[1:], start[1:], added, strict=True):
        assert_close(one, before + more, way.exact, TOLERANCE[way.dtype])
    silent = ~(active > 0).any(0)
    assert torch.equal(found.encoder.cpu()[silent], start.encoder[silent].to(way.exact))


def assert_close(found, expected, dtype, tolerance=None):
    assert found.dtype == dtype and found.shape == expected.shape
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = tolerance or TOLERANCE[dtype]
    assert torch.allclose(found.cpu().double(), expected, rtol=0, atol=tolerance * scale)


def assert_all_close(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, dtype)


def assert_rounded(found, exact):
    """To nearest; the interpreter cuts bits off where the card rounds."""
    cut_off = 2**-7 if INTERPRETED and found.dtype == BF16 else 0
    torch.testing.assert_close(found, exact.to(found.dtype), rtol=cut_off, atol=0)


def by_values(codes, decoder, output_gradient):
    by_latent = output_gradient @ decoder.T
    return by_latent[codes.rows(), codes.indices] * (codes.values > 0)


@over(fast=[F32, BF16], name=SUMS)
def test_operations_on_codes(name, fast, summing):
    """Decoding, gradients by values, exact values, and a reconstruction that needs all of them."""
    wide, fast = SUMS[name], fast if summing.exact == F32 else F64
    codes, x, decoder, bias, by_output = summing.cast(wide)
    decoded = cases.dense(wide.codes, wide.codes.values, len(decoder)) @ wide.decoder + wide.bias
    assert_close(operations.decode(codes, decoder, bias), decoded, summing.exact)
    found = operations.value_gradients(codes, decoder, by_output)
    assert_close(found, by_values(wide.codes, wide.decoder, wide.output_gradient), summing.exact)
    assert not found[codes.values == 0].any()  # else clipped slots would push the encoder

    encoder, own = decoder.to(fast), random(len(decoder), seed=9)
    found = operations.exact_values(codes, x, encoder, own.to(x))
    pre = wide.x @ encoder.cpu().double().T + own
    expected = pre[wide.codes.rows(), wide.codes.indices].relu() * (wide.codes.values > 0)
    assert_close(found.values, expected, summing.exact)
    assert torch.equal(found.indices, codes.indices) and torch.equal(found.offsets, codes.offsets)
    assert not found.values[codes.values == 0].any()

    rows, columns = random(len(x), seed=7).relu(), random(x.shape[1], seed=8).relu()
    residual = (decoded - wide.x) * rows[:, None]
    gradient = residual * columns
    by_value = by_values(wide.codes, wide.decoder, gradient)
    expected = (residual, by_value, (residual * gradient).sum(1))
    found = operations.reconstruct(codes, decoder, bias, x, rows.to(x), columns.to(x), fast)
    assert_all_close((found.residual, found.by_value, found.row_errors), expected, summing.exact)
    assert found.output_gradient.dtype == fast
    assert_rounded(found.output_gradient, found.residual * columns.to(x))


def gradients_of(case: cases.Sums, kinds: int = 1, more: bool = False) -> SparseGradients:
    """The gradients of a problem, with ``kinds`` rows of codes to every row of x; float64."""
    codes, x, decoder, _, output_gradient = case
    some = None
    if more:
        latents = torch.randperm(len(decoder), generator=torch.Generator().manual_seed(0))
        latents = latents[: 1 + len(decoder) // 3]
        rows = (random(len(latents), x.shape[1], seed=seed) for seed in (11, 12))
        some = SubsetGradients(latents, *rows, random(len(latents), seed=13))
    by_value = by_values(codes, decoder, output_gradient)
    return SparseGradients(codes, x[: len(x) // kinds], output_gradient, by_value, some)


def weight_gradients(gradients: SparseGradients, d_sae: int):
    codes, x, output_gradient, by_value, more = gradients
    by_latent, latents = (cases.dense(codes, slots, d_sae) for slots in (by_value, codes.values))
    x = x.repeat(len(output_gradient) // max(1, len(x)), 1)
    sums = (by_latent.T @ x, latents.T @ output_gradient, by_latent.sum(0))
    if more is not None:
        more.add_to(sums)
    return sums


@over(more=[False, True], kinds=[1, 2, 5], name=SUMS)
def test_weight_gradients(name, kinds, summing, more):
    case = SUMS[name]
    if len(case.x) % kinds:
        return
    gradients, d_sae = gradients_of(case, kinds, more), len(case.decoder)
    found = operations.weight_gradients(summing.cast(gradients), d_sae)
    assert_all_close(found, weight_gradients(gradients, d_sae), summing.exact)
    if name == "few latents hot" and kinds == 1:
        again = operations.weight_gradients(summing.cast(gradients), d_sae)
        assert all(map(torch.equal, found, again))


@over(raw=[False, True], fast=[BF16, None], more=[False, True], name=SUMS)
def test_adam(name, summing, more, fast, raw):
    """It is that of plain torch in float64, with the gradients or with their terms, which may be
    rounded. test_steps.py compares plain torch with torch.optim.Adam and with autograd."""
    case = SUMS[name]
    wide, d_sae = case.decoder, len(case.decoder)
    moments = (wide * 0.1, wide * 0.2, wide**2 + 1, wide**2 + 2)
    start = Latents(wide.flip(0), torch.nn.functional.normalize(wide, dim=1), *moments)
    raw_rows = RawRows(random(d_sae, seed=1).abs() + 0.1, random(d_sae, seed=2)) if raw else None
    gradients = gradients_of(case, 1, more)
    given = summing.cast(gradients)
    if fast is not None:
        x, by_output = given.x.to(fast), given.output_gradient.to(fast)
        given = given._replace(x=x, output_gradient=by_output)
        gradients = gradients._replace(x=x.cpu().double(), output_gradient=by_output.cpu().double())
    expected, sums = cast(start, F64), weight_gradients(gradients, d_sae)
    expected_raw = cast(raw_rows, F64) if raw else None
    with cases.using("pytorch"):
        operations.adam(expected, sums, 3, 0.01, expected_raw)
    dense_terms = tuple(part.to(summing.device, summing.exact) for part in sums)
    for terms in [given] if more else [given, dense_terms]:
        found, found_raw = summing.cast(start), summing.cast(raw_rows) if raw else None
        if fast is not None:
            found = found._replace(encoder_fast=torch.zeros_like(found.encoder, dtype=fast))
        by_bias = operations.adam(found, terms, 3, 0.01, found_raw)
        assert_close(by_bias, sums[2], summing.exact)
        assert_all_close(found[:6], expected[:6], summing.exact)
        if raw:
            assert_close(found_raw.lengths, expected_raw.lengths, summing.exact)
            assert torch.equal(found_raw.bias, summing.cast(raw_rows).bias)
        if fast is not None:
            assert_rounded(found.encoder_fast, found.encoder)


def test_a_row_that_cannot_be_normalised_stays_0(summing):
    latents = summing.cast(Latents(*torch.zeros(6, 9, cases.D_IN).double()))
    operations.adam(latents, (latents[0].clone(), latents[0].clone(), latents[0][:, 0]), 1, 0.01)
    assert not any(part.any() for part in latents[:6])


def test_codes_end_to_end():
    codes = Codes(torch.arange(6).view(3, 2), torch.ones(3, 2))
    assert ragged(codes).offsets.tolist() == [0, 2, 4, 6]
    assert ragged(codes).values.data_ptr() == codes.values.data_ptr()
    uneven = RaggedCodes(torch.arange(3), torch.ones(3), torch.tensor([0, 0, 3, 3]))
    both = joined([uneven, ragged(codes), uneven])
    assert both.offsets.tolist() == [0, 0, 3, 3, 5, 7, 9, 9, 12, 12]
    assert both.rows().tolist() == [1, 1, 1, 3, 3, 4, 4, 5, 5, 7, 7, 7]
    assert both.num_rows == 9
    assert padded(uneven).indices.tolist() == [[0, 0, 0], [0, 1, 2], [0, 0, 0]]
    assert padded(uneven).values.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    empty = RaggedCodes(torch.arange(0), torch.ones(0), torch.zeros(1, dtype=torch.int64))
    assert padded(empty).indices.shape == (0, 1)


def test_rows_get_slots_by_what_the_last_ones_needed():
    """And a step is repeated until all processes have enough."""
    capacity = SlotCapacity()
    assert capacity.enough()
    for counts, fit, slots in (
        ([3, 64, 5], True, 128),
        ([3, 500, 0], False, 1024),
        ([700], True, 1024),
        ([], True, 64),  # all rows of a process may be masked
        ([65], False, 128),
    ):
        capacity.report(torch.tensor(counts, dtype=torch.int64))
        assert (capacity.enough(), capacity.slots) == (fit, slots), counts
    capacity, made, answers = SlotCapacity(), [], iter([False, True])

    def compute():
        made.append(capacity.slots)
        capacity.report(torch.tensor([100]))
        return len(made)

    assert capacity.retry(compute, lambda yes: yes and next(answers)) == 3
    assert made == [64, 128, 128]
    assert capacity.retry(lambda: "nothing was reported", lambda yes: False).startswith("nothing")


def test_the_choice_of_a_backend():
    """By device, dtype and autograd, at the time of the call."""

    def chosen(tensor, dtypes=(F32,)):
        return operations._faster("decode", (tensor,), dtypes)

    here, number = cpu.decode if cpu.available() else None, torch.ones(1)
    assert chosen(number) is chosen(number.bfloat16(), (F32, BF16)) is here
    for other in (number.bfloat16(), number.double(), torch.ones(1, requires_grad=True)):
        assert chosen(other) is None
    with torch.no_grad():
        assert chosen(torch.ones(1, requires_grad=True)) is here
