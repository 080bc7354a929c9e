import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llm_wsae

ROOT = Path(__file__).parents[1]
TREE = ast.parse((ROOT / "llm_wsae" / "__init__.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", llm_wsae.__all__)
def test_every_public_name_is_the_thing_itself(name):
    value = getattr(llm_wsae, name)
    assert name in dir(llm_wsae)
    if name not in ("__version__", "RULES"):
        assert value.__name__ == name and value.__module__ == f"llm_wsae.{llm_wsae._HOMES[name]}"


def test_editors_are_shown_the_same_names():
    (block,) = (n for n in TREE.body if isinstance(n, ast.If))
    shown = {
        alias.name: node.module.removeprefix("llm_wsae.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == llm_wsae._HOMES
    assert sorted(llm_wsae.__all__) == sorted([*shown, "__version__"])


def test_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert llm_wsae.__version__ == project["project"]["version"]


def test_unknown_names_are_errors():
    with pytest.raises(AttributeError, match="'llm_wsae' has no attribute 'Harvester'"):
        llm_wsae.Harvester  # noqa: B018


def test_the_stages_are_imported_as_the_docstring_says():
    lines = [line.strip() for line in llm_wsae.__doc__.splitlines() if " import " in line]
    assert len(lines) == 4
    for line in lines:
        _, module, _, name = line.split()
        assert callable(getattr(importlib.import_module(module), name))
        assert name not in llm_wsae.__all__  # the module has that name already


def test_names_mean_the_same_whatever_is_imported_first():
    script = """
from llm_wsae import *
import llm_wsae, llm_wsae.harvest, llm_wsae.run
assert llm_wsae.ActivationStream is ActivationStream is llm_wsae.harvest.ActivationStream
for stage in ("harvest", "train", "evaluate", "run"):
    assert getattr(llm_wsae, stage).__name__ == "llm_wsae." + stage
"""
    subprocess.run([sys.executable, "-c", script], check=True)
