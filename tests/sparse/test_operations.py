"""Every implementation of every operation against the dense reference in float64."""

import pytest
import torch
from looping import over
from sparse_cases import D_IN, ENCODINGS, SUMS, Sums, cast, integers, random, whole

from llm_wsae.sparse import operations
from llm_wsae.sparse.backends import cpu, pytorch, reference
from llm_wsae.sparse.backends.reference import EPSILON
from llm_wsae.sparse.codes import (
    Codes,
    RaggedCodes,
    RawRows,
    SlotCapacity,
    SparseGradients,
    SubsetGradients,
    joined,
    padded,
    ragged,
)

EXACT = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}


def ways(*dtypes):
    """Every implementation with every dtype it takes: C++ leaves float64 to torch."""
    return [
        pytest.param((name, dtype), id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name in ("reference", "pytorch", "cpu")
        for dtype in dtypes
        if name != "cpu" or dtype != torch.float64
    ]


def choose(way):
    name, dtype = way
    if name == "cpu" and not cpu.available():
        pytest.skip("there is no C++ compiler here")
    with operations.using(name):
        yield dtype


@pytest.fixture(params=ways(*EXACT))
def dtype(request):
    """Of an encoder's product, the implementation being chosen."""
    yield from choose(request.param)


@pytest.fixture(params=ways(torch.float64, torch.float32))
def exact(request):
    """Of sums, the implementation being chosen."""
    yield from choose(request.param)


def encoding_of(name, dtype):
    """The case and its exact pre-activations; equal in all dtypes, but for the random one."""
    case = cast(ENCODINGS[name], dtype)
    x, encoder, bias = ENCODINGS[name]
    return case, x @ encoder.T + bias, TOLERANCE[dtype] * 20 if name == "random" else 0


def assert_found(codes: RaggedCodes, pre, tolerance):
    """Slots of a row are different latents, and each has the value of its pre-activation."""
    used = codes.values > 0
    rows, indices, values = codes.rows()[used], codes.indices[used], codes.values[used].double()
    assert len(set(zip(rows.tolist(), indices.tolist(), strict=True))) == len(rows)
    assert ((codes.indices >= 0) & (codes.indices < pre.shape[1])).all()
    assert torch.allclose(pre[rows, indices], values, rtol=0, atol=tolerance)


@over(k=[1, 7, 20, 159, 160], name=ENCODINGS)
def test_encode_topk(name, k, dtype):
    (x, encoder, bias), pre, tolerance = encoding_of(name, dtype)
    k = min(k, len(encoder))
    codes = operations.encode_topk(x, encoder, bias, k)
    assert codes.indices.shape == codes.values.shape == (len(x), k)
    assert codes.values.dtype == EXACT[dtype]
    assert_found(ragged(codes), pre, tolerance)
    found = codes.values.double().sort(descending=True).values
    assert torch.allclose(found, pre.topk(k).values.relu(), rtol=0, atol=tolerance)


@over(threshold=["zero", "whole", "high"], name=ENCODINGS)
def test_encode_above(name, threshold, dtype):
    (x, encoder, bias), pre, tolerance = encoding_of(name, dtype)
    level = {
        "zero": torch.zeros_like(bias),
        "whole": integers(len(bias), seed=9).abs() * 4,
        "high": torch.full_like(bias, 1e6),
    }[threshold].to(EXACT[dtype])
    codes = operations.encode_above(x, encoder, bias, level)
    assert codes.values.dtype == EXACT[dtype] and codes.offsets[-1] == len(codes.indices)
    assert_found(codes, pre, tolerance)
    expected = torch.where(pre > level, pre, 0)
    found = reference.dense(codes, codes.values.double(), len(bias))
    if name == "random":  # rounding may decide about an entry at the threshold
        away = (pre - level).abs() > tolerance
        expected, found = expected[away], found[away]
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)


@over(guess=[0.0, 8.0, 19.0, 1e6], k=[1, 7, 160], name=ENCODINGS)
def test_encode_batch_topk(name, k, guess, dtype):
    (x, encoder, bias), pre, tolerance = encoding_of(name, dtype)
    k = min(k, len(encoder))
    codes = operations.encode_batch_topk(x, encoder, bias, k, guess)
    assert codes.values.dtype == EXACT[dtype] and codes.num_rows == len(x)
    assert (codes.values > 0).all()
    assert_found(codes, pre, tolerance)
    expected = pre.flatten().topk(k * len(x)).values.relu()
    found = torch.zeros_like(expected)  # as many as there are positive ones, then nothing
    found[: len(codes.values)] = codes.values.sort(descending=True).values
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)


@over(share=[0.0, 0.8, 1.0], name=ENCODINGS)
def test_encode_batch_topk_of_some_rows(name, share, dtype):
    """The others count nowhere, though their pre-activations may be the largest."""
    (x, encoder, bias), pre, tolerance = encoding_of(name, dtype)
    kept = torch.rand(len(x), generator=torch.Generator().manual_seed(3)) < share
    k = min(7, len(encoder))
    codes = operations.encode_batch_topk(x, encoder, bias, k, torch.tensor(0.5), kept)
    assert codes.num_rows == len(x) and kept[codes.rows()][codes.values > 0].all()
    assert_found(codes, pre, tolerance)
    expected = pre[kept].flatten().topk(k * int(kept.sum())).values.relu()
    found = torch.zeros_like(expected)
    positive = codes.values[codes.values > 0].sort(descending=True).values
    found[: len(positive)] = positive
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)


@over(k=[1, 7, 19, 20, 159, 160], d_sae=[160, 157])
def test_selection_is_exact_and_keeps_the_sign(k, d_sae, dtype):
    k = min(k, d_sae)
    pre = (random(300, d_sae) - 0.5).to(dtype)
    best = operations.select_topk(pre, k)
    assert best.values.dtype == dtype
    assert torch.equal(best.values.sort(descending=True).values, pre.topk(k).values)
    assert torch.equal(pre.gather(1, best.indices), best.values)
    assert all(len(set(row)) == k for row in best.indices.tolist())


@over(pre=[torch.zeros(5, 160), torch.full((5, 160), -1.0), torch.ones(5, 160).tril_(3)])
def test_selection_with_ties_picks_k_different_latents(pre):
    best = operations.select_topk(pre, 9)
    assert torch.equal(best.values.sort(descending=True).values, pre.topk(9).values)
    assert all(len(set(row)) == 9 for row in best.indices.tolist())


DEAD = ENCODINGS | {
    "more than are counted at once": whole(3, 40_000),
    "none here": whole(5, 0),  # other processes have some
}


@over(share=[None, 0.0, 0.6], k=[1, 7, 80, 160], name=DEAD)
def test_encode_dead(name, k, share, dtype):
    """Those that tie with the k-th largest are all there, and nothing else is."""
    x, encoder, bias = cast(DEAD[name], dtype)
    pre = DEAD[name].x @ DEAD[name].encoder.T + DEAD[name].bias
    dead = None
    if share is not None:
        dead = torch.rand(len(bias), generator=torch.Generator().manual_seed(k)) < share
        pre = pre * dead
    found = operations.encode_dead(x, encoder, bias, dead, k)
    assert found.dtype == dtype and found.shape == pre.shape
    wanted = pre.relu()
    smallest = wanted.topk(min(k, len(bias))).values[:, -1:]
    if name == "random":
        tolerance = TOLERANCE[dtype] * 20
        assert torch.allclose(found.double()[found > 0], pre[found > 0], rtol=0, atol=tolerance)
        assert (found[wanted > smallest + 2 * tolerance] > 0).all()
        assert not found[wanted < smallest - 2 * tolerance].any()
    else:
        assert torch.equal(found.double(), wanted * (wanted >= smallest))


@over(name=[name for name in DEAD if name != "random"])
def test_dead_gradients(name, dtype):
    """Of small whole numbers, so that what is added up is exact but for the last rounding."""
    x, encoder, bias = cast(DEAD[name], dtype)
    active = (x @ encoder.T + bias).relu()
    by_output, some = integers(*x.shape, seed=7).to(dtype), len(bias)
    start = (random(some, D_IN, seed=8), random(some, D_IN, seed=9), random(some, seed=10))
    wanted, found = (
        SubsetGradients(torch.arange(some), *(part.to(exact, copy=True) for part in start))
        for exact in (torch.float64, EXACT[dtype])
    )
    with operations.using("reference"):
        wide = (active.double(), x.double(), encoder.double(), by_output.double())
        operations.dead_gradients(*wide, wanted)
    operations.dead_gradients(active, x, encoder, by_output, found)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert_close(one, other, EXACT[dtype], TOLERANCE[dtype])
    silent = ~(active > 0).any(0)
    assert torch.equal(found.encoder[silent], start[0][silent].to(EXACT[dtype]))


def assert_close(found, expected, dtype, tolerance=None):
    assert found.dtype == dtype and found.shape == expected.shape
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = tolerance or TOLERANCE[dtype]
    assert torch.allclose(found.double(), expected, rtol=0, atol=tolerance * scale)


@over(name=SUMS)
def test_decode(name, exact):
    codes, _, decoder, bias, _ = cast(SUMS[name], exact)
    wide = SUMS[name]
    assert_close(
        operations.decode(codes, decoder, bias),
        reference.decode(wide.codes, wide.decoder, wide.bias),
        exact,
    )


@over(name=SUMS)
def test_value_gradients(name, exact):
    codes, _, decoder, _, output_gradient = cast(SUMS[name], exact)
    wide = SUMS[name]
    found = operations.value_gradients(codes, decoder, output_gradient)
    expected = reference.value_gradients(wide.codes, wide.decoder, wide.output_gradient)
    assert_close(found, expected, exact)
    assert not found[codes.values == 0].any()  # else clipped slots would push the encoder


@over(fast=[torch.float32, torch.bfloat16], name=SUMS)
def test_exact_values(name, fast, exact):
    """Whatever the values were before, and with the encoder rounded or not."""
    wide = SUMS[name]
    codes, x, encoder, _, _ = cast(wide, exact)
    bias = random(len(encoder), seed=9)
    encoder = encoder.to(fast if exact == torch.float32 else exact)
    found = operations.exact_values(codes, x, encoder, bias.to(exact))
    pre = wide.x @ encoder.double().T + bias
    expected = pre[wide.codes.rows(), wide.codes.indices].relu() * (wide.codes.values > 0)
    assert_close(found.values, expected, exact)
    assert torch.equal(found.indices, codes.indices) and torch.equal(found.offsets, codes.offsets)
    assert not found.values[codes.values == 0].any()


@over(fast=[torch.float32, torch.bfloat16], name=SUMS)
def test_reconstruct(name, fast, exact):
    case = SUMS[name]
    rows, columns = random(len(case.x), seed=7).relu(), random(case.x.shape[1], seed=8).relu()
    wanted = (case.decoder, case.bias, case.x, rows, columns)
    with operations.using("reference"):
        expected = operations.reconstruct(case.codes, *wanted, torch.float64)
    codes = cast(case, exact).codes
    found = operations.reconstruct(codes, *(tensor.to(exact) for tensor in wanted), fast)
    assert_close(found.residual, expected.residual, exact)
    assert_close(found.by_value, expected.by_value, exact)
    assert_close(found.row_errors, expected.row_errors, exact)
    assert torch.equal(found.output_gradient, (found.residual * columns.to(exact)).to(fast))


def gradients_of(case: Sums, kinds: int = 1, more: bool = False) -> SparseGradients:
    """The gradients of a problem, with ``kinds`` rows of codes to every row of x; float64."""
    codes, x, decoder, _, output_gradient = case
    by_value = reference.value_gradients(codes, decoder, output_gradient)
    some = None
    if more:
        latents = torch.randperm(len(decoder), generator=torch.Generator().manual_seed(0))
        latents = latents[: 1 + len(decoder) // 3]
        rows = (random(len(latents), x.shape[1], seed=seed) for seed in (11, 12))
        some = SubsetGradients(latents, *rows, random(len(latents), seed=13))
    return SparseGradients(codes, x[: len(x) // kinds], output_gradient, by_value, some)


def narrowed(gradients: SparseGradients, dtype: torch.dtype) -> SparseGradients:
    """The gradients in another dtype."""
    codes, *tensors, more = gradients
    if more is not None:
        more = SubsetGradients(more.latents, *(part.to(dtype) for part in more[1:]))
    codes = codes._replace(values=codes.values.to(dtype))
    return SparseGradients(codes, *(tensor.to(dtype) for tensor in tensors), more)


@over(more=[False, True], kinds=[1, 2, 5], name=SUMS)
def test_weight_gradients(name, kinds, exact, more):
    case = SUMS[name]
    if len(case.x) % kinds:
        return
    gradients, d_sae = gradients_of(case, kinds, more), len(case.decoder)
    found = operations.weight_gradients(narrowed(gradients, exact), d_sae)
    with operations.using("reference"):
        expected = operations.weight_gradients(gradients, d_sae)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, exact)


def test_several_rows_of_codes_belong_to_a_row_of_x():
    """Written out by hand: rows 0 and 2 of the codes are of x[0], rows 1 and 3 of x[1]."""
    latents = torch.tensor([[0], [1], [1], [0]])
    codes = ragged(Codes(latents, torch.ones(4, 1, dtype=torch.float64)))
    x, by_output, by_value = random(2, D_IN), random(4, D_IN, seed=1), random(4, seed=2)
    by_encoder, by_decoder, by_bias = operations.weight_gradients(
        SparseGradients(codes, x, by_output, by_value), 2
    )
    a, b, c, d = by_value
    close = torch.testing.assert_close
    close(by_encoder, torch.stack([a * x[0] + d * x[1], b * x[1] + c * x[0]]))
    close(by_decoder, torch.stack([by_output[0] + by_output[3], by_output[1] + by_output[2]]))
    close(by_bias, torch.stack([a + d, b + c]))


@over(fast=[torch.bfloat16, None], more=[False, True], name=SUMS)
def test_sparse_adam(name, exact, more, fast):
    """It is Adam with the gradients that the gradients are summed to."""
    case = SUMS[name]
    gradients = gradients_of(case, 1, more)
    start = (
        (case.decoder, case.decoder.flip(0)),
        (case.decoder * 0.1,) * 2,
        (case.decoder**2 + 1,) * 2,
    )
    d_sae, width = case.decoder.shape
    expected, found = (
        tuple(tuple(part.to(dtype, copy=True) for part in pair) for pair in start)
        for dtype in (torch.float64, exact)
    )
    copy = None if fast is None else torch.zeros(d_sae, width, dtype=fast)
    with operations.using("reference"):
        *by_rows, wanted = operations.weight_gradients(gradients, d_sae)
        operations.adam_rows(expected[0], tuple(by_rows), *expected[1:], 3, 0.01, None)
    by_bias = operations.sparse_adam(narrowed(gradients, exact), *found, 3, 0.01, copy)
    assert_close(by_bias, wanted, exact)
    for one, other in zip(sum(found, ()), sum(expected, ()), strict=True):
        assert_close(one, other, exact)
    assert copy is None or torch.equal(copy, found[0][0].to(fast))


@over(along=[False, True], fast=[torch.bfloat16, None], more=[False, True], name=SUMS)
def test_sparse_adam_of_raw_rows(name, exact, more, fast, along):
    """The same as with dense sums, in float64; test_free_lengths.py compares that with autograd."""
    case = SUMS[name]
    gradients = gradients_of(case, 1, more)
    d_sae, width = case.decoder.shape
    draw = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(case.decoder, dim=1)
    start = (
        *(case.decoder.flip(0), unit, *(case.decoder * 0.1,) * 2, *(case.decoder**2 + 1,) * 2),
        torch.rand(d_sae, generator=draw, dtype=torch.float64) + 0.1,
        torch.randn(d_sae, generator=draw, dtype=torch.float64),
        torch.randn(d_sae, width, generator=draw, dtype=torch.float64),
    )
    expected, found = (
        [part.to(dtype, copy=True) for part in start] for dtype in (torch.float64, exact)
    )

    def arguments(parts, copy):
        raw = RawRows(*parts[6:8], parts[8] if along else None)
        pairs = [tuple(parts[i : i + 2]) for i in (0, 2, 4)]
        return pairs[0], (*pairs[1:], 3, 0.01, copy, raw)

    copy = None if fast is None else torch.zeros(d_sae, width, dtype=fast)
    with operations.using("reference"):
        sums = operations.weight_gradients(gradients, d_sae)
    rows, given = arguments(expected, None)
    operations.adam_raw_rows(rows, sums, *given)
    rows, given = arguments(found, copy)
    by_bias = operations.sparse_adam(narrowed(gradients, exact), rows, *given)
    assert_close(by_bias, sums[2], exact)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, exact)
    assert copy is None or torch.equal(copy, found[0].to(fast))


@over(name=SUMS)
def test_firing_counts(name, exact):
    codes = cast(SUMS[name], exact).codes
    d_sae = len(SUMS[name].decoder)
    used = codes.indices[codes.values > 0]
    counts = operations.firing_counts(codes, d_sae)
    assert counts.dtype == exact
    assert torch.equal(counts.long(), torch.bincount(used, minlength=d_sae))


def test_weight_gradients_of_rounded_rows(exact):
    """Rows in bfloat16 make sums of what they were rounded to, in full precision."""
    gradients, d_sae = gradients_of(SUMS["ragged"]), len(SUMS["ragged"].decoder)
    rounded = [part.bfloat16() for part in (gradients.x, gradients.output_gradient)]
    narrow = narrowed(gradients, exact)
    found = operations.weight_gradients(
        SparseGradients(narrow.codes, *rounded, narrow.by_value), d_sae
    )
    expected = reference.weight_gradients(
        SparseGradients(gradients.codes, *rounded, gradients.by_value), d_sae
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, exact)


def test_unused_slots_push_no_weight(exact):
    """A known mistake of other implementations: zero-valued selections still move the encoder."""
    codes = ragged(Codes(torch.tensor([[3, 5]]), torch.tensor([[2.0, 0.0]], dtype=exact)))
    x, decoder, by_output = (random(n, D_IN, seed=n).to(exact) for n in (1, 160, 1))
    by_value = operations.value_gradients(codes, decoder, by_output)
    assert by_value[0] != 0 and by_value[1] == 0
    for gradient in operations.weight_gradients(
        SparseGradients(codes, x, by_output, by_value), 160
    ):
        assert gradient[3].any() and not gradient[5].any()


@over(fast=[torch.bfloat16, None], d_in=[D_IN, 37])
def test_adam_rows(d_in, fast, exact):
    """Three steps are torch's Adam, each followed by the decoder's renormalisation."""
    start = (random(50, d_in), random(50, d_in, seed=1))
    start[1][7] = 0  # a row that cannot be normalised
    expected = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    optimiser = torch.optim.Adam(expected, lr=0.01, eps=EPSILON)
    rows, *moments = (tuple((scale * tensor).to(exact) for tensor in start) for scale in (1, 0, 0))
    copy = None if fast is None else torch.zeros(50, d_in, dtype=fast)
    for step in (1, 2, 3):
        gradients = [random(50, d_in, seed=10 * step + i) * 1e-3 for i in (0, 1)]
        gradients[0][3] = gradients[1][7] = 0  # a latent that never fired
        for parameter, gradient in zip(expected, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        with torch.no_grad():
            expected[1] /= expected[1].norm(dim=1, keepdim=True).clamp(min=1e-8)
        narrow = tuple(gradient.to(exact) for gradient in gradients)
        operations.adam_rows(rows, narrow, *moments, step, 0.01, copy)
        for row, wanted in zip(rows, expected, strict=True):
            torch.testing.assert_close(row.double(), wanted.data, rtol=1e-6, atol=2e-7)
        assert copy is None or torch.equal(copy, rows[0].to(fast))
    assert not rows[1][7].any()


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
    capacity = SlotCapacity()
    assert capacity.enough()
    for counts, fit, least, most in (
        ([3, 64, 5], True, 80, 128),
        ([3, 500, 0], False, 625, 1250),
        ([700], True, 875, 1750),
        ([], True, 64, 64),  # all rows of a process may be masked
        ([65], False, 82, 164),
    ):
        capacity.report(torch.tensor(counts, dtype=torch.int64))
        assert capacity.enough() == fit and least <= capacity.slots <= most, counts


def test_a_step_is_repeated_until_all_processes_have_slots_enough():
    capacity, made, answers = SlotCapacity(), [], iter([False, True])

    def compute():
        made.append(capacity.slots)
        capacity.report(torch.tensor([100]))
        return len(made)

    assert capacity.retry(compute, lambda yes: yes and next(answers)) == 3
    assert made == [64, 128, 128]
    assert capacity.retry(lambda: "nothing was reported", lambda yes: False).startswith("nothing")


def test_the_choice_of_an_implementation():
    """By device, dtype and autograd, at the time of the call; an override ends with its block."""
    here = cpu if cpu.available() else pytorch
    number = torch.ones(1)
    assert operations._for_sums(number) is here
    assert operations._for_products(number.bfloat16()) is here
    assert (
        operations._for_sums(number.bfloat16()) is operations._for_sums(number.double()) is pytorch
    )
    assert operations._for_sums(number.requires_grad_()) is pytorch
    with torch.no_grad():
        assert operations._for_sums(number) is here
        with operations.using("reference"):
            with operations.using("pytorch"):
                assert operations._for_sums(number) is pytorch
            assert operations._for_sums(number) is reference
        assert operations._for_sums(number) is here
