import ast
import subprocess
import sys
import tomllib

import pytest
from places import ROOT

import llm_wsae

TREE = ast.parse((ROOT / "llm_wsae" / "__init__.py").read_text(encoding="utf-8"))


def test_every_public_name_is_the_thing_itself():
    for name in llm_wsae.__all__:
        value = getattr(llm_wsae, name)
        assert name in dir(llm_wsae)
        if name not in ("__version__", "RULES"):
            home = f"llm_wsae.{llm_wsae._HOMES[name]}"
            assert (value.__name__, value.__module__) == (name, home)


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


def test_names_mean_the_same_whatever_is_imported_first():
    """No module may stand where a public function is looked for."""
    script = """
import pkgutil, importlib, llm_wsae
from llm_wsae import harvest, train, evaluate, run, study, attach, inspect, load_pretrained
for found in pkgutil.walk_packages(llm_wsae.__path__, "llm_wsae."):
    if found.name not in ("llm_wsae.__main__", "llm_wsae.saelens.training"):
        importlib.import_module(found.name)
for name in llm_wsae.__all__:
    value = getattr(llm_wsae, name)
    assert type(value).__name__ != "module", name
assert llm_wsae.train is train and callable(train)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
