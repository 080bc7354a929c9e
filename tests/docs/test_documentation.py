"""The site of docs/ builds without a warning; every page can be reached; no link is dead."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from places import DOCS, PAGES, README, ROOT, SCRIPTS, blocks, prose_words

import llm_wsae
from llm_wsae.cli import COMMANDS

SITE = ROOT / "build/site"
LANGUAGES = {"bash", "python", "text", "bibtex", "diff"}


class Page(HTMLParser):
    """What a built page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Note a tag's addresses and names."""
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(given["href"])
        elif given.get("src"):
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def site():
    """The pages of the site, built afresh."""
    shutil.rmtree(SITE, ignore_errors=True)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    said = built.stdout + built.stderr
    assert built.returncode == 0 and "No issues found" in said, said
    return {path: Page(path) for path in sorted(SITE.rglob("*.html"))}


def test_every_page_is_built(site):
    built = {path.relative_to(SITE).with_suffix(".md").as_posix() for path in site}
    assert {path.relative_to(DOCS).as_posix() for path in PAGES} <= built


def test_no_link_is_dead(site):
    dead = []
    for path, page in site.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https" and "." in parts.netloc, f"{path.name}: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if path.name == "404.html" and parts.path.startswith("/"):
                target = SITE / parts.path[1:]
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                dead.append(f"{path.relative_to(SITE)}: {link}")
            elif parts.fragment and target in site:
                anchors = site[target].anchors
                if unquote(parts.fragment) not in anchors:
                    dead.append(f"{path.relative_to(SITE)}: {link}")
    assert dead == []


def test_nothing_is_loaded_from_another_host(site):
    for path, page in site.items():
        assert not [load for load in page.loads if urlsplit(load).netloc], path


def test_every_page_is_in_the_navigation():
    def pages(nav):
        for entry in nav if isinstance(nav, list) else nav.values():
            yield from [entry] if isinstance(entry, str) else pages(entry)

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(pages(config["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


def test_the_readmes_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_pages_are_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 900
    for path in PAGES:
        limit = 20_000 if path.name == "results.md" else 1500
        assert prose_words(path) <= limit, f"{path.name}: {prose_words(path)} words"


def test_every_code_block_has_a_language_that_is_tested():
    assert {block.language for block in blocks(*LANGUAGES)} <= LANGUAGES
    for path in [README, *PAGES]:
        text = path.read_text(encoding="utf-8")
        openings = re.findall(r"^\s*```(\w*)$", text, re.MULTILINE)[::2]
        assert set(openings) <= LANGUAGES, f"{path}: {openings}"


def test_every_public_name_is_documented_once():
    pages = (DOCS / "python-api").glob("*.md")
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    named = re.findall(r"^::: llm_wsae\.(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted(set(llm_wsae.__all__) - {"__version__"})


def test_every_command_has_a_page_with_its_options(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import update_docs

    for command in COMMANDS:
        page = (update_docs.PAGES / f"{command}.md").read_text(encoding="utf-8")
        found = page.partition("<!-- begin options -->")[2].partition("<!-- end options -->")[0]
        assert found.strip() == update_docs.options(command), (
            f"the options of {command} have changed: python scripts/update_docs.py"
        )
        assert "|---|---|---|" in found


def test_the_messages_of_the_page_of_errors_are_those_of_the_package():
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "llm_wsae").rglob("*.py"))
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    source = re.sub(r"\{[^{}]*\}", "…", source)
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"\*\*`(.+?)`\*\*", page)
    assert len(messages) > 25
    missing = [
        message
        for message in messages
        for part in message.split("…")
        if part.strip() and part.strip() not in source
    ]
    assert missing == []


def test_the_files_named_on_the_pages_are_there():
    for path in [README, *PAGES, ROOT / "checkpoints/README.md"]:
        named = re.findall(
            r"`((?:llm_wsae|tests|scripts|docs)/[\w/.-]+)`", path.read_text(encoding="utf-8")
        )
        missing = [name for name in named if not (ROOT / name).exists()]
        assert missing == [], path
