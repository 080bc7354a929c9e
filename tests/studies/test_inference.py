"""The statistics of a study, on differences whose truth is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm_wsae.studies.curve import Curve, Point, Value
from llm_wsae.studies.inference import adjusted, estimates, pooled_variance
from llm_wsae.studies.stopping import SPENT, k_added, spent

SEEDS = 3


def over_latents(draw, arms=4, seeds=SEEDS, effects=(), shared=0.7, own=1.0, latents=0.3):
    """Differences with an error that all arms share (the plain curve's), one of their own, and one
    from the finite number of latents; arm u has the effect ``effects[u]``."""
    of_curve = draw.normal(0, shared, seeds)
    effects = [*effects, *[0.0] * (arms - len(effects))]
    return {
        arm: {
            seed: Value(
                effect + of_curve[seed] + draw.normal(0, own) + draw.normal(0, latents), latents**2
            )
            for seed in range(seeds)
        }
        for arm, effect in enumerate(effects)
    }


def over_families(draw, arms=4, seeds=SEEDS, families=9, of_family=3.0, noise=3.0):
    """Differences that vary from family to family, the same way on all seeds, about 0."""
    found = {}
    for arm in range(arms):
        common = draw.normal(0, of_family, families)
        rows = common + draw.normal(0, 1, (seeds, 1)) + draw.normal(0, noise, (seeds, families))
        found[arm] = {seed: of_items(row) for seed, row in enumerate(rows)}
    return found


def of_items(row) -> Value:
    return Value(float(np.mean(row)), 0.0, {f"c{i}": float(v) for i, v in enumerate(row)})


def false_alarms(make, repetitions=600) -> float:
    draw = np.random.default_rng(0)
    tests = [e.p < 0.05 for _ in range(repetitions) for e in estimates(make(draw)).values()]
    return float(np.mean(tests))


def test_what_was_given_more_k_on_the_same_seeds():
    def look(**labels):
        return {
            label: {"ks": ks, "seeds": list(range(seeds))} for label, (ks, seeds) in labels.items()
        }

    first = look(uniform=([24, 32], 3), rule=([32], 3))
    assert k_added([]) == k_added([first]) == k_added([first, first]) == []
    assert k_added([first, first | look(other=([32], 3))]) == []  # Holm's correction covers it
    assert k_added([first, look(uniform=([24, 32], 5), rule=([24, 32], 5))]) == []  # a new share
    assert k_added([first, first | look(rule=([24, 32], 3))]) == ["rule"]
    assert k_added([first, first | look(uniform=([16, 24, 32], 3))]) == ["uniform"]
    more = [first, first | look(rule=([24, 32], 3)), look(rule=([24, 32], 5))]
    assert k_added(more) == []  # five seeds have not been looked at before
    assert k_added([look(rule=([32], 1)), look(rule=([24, 32], 1))]) == []  # one seed has no p


def test_without_an_effect_none_is_found_in_95_of_100():
    for seeds in (2, 3, 5):
        of_latents = false_alarms(lambda draw, n=seeds: over_latents(draw, seeds=n))
        of_families = false_alarms(lambda draw, n=seeds: over_families(draw, seeds=n), 300)
        assert 0.01 < of_latents < 0.06 and 0.01 < of_families < 0.07, seeds


def test_a_bootstrap_over_three_seeds_would_be_too_sure():
    """Why there is none."""
    draw = np.random.default_rng(0)
    misses = 0
    for _ in range(400):
        sample = draw.normal(0, 1, SEEDS)
        means = sample[draw.integers(SEEDS, size=(500, SEEDS))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        misses += not low <= 0 <= high
    assert misses / 400 > 0.15


def test_families_that_differ_alike_on_every_seed_do_not_count_as_many():
    """With the families' part left out, their choice would pass for an effect."""
    draw = np.random.default_rng(0)
    found = {True: 0, False: 0}
    for _ in range(200):
        differences = over_families(draw, of_family=3.0, noise=0.5)
        bare = {
            arm: {seed: Value(value.mean) for seed, value in by_seed.items()}
            for arm, by_seed in differences.items()
        }
        found[True] += estimates(differences)[0].p < 0.05
        found[False] += estimates(bare)[0].p < 0.05
    assert found[True] < 16 and found[False] > 25


def test_documents_that_all_seeds_share_do_not_average_out():
    """Every seed is scored on one text, so seeds agree on what its documents do."""
    draw = np.random.default_rng(0)
    found = {True: 0, False: 0}
    for _ in range(200):
        document, seeds = draw.normal(0, 2.0), draw.normal(0, 1.0, 3)
        drawn = draw.normal(0, 2.0, 100)
        for known in found:
            made = {
                seed: Value(document + v, resampled=tuple(drawn + v) if known else None)
                for seed, v in enumerate(seeds)
            }
            found[known] += estimates({"a": made})["a"].p < 0.05
    assert found[True] < 16 and found[False] > 30
    one = Value(1.0, resampled=(0.0, 2.0))
    mixed = Value.mixture([(1.0, one), (-0.5, Value(2.0, resampled=(1.0, 3.0)))])
    assert mixed.resampled == (-0.5, 0.5)
    gap = Value.mixture([(1.0, one), (-0.5, Value(2.0, resampled=(None, 3.0)))]).resampled
    assert gap == pytest.approx((np.nan, 0.5), nan_ok=True)
    assert Value.mixture([(1.0, one), (1.0, Value(1.0))]).resampled is None


def test_a_difference_is_of_the_families_that_both_have():
    both = Value(0.3, items={"a": 0.5, "b": 0.1})
    difference = Value.mixture([(1.0, Value(0.5, items={"a": 0.5})), (-1.0, both)])
    assert (difference.mean, difference.items) == (0, {"a": 0})
    nothing = Value.mixture([(1.0, Value(0.5, items={"c": 0.5})), (-1.0, both)])
    assert np.isnan(nothing.mean)
    plain = [Point(k, 0, increase, {"m": both}) for k, increase in ((1, 0.1), (2, 0.2))]
    other = Point(1, 0, 0.15, {"m": Value(0.5, items={"c": 0.5})})
    assert Curve(plain).beside([(1.0, other)], "m") is None
    same = Curve(plain).beside([(1.0, Point(1, 0, 0.15, {"m": both}))], "m")
    assert same.mean == pytest.approx(0)


def test_resamplings_without_any_scored_document_are_left_out_for_all_seeds():
    draw = np.random.default_rng(0)
    drawn = draw.normal(0, 2.0, (3, 100)) + draw.normal(0, 2.0, 100)
    gaps = drawn.copy()
    gaps[0, :10] = gaps[2, 5:20] = np.nan

    def found(table):
        return estimates(
            {"a": {s: Value(0.5 + s, resampled=tuple(v)) for s, v in enumerate(table)}}
        )

    assert found(gaps) == found(drawn[:, 20:]) != found(drawn)
    gaps[1, 21:] = np.nan  # of one resampling there is no variance
    bare = estimates({"a": {s: Value(0.5 + s) for s in range(3)}})
    assert found(gaps) == bare


def test_looks_spend_five_per_cent_together():
    assert sum(SPENT.values()) == pytest.approx(0.05)
    assert spent(0.009, 3) == pytest.approx(0.05) and spent(0.5, 2) == 1
    assert spent(0.02, 9) == spent(0.02, 5) < 0.05 < spent(0.02, 3)


def test_a_planted_difference_is_found_and_its_interval_holds_it():
    draw = np.random.default_rng(0)
    found, inside = 0, 0
    for _ in range(300):
        estimate = estimates(over_latents(draw, effects=(4.0,)))[0]
        found += estimate.p < 0.05 and estimate.difference > 0
        inside += estimate.interval[0] <= 4.0 <= estimate.interval[1]
    assert found > 240 and inside > 275


def test_holm_keeps_the_chance_of_any_false_alarm_at_5_percent():
    draw = np.random.default_rng(0)
    any_of_them = 0
    for _ in range(400):
        found = estimates(over_latents(draw, arms=8))
        any_of_them += min(adjusted({arm: e.p for arm, e in found.items()}).values()) < 0.05
    assert any_of_them < 24
    assert adjusted({"a": 0.01, "b": 0.03, "c": 0.2}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.2}
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(4)), st.permutations(range(SEEDS)))
def test_names_and_order_mean_nothing(number, arms, seeds):
    differences = over_latents(np.random.default_rng(number))
    expected = estimates(differences)
    renamed = {f"rule {arm}": {10 * seed: differences[arm][seed] for seed in seeds} for arm in arms}
    found = estimates(renamed)
    for arm in arms:
        one, other = expected[arm], found[f"rule {arm}"]
        assert one.difference == pytest.approx(other.difference)
        assert one.interval == pytest.approx(other.interval)
        assert one.p == pytest.approx(other.p)
        assert {10 * seed: d for seed, d in one.by_seed.items()} == other.by_seed


def test_one_arm_without_latents_is_the_t_test():
    values = [0.3, -0.1, 0.8, 0.4]
    estimate = estimates({"a": {seed: Value(v) for seed, v in enumerate(values)}})["a"]
    reference = stats.ttest_1samp(values, 0.0)
    assert estimate.p == pytest.approx(reference.pvalue)
    assert estimate.interval == pytest.approx(tuple(reference.confidence_interval()))


def test_the_pool_is_the_mean_variance_and_knows_what_is_shared():
    draw = np.random.default_rng(0)
    table = draw.normal(size=(5, 3))
    variance, degrees = pooled_variance(by_seed(table))
    assert variance == pytest.approx(table.var(1, ddof=1).mean())
    alike = table[:1] + draw.normal(size=(5, 1))  # five arms that are one
    assert pooled_variance(by_seed(alike))[1] == pytest.approx(2)
    assert 2 < degrees < 10


def by_seed(table) -> list[dict[int, float]]:
    return [dict(enumerate(row.tolist())) for row in table]


def test_more_seeds_of_one_arm_are_pooled_with_the_fewer_of_the_others():
    """Variance as it is on the whole, and no more false alarms for either kind of arm."""
    draw = np.random.default_rng(0)
    pools, alarms = [], {True: [], False: []}
    for _ in range(1000):
        found = over_latents(draw, arms=5, seeds=5, latents=0.0)
        few = {
            arm: {s: v for s, v in own.items() if s < 3 or arm == 0} for arm, own in found.items()
        }
        pools.append(pooled_variance([{s: v.mean for s, v in o.items()} for o in few.values()])[0])
        for arm, estimate in estimates(few).items():
            alarms[arm == 0].append(estimate.p < 0.05)
    assert np.mean(pools) == pytest.approx(0.7**2 + 1, rel=0.1)
    assert np.mean(alarms[True]) < 0.06 and np.mean(alarms[False]) < 0.06


def test_the_pool_is_right_whichever_seeds_the_arms_have():
    """A study is extended by rules on seeds of their own: mean variance and its degrees of freedom
    (a mean square's variance is 2/degrees of its own mean's square) as they are."""
    draw = np.random.default_rng(0)
    designs = (
        ((0, 1, 2), (0, 1, 2)),
        ((0, 1, 2), (3, 4, 5)),
        ((0, 1, 2), (3, 4, 5), (6, 7, 8)),
        ((0, 1), (2, 3)),
        ((0, 1, 2), (2, 3, 4)),
        ((0, 1, 2), (0, 1, 2), (3, 4, 5)),
        ((0, 1, 2, 3, 4), (0, 1)),
    )
    for shared, design in itertools.product((0.0, 0.5, 0.9), designs):
        of_seed = draw.normal(0, shared**0.5, (2000, 9))
        own = draw.normal(0, (1 - shared) ** 0.5, (2000, 9, len(design)))
        pools = np.array(
            [
                pooled_variance([{s: c[s] + e[s, a] for s in has} for a, has in enumerate(design)])
                for c, e in zip(of_seed, own, strict=True)
            ]
        )
        variance, degrees = pools.mean(0)
        assert variance == pytest.approx(1, abs=0.08), (shared, design)
        assert degrees == pytest.approx(2 / pools[:, 0].var(), rel=0.25), (shared, design)


def test_an_arm_apart_spreads_as_it_does_and_disturbs_nobody():
    """A control whose draws differ more than anything else does."""
    draw = np.random.default_rng(0)
    alarms = {True: [], False: []}
    for _ in range(600):
        differences = over_latents(draw, arms=5)
        quiet = estimates({arm: differences[arm] for arm in range(4)})
        differences[4] = {s: Value(8 * v.mean, v.variance) for s, v in differences[4].items()}
        found = estimates(differences, apart={4})
        assert {arm: found[arm] for arm in range(4)} == quiet
        for arm, estimate in found.items():
            alarms[arm == 4].append(estimate.p < 0.05)
    assert 0.03 < np.mean(alarms[True]) < 0.07 and np.mean(alarms[False]) < 0.06


def test_latents_own_spread_is_the_least():
    exact = {0: Value(1.0, 0.09), 1: Value(1.0, 0.09)}
    found = estimates({"a": exact})["a"]
    assert found.error == pytest.approx((0.09 / 2) ** 0.5) and found.degrees == np.inf
    assert found.p == pytest.approx(2 * stats.norm.sf(1 / found.error))


def test_seeds_that_agree_by_chance_are_held_to_the_spread_of_their_latents():
    """Where only latents differ: neither as many false alarms as the latents' own test would give
    with a small spread of the seeds, nor none at all."""
    for seeds, own in itertools.product((3, 5), (0.0, 0.5, 2.0)):
        draw = np.random.default_rng(0)
        alarms = []
        for _ in range(600):
            made = over_latents(draw, arms=1, seeds=seeds, shared=0.0, own=own, latents=1.0)
            alarms.append(estimates(made, apart={0})[0].p < 0.05)
        assert 0.004 < np.mean(alarms) < 0.062, (seeds, own)


def test_what_seeds_and_latents_both_show_is_found():
    """Five seeds, all on one side and far apart for the latents that they have."""
    made = {seed: Value(value, 1.0) for seed, value in enumerate((9.0, 6.0, 7.0, 5.0, 6.5))}
    estimate = estimates({"a": made}, apart={"a"})["a"]
    reference = stats.ttest_1samp([value.mean for value in made.values()], 0.0)
    assert estimate.p == pytest.approx(reference.pvalue) and estimate.p < 0.001


def test_one_seed_gives_no_estimate():
    assert estimates({"a": {0: Value(1.0)}, "b": {0: Value(1.0), 1: Value(2.0)}}).keys() == {"b"}


def point(increase, k=8, seed=0, **values) -> Point:
    return Point(k, seed, increase, {name: Value(v) for name, v in values.items()})


def test_the_curve_is_straight_over_the_logarithm():
    curve = Curve(point(0.01 * 4**i, k=64 // 2**i, m=3.0 - i) for i in (2, 0, 1))
    for increase, level in ((0.02, 2.5), (0.16, 1.0), (0.08, 1.5)):
        beside = curve.beside([(1.0, point(increase, m=1.75))], "m")
        assert beside.mean == pytest.approx(1.75 - level)
    rest = curve.without(32)
    assert rest.beside([(1.0, point(0.04, m=0.0))], "m").mean == pytest.approx(-2.0)
    assert curve.beside([(1.0, point(0.08))], "m") is None
    assert curve.beside([(1.0, point(0.08, other=1.0))], "other") is None


def test_what_two_points_share_of_the_curve_is_no_part_of_their_difference():
    curve = Curve(Point(k, 0, 0.64 / k, {"m": Value(1.0, 0.25)}) for k in (16, 64))
    one, other = (Point(32, 0, 0.02, {"m": Value(mean, 0.01)}) for mean in (3.0, 2.0))
    alone = curve.beside([(1.0, one)], "m")
    assert alone.mean == 2.0 and alone.variance == pytest.approx(0.01 + 2 * 0.25 / 4)
    apart = curve.beside([(1.0, one), (-1.0, other)], "m")
    assert apart.mean == pytest.approx(1.0) and apart.variance == pytest.approx(0.02)
    both = curve.beside([(0.5, one), (0.5, other)], "m")
    assert both.variance == pytest.approx(2 * 0.01 / 4 + 2 * 0.25 / 4)


def test_beyond_its_ends_the_curve_says_nothing():
    curve = Curve([point(0.01, m=1.0), point(0.04, m=0.0)])
    assert point(0.02) in curve and point(0.01) in curve
    assert point(0.009) not in curve and point(0.05) not in curve
    assert point(0.01) not in Curve([point(0.01, m=1.0)])
    lossless = Curve([point(-0.01, m=1.0), point(0.01, m=0.0)])
    assert point(-5.0) in lossless and point(0.001) in lossless


def test_a_mixture_carries_variances_and_concepts():
    one = Value(1.0, 0.2, {"a": 1.0, "b": 2.0})
    other = Value(3.0, 0.4, {"b": 5.0, "c": 0.0})
    mixed = Value.mixture([(1.0, one), (-0.5, other)])
    assert mixed.mean == -0.5 and mixed.variance == pytest.approx(0.3)
    assert mixed.items == {"b": -0.5}
    assert Value.mixture([(1.0, one), (1.0, Value(1.0))]).items is None
