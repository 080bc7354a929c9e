"""From made-up results to verdicts and a report: planted effects are found, and nothing else is."""

import dataclasses
import json
import random
import re

import pytest
from matplotlib.image import imread
from study_cases import KS, NATS, SEEDS, Made

from llm_wsae.files import write_json
from llm_wsae.studies import comparison as v
from llm_wsae.studies.comparison import compare, curve_against_itself
from llm_wsae.studies.figures import figures_of_page
from llm_wsae.studies.plan import BASELINES
from llm_wsae.studies.report import StudyReport
from llm_wsae.studies.results import MEASURES, read_result


def verdict_of(results, label="variance-a0.5") -> str:
    return next(one for one in compare(results) if one.label == label).verdict


def test_what_is_planted_is_found():
    for options, expected in (
        ({}, v.INDISTINGUISHABLE),
        ({"effect": 0.03}, v.BETTER),
        ({"effect": -0.03}, v.WORSE),
        ({"effect": 0.03, "control_effect": 0.03}, v.NO_BETTER_THAN_CONTROL),
        ({"effect": 0.09, "control_effect": 0.03, "selective": 0.0}, v.BETTER),
        ({"effect": 0.03, "control_cost": 9.0}, v.UNCONTROLLED),
        ({"effect": 0.03, "selective": -0.03}, v.MIXED),
        ({"effect": 0.03, "cost": 9.0}, v.OUTSIDE),
        ({"cost": 1.7}, v.INDISTINGUISHABLE),
        ({"cost": 1.7, "effect": 0.03}, v.BETTER),
    ):
        made = Made()
        results = made.curve() + made.rule(**options)
        assert verdict_of(results) == expected, options
        control = next(one for one in compare(results) if one.is_control)
        assert control.label == "permuted-variance-a0.5" and control.adjusted == {}


def test_what_was_given_more_k_after_a_look_is_not_called_better():
    for options, usual, decided in (
        ({"effect": 0.03}, v.BETTER, v.LOOKED_AGAIN),
        ({"effect": 0.03, "control_cost": 9.0}, v.UNCONTROLLED, v.LOOKED_AGAIN),
        ({"effect": -0.03}, v.WORSE, v.WORSE),
    ):
        made = Made()
        results = made.curve() + made.rule(**options)
        for again, expected in (
            (["another"], usual), (["variance-a0.5"], decided), (["uniform"], decided)
        ):  # fmt: skip
            found = {one.label: one.verdict for one in compare(results, again)}
            assert found["variance-a0.5"] == expected
            report = StudyReport.of("blocks.1.hook_resid_post", {"k_added": again}, results)
            assert report.compared[0].verdict == expected


def test_where_spill_is_measured_it_decides_in_place_of_selectivity():
    seeds = range(5)
    for options, expected in (
        ({"selective": 0.03}, v.INDISTINGUISHABLE),
        ({"selective": -0.03}, v.INDISTINGUISHABLE),
        ({"spill": -0.03}, v.BETTER),
        ({"spill": -0.03, "control_spill": -0.03}, v.NO_BETTER_THAN_CONTROL),
        ({"spill": -0.03, "control_cost": 9.0}, v.UNCONTROLLED),
        ({"spill": 0.03}, v.WORSE),
        ({"effect": 0.03, "spill": 0.03}, v.MIXED),
        ({"effect": -0.03, "spill": -0.03}, v.MIXED),
    ):
        made = Made(with_spill=True)
        results = made.curve(seeds=seeds) + made.rule(seeds=seeds, **options)
        assert verdict_of(results) == expected, options
        assert set(compare(results)[0].adjusted) == {"detection", "spill"}
        report = StudyReport.of("blocks.1.hook_resid_post", BASIS, results)
        assert "Detection and spill decide;" in report.markdown()
        heads = re.split(r"  +", report.table().split("plain curve at equal CE")[1].strip())[:6]
        assert heads[3:] == ["detection", "spill", "selectivity"]


def test_older_results_say_that_selectivity_decides():
    made = Made()
    report = StudyReport.of("blocks.1.hook_resid_post", BASIS, made.curve() + made.rule())
    said = "Detection and selectivity decide, since spill was not measured;"
    assert said in report.markdown() and said in report.page()
    assert report.to_dict()["deciding"] == ["detection", "selectivity"]


def test_to_lie_elsewhere_on_the_curve_is_no_difference():
    """At the same k its measures differ by .05; at the same cross-entropy by nothing."""
    made = Made(noise=1e-5)
    (one, _) = compare(made.curve() + made.rule(cost=1.7))
    effect = one.effects["detection"]
    assert abs(effect.difference) < 1e-4
    assert one.ce_change[32] == pytest.approx(-0.7 * NATS / 32)


def test_an_effect_is_measured_with_its_interval():
    made = Made()
    (one, _) = compare(made.curve() + made.rule(effect=0.03, ks=(24, 32)))
    for measure in ("detection", "selectivity", "selectivity_dense"):
        low, high = one.effects[measure].interval
        assert low < 0.03 < high and high - low < 0.02
    assert one.ks == (24, 32) and one.seeds == SEEDS
    assert one.families["letters"] == pytest.approx(0.03, abs=0.005)
    assert set(one.adjusted) == {"detection", "selectivity"}
    assert one.against_control["detection"].difference == pytest.approx(0.03, abs=0.006)


def test_under_the_null_no_rule_is_called_anything_in_95_of_100_studies():
    called = 0
    for seed in range(40):
        made = Made(seed)
        results = made.curve() + made.rule() + made.rule("kurtosis", cost=1.2) + made.rule("hoyer")
        called += any(one.verdict != v.INDISTINGUISHABLE
                      for one in compare(results) if not one.is_control)  # fmt: skip
    assert called <= 5


def test_more_rules_ask_for_more():
    """What passes alone need not pass among many that were tried: the least p of 7 × 2 counts 14
    times, and a look at three seeds may spend .009 of the .05."""
    made = Made()
    results = made.curve() + made.rule(effect=0.009)
    results += [r for i in range(6) for r in made.rule(f"rule{i}")]
    one = compare(results)[0]
    measure = min(one.adjusted, key=lambda measure: one.effects[measure].p)
    assert one.adjusted[measure] == pytest.approx(14 * one.effects[measure].p * 0.05 / 0.009)


def test_order_and_names_of_seeds_change_nothing():
    made = Made()
    results = made.curve() + made.rule(effect=0.01) + made.rule("hoyer", effect=-0.01)
    expected = {one.label: one for one in compare(results)}
    shuffled = list(results)
    random.Random(0).shuffle(shuffled)
    moved = [
        dataclasses.replace(r, point=dataclasses.replace(r.point, seed=r.point.seed + 7))
        for r in shuffled
    ]
    for one in compare(moved):
        other = expected[one.label]
        assert one.verdict == other.verdict and one.seeds == (7, 8, 9)
        for measure, effect in one.effects.items():
            assert effect.difference == pytest.approx(other.effects[measure].difference)
            assert effect.interval == pytest.approx(other.effects[measure].interval)


def test_seeds_dealt_out_anew_break_the_pairing_and_only_that():
    """Differences are taken within seeds: the mean stays, the by-seed numbers do not."""
    made = Made()
    results = made.curve() + made.rule(effect=0.01)
    turned = [
        dataclasses.replace(r, point=dataclasses.replace(r.point, seed=(r.point.seed + 1) % 3))
        if r.label == "variance-a0.5" else r for r in results
    ]  # fmt: skip
    before, after = compare(results)[0].effects, compare(turned)[0].effects
    for measure in ("detection", "purity"):
        assert after[measure].difference == pytest.approx(before[measure].difference, abs=1e-3)
        assert after[measure].by_seed != pytest.approx(before[measure].by_seed, abs=1e-6)


def test_a_rule_is_held_against_its_control_at_the_k_of_both():
    """Both are .06 above the curve at k 48 and on it at k 24; the control's k 48 is off the curve,
    so what the rule gains there is not more than its control."""
    made = Made()
    results = made.curve() + made.rule(ks=(24,)) + made.rule(
        ks=(48,), effect=0.06, control_effect=0.06, control_cost=9.0
    )  # fmt: skip
    rule, control = compare(results)
    assert rule.ks == (24, 48) and control.ks == (24,)
    assert abs(rule.against_control["detection"].difference) < 0.01
    assert rule.verdict == v.NO_BETTER_THAN_CONTROL


def test_better_than_the_control_is_corrected_for_all_that_was_tried():
    """Ten rules, each as good as its control: hardly ever is one called better than it."""
    called = 0
    for seed in range(12):
        made = Made(seed)
        results = made.curve()
        for number in range(10):
            results += made.rule(f"rule{number}", effect=0.03, control_effect=0.03)
        called += any(one.verdict == v.BETTER for one in compare(results))
    assert called <= 2


def test_a_k_that_some_seeds_lack_is_not_compared():
    made = Made()
    results = made.curve(seeds=range(6))
    both = results + made.rule(ks=(32,), seeds=range(6)) + made.rule(ks=(48,), seeds=(3, 4, 5))
    assert compare(both)[0].ks == (32,)
    none = results + made.rule(ks=(32,), seeds=(0, 1, 2)) + made.rule(ks=(48,), seeds=(3, 4, 5))
    assert compare(none)[0].ks == () and verdict_of(none) == v.OUTSIDE


def test_the_k_of_one_seed_outside_is_omitted():
    made = Made()
    results = made.curve() + made.rule(ks=(24, 32), effect=0.03)
    strayed = [
        dataclasses.replace(r, point=dataclasses.replace(r.point, increase=1.0))
        if r.name == "variance-a0.5-k24-s1" else r for r in results
    ]  # fmt: skip
    one = compare(strayed)[0]
    assert one.ks == (32,) and one.verdict == v.BETTER


def test_a_rule_on_a_seed_without_curve_is_not_comparable():
    made = Made()
    assert verdict_of(made.curve(seeds=(0, 1)) + made.rule()) == v.OUTSIDE


def test_without_latents_and_concepts_nothing_is_said():
    made = Made()
    bare = [
        dataclasses.replace(r, point=dataclasses.replace(r.point, values={}))
        for r in made.curve() + made.rule()
    ]
    assert verdict_of(bare) == v.UNMEASURED


def test_one_seed_is_no_verdict():
    made = Made()
    assert verdict_of(made.curve(seeds=(0,)) + made.rule(seeds=(0,), effect=1.0)) == v.ONE_SEED


def test_a_control_that_its_draws_throw_about_does_not_blur_the_rules():
    made, wild = Made(), Made(noise=0.05)
    quiet = made.curve() + made.rule("kurtosis", effect=0.01)
    variance = made.rule(effect=0.01)
    thrown = wild.rule()
    both = quiet + [r for r in variance if r.control] + [r for r in thrown if r.control is None]
    intervals = [
        next(c for c in compare(results) if c.rule == "kurtosis").effects["purity"].interval
        for results in (quiet + variance, both)
    ]
    assert intervals[0] == pytest.approx(intervals[1])


def test_baselines_move_nothing():
    """However far they lie from the others."""
    made = Made()
    results = made.curve() + made.rule(effect=0.01) + made.rule("kurtosis")
    beside = [
        made.one(label, "uniform", None, k, seed, effect=effect)
        for effect, label in enumerate(BASELINES, 1)
        for k in KS
        for seed in (*SEEDS, 9)
    ]
    without, report = (
        StudyReport.of("blocks.1.hook_resid_post", BASIS, own)
        for own in (results, beside + results)
    )
    assert report.results[-len(beside) :] == sorted(
        beside, key=lambda r: (r.label, r.point.k, r.point.seed)
    )
    for part in ("compared", "at_equal_kl", "at_equal_density", "at_equal_fvu", "against_itself"):
        assert getattr(report, part) == getattr(without, part)
    assert report.sentences() == without.sentences()
    figures = [
        figures_of_page(one.results, {"CE": one.compared}, one.against_itself)
        for one in (without, report)
    ]
    assert figures[0] == figures[1]
    assert "60 baselines" in report.page() and "baseline" not in without.page()
    assert report.page().count("on seeds 0, 1, 2,") == 1


def test_the_curve_against_itself():
    made = Made(noise=1e-6)
    found = curve_against_itself(made.curve())
    assert sorted(found) == [24, 32, 48]
    assert all(abs(one["detection"].difference) < 1e-4 for one in found.values())
    made = Made(noise=1e-6)
    bent = [
        made.one("uniform", "uniform", None, k, s, effect=0.05 * (k == 32))
        for s in SEEDS
        for k in KS
    ]
    assert curve_against_itself(bent)[32]["detection"].difference == pytest.approx(0.05, abs=1e-4)


BASIS = {"training": {"architecture": "jumprelu"}}


def test_report(tmp_path):
    made = Made()
    results = made.curve() + made.rule(effect=0.03) + made.rule("kurtosis", cost=9.0)
    report = StudyReport.of("blocks.1.hook_resid_post", BASIS, results[::-1])
    better, outside = sorted(report.sentences(), reverse=True)
    assert better.startswith("variance-a0.5: better than the plain curve at equal CE, and ")
    assert "detection +0.0" in better and "3 seeds" in better
    recovered = 1 - 9 * NATS / 32
    assert outside.startswith("kurtosis-a0.5: not comparable") and f"{recovered:.4f}" in outside
    assert f"from {1 - NATS / KS[0]:.4f} to {1 - NATS / KS[-1]:.4f}" in outside

    report.write(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["verdicts"] == {"variance-a0.5": v.BETTER, "kurtosis-a0.5": v.OUTSIDE}
    assert found["compared"]["variance-a0.5"]["effects"]["detection"]["p"] < 0.01
    assert len(found["dictionaries"]) == len(results)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Study of weights at blocks.1.hook_resid_post, jumprelu")
    assert all(f"- {sentence}" in page for sentence in report.sentences())
    for name in ("curve.png", "differences.png"):
        assert f"({name})" in page and min(imread(tmp_path / name).shape[:2]) > 200
    table = report.table()
    _, *titles, last = re.split(r"  +", table.splitlines()[0].strip())
    _, *cells = table.splitlines()[2].split()
    own = [r for r in results if r.label == "uniform" and r.point.k == KS[0]]
    for measure in ("selectivity", "no_token", "purity", "coherence", "probe_5"):
        mean = sum(r.point.values[measure].mean for r in own) / len(own)
        assert cells[[*titles, last].index(MEASURES[measure].title)] == f"{mean:.4f}"
    assert table.splitlines()[0].split()[:3] == ["weights", "k", "seeds"]
    assert sum(line.startswith("uniform ") for line in table.splitlines()) == len(KS)


def test_where_kl_or_density_says_otherwise_the_line_says_so():
    made = Made()
    results = made.curve() + made.rule()
    (same,) = StudyReport.of("blocks.1.hook_resid_post", BASIS, results).sentences()
    assert "; at equal KL the same; " in same
    costly = [dataclasses.replace(r, kl=1.7 * r.kl) if r.rule == "variance" else r for r in results]
    (other,) = StudyReport.of("blocks.1.hook_resid_post", BASIS, costly).sentences()
    assert other.startswith("variance-a0.5: indistinguishable")
    assert "; at equal KL better; at equal density the same; " in other
    rare = [
        dataclasses.replace(r, density=1.7 * r.density) if r.rule == "variance" else r
        for r in results
    ]
    (other,) = StudyReport.of("blocks.1.hook_resid_post", BASIS, rare).sentences()
    assert "; at equal KL the same; at equal density worse; " in other


def test_a_report_says_what_more_than_five_seeds_are_worth():
    def report(count):
        made, seeds = Made(), range(count)
        results = made.curve(seeds=seeds) + made.rule(seeds=seeds)
        return StudyReport.of("blocks.1.hook_resid_post", BASIS, results)

    said = "only if they were all decided on beforehand"
    assert said not in report(5).markdown() + report(5).page() + report(5).table()
    many = report(6)
    assert many.sentences()[-1].startswith("This study has 6 seeds. ")
    for shown in (many.to_dict()["sentences"][-1], many.markdown(), many.page(), many.table()):
        assert shown.count(said) == 1


def test_a_report_of_the_curve_alone(tmp_path):
    report = StudyReport.of("blocks.1.hook_resid_post", BASIS, Made().curve())
    report.write(tmp_path)
    assert report.sentences() == [] and "uniform" in report.table()


def test_a_damaged_result_is_named(tmp_path):
    write_json(tmp_path / "x.json", {"fidelity": {}, "scores": {}})
    with pytest.raises(Exception, match=r"x\.json is not a result of a study"):
        read_result(tmp_path / "x.json")
