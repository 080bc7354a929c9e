"""Runs the fuzzers for long and writes what came of every case into docs/threat-model.md.

python scripts/fuzz_table.py --fuzz 20     # about half an hour
python scripts/fuzz_table.py --fuzz 20 tests/fuzzing/test_fuzz_files.py    # only shown
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import ROOT, write_section

PAGE = ROOT / "docs/threat-model.md"
TESTS = "tests/fuzzing"
COLUMNS = {
    "tried": "tried",
    "refused": "refused",
    "harmless": "harmless",
    "different": "silently different",
    "traceback": "tracebacks",
    "code": "code run",
    "lost": "lost",
}
SAME = "all values are the same"
ROWS = {  # how kinds begin: what is shown of them, and what harmless means
    "dictionary": ("dictionaries: all four files", SAME),
    "explanations": ("explanations", SAME),
    "store": ("stores: manifest, records, rows, tokens, statistics", SAME),
    "training": ("trainings: checkpoint, record, log", "arms, step and log are the same"),
    "verify": ("`verify` on a store and a training", "the bytes are the same"),
    "model": ("model folders, also with code", "it loads; there is no checksum"),
    "GGUF": ("GGUF files", "it loads with the weights of the file"),
    "pickled": ("pickled models, also with code", "it loads, and nothing in it ran"),
    "repository": ("repositories on the Hub", "what was pulled is the dictionary"),
    "answer of a Hub": ("answers of a Hub", "what came is the dictionary"),
    "endpoint": ("replies of a model server", "the answer is read"),
    "two processes": ("two writers to one dictionary", "all that either kept is there"),
    "command line": ("command lines", "the command did its work"),
    "place": ("places that are gone, forbidden, of another kind", "the command did its work"),
    "kill, harvest": ("kills of `harvest`", "the same command ends with the same bytes"),
    "kill, train": ("kills of `train`", "the same"),
    "kill, save": ("kills while a dictionary is saved", "the old or the new is there; the same"),
    "kill, pu": ("kills of `push` and `pull`", "the same"),
    "kill, ": ("kills of other commands that write", "the same"),
}


def run(times: int, tests: list[str]) -> dict[str, Counter[str]]:
    """Run the fuzzers: the counts of every kind. A failure ends this program."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
        words += ["--fuzz", str(times), f"--junitxml={report}"]
        done = subprocess.run([sys.executable, "-m", "pytest", *words, *tests], cwd=ROOT)
        properties = ElementTree.parse(report).iter("property")
        found = {one.get("name", ""): one.get("value", "") for one in properties}
    if done.returncode:
        sys.exit(done.returncode)
    return {
        name.removeprefix("fuzz "): Counter(json.loads(value))
        for name, value in found.items()
        if name.startswith("fuzz ")
    }


def table(counts: dict[str, Counter[str]]) -> str:
    """One row for some kinds, and the sum."""
    sums: dict[str, Counter[str]] = {}
    for kind, count in counts.items():
        pattern = next(pattern for pattern in ROWS if re.match(pattern, kind))
        sums.setdefault(pattern, Counter()).update(count)
    lines = [f"| what | {' | '.join(COLUMNS.values())} | harmless: |"]
    lines += [f"|---|{'--:|' * len(COLUMNS)}---|"]
    for pattern, (shown, harmless) in ROWS.items():
        if pattern in sums:
            lines.append(row(shown, sums[pattern], harmless))
    lines.append(row("**in all**", sum(sums.values(), Counter()), ""))
    return "\n".join(lines)


def row(shown: str, count: Counter[str], harmless: str) -> str:
    numbers = " | ".join(f"{count[name]:,}" for name in COLUMNS)
    return f"| {shown} | {numbers} | {harmless} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fuzz", type=int, default=20, help="how many times the usual cases")
    parser.add_argument("tests", nargs="*", help="some of the fuzzers; the table is only printed")
    given = parser.parse_args()
    text = table(run(given.fuzz, given.tests or [TESTS]))
    print(text)
    if not given.tests:
        write_section("fuzzing", text, PAGE)


if __name__ == "__main__":
    main()
