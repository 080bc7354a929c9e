"""From made-up results to verdicts and a report: planted effects are found, and nothing else is."""

import json
import random
from dataclasses import replace

import pytest
from looping import over
from study_cases import KS, MEASURES, SEEDS, Made

from llm_wsae.lab.studies.differences import Value
from llm_wsae.lab.studies.report import BETTER, NOT_SHOWN, WORSE, StudyReport, compare
from llm_wsae.lab.studies.results import BASELINES

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
    turned = [
        replace(r, seed=(r.seed + 1) % 3) if r.label == "variance-a0.5" else r for r in results
    ]
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
