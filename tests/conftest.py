"""Shared fixtures; shapes and types of the package's annotations are checked while tests run."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# The models here are tiny: more threads would only wait for each other, also in the processes that
# tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from jaxtyping import install_import_hook

HERE = Path(__file__).parent

install_import_hook("llm_wsae", "beartype.beartype")


SLOWEST = (
    "sparse/backends/test_triton.py",
    "training/architectures/test_architectures_learn.py",
    "test_harvest_together.py",
    "training/parallel/test_train_together.py",
    "test_scripts.py",
)
"""Files that take a minute or more: first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.relative_to(HERE).as_posix()
        return SLOWEST.index(path) if path in SLOWEST else len(SLOWEST)

    items.sort(key=place)  # stable: the order is otherwise kept


@pytest.fixture(scope="session")
def made_world(tmp_path_factory):
    """A model, a text, a store and two dictionaries, made once for all tests of the commands.

    To be read only; ``world`` is a copy that a file of tests may add to.
    """
    from command_line import make_world

    return make_world(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def world(made_world, tmp_path_factory):
    return shutil.copytree(made_world, tmp_path_factory.mktemp("world"), dirs_exist_ok=True)


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by playwright, for the pages."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
