"""The notebook runs from top to bottom on the real model, with less text than it shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs/tour.ipynb"
SMALLER = {
    "HarvestConfig(tokens=60_000)": "HarvestConfig(tokens=4_000)",
    "TrainConfig(tokens=400_000)": "TrainConfig(tokens=10_000, expansion=2)",
    "EvaluateConfig(tokens=3000)": "EvaluateConfig(tokens=300)",
    "new_tokens=20": "new_tokens=4",
}


def cells():
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_the_notebook_shows_the_outputs_of_one_run():
    own = cells()
    assert [cell["execution_count"] for cell in own] == list(range(1, len(own) + 1))
    outputs = [output for cell in own for output in cell["outputs"]]
    assert not [one for one in outputs if one["output_type"] == "error"]
    shown = json.dumps(outputs)
    assert "image/png" in shown and "/home/" not in shown and "site-packages" not in shown
    assert all(cell["outputs"] for cell in own)


@pytest.mark.slow
@pytest.mark.materials
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    parts = ["import matplotlib", "matplotlib.use('Agg')"]
    code = "\n".join([*parts, *("".join(cell["source"]) for cell in cells())])
    for old, new in SMALLER.items():
        assert old in code
        code = code.replace(old, new)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The model" in done.stdout  # at which strength it breaks
    assert "beside uniform-k32: the weights" in done.stdout
    assert (tmp_path / "runs/tour/page.html").is_file()
