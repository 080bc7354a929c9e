"""The Triton implementation against the dense reference, on random and on adversarial inputs.

The same tests run on the card where there is one and in Triton's interpreter on the CPU. Triton
reads ``TRITON_INTERPRET`` when it is imported, so the interpreter gets a process of its own: one
test here runs this file again in it. That the kernels are not only right but also compile for a
card is tested without one.
"""

import os
import re
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from looping import over
from torch.utils._python_dispatch import TorchDispatchMode

from llm_wsae.machine.hardware import DeferredScalar
from llm_wsae.sparse import codes as sparse_codes
from llm_wsae.sparse import operations
from llm_wsae.sparse.backends import reference
from llm_wsae.sparse.codes import (
    Codes,
    RaggedCodes,
    RawRows,
    SlotCapacity,
    SparseGradients,
    SubsetGradients,
    joined,
    ragged,
)
from llm_wsae.sparse.operations import using
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.parameters import Batch
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for CUDA)")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS = INTERPRETED or torch.cuda.is_available()
D_IN, D_SAE, BATCH = 24, 37, 4
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
FAST = [torch.float32, torch.bfloat16]
# selecting from float64 takes the interpreter long
DTYPES = FAST if INTERPRETED else [torch.float64, *FAST]
SMALL = {
    "_TILE_BYTES": 1,
    "_FEWEST_ROWS": 2,
    "_PART": 32,
    "_SLOTS": 4,
    "_COLUMNS": 16,
    "_SPAN": 4,
    "_HELD": 128,
}


def each(*axes):
    """Combinations of the axes' values: all of them on a card. In the interpreter, which is slow,
    one axis is varied at a time, and the others keep their first value."""
    if not INTERPRETED:
        return list(product(*axes))
    first = [axis[0] for axis in axes]
    varied = (
        (*first[:place], value, *first[place + 1 :])
        for place, axis in enumerate(axes)
        for value in axis
    )
    return list(dict.fromkeys(varied))


@pytest.fixture(params=[pytest.param(DEVICE, marks=[] if INTERPRETED else pytest.mark.gpu)])
def device(request):
    if not RUNS:
        pytest.skip("there is no CUDA device")
    return request.param


@pytest.fixture(params=["cut", "whole"] if RUNS else ["cut"])
def triton(request, monkeypatch):
    """The implementation, with tiles that cut these small inputs and with its real ones."""
    from llm_wsae.sparse.backends.triton import operations as triton

    if request.param == "cut":
        for name, size in SMALL.items():
            monkeypatch.setattr(triton, name, size)
        monkeypatch.setattr(sparse_codes, "_FEWEST", 16)
    return triton


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(*shape, seed=0):
    """Small whole numbers: their products and sums are exact in bfloat16, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).double()


def pre_activations(kind, d_sae=D_SAE):
    pre = {
        "random": random(BATCH, d_sae),
        "repeated": integers(BATCH, d_sae),
        "negative": random(BATCH, d_sae).abs().neg() - 1,
        "zero": torch.zeros(BATCH, d_sae),
        "infinite": random(BATCH, d_sae).where(random(BATCH, d_sae, seed=1) > 0, -torch.inf),
    }[kind]
    if kind == "infinite":
        pre[:, 5] = torch.inf
    return pre


PRE_ACTIVATIONS = ["random", "repeated", "negative", "zero", "infinite"]


@over(case=each(FAST, PRE_ACTIVATIONS, [7, 1, D_SAE]))
def test_selection_is_exact_and_ties_go_to_the_lowest_latents(device, triton, case):
    dtype, kind, k = case
    pre = pre_activations(kind).to(device, dtype)
    best = triton.select_topk(pre, k)
    expected = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(best.indices.sort(dim=1).values, expected.sort(dim=1).values)
    assert torch.equal(pre.gather(1, best.indices), best.values)


def test_not_a_number_is_selected_so_that_it_is_seen(device, triton):
    pre = random(3, D_SAE).float().to(device)
    pre[1, 34] = -torch.nan
    best = triton.select_topk(pre, 7)
    assert best.values.isnan().sum(1).tolist() == [0, 1, 0]
    assert 34 in best.indices[1].tolist()


def layer(kind, device, dtype, batch=BATCH, d_sae=D_SAE):
    """x, encoder and bias whose products are exact in ``dtype``."""
    x, encoder = integers(batch, D_IN), integers(d_sae, D_IN, seed=1)
    bias = integers(d_sae, seed=2)
    if kind == "negative":  # no latent of any row is active
        bias -= 200
    if kind == "zero rows":
        x[::2] = 0
        bias = bias.abs().neg()
    if kind == "dead latents":
        bias[::3] -= 200
    return [tensor.to(device, dtype) for tensor in (x, encoder, bias)]


def dense(codes, d_sae=D_SAE):
    codes = ragged(codes) if isinstance(codes, Codes) else codes
    assert codes.indices.dtype == codes.offsets.dtype == torch.int64
    assert codes.offsets[0] == 0 and codes.offsets[-1] == len(codes.indices)
    return reference.dense(codes, codes.values, d_sae)


LAYERS = ["random", "negative", "zero rows", "dead latents"]


@over(case=each(FAST, LAYERS, [7, D_SAE]))
def test_encode_topk(device, triton, case):
    dtype, kind, k = case
    x, encoder, bias = layer(kind, device, dtype)
    codes = triton.encode_topk(x, encoder, bias, k)
    expected = reference.encode_topk(x, encoder, bias, k)
    assert codes.values.dtype == expected.values.dtype
    assert torch.equal(codes.values.sort(1).values, expected.values.sort(1).values)
    pre = torch.addmm(bias, x, encoder.T).to(codes.values.dtype)
    assert torch.equal(pre.gather(1, codes.indices).relu(), codes.values)
    assert all(len(set(row)) == k for row in codes.indices.tolist())


@over(case=each(DTYPES, LAYERS, [0, 20]))
def test_encode_above(device, triton, case):
    """With and without rows that have more entries than the room they get at first."""
    dtype, kind, highest = case
    x, encoder, bias = layer(kind, device, dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    threshold = (integers(D_SAE, seed=3).abs() * highest).to(device, exact)
    codes = triton.encode_above(x, encoder, bias, threshold)
    expected = reference.encode_above(x, encoder, bias, threshold)
    assert codes.values.dtype == expected.values.dtype
    assert torch.equal(dense(codes), dense(expected))
    assert (codes.values != 0).sum() == len(expected.values)


def test_rows_without_room_are_told_and_have_it_the_next_time(device, triton):
    x, encoder, bias = layer("random", device, torch.float32)
    bias += 200  # all of them are active
    given = (x, encoder, bias, torch.zeros(D_SAE, device=device))
    little = SlotCapacity()
    little.slots = 5
    codes = triton.encode_above(*given, little)
    assert not little.enough() and little.enough()  # a report is read once
    assert codes.offsets.tolist() == [5 * i for i in range(BATCH + 1)]
    pre = torch.addmm(bias, x, encoder.T)
    assert torch.equal(pre.gather(1, codes.indices.view(BATCH, 5)), codes.values.view(BATCH, 5))
    codes = triton.encode_above(*given, little)
    assert little.enough() and torch.equal(dense(codes), pre)


@over(case=each(DTYPES, LAYERS, [7, 1, D_SAE]))
def test_encode_batch_topk(device, triton, case):
    dtype, kind, k = case
    x, encoder, bias = layer(kind, device, dtype)
    codes = triton.encode_batch_topk(x, encoder, bias, k, 0.0)
    expected = reference.encode_batch_topk(x, encoder, bias, k, 0.0)
    assert codes.values.dtype == expected.values.dtype
    assert len(codes.values) == k * BATCH and codes.values.min() >= 0
    positive = codes.values[codes.values > 0]
    assert torch.equal(positive.sort().values, expected.values.sort().values)
    # every value stands at its row and latent, none twice
    pre = torch.addmm(bias, x, encoder.T).to(codes.values.dtype)
    found = dense(codes)
    assert torch.equal(found[found > 0], pre[found > 0])
    assert int((found > 0).sum()) == len(positive)


@over(case=each(DTYPES, LAYERS))
def test_encode_batch_topk_of_some_rows(device, triton, case):
    dtype, kind = case
    x, encoder, bias = layer(kind, device, dtype)
    kept = (torch.arange(BATCH) % 3 > 0).to(device)
    codes = triton.encode_batch_topk(x, encoder, bias, 5, 0.0, kept)
    expected = reference.encode_batch_topk(x, encoder, bias, 5, 0.0, kept)
    assert len(codes.values) == 5 * BATCH
    positive = codes.values > 0
    assert torch.equal(codes.values[positive].sort().values, expected.values.sort().values)
    assert kept[codes.rows()[positive]].all()


@over(case=each(DTYPES, LAYERS, [7, 1, D_SAE], [True, False]))
def test_encode_dead(device, case):
    dtype, kind, k, masked = case
    from llm_wsae.sparse.backends.triton import operations as triton

    given = layer(kind, device, dtype)
    dead = (integers(D_SAE, seed=5) > -2).to(device) if masked else None
    found = triton.encode_dead(*given, dead, k)
    assert found.dtype == dtype
    assert torch.equal(found, reference.encode_dead(*given, dead, k))


@over(d_sae=[0, 2100])
def test_encode_dead_of_none_and_of_more_than_are_read_at_once(device, d_sae):
    from llm_wsae.sparse.backends.triton import operations as triton

    given = layer("random", device, torch.bfloat16, batch=2, d_sae=d_sae)
    for k in (3, 40):
        assert torch.equal(
            triton.encode_dead(*given, None, k), reference.encode_dead(*given, None, k)
        )


def test_the_guess_changes_nothing(device, triton):
    x, encoder, bias = layer("random", device, torch.float32)
    first, *others = (triton.encode_batch_topk(x, encoder, bias, 5, g) for g in (0.0, 7.0, 1e9))
    for other in others:
        assert all(map(torch.equal, first, other))


@over(dtype=DTYPES)
def test_a_batch_of_one_row(device, triton, dtype):
    x, encoder, bias = layer("random", device, dtype, batch=1)
    pre = torch.addmm(bias, x, encoder.T)
    wanted = pre.to(torch.float64 if dtype == torch.float64 else torch.float32).relu()
    threshold = torch.zeros(D_SAE, dtype=wanted.dtype, device=device)
    assert torch.equal(dense(triton.encode_topk(x, encoder, bias, D_SAE)), wanted)
    assert torch.equal(dense(triton.encode_above(x, encoder, bias, threshold)), wanted)
    assert torch.equal(dense(triton.encode_batch_topk(x, encoder, bias, D_SAE, 0.0)), wanted)


def test_a_batch_of_no_rows(device, triton):
    """All rows of a batch may be masked."""
    x, encoder, bias = layer("random", device, torch.float32, batch=0)
    threshold = torch.zeros_like(bias)
    for codes in (
        ragged(triton.encode_topk(x, encoder, bias, 3)),
        triton.encode_above(x, encoder, bias, threshold),
        triton.encode_batch_topk(x, encoder, bias, 3, 0.0),
    ):
        assert codes.offsets.tolist() == [0] and len(codes.indices) == 0
        error = triton.decode(codes, encoder, bias[:D_IN])
        by_value = triton.value_gradients(codes, encoder, error)
        assert len(error) == len(by_value) == 0
        gradients = SparseGradients(codes, x, error, by_value)
        assert not any(g.any() for g in triton.weight_gradients(gradients, D_SAE))


def some_codes(kind, device, exact):
    """Ragged codes with unused slots, rows without any, dead latents and one that always fires."""
    values = random(BATCH, D_SAE).abs().where(random(BATCH, D_SAE, seed=1) > 1, 0)
    values[:, ::5] = 0
    slots = values > 0
    if kind == "random":
        values[:, 11] = 1.5
        slots = (values > 0) | (random(BATCH, D_SAE, seed=2) > 1.5)  # some of them unused
        slots[2] = False
        slots[-1] = False
    if kind == "unused":
        values.zero_()
    if kind == "one row":
        values, slots = values[:1], slots[:1]
    if kind == "all latents":
        slots = torch.ones_like(slots)
    if kind == "none":
        slots = torch.zeros_like(slots)
    if kind == "dense latent":  # far more often active than the others
        rows = 16 if INTERPRETED else 40
        values = random(rows, D_SAE).abs()
        slots = random(rows, D_SAE, seed=1) > 2
        slots[:, 11] = True
    offsets = torch.zeros(len(slots) + 1, dtype=torch.int64)
    offsets[1:] = slots.sum(1).cumsum(0)
    codes = RaggedCodes(slots.nonzero()[:, 1], values[slots].to(exact), offsets)
    return RaggedCodes(*(part.to(device) for part in codes))


CODES = ["random", "unused", "one row", "all latents", "none", "dense latent"]
CASES = [(kind, torch.float32) for kind in CODES]
CASES += [("dense latent", torch.float64), ("random", torch.bfloat16)]


def close(found, wanted):
    """As close as sums in the dtype of the result allow."""
    wanted = wanted.to(found.dtype)
    tolerance = EXACT[found.dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@over(case=CASES)
def test_decode(device, triton, case):
    kind, dtype = case
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    codes = some_codes(kind, device, exact)
    decoder, bias = random(D_SAE, D_IN).to(device, dtype), random(D_IN, seed=5).to(device, dtype)
    wanted = dense(codes).double() @ decoder.double() + bias.double()
    close(triton.decode(codes, decoder, bias), wanted)


@over(case=CASES)
def test_value_gradients(device, triton, case):
    kind, dtype = case
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    codes = some_codes(kind, device, exact)
    decoder = random(D_SAE, D_IN).to(device, dtype)
    output_gradient = random(codes.num_rows, D_IN, seed=8).to(device, exact)
    output_gradient[:, :3] = 0  # dimensions of weight 0
    found = triton.value_gradients(codes, decoder, output_gradient)
    close(found, reference.value_gradients(codes, decoder.double(), output_gradient.double()))
    assert not found[codes.values == 0].any()


@over(case=each(CASES, [2, 1]))
def test_weight_gradients(device, triton, case):
    (kind, dtype), kinds = case
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    codes = some_codes(kind, device, exact)
    x = random(codes.num_rows, D_IN, seed=7).to(device, dtype)
    codes = joined([codes] * kinds)
    output_gradient = random(codes.num_rows, D_IN, seed=8).to(device, exact)
    by_value = random(len(codes.values), seed=9).to(device, exact) * (codes.values > 0)
    gradients = SparseGradients(codes, x, output_gradient, by_value)
    found = triton.weight_gradients(gradients, D_SAE)
    wide = RaggedCodes(codes.indices, codes.values.double(), codes.offsets)
    wanted = reference.weight_gradients(
        SparseGradients(wide, *(part.double() for part in gradients[1:4])), D_SAE
    )
    for one, other in zip(found, wanted, strict=True):
        close(one, other)
    assert all(map(torch.equal, found, triton.weight_gradients(gradients, D_SAE)))


def some_gradients(kind, device, dtype, more):
    """Of a problem, with what AuxK adds to every third latent."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    codes = some_codes(kind, device, exact)
    x = random(codes.num_rows, D_IN, seed=7).to(device, dtype)
    output_gradient = random(codes.num_rows, D_IN, seed=8).to(device, dtype)
    by_value = random(len(codes.values), seed=9).to(device, exact) * (codes.values > 0)
    some = None
    if more:
        latents = torch.arange(0, D_SAE, 3).flip(0)
        parts = (random(len(latents), D_IN), random(len(latents), D_IN), random(len(latents)))
        some = SubsetGradients(
            *(part.to(device) for part in (latents, *(p.to(exact) for p in parts)))
        )
    return SparseGradients(codes, x, output_gradient, by_value, some)


def widened(gradients):
    """The gradients in float64."""
    codes, *tensors, more = gradients
    more = more and SubsetGradients(more.latents, *(part.double() for part in more[1:]))
    return SparseGradients(
        codes._replace(values=codes.values.double()), *(t.double() for t in tensors), more
    )


@over(case=each(CASES, [True, False], [torch.bfloat16, None]))
def test_sparse_adam(device, triton, case):
    """It is Adam with the gradients that the gradients are summed to."""
    (kind, dtype), more, fast = case
    gradients = some_gradients(kind, device, dtype, more)
    exact = gradients.codes.values.dtype
    start = [(random(D_SAE, D_IN, seed=1), random(D_SAE, D_IN, seed=2))]
    start += [tuple(0.1 * row for row in start[0]), tuple(row**2 + 1 for row in start[0])]
    found, wanted = (
        [tuple(one.to(device, dtype, copy=True) for one in pair) for pair in start]
        for dtype in (exact, torch.float64)
    )
    copy = None if fast is None else torch.zeros(D_SAE, D_IN, dtype=fast, device=device)
    by_bias = triton.sparse_adam(gradients, *found, 3, 0.01, copy)
    with using("reference"):
        *by_rows, wanted_bias = operations.weight_gradients(widened(gradients), D_SAE)
        operations.adam_rows(wanted[0], tuple(by_rows), *wanted[1:], 3, 0.01, None)
    close(by_bias, wanted_bias)
    for one, other in zip(sum(found, ()), sum(wanted, ()), strict=True):
        close(one, other)
    if copy is not None:  # the interpreter cuts bits off where the card rounds
        nearness = 2**-7 if INTERPRETED else 0
        torch.testing.assert_close(copy, found[0][0].to(fast), rtol=nearness, atol=0)


@over(case=each([(one, torch.float32) for one in CODES], [False, True], [False, True]))
def test_sparse_adam_of_raw_rows(device, triton, case):
    (kind, dtype), more, along = case
    gradients = some_gradients(kind, device, dtype, more)
    drawn = [random(D_SAE, D_IN, seed=seed) for seed in range(4)]
    drawn[1] = torch.nn.functional.normalize(drawn[1], dim=1)
    drawn += [one**2 + 1 for one in drawn[2:]]
    vectors = [random(D_SAE, seed=5).abs() + 0.1, random(D_SAE, seed=6)]
    sides = [random(D_SAE, D_IN, seed=7)] if along else []
    found, wanted = (
        [one.to(device, kind, copy=True) for one in (*drawn, *vectors, *sides)]
        for kind in (torch.float32, torch.float64)
    )

    def parts(of):
        encoder, decoder, mean, other_mean, square, other_square, *raw = of
        moments = ((mean, other_mean), (square, other_square))
        return (encoder, decoder), moments, RawRows(*raw)

    rows, moments, raw = parts(found)
    by_bias = triton.sparse_adam(gradients, rows, *moments, 3, 0.01, None, raw)
    with using("reference"):
        sums = operations.weight_gradients(widened(gradients), D_SAE)
    rows, moments, raw = parts(wanted)
    operations.adam_raw_rows(rows, sums, *moments, 3, 0.01, None, raw)
    close(by_bias, sums[2])
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


@over(case=each([torch.bfloat16, torch.float32, torch.float64], CODES))
def test_reconstruct(device, triton, case):
    fast, kind = case
    dtype = torch.float64 if fast == torch.float64 else torch.float32
    codes = some_codes(kind, device, dtype)
    rows, columns = random(codes.num_rows, seed=7).relu(), random(D_IN, seed=8).relu()
    given = (random(D_SAE, D_IN), random(D_IN, seed=5), random(codes.num_rows, D_IN, seed=6))
    given = [tensor.to(device, dtype) for tensor in (*given, rows, columns)]
    found = triton.reconstruct(codes, *given, fast)
    wide = codes._replace(values=codes.values.double())
    with using("reference"):
        wanted = operations.reconstruct(wide, *(g.double() for g in given), torch.float64)
    assert found.output_gradient.dtype == fast
    for one, other in zip(found, wanted, strict=True):
        if one is not found.output_gradient:
            close(one, other)
    weighed = (found.residual * given[-1]).to(fast)
    nearness = 2**-7 if INTERPRETED and fast == torch.bfloat16 else 0
    torch.testing.assert_close(found.output_gradient, weighed, rtol=nearness, atol=0)
    assert not found.by_value[codes.values == 0].any()


@over(kind=CODES)
def test_firing_counts(device, triton, kind):
    codes = some_codes(kind, device, torch.float32)
    assert torch.equal(triton.firing_counts(codes, D_SAE), (dense(codes) > 0).float().sum(0))


@over(case=each([torch.bfloat16, torch.float32, None], [*EXACT], [D_IN, 37]))
def test_adam_rows(device, case):
    fast, exact, d_in = case
    from llm_wsae.sparse.backends.triton import operations as triton

    shape = (9, d_in)
    rows = [random(*shape), random(*shape, seed=1)]
    rows[1][7] = 0  # a row that cannot be normalised
    rows, means, squares = (tuple(s * r.to(device, exact) for r in rows) for s in (1, 0, 0))
    others = [tuple(one.double().clone() for one in pair) for pair in (rows, means, squares)]
    copy = None if fast is None else torch.zeros(shape, dtype=fast, device=device)
    for step in (1, 2, 3):
        gradients = tuple(random(*shape, seed=10 * step + i).to(device, exact) for i in (0, 1))
        gradients[0][3] = gradients[1][7] = 0  # a latent that never fired
        triton.adam_rows(rows, gradients, means, squares, step, 0.01, copy)
        wide = tuple(gradient.double() for gradient in gradients)
        reference.adam_rows(others[0], wide, others[1], others[2], step, 0.01, None)
        for pair, other in zip((rows, means, squares), others, strict=True):
            for one, wanted in zip(pair, other, strict=True):
                torch.testing.assert_close(one.double(), wanted, rtol=1e-6, atol=2e-7)
        if copy is not None:  # the interpreter cuts bits off where the card rounds
            nearness = 2**-7 if INTERPRETED and fast == torch.bfloat16 else 0
            torch.testing.assert_close(copy, rows[0].to(fast), rtol=nearness, atol=0)
    assert not rows[1][7].any()


class Watched(TorchDispatchMode):
    """Records what would wait for the device, and the largest tensor made.

    What was asked for first and is read later does not count.
    """

    # lift_fresh: a number that a tensor is made of is copied to the device.
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero",
             "lift_fresh")  # fmt: skip

    def __init__(self, monkeypatch):
        super().__init__()
        self.waited, self.largest, self._reading = [], 0, False
        tolist, read = torch.Tensor.tolist, DeferredScalar.read

        def watched_tolist(tensor):
            self.waited.append("tolist")
            return tolist(tensor)

        def watched_read(number):
            self._reading = True
            try:
                return read(number)
            finally:
                self._reading = False

        monkeypatch.setattr(torch.Tensor, "tolist", watched_tolist)
        monkeypatch.setattr(DeferredScalar, "read", watched_read)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        sizeless = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        waits = by_mask or sizeless or any(word in name for word in self.waits)
        if waits and not self._reading:
            self.waited.append(name)
        out = function(*args, **kwargs)
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and one.dtype != torch.uint8:  # the interpreter's
                self.largest = max(self.largest, one.numel())
        return out


def step(triton, x, encoder, bias, codes):
    """All operations of a step of training, with the encoder as decoder too."""
    error = triton.decode(codes, encoder, bias[: x.shape[1]]) - x
    by_value = triton.value_gradients(codes, encoder, error)
    gradients = triton.weight_gradients(SparseGradients(codes, x, error, by_value), len(encoder))[
        :2
    ]
    triton.firing_counts(codes, len(encoder))
    rows, means, squares = ((encoder.abs(), encoder.abs()) for _ in range(3))
    triton.adam_rows(rows, gradients, means, squares, 1, 0.01, None)


@pytest.mark.parametrize("triton", ["cut"], indirect=True)
def test_no_step_waits_for_the_device_or_holds_all_pre_activations(device, triton, monkeypatch):
    x, encoder, bias = layer("random", device, torch.float32, batch=14)
    x, encoder = x[:, :8].contiguous(), encoder[:, :8].contiguous()
    threshold = torch.full((D_SAE,), 9.0, device=device)

    def steps():
        step(triton, x, encoder, bias, ragged(triton.encode_topk(x, encoder, bias, 3)))
        step(triton, x, encoder, bias, triton.encode_batch_topk(x, encoder, bias, 1, 0.0))
        above = triton.encode_above(x, encoder, bias, threshold, SlotCapacity())
        step(triton, x, encoder, bias, above)
        triton.encode_dead(x, encoder[:9], bias[:9], threshold[:9] > 0, 3)

    with Watched(monkeypatch) as watched:
        steps()
        assert watched.waited == []
        assert D_SAE * 8 <= watched.largest < 14 * D_SAE
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("triton", ["cut"], indirect=True)
@pytest.mark.parametrize(
    "architecture", ["topk", "batch-topk", "matryoshka", "jumprelu", "dense relu", "sparse relu"]
)
def test_no_whole_step_waits_for_the_device(device, triton, architecture, monkeypatch):
    """With a masked row, and with dead latents that were looked for in the steps before."""
    d_in = 8
    weights = LossWeights(torch.ones(d_in), RULES["uniform"])
    relu = architecture.endswith(" relu")
    kind = {"l1": 0.1, "architecture": "relu"} if relu else {"k": 2, "architecture": architecture}
    arm = Arm(ArmConfig(weights, **kind), d_in, D_SAE, torch.device(device))
    arm._finder._waits = True  # as on a card
    if relu:
        arm.parameters.encoder_bias.fill_(-2.4 if architecture == "sparse relu" else -0.3)
    arm.last_fired.fill_(-10_000)
    x = layer("random", device, torch.float32, batch=14)[0][:, :d_in].contiguous()
    mask = (torch.arange(14, device=device) != 5).float()
    x *= mask[:, None] / x.std()
    batch = Batch(x, x, mask)
    with using("triton"):
        arm.step(batch, 14, 0.01, 1 / 32, 160)
        for rows_seen in (28, 56):
            before = arm.parameters.encoder.clone()
            with monkeypatch.context() as patch, Watched(patch) as watched:
                arm.step(batch, rows_seen, 0.01, 1 / 32, 160)
            assert watched.waited == []
    if relu:
        assert (arm.architecture.active_share() < 1 / 64) == (architecture == "sparse relu")
    moved = (arm.parameters.encoder != before).any(1)
    assert moved[arm.dead(56, 160)].any() == arm.architecture.revives_dead


def test_whether_there_was_room_is_read_with_other_work_under_way(device, triton, monkeypatch):
    """After the gradients by the values were asked for; and Adam waits for the answer."""
    weights = LossWeights(torch.ones(D_IN), RULES["uniform"])
    arm = Arm(ArmConfig(weights, 2, architecture="jumprelu"), D_IN, D_SAE, torch.device(device))
    x = random(14, D_IN).float().to(device)
    happened, run, read = [], triton._run, DeferredScalar.read

    def noted_run(kernel, *arguments, **constants):
        happened.append(kernel.__name__)
        run(kernel, *arguments, **constants)

    def noted_read(number):
        happened.append("read")
        return read(number)

    monkeypatch.setattr(triton, "_run", noted_run)
    monkeypatch.setattr(DeferredScalar, "read", noted_read)
    with using("triton"):
        arm.step(Batch(x, x, torch.ones(14, device=device)), 14, 0.01, 0.0, 10**6)
    order = [name for name in happened if name != "above_kernel"]
    assert order == [
        "decode_kernel",
        "value_gradients_kernel",
        "read",
        "further_sums_kernel",
        "sparse_adam_kernel",
    ]


@over(l1=[None, 0.1])
def test_a_step_that_lacked_room_is_made_again(device, triton, l1):
    """The same numbers come out as with the implementation that needs none."""
    x = random(14, D_IN).float().to(device)
    batch = Batch(x, x, torch.ones(14, device=device))
    weights = LossWeights(torch.ones(D_IN), RULES["uniform"])
    kind = (
        {"k": 12, "architecture": "jumprelu"} if l1 is None else {"l1": l1, "architecture": "relu"}
    )
    found = {}
    for name in ("triton", "reference"):
        arm = Arm(ArmConfig(weights, **kind), D_IN, D_SAE, torch.device(device))
        arm.parameters.encoder_bias.fill_(1)
        if l1 is not None:
            arm.architecture.follow(
                torch.tensor(0.001, device=device), 0.01
            )  # so that it goes sparse
        arm.architecture._capacity.slots = 2
        with using(name):
            found[name] = arm.evaluate(batch)
        assert (arm.architecture._capacity.slots > 2) == (name == "triton")
    ours, theirs = found.values()
    assert float(theirs.firings.sum()) > 14 * 4
    assert torch.equal(ours.firings, theirs.firings)
    for one, other in zip(ours.gradients, theirs.gradients, strict=True):
        close(one, other.double())
    close(ours.observed, theirs.observed.double())


if not INTERPRETED:

    def test_all_of_this_in_the_interpreter():
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
        outcome = run.stdout.splitlines()[-1]
        assert int(re.match(r"(\d+) passed", outcome)[1]) > 40 and "skipped" not in outcome

    @pytest.mark.parametrize(("d_in", "dtype"), [(D_IN, torch.float32), (768, torch.bfloat16)])
    def test_the_kernels_compile_for_a_card_without_one(monkeypatch, tmp_path, dtype, d_in):
        """To machine code for an H100, specialised as each launch would be."""
        from triton import runtime
        from triton.backends.compiler import GPUTarget

        from llm_wsae.sparse.backends.triton import adam, select, sums
        from llm_wsae.sparse.backends.triton import operations as triton

        card = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 99,  # a number of its own in the caches of a real card
            get_current_stream=lambda device: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448}),
        )
        compiled = {}

        def compile_only(kernel, grid, *arguments, **constants):
            binary = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=True, **constants)
            compiled.setdefault(kernel.__name__, []).append(binary.asm)

        monkeypatch.setattr(runtime.driver, "_active", card)
        monkeypatch.setattr(triton, "_run", compile_only)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        encoder, bias = torch.zeros(5000, d_in, dtype=dtype), torch.zeros(5000, dtype=dtype)
        x = torch.zeros(40, d_in, dtype=dtype)
        for k in (1, 32):
            triton.encode_topk(x, encoder, bias, k)
        triton.encode_dead(x, encoder, bias, bias > 0, 32)
        triton.encode_above(x, encoder, bias, bias.float(), SlotCapacity())
        ones = torch.zeros(40 * 5000, dtype=torch.int64)
        codes = RaggedCodes(ones, ones.float(), torch.arange(41) * 5000)
        triton.decode(codes, encoder, encoder[0])
        triton.value_gradients(codes, encoder, x.float())
        ones_of = (torch.ones(40), torch.ones(d_in))
        triton.reconstruct(codes, encoder.float(), encoder[0].float(), x.float(), *ones_of, dtype)
        triton.weight_gradients(SparseGradients(codes, x, x.float(), codes.values), 5000)
        pair = (encoder.float(), encoder.float())
        triton.adam_rows(pair, pair, pair, pair, 1, 0.01, encoder)
        more = SubsetGradients(torch.arange(5000), *pair, bias.float())
        for some in (None, more) if dtype == torch.bfloat16 else (more,):  # float32 is slow
            gradients = SparseGradients(codes, x, x, codes.values, some)
            for raw in (None, RawRows(bias.float(), bias.float(), None if some else pair[0])):
                triton.sparse_adam(gradients, pair, pair, pair, 1, 0.01, encoder, raw)
        modules = (adam, select, sums)
        kernels = {name for module in modules for name in vars(module)}
        assert compiled.keys() == {name for name in kernels if name.endswith("_kernel")}
        assert all(code["cubin"] for codes in compiled.values() for code in codes)
        if dtype == torch.bfloat16:  # rounded to nearest, which the interpreter isn't
            for name in ("adam_rows_kernel", "sparse_adam_kernel", "reconstruct_kernel"):
                assert all("cvt.rn.bf16" in code["ptx"] for code in compiled[name])
