"""What cannot be done must be said in one sentence."""

from collections.abc import Callable
from typing import Any

import pytest

from llm_wsae.errors import LlmWsaeError, UsageError


def fails(
    said: str, work: Callable[..., Any], *given: Any, error: type = LlmWsaeError, **named: Any
) -> str:
    """The text of the error that a call must raise; it matches ``said``."""
    with pytest.raises(error, match=said) as caught:
        work(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def misused(said: str, work: Callable[..., Any], *given: Any, **named: Any) -> str:
    """As ``fails``, for a mistake of whoever asked."""
    return fails(said, work, *given, error=UsageError, **named)
