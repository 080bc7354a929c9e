"""A Hub that this process talks to, dictionaries to send there (``pytest_plugins``), and what its
tests ask again and again: where a branch is, whether an error is a sentence."""

from pathlib import Path

import pytest
from command_line import content
from hub_server import WRITER, HubServer
from small_dictionaries import SITE, make_dictionary

REPO = "user/saes"
HERE = f"{SITE}/plain-k4"
"""Where a push puts ``plain``."""


def head(hub: HubServer, branch: str = "main") -> str:
    return hub.repositories[REPO].branches[branch]


def sentence(error: pytest.ExceptionInfo) -> str:
    """The error's text, which must be one sentence without a token, also in its causes."""
    one: BaseException | None = error.value
    while one is not None:
        assert WRITER not in str(one)
        one = one.__cause__ or one.__context__
    assert "\n" not in str(error.value)
    return str(error.value)


def place(hub: HubServer, sae_id: str, folder: Path) -> None:
    """Put a folder's files into the repository, as any other tool could."""
    for name, data in content(folder).items():
        hub.put(REPO, f"{sae_id}/{name}".lstrip("/"), data)


@pytest.fixture
def hub(tmp_path, monkeypatch, capfd):
    """A Hub that this process talks to as ``user``; no token may appear anywhere."""
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home", WRITER)
        yield server
        assert server.leaked == []
        said = "".join(capfd.readouterr())
        for repository in server.repositories.values():
            if card := repository.files().get("README.md"):
                said += card.content.decode()
        assert WRITER not in said


@pytest.fixture
def plain(tmp_path) -> Path:
    make_dictionary("plain-k4").save(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def weighted(tmp_path) -> Path:
    make_dictionary("weighted-k4", seed=1).save(tmp_path / "weighted")
    return tmp_path / "weighted"


@pytest.fixture
def there(hub, plain) -> HubServer:
    """A Hub with one good dictionary, ready to be spoilt."""
    place(hub, HERE, plain)
    return hub
