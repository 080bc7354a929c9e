"""A model, a text, a store and two dictionaries, made once for all tests of the commands."""

import shutil

import pytest
from command_line import make_world


@pytest.fixture(scope="session")
def made_world(tmp_path_factory):
    """To be read only; ``world`` is a copy that a file of tests may add to."""
    return make_world(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def world(made_world, tmp_path_factory):
    return shutil.copytree(made_world, tmp_path_factory.mktemp("world"), dirs_exist_ok=True)
