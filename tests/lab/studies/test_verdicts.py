"""From made-up results to verdicts and a report: planted effects are found, and nothing else is.
Then the statistics of a study, on differences whose truth is known."""

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from looping import over
from scipy import stats
from study_cases import KS, MEASURES, SEEDS, Made

from llm_wsae.lab.studies.differences import Value, compared
from llm_wsae.lab.studies.report import BASELINES, BETTER, NOT_SHOWN, WORSE, StudyReport, compare

SITE = "blocks.1.hook_resid_post"
BASIS = {
    "training": {"architecture": "jumprelu"},
    "rows": {"model": {"name": "tiny"}, "num_rows": 5},
    "text": {"name": "words"},
}


@over(
    case=[
        ({}, (NOT_SHOWN, NOT_SHOWN, NOT_SHOWN)),
        ({"effect": 0.05}, (NOT_SHOWN, BETTER, NOT_SHOWN)),
        ({"effect": -0.05}, (NOT_SHOWN, WORSE, NOT_SHOWN)),
        ({"spill": -0.05}, (NOT_SHOWN, NOT_SHOWN, BETTER)),
        ({"spill": 0.05}, (NOT_SHOWN, NOT_SHOWN, WORSE)),
        ({"kl": -0.2}, (BETTER, NOT_SHOWN, NOT_SHOWN)),
        ({"kl": 0.2, "effect": 0.05}, (WORSE, BETTER, NOT_SHOWN)),
        ({"effect": 0.05, "control_effect": 0.05}, (NOT_SHOWN, NOT_SHOWN, NOT_SHOWN)),
        ({"effect": 0.10, "control_effect": 0.05}, (NOT_SHOWN, BETTER, NOT_SHOWN)),
        ({"effect": -0.05, "control_effect": -0.05}, (NOT_SHOWN, WORSE, NOT_SHOWN)),
    ]
)
def test_what_is_planted_is_found(case):
    """On KL, detection and spill."""
    options, expected = case
    made, seeds = Made(), range(5)
    rule, control = compare(made.plain(seeds=seeds) + made.rule(seeds=seeds, **options))
    assert rule.verdicts == dict(zip(("kl", "detection", "spill"), expected, strict=True))
    assert control.label == "permuted-variance-a0.5" and control.control is None
    assert control.adjusted == control.verdicts == {} and "detection" in control.effects


def test_planted_features_decide_as_well():
    made = Made(noise=0.0005)
    results = made.plain() + made.rule()
    gain = {"uniform": 0.0, "variance-a0.5": 0.1, "permuted-variance-a0.5": -0.1}
    results = [
        replace(r, values=r.values | {"planted_f1": Value(
            0.5 + gain[r.label], {"0": 0.4 + gain[r.label], "1": 0.6 + gain[r.label] + r.seed / 1e6}
        )}) for r in results
    ]  # fmt: skip
    (one,) = (one for one in compare(results) if one.control)
    assert one.verdicts["planted_f1"] == BETTER and one.adjusted["planted_f1"] < 0.001
    assert one.effects["planted_f1"].difference == pytest.approx(0.1)


def test_an_effect_is_measured_with_its_interval():
    made = Made()
    results = made.plain() + made.rule(effect=0.03, kl=-0.1, ks=KS)
    for one in compare(results):
        if one.control is None:
            continue
        for measure, effect in (("detection", 0.03), ("selectivity", 0.03), ("kl", -0.1)):
            low, high = one.effects[measure].interval
            assert one.effects[measure].difference == pytest.approx(effect, abs=0.006), measure
            assert low < one.effects[measure].difference < high and high - low < 0.05
        assert one.seeds == SEEDS and one.k in KS
        assert one.against_control["detection"].difference == pytest.approx(0.03, abs=0.006)


@over(
    case=[
        (40, 3, {}, (BETTER, WORSE), 5),
        # as good as their controls: hardly ever is one of ten called better than it
        (12, 10, {"effect": 0.03, "control_effect": 0.03}, (BETTER,), 2),
    ]
)
def test_under_the_null_nothing_is_shown_in_95_of_100_studies(case):
    studies, rules, options, shown, most = case
    called = 0
    for seed in range(studies):
        made = Made(seed)
        results = made.plain() + [r for n in range(rules) for r in made.rule(f"rule{n}", **options)]
        called += any(word in shown for one in compare(results) for word in one.verdicts.values())
    assert called <= most


def test_more_rules_ask_for_more():
    """What passes alone need not pass among many: the least p of 7 × 3 counts 21 times."""
    made = Made()
    results = made.plain() + made.rule(effect=-0.05)
    results += [r for i in range(6) for r in made.rule(f"rule{i}")]
    one = compare(results)[0]
    assert one.adjusted["detection"] == pytest.approx(21 * one.effects["detection"].p)


def test_order_and_names_of_seeds_change_nothing_but_differences_are_taken_within_them():
    made = Made()
    results = made.plain() + made.rule(effect=0.01) + made.rule("kurtosis", effect=-0.01)
    expected = {one.label: one for one in compare(results)}
    shuffled = list(results)
    random.Random(0).shuffle(shuffled)
    for one in compare([replace(r, seed=r.seed + 7) for r in shuffled]):
        other = expected[one.label]
        assert one.verdicts == other.verdicts and one.seeds == (7, 8, 9)
        for measure, effect in one.effects.items():
            assert effect.interval == pytest.approx(other.effects[measure].interval)
    own = [replace(r, seed=(r.seed + 1) % 3) for r in results if r.label == "variance-a0.5"]
    turned = own + [r for r in results if r.label != "variance-a0.5"]
    before, after = (compare(own)[0].effects["detection"] for own in (results, turned))
    assert after.difference == pytest.approx(before.difference, abs=1e-3)
    assert after.by_seed != pytest.approx(before.by_seed, abs=1e-6)


def test_what_has_no_plain_dictionary_beside_it_is_not_judged():
    """Of another k, on other seeds, or on one seed alone."""
    made = Made()
    for ks, seeds in (((64,), SEEDS), ((32,), (3, 4)), ((32,), (2, 3))):
        rule, control = compare(made.plain() + made.rule(ks=ks, seeds=seeds, effect=1.0))
        assert rule.effects == rule.verdicts == {} and control.verdicts == {}
        report = StudyReport.of(SITE, BASIS, made.plain() + made.rule(ks=ks, seeds=seeds))
        assert "not measured" in report.sentences()[0]


def test_baselines_move_nothing():
    """However far they lie from the others."""
    made = Made()
    results = made.plain() + made.rule(effect=0.01) + made.rule("kurtosis")
    beside = [
        made.one(label, None, 32, seed, effect=effect)
        for effect, label in enumerate(BASELINES, 1)
        for seed in (*SEEDS, 9)
    ]
    without, report = (StudyReport.of(SITE, BASIS, own) for own in (results, beside + results))
    assert report.results[-len(beside) :] == sorted(beside, key=lambda r: (r.label, r.k, r.seed))
    assert report.compared == without.compared and report.sentences() == without.sentences()
    assert report.figures() == without.figures()
    assert "on seeds 0, 1, 2, and 12 baselines" in report.page()
    assert "12 baselines" not in without.page()


def test_report(tmp_path):
    made = Made()
    results = made.plain() + made.rule(effect=0.05, kl=-0.1) + made.rule("kurtosis")
    report = StudyReport.of(SITE, BASIS, results[::-1])
    nothing, better = report.sentences()
    assert better.startswith("variance-a0.5, k 32: KL better: -")
    assert "detection better: +0.0" in better and "3 seeds" in better
    assert "beside its control" in better and "spill not shown" in better
    assert nothing.startswith("kurtosis-a0.5, k 32: KL not shown")
    report.write(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    words = dict.fromkeys(("kl", "detection"), BETTER) | {"spill": NOT_SHOWN}
    nothing = dict.fromkeys(words, NOT_SHOWN)
    assert found["verdicts"] == {"kurtosis-a0.5, k 32": nothing, "variance-a0.5, k 32": words}
    assert found["compared"]["variance-a0.5, k 32"]["effects"]["detection"]["p"] < 0.01
    assert len(found["dictionaries"]) == len(results)
    page = (tmp_path / "report.html").read_text()
    assert f"Study of weights at {SITE}, jumprelu" in page
    assert "Verdicts are on KL, detection and spill" in page
    table = report.table().splitlines()
    assert table[0].split()[:3] == ["weights", "k", "seeds"]
    assert sum(line.startswith("uniform ") for line in table) == len(KS)
    own = [r for r in results if r.label == "uniform" and r.k == KS[0]]
    for measure in ("selectivity", "purity", "kl"):
        mean = sum(r.values[measure].mean for r in own) / len(own)
        assert f"{mean:.4f}" in table[2]
    assert set(MEASURES) <= found["measures"].keys()
    alone = StudyReport.of(SITE, BASIS, made.plain())
    alone.write(tmp_path)
    assert alone.sentences() == [] and "uniform" in alone.table()


# --- Differences


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


def over_families(draw, seeds=3, noise=3.0):
    """Differences that vary from family to family, the same way on all seeds, about 0."""
    common = draw.normal(0, 3.0, 9)
    rows = common + draw.normal(0, 1, (seeds, 1)) + draw.normal(0, noise, (seeds, 9))
    return {
        seed: Value(float(np.mean(row)), {f"c{i}": float(v) for i, v in enumerate(row)})
        for seed, row in enumerate(rows)
    }


def over_documents(draw, seeds=3):
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
        values = [Value(0.5 + s, resampled=tuple(row)) for s, row in enumerate(table)]
        return against_zero(dict(enumerate(values)))

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
