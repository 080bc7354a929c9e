"""The errors a user can cause: one sentence each, naming the problem and what to do.

The command line prints the sentence and exits with ``exit_code``; Python callers can catch the
root. Broken invariants of the package itself are ``assert``s, never these.
"""

import difflib
import reprlib
from collections.abc import Iterable, Sequence
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
    """A foreign value on one line, shortened where it is long or deeply nested."""
    return _SHORT.repr(value)


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A clause suggesting the known names closest to a misspelt one, or listing the known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    if close:
        return f"did you mean {either(close)}?"
    shown = ", ".join(repr(k) for k in known[:8])
    return f"known are {shown}" + (", …" if len(known) > 8 else "")


def either(names: Sequence[str]) -> str:
    """Some names as a choice: 'a', 'b' or 'c'."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last
