"""docs/results.md says what the measurements that lie beside it say."""

import json
import re

import pytest
from places import ROOT, SCRIPTS

from llm_wsae.theory import experiments
from llm_wsae.theory.config import TheoryConfig
from llm_wsae.weights.rules import RULES

NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e-?\d+)?")


def written(name: str) -> str:
    """A section of docs/results.md."""
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    return text.partition(f"<!-- begin {name} -->")[2].partition(f"<!-- end {name} -->")[0].strip()


def measured_already(*_):
    raise AssertionError("something is measured anew")


def agree(one: str, other: str) -> None:
    """The same words, and the same numbers but for what another processor rounds differently."""
    assert NUMBER.sub("#", one) == NUMBER.sub("#", other)
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (one, other)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=2e-4)


def test_the_section_of_the_study_is_that_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_study

    assert results_study.Study.read_all(results_study.FOLDER)
    agree(written("study"), results_study.section())


def test_what_is_said_of_the_paper_is_that_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import paper_section
    import study_claims

    studies = study_claims.Study.read_all(study_claims.FOLDER)
    agree(written("paper"), paper_section.section(studies))


def test_the_planted_section_is_that_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_archive
    import results_theory

    kept = results_archive.read(results_theory.ARCHIVE)
    results_archive.unpack(results_theory.ARCHIVE, tmp_path)
    monkeypatch.setattr(experiments, "run_unit", measured_already)
    report = experiments.run_theory(TheoryConfig(seeds=results_theory.SEEDS), tmp_path)
    agree(written("planted"), results_theory.section(report))
    again = json.loads((tmp_path / "theory.json").read_text(encoding="utf-8"))
    texts = (json.dumps(one | {"versions": {}}) for one in (kept["theory.json"], again))
    agree(*texts)


def test_every_rule_of_the_study_is_measured_at_every_site(monkeypatch):
    """On at least three seeds, with its control, beside five plain k."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_study

    studies = results_study.Study.read_all(results_study.FOLDER)
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

    studies = results_study.Study.read_all(results_study.FOLDER)
    again = results_study.Study.read_all(results_study.CONFIRMATION.folder)
    assert tuple(again) == results_study.SITES
    for site, study in again.items():
        (one,) = [compared for compared in study.report.compared if not compared.is_control]
        assert len(one.seeds) >= 5
        assert not set(one.seeds) & set(studies[site].compared(one.label).seeds)
