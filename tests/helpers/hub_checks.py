"""What tests of the Hub ask again and again: where a branch is, whether an error is a sentence."""

import pytest
from hub_server import READER, STRANGER, WRITER, HubServer

REPO = "user/saes"
TOKENS = (WRITER, READER, STRANGER, "hf_wrongsecret")


def head(hub: HubServer, branch: str = "main") -> str:
    return hub.store.repositories[REPO].branches[branch]


def sentence(error: pytest.ExceptionInfo) -> str:
    """The error's text, which must be one sentence without a token, also in its causes."""
    one: BaseException | None = error.value
    while one is not None:
        assert not [token for token in TOKENS if token in str(one)]
        one = one.__cause__ or one.__context__
    assert "\n" not in str(error.value)
    return str(error.value)
