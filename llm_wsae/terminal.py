"""What goes to a terminal: foreign text made safe to print, and rows of cells as a table.

What a corpus holds cannot control the terminal. Control characters (escape sequences move the
cursor, change titles, type for the user), marks that reverse the direction of writing, and
everything else that is not printable are shown as Python escapes: ``\\n``, ``\\x1b``, ``\\u202e``.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

_KEYS = ("LLM_WSAE_API_KEY", "OPENAI_API_KEY")  # of the endpoints of ``explaining``
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}|Bearer\s+\S+", re.IGNORECASE)


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


def without_secrets(text: str) -> str:
    """The text without this machine's token and keys, and what looks like a token of the Hub or a
    key in a header."""
    from huggingface_hub import get_token

    for known in (get_token(), *(os.environ.get(name, "").strip() for name in _KEYS)):
        if known:
            text = text.replace(known, "…")
    return _SECRET.sub("…", text)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns two spaces apart, the first ``left`` ones left-aligned, a rule under the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "  ".join("─" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def markdown(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same table in Markdown."""
    head, *body = rows
    rule = ["---" if i < left else "--:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))
