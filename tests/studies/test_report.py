"""The report of a study: its sentences, tables, files and figures, from made-up results."""

import dataclasses
import json
import re

import pytest
from matplotlib.image import imread
from study_cases import KS, NATS, Made

from llm_wsae.files import write_json
from llm_wsae.studies import verdict as v
from llm_wsae.studies.report import StudyReport
from llm_wsae.studies.results import MEASURES, read_result

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


def test_a_report_of_the_curve_alone(tmp_path):
    report = StudyReport.of("blocks.1.hook_resid_post", BASIS, Made().curve())
    report.write(tmp_path)
    assert report.sentences() == [] and "uniform" in report.table()


def test_a_damaged_result_is_named(tmp_path):
    write_json(tmp_path / "x.json", {"fidelity": {}, "scores": {}})
    with pytest.raises(Exception, match=r"x\.json is not a result of a study"):
        read_result(tmp_path / "x.json")
