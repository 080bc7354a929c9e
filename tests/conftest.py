"""Shared fixtures; shapes and types of the package's annotations are checked while tests run.

In each test a function's first ``CHECKED_CALLS`` calls are checked. A training loop calls the same
ones thousands of times, and checking them all would take more than twice as long as training.
"""

import functools
import inspect
import json
import os
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# The models here are tiny: more threads would only wait for each other, also in the processes that
# tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import pytest
import torch
from tqdm import tqdm

os.fsync = lambda handle: None  # no file of a test must outlive a loss of power
pytest_plugins = ("hub_fixtures",)
HERE = Path(__file__).parent
CHECKED_CALLS = 5
KERNELS = "llm_wsae.sparse.backends.triton"


def _forked() -> None:
    """A test's own process. tqdm's lock is shared with the parent, whose monitor may have held it
    at the fork, and torch's pool has lost its threads. One that hangs all the same is ended."""
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    signal.alarm(300)


os.register_at_fork(after_in_child=_forked)
_calls_left: dict = {}
_decorate = jaxtyping.jaxtyped


def _jaxtyped(function=None, *, typechecker):
    """In place of the decorator that the import hook gives every function."""
    if function is None:
        return lambda function: _jaxtyped(function, typechecker=typechecker)
    if getattr(function, "__module__", None) == KERNELS:  # Triton compiles their source
        return function
    # The parser of the command line asks for annotations, which a function so marked denies.
    if not inspect.isfunction(function) or function.__module__.startswith("llm_wsae.commands"):
        return _decorate(function, typechecker=typechecker)

    def check_first_calls(signature):  # a stand-in that jaxtyping calls with the arguments
        check = typechecker(signature)

        @functools.wraps(check)
        def counted(*arguments, **named):
            left = _calls_left.get(function, CHECKED_CALLS)
            _calls_left[function] = left - 1
            function.__no_type_check__ = left <= 1
            return check(*arguments, **named)

        return counted

    return _decorate(function, typechecker=check_first_calls)


def pytest_runtest_setup():
    for function in _calls_left:
        function.__no_type_check__ = False
    _calls_left.clear()


jaxtyping.jaxtyped = _jaxtyped
jaxtyping.install_import_hook("llm_wsae", "beartype.beartype")


def pytest_addoption(parser):
    said = "fuzz with N times as many cases"
    parser.addoption("--fuzz", type=int, default=1, metavar="N", help=said)


@pytest.fixture
def fuzz(request, record_property):
    """Counts a fuzzer's cases; a case that goes wrong fails its test in the end."""
    from fuzzing import Fuzz

    made = Fuzz(request.config.getoption("--fuzz"))
    yield made
    for kind, counts in made.counts.items():
        record_property(f"fuzz {kind}", json.dumps(counts))
    made.end()


SLOW = set((HERE / "slow.txt").read_text().split())
"""Files and tests that take more than a second on one quiet core, most because they start processes
or a whole run; besides those that are marked where they stand. From ``pytest --durations=0``."""


def pytest_collection_modifyitems(items):
    """Files with many slow tests come first: no worker is left alone with one at the end."""
    for item in items:
        path = item.path.relative_to(HERE).as_posix()
        if {path, f"{path}::{item.originalname}"} & SLOW:
            item.add_marker("slow")
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: the order is otherwise kept


@pytest.fixture(scope="session")
def made_world(tmp_path_factory):
    """A model, a text, a store and two dictionaries, made once for all tests of the commands.

    To be read only; ``world`` is a copy that a file of tests may add to.
    """
    from command_line import make_world

    return make_world(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def model_and_corpus(made_world):
    return ("--model", made_world / "model", "--corpus", made_world / "text.jsonl")


@pytest.fixture(scope="module")
def world(made_world, tmp_path_factory):
    return shutil.copytree(made_world, tmp_path_factory.mktemp("world"), dirs_exist_ok=True)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


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


@pytest.fixture(scope="module")
def store(world):
    from llm_wsae.data.store import ActivationStore

    return ActivationStore.open(world / "store")


@pytest.fixture(scope="module")
def model(world):
    from llm_wsae.model.language_model import LanguageModel

    return LanguageModel.load(str(world / "model"))
