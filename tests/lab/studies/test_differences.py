"""The statistics of a study, on differences whose truth is known."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from llm_wsae.lab.studies.differences import Value, compared

SEEDS = 3


def against_zero(values):
    """The estimate of differences that are given by seed."""
    nothing = {
        seed: Value(
            0.0,
            value.items and dict.fromkeys(value.items, 0.0),
            value.resampled and (0.0,) * len(value.resampled),
        )
        for seed, value in values.items()
    }
    return compared(values, nothing)


def over_families(draw, seeds=SEEDS, noise=3.0):
    """Differences that vary from family to family, the same way on all seeds, about 0."""
    common = draw.normal(0, 3.0, 9)
    rows = common + draw.normal(0, 1, (seeds, 1)) + draw.normal(0, noise, (seeds, 9))
    return {
        seed: Value(float(np.mean(row)), {f"c{i}": float(v) for i, v in enumerate(row)})
        for seed, row in enumerate(rows)
    }


def over_documents(draw, seeds=SEEDS):
    """KL of each document, of two equal kinds; documents differ alike on all seeds."""
    length = draw.gamma(4, 25, 80)
    of_document = 1 + draw.normal(0, 0.2, 80)
    plain, own = {}, {}
    for seed in range(seeds):
        sums = length * draw.normal(1, 0.1, 80)
        by_seed = draw.normal(1, 0.01)
        plain[seed] = Value(0.0, documents=tuple(sums))
        own[seed] = Value(0.0, documents=tuple(sums * of_document * by_seed))
    return own, plain


def test_without_an_effect_none_is_found_in_95_of_100():
    for seeds in (2, 3, 5):
        draw, alarms = np.random.default_rng(0), []
        for _ in range(600):
            row = draw.normal(0, 1, seeds)
            alarms.append(against_zero({s: Value(float(v)) for s, v in enumerate(row)}).p < 0.05)
        assert 0.03 < np.mean(alarms) < 0.07, seeds
        of_families = [against_zero(over_families(draw, seeds)).p < 0.05 for _ in range(600)]
        assert 0.005 < np.mean(of_families) < 0.07, seeds
        of_documents = [compared(*over_documents(draw, seeds)).p < 0.05 for _ in range(400)]
        assert 0.005 < np.mean(of_documents) < 0.08, seeds


def test_one_document_or_seed_gives_no_estimate():
    own, plain = over_documents(np.random.default_rng(0))
    assert compared({0: own[0]}, plain) is None
    assert compared(own, {7: plain[0], 8: plain[1]}) is None
    few = {seed: Value(0.0, documents=(1.0,)) for seed in own}
    assert compared(few, few) is None


def test_families_and_documents_that_all_seeds_share_do_not_average_out():
    """With their part left out, their choice would pass for an effect."""
    draw, alarms = np.random.default_rng(0), Counter()
    for _ in range(200):
        document, drawn = draw.normal(0, 2.0), draw.normal(0, 2.0, 100)
        by_document = {
            seed: Value(document + v, resampled=tuple(drawn + v))
            for seed, v in enumerate(draw.normal(0, 1.0, 3))
        }
        for name, own in (("families", over_families(draw, noise=0.5)), ("documents", by_document)):
            bare = {seed: Value(value.mean) for seed, value in own.items()}
            alarms[name] += against_zero(own).p < 0.05
            alarms[f"without {name}"] += against_zero(bare).p < 0.05
    assert alarms["families"] < 16 and alarms["without families"] > 25
    assert alarms["documents"] < 16 and alarms["without documents"] > 30


def test_resamplings_without_any_scored_document_are_left_out_for_all_seeds():
    draw = np.random.default_rng(0)
    drawn = draw.normal(0, 2.0, (3, 100)) + draw.normal(0, 2.0, 100)
    gaps = drawn.copy()
    gaps[0, :10] = gaps[2, 5:20] = np.nan

    def found(table):
        return against_zero(
            {s: Value(0.5 + s, resampled=tuple(row)) for s, row in enumerate(table)}
        )

    assert found(gaps) == found(drawn[:, 20:]) != found(drawn)
    gaps[1, 21:] = np.nan  # of one resampling there is no variance
    assert found(gaps) == against_zero({s: Value(0.5 + s) for s in range(3)})


def test_a_difference_is_of_what_both_have():
    both = Value(0.3, {"a": 0.5, "b": 0.1}, (1.0, 2.0))
    difference = both.less(Value(0.5, {"a": 0.25}, (None, 0.5)))
    assert (difference.mean, difference.items) == (0.25, {"a": 0.25})
    assert difference.resampled == pytest.approx((np.nan, 1.5), nan_ok=True)
    assert both.less(Value(0.5, {"c": 0.5})) is None
    assert both.less(Value(0.5)).items is None


def test_without_items_and_documents_it_is_the_t_test():
    values = [0.3, -0.1, 0.8, 0.4]
    estimate = against_zero({seed: Value(v) for seed, v in enumerate(values)})
    reference = stats.ttest_1samp(values, 0.0)
    assert estimate.p == pytest.approx(reference.pvalue)
    assert estimate.interval == pytest.approx(tuple(reference.confidence_interval()))


def test_intervals_cross_documents_and_seeds():
    """Against a simulation in which both vary: 95 % of the intervals hold the truth."""
    draw, hits = np.random.default_rng(0), 0
    for _ in range(300):
        plain = draw.gamma(2.0, size=200)
        documents, seeds = draw.normal(0, 0.3, 200), draw.normal(0, 0.02, 4)
        own = plain * (1.1 + documents + seeds[:, None])
        found = compared(
            {seed: Value(0.0, documents=sums) for seed, sums in enumerate(own.tolist())},
            {seed: Value(0.0, documents=plain.tolist()) for seed in range(4)},
        )
        low, high = found.interval
        hits += low <= 0.1 <= high
    assert 270 <= hits <= 297
