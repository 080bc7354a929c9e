"""Adding an architecture touches one file and its test: the diff in the docs is applied and run."""

import os
import re
import shutil
import subprocess
import sys

from places import ROOT

from llm_wsae.training.architectures import architecture_names, find_architecture

PAGE = ROOT / "docs/adding-an-architecture.md"
ADDED = "llm_wsae/training/architectures/annealed_topk.py"
ITS_TEST = "tests/training/architectures/test_annealed_topk.py"


def test_the_folder_is_the_registry():
    assert {"topk", "batch-topk", "matryoshka", "jumprelu", "relu"} <= set(architecture_names())
    for name in architecture_names():
        assert find_architecture(name).name == name


def test_the_diff_in_the_docs_adds_an_architecture(tmp_path):
    (diff,) = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE) == [ADDED, ITS_TEST]
    for folder in ("llm_wsae", "tests/helpers"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / file, tmp_path / file)

    def run(*words, **more):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        more = {"capture_output": True, "text": True, "env": environment, **more}
        done = subprocess.run(words, cwd=tmp_path, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("git", "apply", "-", input=diff)
    run(sys.executable, "-m", "ruff", "check", "--select", "E,F,I,UP,B", ADDED, ITS_TEST)
    assert "2 passed" in run(sys.executable, "-m", "pytest", "-o", "addopts=", ITS_TEST)
    assert "annealed-topk" in run(sys.executable, "-m", "llm_wsae", "train", "--help")
