"""Foreign text made safe to print: what a corpus holds cannot control the terminal.

Control characters (escape sequences move the cursor, change titles, type for the user), marks that
reverse the direction of writing, and everything else that is not printable are shown as Python
escapes: ``\\n``, ``\\x1b``, ``\\u202e``.
"""

import json
from typing import Any


def printable(text: str) -> str:
    """The text on one line, with escapes for what is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def printable_json(value: Any) -> str:
    """The value as JSON on one line; unprintable characters are JSON escapes."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
