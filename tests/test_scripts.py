"""Scripts run and import what exists; docs/results says what the archives say."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import SCRIPTS

from llm_wsae.studies.inference import Estimate
from llm_wsae.weights.rules import RULES, Rule

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CARD = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])


def bench_train(device: str) -> subprocess.CompletedProcess:
    """At a tiny shape, without peers."""
    shape = ["--shapes", "32x256x4", "--batch", "64", "--rounds", "1", "--steps", "1"]
    how = ["--threads", "1", "--device", device]
    return subprocess.run(
        [sys.executable, SCRIPTS / "bench_train.py", "--peers", *shape, *how],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("device", ["cpu", CARD])
def test_the_table_of_the_training_step(device):
    """Ours, rows of length 1, four arms and the floor: each row has a time above 0, and the floor's
    is the sum of its parts."""
    done = bench_train(device)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith("| ")]
    seconds = {name.strip(): float(cell) for name, cell in rows[1:]}
    assert len(seconds) == 6
    assert all(value > 0 for value in seconds.values())
    *_, matmul, adam, floor = seconds.values()
    assert abs(floor - matmul - adam) < 0.02 * floor  # printed with three digits


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_benchmark_says_so():
    done = bench_train("cuda")
    assert done.returncode == 1
    assert done.stderr.strip() == "there is no device 'cuda' on this machine; it has cpu"


def gpu_check(tmp_path, *words: str, fails: str = "nothing") -> subprocess.CompletedProcess:
    """With a Python that only writes down what it is asked for, and cannot do what ``fails``."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" | tee -a {tmp_path}/calls\n! echo "$@" | grep -q {fails}\n'
    )
    python.chmod(0o755)
    return subprocess.run(
        ["bash", SCRIPTS / "gpu_check.sh", *words],
        env=os.environ | {"PYTHON": str(python), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_gpu_check_says_so(tmp_path):
    done = gpu_check(tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"there is no NVIDIA card here[^\n]+\n", done.stderr)


def test_the_gpu_check_goes_on_after_a_failure_and_gives_options_that_exist(tmp_path, monkeypatch):
    done = gpu_check(tmp_path, "--rehearse", fails="bench_harvest")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("failed: harvest; ")
    _, *parts = (line.split(" | ") for line in done.stdout.splitlines() if line.endswith(" |"))
    assert [words[:7] for _, _, words in parts] == ["ok |"] * 6 + ["failed:"] + ["ok |"] * 2

    monkeypatch.syspath_prepend(str(SCRIPTS))
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    benchmarks = {words[0]: words for words in calls if words[0].startswith("scripts/bench_")}
    assert len(benchmarks) == 3
    for path, words in benchmarks.items():
        module = importlib.import_module(Path(path).stem)
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(module, "choose_device", sys.exit)  # what comes behind the options
        with pytest.raises(SystemExit, match=r"^cpu$"):
            module.main()
    (run,) = [words for words in calls if words[:3] == ["-m", "llm_wsae", "run"]]
    options = {word for word in run if word.startswith("--")}
    documented = (SCRIPTS.parent / "docs/commands/run.md").read_text(encoding="utf-8")
    assert options <= set(re.findall(r"`(--[a-z-]+)", documented)), options


def test_a_section_is_replaced_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import write_section

    path = tmp_path / "page.md"
    path.write_text("# Page\n")
    write_section("a", "old a", path)
    write_section("b", "b", path)
    whole = path.read_text()
    write_section("a", "new a", path)
    assert path.read_text() == whole.replace("old a", "new a")
    assert re.findall(r"<!-- begin (\w) -->", path.read_text()) == ["a", "b"]


def test_every_section_of_the_results_is_on_its_page_alone(monkeypatch):
    """A page that had been given another's section would keep old numbers for ever."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import RESULT_PAGES, RESULTS

    marker = re.compile(r"^<!-- begin (.+) -->$", re.MULTILINE)
    found = [
        (name, os.path.relpath(path, RESULTS))
        for path in (*RESULTS.glob("*.md"), RESULTS.parent / "which-weights.md")
        for name in marker.findall(path.read_text(encoding="utf-8"))
    ]
    assert sorted(found) == sorted(RESULT_PAGES.items())


def test_scripts_import_names_that_exist():
    """Most scripts run for minutes and rarely; a name that has moved must not wait for that."""
    for script in sorted(SCRIPTS.rglob("*.py")):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "llm_wsae":
                module = importlib.import_module(node.module)
                names = {*dir(module), *getattr(module, "__all__", ())}
                missing = {alias.name for alias in node.names} - names
                assert not missing, f"{script}, line {node.lineno}"


NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e-?\d+)?")


def written(name: str) -> str:
    """A section of docs/results, from the page where its script writes it."""
    from benchmarks import RESULT_PAGES, RESULTS

    text = (RESULTS / RESULT_PAGES[name]).read_text(encoding="utf-8")
    return text.partition(f"<!-- begin {name} -->")[2].partition(f"<!-- end {name} -->")[0].strip()


def unpack(monkeypatch, tmp_path, *scripts) -> None:
    """The archives of several scripts, in folders of their own."""
    import results_archive

    for script in scripts:
        results_archive.unpack(script.ARCHIVE, tmp_path / script.__name__)
        monkeypatch.setattr(script, "RUN", tmp_path / script.__name__)


def agree(one: str, other: str) -> None:
    """The same words, and the same numbers but for what another processor rounds differently."""
    assert NUMBER.sub("#", one) == NUMBER.sub("#", other)
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (one, other)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=2e-4)


def test_the_section_of_the_study_is_that_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_study

    studies, baselines = (
        results_study.Study.read_all(folder)
        for folder in (results_study.WEIGHTS, results_study.OF_BASELINES.folder)
    )
    assert studies
    agree(written("study"), results_study.section())
    agree(written("study table"), results_study.study_table(studies, baselines))


def test_what_is_said_of_the_paper_is_that_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import findings
    import study_claims

    studies = study_claims.Study.read_all(study_claims.WEIGHTS)
    agree(written("paper"), findings.paper_section(studies))


def test_the_section_of_free_lengths_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_archive
    import results_free_lengths
    import results_recovery

    results_archive.unpack(results_free_lengths.ARCHIVE, tmp_path)
    monkeypatch.setattr(results_free_lengths, "RUN", tmp_path)
    agree(written("free-lengths"), results_free_lengths.section())
    agree(written("free-lengths-others"), results_free_lengths.section_of_others())
    agree(written("free-lengths-rates"), results_free_lengths.section_of_rates("smollm2"))
    agree(written("free-lengths-rates-gemma"), results_free_lengths.section_of_rates("gemma"))
    agree(written("free-lengths-settings"), results_free_lengths.section_of_settings())
    agree(written("free-lengths-space"), results_free_lengths.section_of_space())
    summary, read = results_free_lengths.free_lengths_summary, results_free_lengths.read
    agree(written("what each brings"), summary.each(read))
    agree(written("what lasts"), summary.lasting(read))
    agree(written("free-lengths-strata"), summary.by_stratum(read))
    for name, part in results_free_lengths.PARTS.items():
        for key in part.places:
            measured = {
                (record["label"], record["seed"])
                for record in results_free_lengths.read(key, part.setting)
            }
            for rule, alpha, place, k in part.weights:
                usual = results_recovery._label(Rule.parse(rule), alpha, place)
                label = usual.removesuffix(f"-k{results_recovery.K}") + f"-k{k}"
                missing = {(label, seed) for seed in part.seeds} - measured
                assert not missing, (name, key)


def test_the_section_of_clean_rows_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_archive
    import results_clean_rows

    results_archive.unpack(results_clean_rows.ARCHIVE, tmp_path)
    monkeypatch.setattr(results_clean_rows, "RUN", tmp_path)
    agree(written("clean-rows"), results_clean_rows.section())
    agree(written("clean-rows-latents"), results_clean_rows.in_short())
    for key, trained in results_clean_rows.TRAINED.items():
        found = results_clean_rows.read(key)
        for (rows, lengths), seeds in trained.items():
            for name in (results_clean_rows.PLAIN, results_clean_rows.WHITENED):
                assert found[rows, lengths, name].keys() == set(seeds), (key, rows, lengths)


def test_the_section_of_baselines_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_baselines
    import results_free_lengths
    import results_recovery

    unpack(monkeypatch, tmp_path, results_recovery, results_free_lengths)
    agree(written("baselines"), results_baselines.section())
    raw, half_random = results_baselines.LABELS[:2], results_baselines.LABELS[2:]
    for setting in results_baselines.SETTINGS:
        for key in setting.places:
            found = {
                (record["label"], record["seed"])
                for record in results_recovery.read_baselines(
                    key, setting.folder, setting.raw_folder
                )
            }
            wanted = {(label, 0) for label in raw}
            wanted |= {(label, seed) for label in half_random for seed in setting.seeds(key)}
            assert found == wanted, (setting.words, key)


def test_the_section_of_recovery_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_archive
    import results_recovery

    results_archive.unpack(results_recovery.ARCHIVE, tmp_path)
    monkeypatch.setattr(results_recovery, "RUN", tmp_path)
    agree(written("recovery"), results_recovery.section())
    for key, where in results_recovery.PLACES.items():
        seeds = {}
        for record in results_recovery.read(key):
            seeds.setdefault(record["label"], set()).add(record["seed"])
        assert seeds.keys().isdisjoint(where.omitted)
        several = {label: len(own) for label, own in seeds.items()}
        assert set(several.values()) <= {3, 5}
        assert {label for label, own in several.items() if own == 5} <= set(results_recovery.BETTER)
    assert len({record["label"] for record in results_recovery.read("smollm2")}) > 15


def test_the_section_on_whitening_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_recovery
    import results_whitening

    unpack(monkeypatch, tmp_path, results_recovery, results_whitening)
    agree(written("whitening"), results_whitening.section())


def test_the_section_on_shrinkage_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_shrinkage

    unpack(monkeypatch, tmp_path, results_shrinkage)
    assert list(results_shrinkage.read()) == list(results_shrinkage.PLACES)
    agree(written("shrinkage"), results_shrinkage.section())


def test_the_section_on_probes_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_archive
    import results_probes

    results_archive.unpack(results_probes.ARCHIVE, tmp_path)
    monkeypatch.setattr(results_probes, "RUN", tmp_path)
    agree(written("probes"), results_probes.section())


def test_the_section_on_gba_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_archive
    import results_gba

    results_archive.unpack(results_gba.ARCHIVE, tmp_path)
    monkeypatch.setattr(results_gba, "RUN", tmp_path)
    agree(written("gba"), results_gba.section())


def test_the_section_on_further_ideas_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_archive
    import results_rules

    results_archive.unpack(results_rules.ARCHIVE, tmp_path)
    monkeypatch.setattr(results_rules, "RUN", tmp_path)
    agree(written("rules"), "\n\n".join(results_rules.tables()))
    # an idea that changes nothing would be measured as the dictionary that it should change
    for key in results_rules.SEEDS:
        numbers = {}
        for record in results_rules.read(key):
            own = (record["seed"], record["f1"], record["fvu"])
            assert numbers.setdefault(own, record["idea"]) == record["idea"]


def test_every_rule_of_the_study_is_measured_at_every_site(monkeypatch):
    """On at least three seeds, with its control, beside five plain k."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_study

    studies = results_study.Study.read_all(results_study.WEIGHTS)
    assert tuple(studies) == results_study.SITES
    for study in studies.values():
        assert {result.rule for result in study.report.results} >= set(RULES)
        for one in study.report.compared:
            assert len(one.seeds) >= 3
            assert one.is_control or one.control is None or study.compared(one.control)
        plain = {(r.point.k, r.point.seed) for r in study.report.results if r.label == "uniform"}
        assert len({k for k, _ in plain}) >= 5 and len({seed for _, seed in plain}) >= 3


def test_the_finding_was_tried_again_on_fresh_seeds_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_study

    studies = results_study.Study.read_all(results_study.WEIGHTS)
    again = results_study.Study.read_all(results_study.CONFIRMATION.folder)
    assert tuple(again) == results_study.SITES
    for site, study in again.items():
        (one,) = [compared for compared in study.report.compared if not compared.is_control]
        assert len(one.seeds) >= 5
        assert not set(one.seeds) & set(studies[site].compared(one.label).seeds)


def test_a_study_without_an_effect_seldom_calls_a_rule_better(monkeypatch):
    """A small version of the table in docs/results; a real effect is found."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from simulate_verdict import Design, Spreads, known_spill, rate

    for spreads in Spreads(), Spreads(spill=known_spill()):
        assert rate(spreads, Design(arms=2, looks=(3, 5)), 40) <= 0.1
        assert rate(spreads, Design(arms=1, looks=(5,), effect=0.03), 20) <= 0.1  # as its control
        alone = Design(arms=1, looks=(5,), effect=0.03, of_control=0.0)
        assert rate(spreads, alone, 10) >= 0.8


def test_a_rule_is_not_selective_where_spill_is_clearly_higher(monkeypatch):
    """Nor is it asked of older studies, which did not measure spill."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from study_claims import K, _selective

    def at(difference):
        interval = (difference - 0.01, difference + 0.01)
        return Estimate(difference, interval, 0.01, 0.005, 9.0, {})

    def measured(**spill):
        one = SimpleNamespace(
            effects={"selectivity": at(0.02), **spill},
            against_control={"selectivity": at(0.02)},
            families={"digit": 0.0},
            ce_change={K: 0.0},
            seeds=(0, 1, 2),
        )
        return _selective("rule")(SimpleNamespace(compared=lambda label: one))

    assert measured()[1] and measured(spill=at(0.009))[1]
    words, met = measured(spill=at(0.02))
    assert not met and words.endswith("spill +0.0200 [+0.0100, +0.0300]")


def test_every_picture_is_drawn_by_one_script():
    found = re.findall(
        r'IMAGES / "([^"]+)"', "".join(path.read_text() for path in SCRIPTS.glob("*.py"))
    )
    assert "learning_curve.png" in found
    assert len(found) == len(set(found))
