"""What goes to a terminal: foreign text made safe to print, and rows of cells as a table.

Whatever is not printable (escape sequences, marks that reverse the direction of writing) is shown
as Python escapes, so what a corpus holds cannot control the terminal.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_KEYS = ("LLM_WSAE_API_KEY", "OPENAI_API_KEY")  # of the endpoints of ``explaining``
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}|Bearer\s+\S+", re.IGNORECASE)


def printable(text: str) -> str:
    """The text on one line, with escapes for what is not printable."""
    if text.isprintable():
        return text
    escape = "unicode_escape"
    return "".join(c if c.isprintable() else c.encode(escape).decode("ascii") for c in text)


def printable_json(value: Any) -> str:
    """The value as JSON on one line; unprintable characters are JSON escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


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
    rule = ["---" if i < left else "--:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of which is the head, and what a reader should know of them."""

    rows: Sequence[Sequence[str]]
    left: int = 1  # columns of names, which are left-aligned
    meanings: Mapping[str, str] = field(default_factory=dict)  # of the columns
    words: Sequence[str] = ()  # sentences below it
    title: str = ""

    def text(self) -> str:
        """For a terminal."""
        width = max(map(len, self.meanings), default=0)
        lines = [f"{name.ljust(width)}  {meaning}" for name, meaning in self.meanings.items()]
        blocks = [[aligned(self.rows, self.left)], lines, self.words]
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def of_page(self) -> dict[str, Any]:
        """For ``pages/report.html``, which shows the meanings of all its measures by itself."""
        return {"title": self.title, "words": " ".join(self.words), "rows": self.rows}
