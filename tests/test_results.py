"""RESULTS.md says what the measurements that lie beside it say."""

import re
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e-?\d+)?")


def test_the_section_of_the_study_is_that_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_study

    studies = {s: found for s in results_study.SITES if (found := results_study.Study.read(s))}
    assert studies
    expected = results_study.section(studies)
    written = (SCRIPTS / "RESULTS.md").read_text(encoding="utf-8")
    written = (
        written.partition("<!-- begin study -->")[2].partition("<!-- end study -->")[0].strip()
    )
    assert NUMBER.sub("#", written) == NUMBER.sub("#", expected)
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (written, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=2e-4)


def test_every_rule_of_the_study_is_measured_at_every_site(monkeypatch):
    """On at least three seeds, with its control, beside five plain k."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_study

    for site in results_study.SITES:
        study = results_study.Study.read(site)
        assert study is not None and study.report.compared
        for one in study.report.compared:
            assert len(one.seeds) >= 3
            assert one.is_control or one.control is None or study.compared(one.control)
        plain = {(r.point.k, r.point.seed) for r in study.report.results if r.label == "uniform"}
        assert len({k for k, _ in plain}) >= 5 and len({seed for _, seed in plain}) >= 3
