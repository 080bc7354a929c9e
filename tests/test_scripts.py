"""Scripts run and import what exists; docs/results says what was measured."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import SCRIPTS

HAS_CARD = torch.cuda.is_available()
NO_CARD = pytest.mark.skipif(HAS_CARD, reason="there is a CUDA device")
CARD = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CARD, reason="no CUDA device")]
)


def ran(*words, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run([*map(str, words)], env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", CARD])
def test_the_table_of_the_training_step(device):
    """Ours, rows of length 1, four arms and the floor: each row has a time above 0, and the floor's
    is the sum of its parts."""
    shape = ["--shapes", "32x256x4", "--batch", "64", "--rounds", "1", "--steps", "1"]
    how = ["--peers", *shape, "--threads", "1", "--device", device]
    done = ran(sys.executable, SCRIPTS / "bench_train.py", *how)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith("| ")]
    seconds = {name.strip(): float(cell) for name, cell in rows[1:]}
    assert len(seconds) == 6
    assert all(value > 0 for value in seconds.values())
    *_, matmul, adam, floor = seconds.values()
    assert abs(floor - matmul - adam) < 0.02 * floor  # printed with three digits


def gpu_check(tmp_path, *words: str, fails: str = "nothing") -> subprocess.CompletedProcess:
    """With a Python that only writes down what it is asked for, and cannot do what ``fails``."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" | tee -a {tmp_path}/calls\n! echo "$@" | grep -q {fails}\n'
    )
    python.chmod(0o755)
    where = {"PYTHON": str(python), "TMPDIR": str(tmp_path)}
    return ran("bash", SCRIPTS / "gpu_check.sh", *words, **where)


@NO_CARD
def test_without_a_gpu_the_gpu_check_says_so(tmp_path):
    done = gpu_check(tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"there is no NVIDIA card here[^\n]+\n", done.stderr)


def test_the_gpu_check_goes_on_after_a_failure_and_gives_options_that_exist(tmp_path):
    done = gpu_check(tmp_path, "--rehearse", fails="bench_harvest")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("failed: harvest; ")
    _, *parts = (line.split(" | ") for line in done.stdout.splitlines() if line.endswith(" |"))
    assert [words[:7] for _, _, words in parts] == ["ok |"] * 6 + ["failed:"] + ["ok |"] * 2
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    benchmarks = {words[0]: words for words in calls if words[0].startswith("scripts/bench_")}
    assert len(benchmarks) == 3
    for path, words in benchmarks.items():
        source = (SCRIPTS / Path(path).name).read_text(encoding="utf-8")
        known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source))
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, (path, given - known)
    (run,) = [words for words in calls if words[:3] == ["-m", "llm_wsae", "run"]]
    options = {word for word in run if word.startswith("--")}
    documented = (SCRIPTS.parent / "docs/commands/run.md").read_text(encoding="utf-8")
    assert options <= set(re.findall(r"`(--[a-z-]+)", documented)), options


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


def test_the_section_on_probes_is_that_of_the_measurements(monkeypatch):
    """The same words, and the same numbers but for what another processor rounds differently."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results_probes

    page = results_probes.PAGE.read_text(encoding="utf-8")
    shown = page.partition("<!-- begin probes -->")[2].partition("<!-- end probes -->")[0].strip()
    made = results_probes.section()
    assert NUMBER.sub("#", shown) == NUMBER.sub("#", made)
    found, expected = ([float(n) for n in NUMBER.findall(text)] for text in (shown, made))
    assert found == pytest.approx(expected, rel=0.02, abs=2e-4)
