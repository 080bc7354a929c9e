"""``llm-wsae theory``: what it prints and leaves, that it goes on, and what it refuses."""

import json
import re
from importlib.metadata import version

import pytest
from command_line import call, content, works
from matplotlib.image import imread

from llm_wsae.theory import experiments, jobs

SMALL = ("--experiments", "mixed-0.7", "digon-0.5", "--seeds", 3, 5, "--steps", 20,
         "--batch-size", 32, "--rows", 300, "--spare-latents", 2)  # fmt: skip


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Closed-form facts without the toy models, whose training takes seconds."""
    monkeypatch.setattr(experiments, "MIXTURES", {"digon": 0.5, "mixed": 0.5})


def test_tables_figures_and_json(tmp_path):
    out = tmp_path / "out"
    result = works("theory", *SMALL, "--out", out, "--json")
    written = json.loads((out / "theory.json").read_text())
    assert written["command"] == "theory" and written["versions"]["torch"] == version("torch")
    assert {k: written[k] for k in result.json} == result.json
    assert list(result.json["arms"]) == ["mixed-0.7", "digon-0.5"]
    assert result.json["config"]["seeds"] == [3, 5] and result.json["config"]["steps"] == 20
    assert "planted experiments: 100%" in result.err and "6/6" in result.err
    for name in experiments.FIGURES:
        height, width, _ = imread(out / name).shape
        assert min(height, width) > 200
    found = {path.stem for path in (out / "units").iterdir()}
    assert found == {
        *(f"{name}-seed{seed}" for name in ("mixed-0.7", "digon-0.5") for seed in (3, 5)),
        *(f"closed-form-{name}-seed3" for name in ("digon", "mixed")),
    }

    before = content(out)
    again = works("theory", *SMALL, "--out", out)
    assert again.err == "" and content(out) == before  # no bar: nothing was computed
    hoyer = result.json["arms"]["digon-0.5"]["hoyer"]
    wins = r"{:+.1f}[*~!]? {}".format(hoyer["change"]["mean"], hoyer["wins"]).replace("+", r"\+")
    assert re.search(rf"^hoyer .* {wins}$", again.out, re.MULTILINE)
    rank = result.json["correlations"]["digon-0.5"]["hoyer"]
    assert rank > 0.6 and re.search(rf"^hoyer .* \+{rank:.2f}$", again.out, re.MULTILINE)
    assert str(out / "theory.md") in again.out
    assert all(str(out / name) in again.out for name in experiments.FIGURES)
    widest = max(len(line) for line in again.out.splitlines())
    assert widest < 130


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    works("theory", *SMALL, "--out", whole, "--workers", 1)
    write, written = jobs.write_json, []

    def interrupted_at_the_fourth(path, value):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_json", interrupted_at_the_fourth)
        result = call("theory", *SMALL, "--out", out, "--workers", 1)
    assert result.code == 130 and "Traceback" not in result.err
    assert result.err.endswith("run the same command again to resume\n")
    assert sorted(p.name for p in (out / "units").iterdir()) == sorted(written)
    assert not (out / "theory.json").exists()
    again = works("theory", *SMALL, "--out", out, "--workers", 1)
    assert "3/3" in again.err
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
