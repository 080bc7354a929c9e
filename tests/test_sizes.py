"""The tree stays small: nothing over a megabyte but dictionaries, few words; and the tests use the
public interface: few reach into a module."""

from collections.abc import Iterator
from pathlib import Path

from places import ROOT

MOST_PATCHES = 60
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


def test_few_tests_replace_what_a_module_holds():
    """Such a test fails when the code is reshaped, and passes when what it replaced is not used."""
    call = ".setattr" + "("  # not itself
    files = (ROOT / "tests").rglob("*.py")
    found = {str(path): path.read_text(encoding="utf-8").count(call) for path in files}
    assert len(found) > 80
    most = sorted(found.items(), key=lambda one: -one[1])[:8]
    assert sum(found.values()) <= MOST_PATCHES, most
