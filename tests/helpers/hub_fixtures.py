"""A Hub that this process talks to, and dictionaries to send there (``pytest_plugins``)."""

from pathlib import Path

import pytest
from hub_checks import TOKENS
from hub_server import WRITER, HubServer
from small_dictionaries import make_dictionary


@pytest.fixture
def hub(tmp_path, monkeypatch, capfd):
    """A Hub that this process talks to as ``user``; no token may appear anywhere."""
    with HubServer(tmp_path / "hub") as server:
        server.use(monkeypatch, tmp_path / "home", WRITER)
        yield server
        assert server.leaked == []
        said = "".join(capfd.readouterr())
        cards = [
            server.store.content(name, "README.md").decode()
            for name, repository in server.store.repositories.items()
            if "README.md" in repository.files()
        ]
        assert not [token for token in TOKENS if token in said + "".join(cards)]


@pytest.fixture
def login(hub, monkeypatch, tmp_path):
    """Become someone else, on a machine with an empty cache."""

    def become(token: str | None) -> None:
        hub.use(monkeypatch, tmp_path / f"home of {token}", token)

    return become


@pytest.fixture
def plain(tmp_path) -> Path:
    make_dictionary("plain-k4").save(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def weighted(tmp_path) -> Path:
    make_dictionary("weighted-k4", seed=1).save(tmp_path / "weighted")
    return tmp_path / "weighted"
