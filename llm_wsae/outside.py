"""The gate for what comes from outside: JSON, paths, numbers of options, the environment. It has
the expected type and a size that can be worked with, or it is refused with a sentence.

Typed readers (``number``, ``text``, …) give None for a value of another type: others' files are
believed as far as they make sense.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from types import UnionType
from typing import IO, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llm_wsae.errors import LlmWsaeError, UsageError, shown

T = TypeVar("T")

LARGEST_NUMBER = 10**15  # of tokens, rows, steps or latents; sums and products of it still fit
SHARE = (0, 1)  # the limits of a share or a probability
_REVISION = re.compile(r"\w[\w./+@-]{0,199}", re.ASCII)
_LONGEST_LINE = 1 << 26  # characters of one line of text


def check_token() -> None:
    """Raises LlmWsaeError for a Hub token that cannot be sent; the client's error would show it."""
    from huggingface_hub import get_token

    token = get_token() or ""
    if not (token.isascii() and token.isprintable()):
        raise LlmWsaeError(
            "your token holds characters that no token has; log in (`hf auth login`, or the "
            "variable HF_TOKEN)"
        )


def hub_is_unreachable(error: BaseException) -> bool:
    """Whether the Hub could not be asked at all, so that the cache may answer instead."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError | OfflineModeIsEnabled)


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Turn everything that a library raises about somebody's file into one sentence, which begins
    with ``what`` ("model.gguf cannot be read"). Only this package's own errors and the end of the
    program are let through. Keep the block to the library's call."""
    try:
        yield
    except BaseException as error:
        ours = isinstance(error, LlmWsaeError | MemoryError)
        if ours or not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise LlmWsaeError(f"{what}: {reason(error)}") from error


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up, such as that of tokenizers."""
    return type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """What an error says, in one sentence without its full stop; its class if it says nothing."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    text = " ".join(text.split()).split(". ")[0].rstrip(".")
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__} {text}".rstrip()
    return text if len(text) <= 300 else f"{text[:300]}…"


def parse_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text. Raises LlmWsaeError, in which ``what`` names it, if it is none."""
    with parsing(f"{what} is not readable JSON"):
        return json.loads(text)


def lines(file: IO[str], what: str) -> Iterator[str]:
    """The lines of a text file. Raises LlmWsaeError, with its number, for one without an end."""
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), 1):
        if len(line) == _LONGEST_LINE and not line.endswith("\n"):
            raise LlmWsaeError(f"{what}, line {number}: longer than {_LONGEST_LINE:,} characters")
        yield line


def number(value: Any) -> float | None:
    """The value as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON's integers have no limit
        return None


def integer(value: Any) -> int | None:
    """The value if it is an integer of at most 64 bits."""
    return value if type(value) is int and abs(value) < 2**63 else None


def text(value: Any) -> str | None:
    """The value if it is a string that is not empty."""
    return value if isinstance(value, str) and value else None


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def pair(value: Any) -> tuple[float, float] | None:
    """The value if it is a list of two finite numbers."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def typed(made: T) -> T:
    """A dataclass that was filled from JSON. Raises TypeError, naming the field, unless its fields
    hold what they are declared to, also within other dataclasses."""
    hints = get_type_hints(type(made))
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        value = getattr(made, field.name)
        if not _fits(value, hints[field.name]):
            raise TypeError(f"its {field.name} is {shown(value)}")
    return made


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a declared type; a float may be a whole number."""
    kind, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(one, parts[0]) for one in value)
    if kind in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(one, parts[1]) for one in value.values())
    if dataclasses.is_dataclass(hint):
        return isinstance(value, hint) and typed(value) is value  # type: ignore[arg-type]
    if hint in (int, float):
        return (integer if hint is int else number)(value) is not None
    return type(value) is hint


def check_numbers(settings: Any, **limits: int | tuple[int, int]) -> None:
    """Check every number among the fields of a configuration, also within tuples. The limits of a
    field are its least value, or that and its greatest; others follow from its kind. Raises as
    ``check_number``."""
    for field in dataclasses.fields(settings):
        given = limits.get(field.name)
        least_and_most = given if isinstance(given, tuple) else (given,)
        found = getattr(settings, field.name)
        for value in found if isinstance(found, tuple) else (found,):
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(field.name.replace("_", "-"), value, *least_and_most)


def check_choices(settings: Any, **allowed: Sequence[str]) -> None:
    """Raises UsageError, naming the field, if a setting is none of the words that it may be."""
    for name, words in allowed.items():
        if (found := getattr(settings, name)) not in words:
            known = f"{', '.join(words[:-1])} or {words[-1]}"
            raise UsageError(f"{name} must be {known}, not {found!r}")


def check_number(
    name: str, value: int | float, least: int | None = None, most: int = LARGEST_NUMBER
) -> None:
    """Raises UsageError, naming the number and the limit, unless least ≤ value ≤ most. A whole
    number is a count or a seed, so at least 0, and NaN is no number."""
    if not isinstance(value, Real):
        raise UsageError(f"{name} is {value!r}, but must be a number")
    if least is None:
        least = 0 if isinstance(value, int) else -LARGEST_NUMBER
    if value < least:
        raise UsageError(f"{name} is {shown(value)}, but must be at least {least:,}")
    if not value <= most:  # NaN too
        limit = f"at most {most:,}" if value > most else "a number"
        raise UsageError(f"{name} is {shown(value)}, but must be {limit}")


def from_environment(name: str, least: int, most: int) -> int:
    """A whole number that a launcher put into the environment. Raises UsageError if it is not one
    from ``least`` to ``most``."""
    found = os.environ[name]
    value = int(found) if re.fullmatch(r"\d{1,9}", found, re.ASCII) else None
    if value is None or not least <= value <= most:
        raise UsageError(
            f"the environment variable {name} is {shown(found)}, but must be a whole number from "
            f"{least} to {most}; start several processes with torchrun, or unset it"
        )
    return value


def check_revision(name: str | None) -> None:
    """Raises UsageError for what can be no branch, tag or commit: the Hub's client would take it
    for a path from its cache to anywhere."""
    if name is not None and not (_REVISION.fullmatch(name) and ".." not in name):
        raise UsageError(f"{shown(name)} cannot be a branch, tag or commit")


def local_path(name: str, what: str) -> Path:
    """The path of that name, ``~`` expanded. Raises UsageError, in which ``what`` names it
    ("corpus"), for an empty name, an unknown home, and a name that no file can have."""
    if not name.strip():
        raise UsageError(f"the name of the {what} is empty; this folder is called .")
    if "\0" in name:
        raise UsageError(f"{shown(name)} cannot be the name of a {what}")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        home = name.split("/")[0]
        raise UsageError(f"{name} names no {what}: there is no home folder {home}") from None
