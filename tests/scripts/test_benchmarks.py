"""The benchmark of the training step runs, scripts import what there is, and the record of the
benchmarks keeps what others wrote."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
import torch
from places import SCRIPTS

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
    """Ours, four arms and the floor: each row has a time above 0, and the floor's is the sum of its
    parts."""
    done = bench_train(device)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith("| ")]
    seconds = {name.strip(): float(cell) for name, cell in rows[1:]}
    assert len(seconds) == 5
    assert all(value > 0 for value in seconds.values())
    *_, matmul, adam, floor = seconds.values()
    assert abs(floor - matmul - adam) < 0.02 * floor  # printed with three digits


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_benchmark_says_so():
    done = bench_train("cuda")
    assert done.returncode == 1
    assert done.stderr.strip() == "there is no device 'cuda' on this machine; it has cpu"


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


def test_scripts_import_names_that_exist():
    """Most scripts run for minutes and rarely; a name that has moved must not wait for that."""
    for script in sorted(SCRIPTS.rglob("*.py")):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "llm_wsae":
                module = importlib.import_module(node.module)
                names = {*dir(module), *getattr(module, "__all__", ())}
                missing = {alias.name for alias in node.names} - names
                assert not missing, f"{script}, line {node.lineno}"
