"""``evaluate --monosemantic`` and ``--keep``: what is printed, written and kept."""

import json
import shutil

import pytest
from command_line import call, content, works
from tiny import save_encoder

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import keep_measurements
from llm_wsae.errors import UsageError

NAMES = ("uniform-k4", "variance-a0.5-k4")


@pytest.fixture(scope="module")
def world(world):
    save_encoder(world / "encoder")
    return world


@pytest.fixture
def words(world, tmp_path):
    """The command, on copies of the dictionaries."""
    for name in NAMES:
        shutil.copytree(world / "trained" / name, tmp_path / name)
    return ["evaluate", *(tmp_path / name for name in NAMES), "--model", world / "model",
            "--corpus", world / "text.jsonl", "--part", "all", "--tokens", 500,
            "--bootstraps", 50, "--out", tmp_path / "report.json"]  # fmt: skip


def test_latents_are_scored_beside_fidelity(words, tmp_path, world):
    before = content(tmp_path)
    plain = works(*words, "--json").json
    result = works(*words, "--monosemantic", "--score.tokens", 3000, "--json")
    assert {k: v for k, v in result.json.items() if k != "monosemanticity"} == plain
    report = json.loads((tmp_path / "report.json").read_text())
    assert result.json.items() <= report.items() and report["command"] == "evaluate"
    found = result.json["monosemanticity"]
    assert 3000 <= found["num_rows"] < 3015 and list(found["dictionaries"]) == list(NAMES)
    assert found["config"]["bootstraps"] == 50 and found["config"]["tokens"] == 3000
    assert {"number"} <= found["sites"][found["dictionaries"][NAMES[0]]["site"]]["families"].keys()
    scores = found["dictionaries"][NAMES[0]]
    assert 0 < scores["eligible_share"] <= 1
    assert scores["latents"]["purity"]["share"] == scores["eligible_share"]

    text = works(*words, "--monosemantic", "--score.tokens", 3000).out
    rows = [line for line in text.splitlines() if line.startswith(NAMES[0])]
    assert len(rows) == 2  # fidelity, monosemanticity
    assert f"{100 * scores['eligible_share']:.1f}" in rows[1].split()
    assert f"{scores['latents']['purity']['mean']:.3f}" in rows[1].split()
    assert text.endswith(f"report  {tmp_path / 'report.json'}\n")
    unchanged = content(tmp_path)
    unchanged.pop("report.json")
    assert unchanged == before  # nothing is kept unless asked


def test_results_are_kept_with_the_dictionaries(words, tmp_path, world):
    words[words.index("all")] = "heldout"
    before = {name: content(tmp_path / name) for name in NAMES}
    asked = (
        "--score.encoder",
        world / "encoder",
        "--monosemantic",
        "--score.tokens",
        1500,
        "--keep",
    )
    report = works(*words, *asked, "--json").json
    for name in NAMES:
        after = content(tmp_path / name)
        changed = [file for file in after if after[file] != before[name][file]]
        assert changed == ["wsae.json"]
        metrics = Dictionary.load(tmp_path / name).info.metrics
        assert metrics["fidelity"]["fvu"] == report["dictionaries"][name]["fvu"]
        assert "latent_density" not in metrics["fidelity"]
        kept = metrics["monosemanticity"]
        scores = report["monosemanticity"]["dictionaries"][name]
        purity = scores["latents"]["purity"]
        assert kept["purity"] == {
            "value": purity["mean"],
            "interval": purity["interval"],
            "control": report["monosemanticity"]["chance"]["purity"],
        }
        dimensions = report["monosemanticity"]["sites"][scores["site"]]["means"]
        assert kept["probe_5"]["value"] == scores["concepts"]["means"]["best_5"]["mean"]
        assert kept["probe_5"]["control"] == dimensions["best_5"]
        assert kept["eligible_share"] == scores["eligible_share"]
        assert metrics["training"] == Dictionary.load(tmp_path / name).info.metrics["training"]
    works("verify", tmp_path / NAMES[0])
    once = content(tmp_path / NAMES[0])
    works(*words[:3], *words[1:], *asked)  # each of them twice
    assert content(tmp_path / NAMES[0]) == once


def test_what_cannot_be_done_is_said_before_the_work(words, tmp_path, world):
    def fails(match, *more, code=2):
        result = call(*words, *more)
        assert result.code == code and match in result.err, result.err
        assert result.err.rstrip().count("\n") <= 1  # "loading", and the sentence
        assert "evaluate:" not in result.err and not (tmp_path / "report.json").exists()

    asked = ("--score.encoder", world / "encoder", "--monosemantic", "--score.tokens")
    fails("is not a sentence encoder", *asked, 3000, "--score.encoder", world / "model")
    fails(
        "no document has a label 'nmber'; did you mean 'number'",
        *asked,
        3000,
        "--score.labels",
        "nmber",
    )
    fails("but 1,000,000 in at least 2 contexts are needed", *asked, 1_000_000, code=1)
    fails("--score: tokens is 0, but must be at least 1", *asked, 0)
    fails("--score.labels: only with --monosemantic; add that", "--score.labels", "number")
    fails("--score.tokens and --score.encoder: only with", asked[-1], 3000, *asked[:2])
    (tmp_path / NAMES[1] / "wsae.json").rename(tmp_path / "elsewhere.json")
    fails("--keep stores what was measured on held-out text", *asked, 3000, "--keep")
    words[words.index("all")] = "heldout"
    fails("was not saved by this package", *asked, 1500, "--keep")
    (tmp_path / NAMES[1] / "wsae.json").symlink_to(tmp_path / "elsewhere.json")
    fails("wsae.json is only a link", *asked, 1500, "--keep")


def test_a_measurement_replaces_its_own_group_only(world, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(world / "trained" / NAMES[0], folder)
    keep_measurements(folder, {"fidelity": {"fvu": 0.5}})
    keep_measurements(folder, {"monosemanticity": {"purity": 0.7}})
    keep_measurements(folder, {"fidelity": {"kl": 0.1}})
    metrics = Dictionary.load(folder).info.metrics
    assert metrics["fidelity"] == {"kl": 0.1} and metrics["monosemanticity"] == {"purity": 0.7}
    assert (
        metrics["training"]
        == Dictionary.load(world / "trained" / NAMES[0]).info.metrics["training"]
    )
    with pytest.raises(UsageError, match="was not saved by this package"):
        keep_measurements(tmp_path, {"fidelity": {}})
    assert Dictionary.load(folder).info.metrics == metrics
