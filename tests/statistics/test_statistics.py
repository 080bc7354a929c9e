"""Moments against scipy, covariances against torch, coherence by brute force, Holm by hand."""

import functools
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looping import over
from refusals import fails
from scipy import stats
from sklearn.covariance import OAS
from torch.nn.functional import normalize

from llm_wsae.evaluation.monosemanticity.latents import coherence, coherence_of_strangers
from llm_wsae.statistics.moments import SecondMoment, Statistics, shrunk
from llm_wsae.statistics.uncertainty import holm


def rows_of(n, d=5, dtype=torch.float64):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x.sign() * x.abs() ** torch.linspace(0.5, 2, d) + torch.arange(d)).to(dtype)


def positions_of(n, context=32):
    return torch.arange(n) % context


def statistics_of(x, context=32, **more):
    return Statistics(x.shape[1], context, **more).update(x, positions_of(len(x), context))


def test_moments_equal_scipy():
    """Also to six digits from float32 rows, and at a large offset."""
    for x, rtol in (
        (rows_of(10_001), 1e-7),
        (rows_of(50_000, dtype=torch.float32) * 100, 1e-5),
        (rows_of(5000) + 1e6, 1e-6),
    ):
        s, exact = statistics_of(x), x.double()
        assert s.count == len(x)
        torch.testing.assert_close(s.mean, exact.mean(0), rtol=rtol, atol=rtol)
        torch.testing.assert_close(s.variance, exact.var(0, correction=0), rtol=rtol, atol=0)
        kurtosis = torch.tensor(stats.kurtosis(exact.numpy()))
        torch.testing.assert_close(s.excess_kurtosis, kurtosis, rtol=rtol, atol=10 * rtol)
        assert torch.equal(s.minimum, exact.amin(0)) and torch.equal(s.maximum, exact.amax(0))


def test_powers_of_rows_that_outgrow_float32_are_finite():
    x = rows_of(600, dtype=torch.float32)
    small, large = statistics_of(x), statistics_of(x * 2.0**60)
    torch.testing.assert_close(large.variance / 2.0**120, small.variance)
    torch.testing.assert_close(large.excess_kurtosis, small.excess_kurtosis, rtol=1e-5, atol=1e-5)
    fails("most rows are longer than", Statistics.from_tensors(large.to_tensors()).check_varying)


@over(dtype=(torch.float32, torch.float64))
def test_a_constant_dimension_has_no_variance(dtype):
    """0.1 is not the rounded mean of 512 times 0.1, nor of 300 and then 411 times."""
    x = rows_of(1700, 3, dtype=dtype)
    x[:, 1] = 0.1
    parts = map(statistics_of, x.split([300, 411, 989]))
    for s in (functools.reduce(Statistics.merge, parts), statistics_of(x)):
        assert float(s.variance[1]) == 0 and float(s.excess_kurtosis[1]) == -3
        torch.testing.assert_close(s.variance[::2], x[:, ::2].double().var(0, correction=0))
    assert Statistics(3, 32).variance.tolist() == [0, 0, 0]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_merging_parts_equals_one_pass(sizes):
    x = rows_of(sum(sizes) + 1)
    p, whole = positions_of(len(x)), statistics_of(x)
    merged, start = Statistics(5, 32).update(x[-1:], p[-1:]), 0
    for size in sizes:
        part = slice(start, start + size)
        merged.merge(Statistics(5, 32).update(x[part], p[part]))
        start += size
    for name in ("mean", "variance", "excess_kurtosis", "minimum", "maximum"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name))
    assert merged.count == whole.count and torch.equal(merged._norms, whole._norms)
    # while every row still fits, the sample is all rows in some order
    assert sorted(merged.sample[:, 0].tolist()) == sorted(whole.sample[:, 0].tolist())


def test_more_rows_than_an_integer_holds_the_square_of():
    """As the statistics of shards are merged: torch's integers end at 2⁶³."""
    rows = rows_of(500, 3)
    parts = [statistics_of(rows) for _ in "ab"]
    for part in parts:  # a thousand million times the same rows
        part.count *= 10**7
        for name in ("_m2", "_m3", "_m4"):
            setattr(part, name, getattr(part, name) * 10**7)
    merged = parts[0].merge(parts[1])
    torch.testing.assert_close(merged.variance, rows.var(0, correction=0))
    assert merged.count == 10**10 and bool(merged.excess_kurtosis.isfinite().all())


def test_massive_rows_are_found_where_they_sit_and_do_not_move_the_robust_variance():
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(1))
    clean, p = statistics_of(x, 64).robust_variance, positions_of(len(x), 64)
    x[p == 0, 3] = 5000.0
    x[100, 5] = -4000.0  # position 36
    s = statistics_of(x, 64)
    assert s.massive_count == int((p == 0).sum()) + 1
    places = [tuple(place.values()) for place in s.massive_positions()]
    assert places == [(0, 0, 313, 313), (32, 63, 1, 9984)]
    norms = x.norm(dim=1)
    assert s.median_norm == pytest.approx(float(norms.median()), rel=0.03)
    assert s.massive_count == int((norms > s.massive_threshold).sum())
    assert s.variance[5] > 100 * clean[5]
    torch.testing.assert_close(s.robust_variance[5], clean[5], rtol=0.05, atol=0)


def test_small_samples_of_shards_merge_into_a_uniform_one():
    """Also of shards that begin alike: one seed for all would sample the same places."""
    beginning, total = torch.arange(20.0)[:, None], Statistics(1, 32, sample_rows=1000)
    for shard in range(20):  # the last shard is a tenth of the others
        own = 100 * (shard + 1) + torch.arange(280.0 if shard == 19 else 2980.0)[:, None] / 4096
        total.merge(statistics_of(torch.cat([beginning, own]), sample_rows=200))
    assert len(total.sample) == 1000 == len(total.to_tensors()["sample_priority"].unique())
    found = torch.bincount((total.sample[:, 0] // 100).long(), minlength=21)
    assert found[0] < 30 and found[1:20].min() > 25 and found[20] < 20  # 7, 52 and 5, on average


def test_bad_rows_are_refused():
    s, x = Statistics(5, 32), rows_of(10)
    x[2, 1] = float("nan")
    fails("7 dimensions, expected 5", s.update, rows_of(3, 7), positions_of(3))
    fails("1 of 10 rows hold NaN", s.update, x, positions_of(10))
    assert s.count == 0
    fails("rows have 4 dimensions, not 5", SecondMoment(5).update, rows_of(20)[:, :4])
    for bad in (torch.nan, torch.inf):
        fails("NaN or infinite", SecondMoment(5).update, torch.full((3, 5), bad))


def test_robust_covariance_is_that_of_the_clipped_sample():
    x = rows_of(3000, 4) @ torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double()
    s = statistics_of(x)
    first = s.robust_covariance
    order = x.float().sort(0).values
    clipped = x.float().clamp(order[14], order[-15]).double()  # 14 = 0.5 % of 2999, rounded down
    torch.testing.assert_close(first, torch.cov(clipped.T, correction=0), rtol=1e-10, atol=0)
    torch.testing.assert_close(first.diagonal(), s.robust_variance, rtol=1e-12, atol=0)
    s.update(10 * rows_of(3000, 4), positions_of(3000))
    assert s.robust_covariance.trace() > 2 * first.trace()  # nothing old is kept


def test_coherence_is_the_mean_cosine_of_all_pairs():
    draw = torch.Generator().manual_seed(0)
    x = normalize(torch.randn(3, 5, 7, generator=draw), dim=-1)
    for found, vectors in zip(coherence(x), x, strict=True):
        expected = np.mean([float(a @ b) for a, b in combinations(vectors, 2)])
        assert float(found) == pytest.approx(expected, abs=1e-6)
    x, context = x.flatten(0, 1)[:6], torch.tensor([4, 4, 2, 7, 7, 7])
    pairs = [float(x[i] @ x[j]) for i, j in combinations(range(6), 2) if context[i] != context[j]]
    assert coherence_of_strangers(x, context) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert math.isnan(coherence_of_strangers(x[:2], context[:2]))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def moment_of(rows):
    return SecondMoment(rows.shape[1]).update(rows)


def merged(parts):
    return functools.reduce(SecondMoment.merge, parts, SecondMoment(40))


def test_second_moment_is_that_of_float64_and_merges_exactly():
    """Rows like those of a language model: a huge mean, one dimension with nearly all variance."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 3, 40, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(40, 40, generator=draw, dtype=torch.float64))[0]
    rows = torch.randn(30_000, 40, generator=draw, dtype=torch.float64) * scale @ mixing
    rows = (rows + 300 * mixing[3]).float()
    exact = torch.cov(rows.double().T, correction=0)
    whole = SecondMoment(40).update(rows)
    for found in (whole, merged(map(moment_of, rows.split([7, 11_000, 18_993])))):
        assert found.count == 30_000
        torch.testing.assert_close(found.mean, rows.double().mean(0), rtol=1e-6, atol=1e-5)
        error = (found.covariance() - exact).abs() / (exact.diag()[:, None] * exact.diag()).sqrt()
        assert float(error.max()) < 1e-6
    kept = SecondMoment.from_tensors(whole.to_tensors())
    for name, tensor in merged([SecondMoment(40), kept, SecondMoment(40)]).to_tensors().items():
        assert torch.equal(tensor, whole.to_tensors()[name])  # processes without rows
    chunks = merged(map(moment_of, rows.split(4096))).to_tensors()  # the same float32 products
    torch.testing.assert_close(chunks, whole.to_tensors(), rtol=1e-13, atol=0)
    rows[:, 7] = 0.1  # a constant dimension, whose mean is rounded
    still = moment_of(rows).covariance()
    assert not still[7].any() and not still[:, 7].any()
    huge = moment_of(1e30 * rows).covariance()  # their squares outgrow float32
    torch.testing.assert_close(huge / 1e60, still, rtol=1e-4, atol=1e-6)


@over(exponent=(0.3, 1.0, 2.0), number=(40, 90, 200, 2000))
def test_shrinkage_is_what_scikit_learn_makes_of_the_rows(exponent, number):
    """Of fewer rows than dimensions, of some more, and of many more; a little less of many rows
    whose variances are nearly equal."""
    draw = torch.Generator().manual_seed(1)
    scale = torch.arange(1, 61, dtype=torch.float64) ** (-exponent / 2)
    rows = torch.randn(number, 60, generator=draw, dtype=torch.float64) * scale + 3
    own, theirs = torch.cov(rows.T, correction=0), OAS().fit(rows.numpy())
    rho = min(theirs.shrinkage_, (4 * 60 + 1) / (number + 1))
    assert (rho < theirs.shrinkage_) == (exponent < 1 and number == 2000)
    expected = (1 - rho) * own + rho * own.diagonal().mean() * torch.eye(60)
    torch.testing.assert_close(shrunk(own, number), expected)
    for size in (*range(1, 10), 3e7):  # equal eigenvalues; tenths' squares are rounded either way
        same = size / 10 * torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(shrunk(same, 50), same)
