"""Where things lie in the repository, and the code blocks of the pages that people read."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
HELPERS = Path(__file__).parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A code block and where it stands."""

    page: str
    language: str
    code: str


def blocks(*languages: str) -> list[Block]:
    """Every code block of these languages, on all pages and in the README."""
    found = [
        Block(path.relative_to(ROOT).as_posix(), language, code)
        for path in [README, *PAGES]
        for _, language, code in FENCE.findall(path.read_text(encoding="utf-8"))
    ]
    return [block for block in found if block.language in languages]


def prose_words(path: Path) -> int:
    """Words that a reader meets, code and tables included, marks of Markdown and HTML not."""
    text = re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return sum(bool(re.search(r"\w", word)) for word in text.split())
