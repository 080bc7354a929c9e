"""The planted experiments: units of work that are computed once, what a run writes, and what
``llm-wsae theory`` prints, that it goes on, and what it refuses.
"""

import dataclasses
import json
import re
import threading
from importlib.metadata import version

import numpy as np
import pytest
import torch
from command_line import call, content, works
from matplotlib.image import imread
from scipy import stats

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.theory import experiments, jobs, rules, superposition
from llm_wsae.theory.config import EXPERIMENTS, SWEEPS, Point, Sweep, TheoryConfig
from llm_wsae.theory.experiments import FIGURES, figures, run_theory, run_unit
from llm_wsae.theory.jobs import Unit, finish
from llm_wsae.theory.report import SCORING
from llm_wsae.theory.rules import ARMS, RULES, SHOWN, score

SMALL = TheoryConfig(
    experiments=("digon-0.5", "outliers-0.7"),
    seeds=(0, 1),
    steps=30,
    batch_size=32,
    rows=400,
    workers=1,
)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Closed-form facts without the toy models, whose training takes seconds."""
    monkeypatch.setattr(experiments, "MIXTURES", {"digon": 0.5, "mixed": 0.5})


def test_a_dead_latent_of_the_first_dictionary_tells_no_rule_anything(monkeypatch):
    """Its direction is the one it started with."""
    seen = []

    def look(rule, known):
        if rule.name == "participation":
            seen.append(known)
        return score(rule, known)

    monkeypatch.setattr(rules, "score", look)
    kept = experiments.encode_tied

    def dying(w, rows, k):
        codes = kept(w, rows, k)
        codes[:, 5] = 0
        return codes

    monkeypatch.setattr(experiments, "encode_tied", dying)
    run_unit(EXPERIMENTS["digon-0.5"], 0, SMALL)
    assert seen
    for inputs in seen:
        assert len(inputs.decoder) == len(inputs.energy) < 40
        assert bool((inputs.energy > 0).all())


def test_a_unit_measures_every_arm_and_rule_and_repeats_itself():
    unit = run_unit(EXPERIMENTS["digon-0.5"], 3, SMALL)
    assert list(unit["arms"]) == list(ARMS) and list(unit["correlations"]) == list(RULES)
    assert unit["facts"] == {
        "n": 30,
        "n_p": 20,
        "latents": 40,
        "k": 8,
        "mean_active": pytest.approx(15),
    }
    assert unit["correlations"]["uniform"] is None
    assert unit["correlations"]["participation-true"] == pytest.approx(1)
    assert unit["correlations"]["variance"] < -0.8 and unit["correlations"]["kurtosis"] > 0.8
    losses = [arm["l_gt"] for arm in unit["arms"].values()]
    assert all(0 < loss < 1 for loss in losses) and len(set(losses)) > 30
    again = run_unit(EXPERIMENTS["digon-0.5"], 3, SMALL)
    assert json.dumps(again) == json.dumps(unit)
    assert run_unit(EXPERIMENTS["digon-0.5"], 4, SMALL)["arms"] != unit["arms"]


def test_a_run_writes_tables_and_figures(tmp_path):
    report = run_theory(SMALL, tmp_path)
    for name in FIGURES:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    written = json.loads((tmp_path / "theory.json").read_text())
    assert written.items() >= json.loads(json.dumps(report.to_dict())).items()
    assert written["command"] == "theory" and written["config"]["seeds"] == [0, 1]
    assert written["closed_form"]["digon"]["only_digons"]
    assert written["closed_form"]["digon"]["sparsity_needed"] == pytest.approx(0.85, abs=0.03)
    assert written["closed_form"]["mixed"]["sparsity_needed"] is None
    for point in written["closed_form"]["mixed"]["by_sparsity"]:
        assert point["gap"] == pytest.approx(point["sae_loss"] - point["truth_loss"], abs=1e-10)
    # 10 digons, each an off-diagonal −1 twice; the best γ² of (1, −1; −1, 1) is ½, which leaves 1
    norms = written["closed_form"]["digon"]["gap_norms"]
    assert norms["none"] == pytest.approx(20**0.5) and norms["best_scalar"] == pytest.approx(
        12**0.5
    )
    assert norms["weights"]["gap"] == pytest.approx(10**0.5)
    assert norms["whitening"] == pytest.approx(10**0.5) == norms["bound"]
    for name, found in written["closed_form"].items():
        norms = found["gap_norms"]
        assert norms["none"] >= norms["best_scalar"] >= norms["whitening"] >= norms["bound"] - 1e-9
        assert min(norms["weights"].values()) == norms["weights"]["gap"], name
        for point in found["by_sparsity"]:
            assert {"gap", "gap_best_scalar", "gap_weighted", "gap_whitening"} <= set(point)
    table, markdown = report.table(), (tmp_path / "theory.md").read_text()
    for text in (table, markdown):
        for word in ("plain", *SHOWN, *SCORING, *SMALL.experiments):
            assert word in text
    assert "plain, one scale" in table
    assert "with one scale for all features: change" in markdown
    plain = report.arms["digon-0.5"]["plain"]
    assert plain.l_gt <= plain.l_gt_one_scale <= 1 and plain.change_one_scale.mean == 0
    outlier = report.arms["outliers-0.7"]["plain"]  # columns of W_p 20 times as long as others
    assert outlier.l_gt_one_scale > outlier.l_gt + 0.01
    assert plain.change.mean == 0 and plain.wins == 0 and plain.verdict == "–"
    untrained = report.untrained["digon-0.5"]  # raw dimensions with both signs are its features
    assert untrained["raw dimensions"]["l_gt"] < plain.l_gt < untrained["random directions"]["l_gt"]
    assert "untrained: raw dimensions" in table
    units = [json.loads(p.read_text()) for p in sorted((tmp_path / "units").glob("digon*"))]
    mean = np.mean([u["result"]["arms"]["participation"]["l_gt"] for u in units])
    assert report.arms["digon-0.5"]["participation"].l_gt == pytest.approx(mean)


def test_related_features_are_measured_beside_independent_ones(tmp_path):
    names = ("hierarchy-0.9", "hierarchy-off-0.9", "correlated-0.9")
    report = run_theory(dataclasses.replace(SMALL, experiments=names), tmp_path)
    ((title, rows),) = report.related_tables()
    assert "absorbed" in title
    assert rows[0] == [
        "arm", "hierarchy-0.9: absorbed", "hierarchy-0.9: merged", "hierarchy-off-0.9: absorbed",
        "hierarchy-off-0.9: merged", "correlated-0.9: merged",
    ]  # fmt: skip
    untrained = ["untrained: random directions", "untrained: raw dimensions"]
    assert [row[0] for row in rows[1:]] == ["plain", *SHOWN, *untrained]
    for row in rows[-2:]:
        assert all(-1 <= float(share) <= 1 for share in row[1:])
    for arm in report.arms["correlated-0.9"].values():
        assert arm.absorbed is None and 0 <= arm.merged.mean <= 1
    for arm in report.arms["hierarchy-0.9"].values():
        assert -1 <= arm.absorbed.mean <= 1


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    first = run_theory(SMALL, tmp_path)
    (tmp_path / "units" / "digon-0.5-seed1.json").unlink()
    asked = []

    def counted(experiment, seed, config, check):
        asked.append((experiment.regime, seed))
        return run_unit(experiment, seed, config, check)

    monkeypatch.setattr(experiments, "run_unit", counted)
    second = run_theory(dataclasses.replace(SMALL, workers=2), tmp_path)
    assert asked == [("digon", 1)]
    assert second.arms == first.arms
    more = run_theory(dataclasses.replace(SMALL, seeds=(0, 1, 2)), tmp_path)
    assert sorted(asked[1:]) == [("digon", 2), ("outliers", 2)]
    assert len(list((tmp_path / "units").glob("*-0.?-seed*.json"))) == 12
    assert more.arms != first.arms


def test_units_of_another_configuration_are_not_mixed_in(tmp_path):
    config = dataclasses.replace(SMALL, experiments=("digon-0.5",))
    run_theory(config, tmp_path)
    with pytest.raises(LlmWsaeError, match=r"another steps \(30, now 31\)"):
        run_theory(dataclasses.replace(config, steps=31), tmp_path)


def test_a_file_that_is_no_result_is_named(tmp_path):
    config = dataclasses.replace(SMALL, experiments=("digon-0.5",))
    path = tmp_path / "units" / "digon-0.5-seed1.json"
    path.parent.mkdir()
    for text in ("[]", "{}", '{"identity": 3, "result": {}}', "{"):
        path.write_text(text)
        with pytest.raises(LlmWsaeError, match=r"digon-0\.5-seed1\.json is not "):
            run_theory(config, tmp_path)
        assert path.read_text() == text


def test_an_error_in_a_unit_is_not_swallowed(tmp_path, monkeypatch):
    def broken(sparsity, generator):
        raise LlmWsaeError("no such mixture today")

    monkeypatch.setitem(superposition.REGIMES, "digon", broken)
    threads = torch.get_num_threads()
    with pytest.raises(LlmWsaeError, match="no such mixture today"):
        run_theory(SMALL, tmp_path)
    assert torch.get_num_threads() == threads
    assert not (tmp_path / "theory.json").exists()


def test_an_interruption_ends_every_unit_and_keeps_what_is_done(tmp_path):
    """One unit is done, one is interrupted; the one beside it would go on for ever."""
    started = threading.Event()

    def done(check):
        return {"value": 1}

    def interrupted(check):
        started.wait()
        raise KeyboardInterrupt

    def endless(check):
        started.set()
        while True:
            check()

    def units(*computes):
        return [Unit(tmp_path / f"{c.__name__}.json", {"seed": 0}, c) for c in computes]

    with pytest.raises(KeyboardInterrupt):
        finish(units(done, interrupted, endless), 2, "units")
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]
    assert finish(units(done), 1, "units") == [{"value": 1}]


def test_a_training_asks_whether_to_stop(tmp_path):
    asked = []

    def stop_at_the_fifth_step():
        asked.append(1)
        if len(asked) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_unit(EXPERIMENTS["digon-0.5"], 0, SMALL, stop_at_the_fifth_step)
    assert len(asked) == 5


def test_configurations_that_cannot_be():
    for wrong, message in (
        ({"experiments": ("mixed-0.4",)}, "no planted experiment 'mixed-0.4'; did you mean"),
        ({"experiments": ("digon-0.5", "digon-0.5")}, "once"),
        ({"experiments": ()}, "at least one planted experiment of digon-0.5, "),
        ({"seeds": (1,)}, "seeds are 1; .* at least two"),
        ({"seeds": ()}, "seeds are none"),
        ({"seeds": (1, 2, 1)}, "seeds are 1 2 1; .* different"),
        ({"seeds": (1, -2)}, "seeds is -2, but must be at least 0"),
        ({"steps": 0}, "steps is 0"),
        ({"rows": 99}, "rows is 99, but must be at least 100"),
        ({"spare_latents": -1}, "spare-latents is -1"),
    ):
        with pytest.raises(UsageError, match=message):
            TheoryConfig(**wrong)


FEW = {"met": Point("digons-40", 0.99, 40, 1), "relu": Point("digons-40", 0.99, 40, 0)}


def test_a_sweep_is_measured_at_every_point(tmp_path, monkeypatch):
    sweep = Sweep("two points", FEW, ("plain", "whitening"))
    monkeypatch.setitem(SWEEPS, "conditions-digons", sweep)
    config = TheoryConfig(
        experiments=("conditions-digons",), seeds=(0, 1), steps=300, batch_size=128, rows=2000
    )
    report = run_theory(config, tmp_path)
    assert not report.arms and list(report.sweeps["conditions-digons"]) == ["met", "relu"]
    met, relu = (point.measures["plain"] for point in report.sweeps["conditions-digons"].values())
    assert met["recovered"].mean > 0.7 > 0.1 > relu["recovered"].mean
    assert met["features_per_latent"].mean < 1.2 < 4 < relu["features_per_latent"].mean
    units = [
        json.loads(p.read_text())
        for p in sorted((tmp_path / "units").glob("conditions-digons-met-*"))
    ]
    found = [unit["result"]["arms"]["plain"]["l_gt"] for unit in units]
    assert met["l_gt"].mean == pytest.approx(np.mean(found)) and len(found) == 2
    low, high = stats.t.interval(0.95, 1, loc=np.mean(found), scale=stats.sem(found))
    assert met["l_gt"].interval == pytest.approx((low, high))
    whitened = [unit["result"]["arms"]["whitening"]["l_gt"] for unit in units]
    change = 100 * (np.mean(whitened) / np.mean(found) - 1)
    assert report.sweeps["conditions-digons"]["met"].changes["whitening"].mean == pytest.approx(
        change
    )
    untrained = report.sweeps["conditions-digons"]["met"].untrained
    assert met["l_gt"].mean < untrained["random directions"]["l_gt"] < 1
    without = [json.loads(p.read_text()) for p in (tmp_path / "units").glob("untrained-*-met-*")]
    raw = [unit["result"]["raw dimensions"]["l_gt"] for unit in without]
    assert untrained["raw dimensions"]["l_gt"] == pytest.approx(np.mean(raw)) and len(raw) == 2
    assert "two points" in report.table() and "two points" in report.markdown()
    assert figures(report) == ("closed_form.png", "conditions_digons.png")
    assert all((tmp_path / name).exists() for name in figures(report))
    written = json.loads((tmp_path / "theory.json").read_text())["sweeps"]["conditions-digons"]
    assert written["settings"]["relu"]["k"] == 0 and set(written["points"]) == {"met", "relu"}


def test_every_sweep_names_what_exists():
    for sweep in SWEEPS.values():
        assert sweep.arms[0] == "plain" and set(sweep.arms) <= set(ARMS)
        for point in sweep.points.values():
            assert point.regime in superposition.REGIMES and 0 <= point.k < point.latents
        # a sweep's units have neither a first dictionary nor a model
        assert not any(ARMS[arm].needs_dictionary for arm in sweep.arms)
    claim = SWEEPS["toy-claim"]
    assert set(claim.lines) == {"ReLU", "TopK"} and len(claim.points) == 12
    assert {point.latents for point in claim.points.values()} == {200}


WORDS = ("--experiments", "mixed-0.7", "digon-0.5", "--seeds", 3, 5, "--steps", 20,
         "--batch-size", 32, "--rows", 300, "--spare-latents", 2)  # fmt: skip


def test_tables_figures_and_json(tmp_path):
    out = tmp_path / "out"
    result = works("theory", *WORDS, "--out", out, "--json")
    written = json.loads((out / "theory.json").read_text())
    assert written["command"] == "theory" and written["versions"]["torch"] == version("torch")
    assert {k: written[k] for k in result.json} == result.json
    assert list(result.json["arms"]) == ["mixed-0.7", "digon-0.5"]
    assert result.json["config"]["seeds"] == [3, 5] and result.json["config"]["steps"] == 20
    assert "planted experiments: 100%" in result.err and "10/10" in result.err
    for name in experiments.FIGURES:
        height, width, _ = imread(out / name).shape
        assert min(height, width) > 200
    found = {path.stem for path in (out / "units").iterdir()}
    assert found == {
        *(
            f"{start}{name}-seed{seed}"
            for start in ("", "untrained-")
            for name in ("mixed-0.7", "digon-0.5")
            for seed in (3, 5)
        ),
        *(f"closed-form-{name}-seed3" for name in ("digon", "mixed")),
    }

    assert works("verify", out).out == f"{out}: theory is intact\n"
    unit = out / "units/mixed-0.7-seed3.json"
    whole = unit.read_bytes()
    for data in (whole.replace(b"3", b"4", 1), b"[]", b"{}"):
        unit.write_bytes(data)
        assert call("verify", out).code == 1 and str(unit) in call("verify", out).err
    unit.write_bytes(whole)

    before = content(out)
    again = works("theory", *WORDS, "--out", out)
    assert again.err == "" and content(out) == before  # no bar: nothing was computed
    participation = result.json["arms"]["digon-0.5"]["participation"]
    wins = r"{:+.1f}[*~!]? {}".format(
        participation["change"]["mean"], participation["wins"]
    ).replace("+", r"\+")
    assert re.search(rf"^participation .* {wins}$", again.out, re.MULTILINE)
    rank = result.json["correlations"]["digon-0.5"]["kurtosis"]
    assert rank > 0.6 and re.search(rf"^kurtosis .* \+{rank:.2f}$", again.out, re.MULTILINE)
    assert str(out / "theory.md") in again.out
    assert all(str(out / name) in again.out for name in experiments.FIGURES)
    widest = max(len(line) for line in again.out.splitlines())
    assert widest < 130


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    works("theory", *WORDS, "--out", whole, "--workers", 1)
    write, written = jobs.write_json, []

    def interrupted_at_the_fourth(path, value):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_json", interrupted_at_the_fourth)
        result = call("theory", *WORDS, "--out", out, "--workers", 1)
    assert result.code == 130 and "Traceback" not in result.err
    assert result.err.endswith("run the same command again to resume\n")
    assert sorted(p.name for p in (out / "units").iterdir()) == sorted(written)
    assert not (out / "theory.json").exists()
    again = works("theory", *WORDS, "--out", out, "--workers", 1)
    assert "7/7" in again.err
    text = [name for name in content(whole) if not name.endswith(".png")]
    assert {name: content(out)[name] for name in text} == {n: content(whole)[n] for n in text}


def test_bad_usage(tmp_path, subtests):
    for words, sentence in (
        (("--experiments", "mixd-0.7"), "no planted experiment 'mixd-0.7'; did you mean"),
        (("--seeds", 10), "seeds are 10; an interval needs at least two different ones"),
        (("--steps", 0), "steps is 0, but must be at least 1"),
    ):
        with subtests.test(sentence):
            result = call("theory", *words, "--out", tmp_path / "out")
            assert result.code == 2 and sentence in result.err
            assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_left_alone(tmp_path):
    few = ("--experiments", "digon-0.5", "--seeds", 0, 1, "--rows", 100, "--batch-size", 8)
    works("theory", *few, "--steps", 2, "--out", tmp_path)
    before = content(tmp_path)
    result = call("theory", *few, "--steps", 3, "--out", tmp_path)
    assert result.code == 1 and "computed with another steps (2, now 3)" in result.err
    assert content(tmp_path) == before
