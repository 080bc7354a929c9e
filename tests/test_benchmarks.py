"""The benchmark of the training step runs, and its record keeps what other benchmarks wrote."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_the_table_of_the_training_step():
    """Ours, four arms and the floor at a tiny shape: each row has a time above 0, and the floor's
    is the sum of its parts."""
    shape = ["--shapes", "32x256x4", "--batch", "64", "--threads", "1", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "bench_train.py", "--peers", *shape, "--steps", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:3] for line in done.stdout.splitlines() if line.startswith("| ")]
    seconds = {name.strip(): float(cell) for name, cell in rows[1:]}
    assert len(seconds) == 5
    assert all(value > 0 for value in seconds.values())
    *_, matmul, adam, floor = seconds.values()
    assert abs(floor - matmul - adam) < 0.02 * floor  # printed with three digits


def test_a_section_is_replaced_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import write_section

    path = tmp_path / "BENCHMARKS.md"
    write_section("a", "old a", path)
    write_section("b", "b", path)
    whole = path.read_text()
    write_section("a", "new a", path)
    assert path.read_text() == whole.replace("old a", "new a")
    assert re.findall(r"<!-- begin (\w) -->", path.read_text()) == ["a", "b"]
