"""Our readers on dictionaries that the real tools wrote, and our dictionaries in the real tools.

    python scripts/interop.py                       # every part; scripts/INTEROP.md is written anew
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

from benchmarks import write_section
from interop_checks import Part
from interop_ours import ours_in_saelens, plugin, saebench, tests
from interop_theirs import dictionary_learning, saelens, saelens_before_6, sparsify

from llm_wsae.files import write_text

REPORT = Path(__file__).parent / "INTEROP.md"
HEADER = """# What other tools and this package make of each other's dictionaries

Written by `scripts/interop.sh`, which is the command that repeats it. A difference is the largest
|a − b| / (1 + |b|) over all latents, or all reconstructed numbers, of the same rows in float32: a
from this package, b from the tool itself.
"""

PARTS: dict[str, Callable[[Path], Part]] = {
    "saelens": saelens,
    "saelens-before-6": saelens_before_6,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "ours-in-saelens": ours_in_saelens,
    "saebench": saebench,
    "plugin": plugin,
    "tests": tests,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all by default")
    wanted = parser.parse_args().parts or list(PARTS)
    if not REPORT.exists():
        write_text(REPORT, HEADER)
    failed = []
    for name in wanted:
        print(f"{name} …", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            text, ok = PARTS[name](Path(folder).resolve() / name)
        print(text)
        write_section(name, text, REPORT)
        failed += [] if ok else [name]
    if failed:
        sys.exit(f"differences in {', '.join(failed)}: see **NO** in {REPORT}")


if __name__ == "__main__":
    main()
