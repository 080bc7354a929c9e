"""Values from other people's JSON: believed only if they have the expected type, else None."""

import math
from collections.abc import Mapping
from typing import Any


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
