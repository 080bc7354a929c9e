"""Writes the generated parts of the docs and the README.

    python scripts/update_docs.py               # tables of options in docs/commands, from --help
    bash scripts/quickstart.sh && python scripts/update_docs.py quickstart
    python scripts/update_docs.py pictures      # a screenshot of the page, by Chromium

``quickstart`` writes that run's last lines into the README, its table into docs/index.md and the
figure of its weights into docs/images.
``pictures`` shows what the page makes of the pretrained dictionaries.
"""

import argparse
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path

from benchmarks import IMAGES, README, ROOT, embedded_model, write_section

from llm_wsae import Dictionary
from llm_wsae.cli import COMMANDS, help_of, main
from llm_wsae.commands.helping import flags

PAGES = ROOT / "docs/commands"
RUN = ROOT / "runs/quickstart"
QUICKSTART = RUN / "blocks.9.hook_resid_post"
_LONGEST_DEFAULT = 30  # characters in the last column
# Which command's page has the options under a prefix.
_EXPLAINED = {"harvest": "harvest", "train": "train", "evaluate": "evaluate", "score": "evaluate"}
# Which one has the options of a group that mean the same for other commands.
_SHARED = {"model options": "harvest", "corpus options": "harvest", "weigh options": "weigh"}


def options(command: str) -> str:
    """The options of a command, a table for each group of them."""
    if command != "run" and _explained(command) <= _explained("run"):
        return "Those of [run](run.md#options)."
    groups = [(title, rows) for title, rows in help_of(command) if rows]
    tables = "\n\n".join(_table(command, title, rows) for title, rows in groups)
    return tables.removeprefix("**Options**\n\n")  # the section's own title


@functools.cache
def _explained(command: str) -> set[tuple[str, str]]:
    """Every option of a command with its meaning."""
    return {row for _, rows in help_of(command) for row in rows}


def _table(command: str, title: str, rows: list[tuple[str, str]]) -> str:
    """One group as Markdown. What another command's page explains is only named."""
    home, lines, same, elsewhere = _SHARED.get(title, command), [], [], {}
    for name, meaning in rows:
        *long, flag = sorted(flags(name), key=lambda flag: "." not in flag)
        prefix = (long or [flag])[0].partition(".")[0].removeprefix("--")
        page = _EXPLAINED.get(prefix, command)
        if "." in flag and page != command:
            elsewhere.setdefault(page, flag)
        elif home != command and (name, meaning) in _explained(home):
            same.append(f"`{flag}`")
        else:
            lines.append(_row(f"{flag} {_value(name)}".strip(), meaning))
    head = ["| option | meaning | default |", "|---|---|---|"]
    more = "More: " if lines or same else ""
    links = [f"{', '.join(same)}: as for [{home}]({home}.md#options)."] if same else []
    links += [
        f"{more}`{flag}` and so on, explained under [{page}]({page}.md#options)."
        for page, flag in elsewhere.items()
    ]
    title = f"**{title[:1].upper()}{title[1:]}**"
    return "\n\n".join(filter(None, [title, "\n".join(head + lines if lines else []), *links]))


def _row(option: str, meaning: str) -> str:
    """A row of the table; the parser appends the default to the meaning."""
    meaning, _, default = meaning.partition(" (default: ")
    default = default.removesuffix(")")
    cell = "" if default in ("False", "") else f"`{default}`"
    if meaning.endswith("(required)"):
        meaning, cell = meaning.removesuffix(" (required)"), "**required**"
    meaning = re.sub(r"\S*<\S+>", r"`\g<0>`", meaning)  # else it would be a tag of HTML
    if len(cell) > _LONGEST_DEFAULT:
        meaning, cell = f"{meaning} Default: {cell}.", ""
    flag, brace, choices = option.partition(" {")
    if brace:  # the values that it takes would make the column wide
        choices, _, more = choices.partition("}")
        values = ", ".join(f"`{choice}`" for choice in choices.split(","))
        option, meaning = flag + more, f"{meaning} {'Some' if more else 'One'} of {values}."
    return f"| `{option}` | {meaning} | {cell} |".replace("``", "`")


def _value(name: str) -> str:
    """What an option takes: ``[INT [INT ...]]`` becomes ``INT …``."""
    value = name.partition(", ")[0].partition(" ")[2]
    value = re.sub(r"^\[(.+?) \[.*\]\]$", r"\1 …", value)
    return re.sub(r"\{(\w+)\}\|", r"\1|", value).replace("|", "\\|")  # one word, or a number


def update_options() -> None:
    """The tables of all commands."""
    for command in COMMANDS:
        write_section("options", options(command), PAGES / f"{command}.md")


def update_quickstart() -> None:
    """What the quickstart's run found, its table, and the figure of its weights."""
    found = (RUN / "found.txt").read_text(encoding="utf-8").strip()
    write_section("quickstart", f"```text\n{found}\n```", README)
    report = json.loads((QUICKSTART / "report.json").read_text(encoding="utf-8"))
    profile = json.loads((QUICKSTART / "profile.json").read_text(encoding="utf-8"))
    effective = {w["name"]: w["effective_dimensions"] for w in profile["weights"]}
    lines = [
        f"| dictionary | effective dimensions, of {profile['dimensions']} | FVU "
        "| CE recovered [95 %] | KL |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, arm in report["dictionaries"].items():
        low, high = arm["ce_recovered_interval"]
        weights = effective.get(re.sub(r"(-frozen-\w+)?-k\d+$", "", name))
        own = f"{name} | –" if weights is None else f"`{name}` | {weights:.1f}"
        lines.append(
            f"| {own} "
            f"| {arm['fvu']:.3f} | {arm['ce_recovered']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {arm['kl']:.3f} |"
        )
    name, first = next(iter(report["dictionaries"].items()))
    trained = Dictionary.load(QUICKSTART / name).info.training
    lines += [
        "",
        "SmolLM2-135M-Instruct, State of the Union addresses, block 9, "
        f"{trained['num_steps'] * trained['batch_size']:,} rows ({profile['rows']:,} different), "
        f"8× width, {first['l0']:.0f} active latents a row, one seed, {first['rows']:,} held-out "
        f"tokens of {first['documents']} documents. Intervals are over documents, not seeds.",
    ]
    write_section("quickstart", "\n".join(lines), ROOT / "docs/index.md")
    shutil.copy(QUICKSTART / "profile.png", IMAGES)


def update_pictures() -> None:
    """Latents of the whitened dictionary beside their nearest in the plain one."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    site = "blocks.9.hook_resid_post"
    trained = [str(path) for path in sorted((ROOT / "checkpoints/smollm2-135m" / site).iterdir())]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        store, page = (Path(folder) / name for name in ("store", "page.html"))
        source = ["--model", embedded_model()]
        how = ["--corpus", "sotu", "--site", site, "--tokens", "100000", "--out", str(store)]
        assert main(["harvest", *source, *how]) == 0
        assert (
            main(["dashboard", *trained, *source, "--store", str(store), "--out", str(page)]) == 0
        )
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport={"width": 1280, "height": 880})
        tab.goto(f"{page.as_uri()}#compare/d1")
        tab.wait_for_selector("article h2")
        tab.screenshot(path=IMAGES / "dashboard.png")
        browser.close()
    picture = Image.open(IMAGES / "dashboard.png").convert("RGB")  # a few colours are enough
    picture = picture.quantize(128, dither=Image.Dither.NONE)  # and a third of the size
    picture.save(IMAGES / "dashboard.png", optimize=True)


PARTS = {
    "options": update_options,
    "quickstart": update_quickstart,
    "pictures": update_pictures,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS, default="options")
    PARTS[parser.parse_args().part]()
