"""Our readers on dictionaries that the real tools wrote, and our dictionaries in the real tools.

    python scripts/interop.py                       # every part; docs/interop is written
    python scripts/interop.py sparsify saebench     # some of them; the others stay as they are

Each tool runs in an environment of its own (``LLM_WSAE_PEERS``), where a script of ``peers/`` lets
the tool write dictionaries and note what it makes of some rows. Here the same rows go through what
our readers make of the same files; that is how everything in the file was found. Ends with an error
if anything differs by more than 1e-5.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import ROOT, write_section
from interop_checks import Part
from interop_ours import ours_in_saelens, plugin, saebench, tests
from interop_theirs import dictionary_learning, saelens, saelens_before_6, sparsify

REPORTS = ROOT / "docs/interop"
READ, WRITTEN = "read.md", "written.md"
PARTS: dict[str, tuple[Callable[[Path], Part], str]] = {
    "saelens": (saelens, READ),
    "saelens-before-6": (saelens_before_6, READ),
    "sparsify": (sparsify, READ),
    "dictionary-learning": (dictionary_learning, READ),
    "ours-in-saelens": (ours_in_saelens, WRITTEN),
    "saebench": (saebench, WRITTEN),
    "plugin": (plugin, WRITTEN),
    "tests": (tests, WRITTEN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all by default")
    wanted = parser.parse_args().parts or list(PARTS)
    failed = []
    for name in wanted:
        print(f"{name} …", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            part, page = PARTS[name]
            text, ok = part(Path(folder).resolve() / name)
        print(text)
        write_section(name, text, REPORTS / page)
        failed += [] if ok else [name]
    if failed:
        sys.exit(f"differences in {', '.join(failed)}: see **NO** in {REPORTS}")


if __name__ == "__main__":
    main()
