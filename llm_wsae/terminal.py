"""Text from elsewhere, shown as text: what a corpus holds cannot command a terminal.

Control characters (escape sequences move the cursor, change titles, answer for the user), marks
that turn the direction of writing around, and everything else that has no picture of its own are
shown as Python writes them: ``\\n``, ``\\x1b``, ``\\u202e``.
"""

import json
from typing import Any


def printable(text: str) -> str:
    """The text on one line, with escapes for what cannot be printed."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def printable_json(value: Any) -> str:
    """The value as JSON on one line; what cannot be printed is escaped, which JSON reads back."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
