"""The tree stays small: nothing over a megabyte but dictionaries, few words."""

from collections.abc import Iterator
from pathlib import Path

from places import ROOT

FOLDERS = ("llm_wsae", "scripts", "tests", "docs", ".ci", ".github")


def files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def words(*pages: Path) -> int:
    return sum(len(page.read_text(encoding="utf-8").split()) for page in pages)


def test_nothing_is_over_a_megabyte_but_dictionaries():
    found = list(files())
    assert len(found) > 300
    assert [str(path) for path in found if path.stat().st_size > 1_000_000] == []


def test_results_are_few():
    results = [path for path in files() if path.is_relative_to(ROOT / "scripts/results")]
    assert results and sum(path.stat().st_size for path in results) <= 2_000_000


def test_docs_have_few_words():
    assert words(*(ROOT / "docs").rglob("*.md")) <= 45_000
    assert words(*(ROOT / "docs/results").glob("*.md"), ROOT / "docs/log.md") <= 8_000
