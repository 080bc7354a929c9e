"""The errors a user can cause: one sentence each, naming the thing and the way out.

The command line prints the sentence and leaves with ``exit_code``; Python callers can catch the
root. Broken invariants of our own are ``assert``s, never these.
"""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


class LlmWsaeError(Exception):
    """Root of every error of this package: the work could not be done (exit code 1)."""

    exit_code = 1


class UsageError(LlmWsaeError):
    """The request itself cannot be right: a bad name, number or combination (exit code 2)."""

    exit_code = 2


def shown(value: Any) -> str:
    """A value that somebody else wrote, on one line, cut short where it is long or deep."""
    return _SHORT.repr(value)


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A clause that offers the known names closest to a misspelt one, all of them if few."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(k) for k in known[:8])
    return f"known are {shown}" + (", …" if len(known) > 8 else "")
