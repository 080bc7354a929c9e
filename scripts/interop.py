"""Our readers on dictionaries that the real tools wrote, and our dictionaries in the real tools.

    python scripts/interop.py                       # every part; docs/interop is written
    python scripts/interop.py sparsify plugin       # some of them; the others stay as they are

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
from interop_checks import Part, ours_in_saelens, peer, plugin, read_all, tests

REPORTS = ROOT / "docs/interop"
READ, WRITTEN = "read.md", "written.md"


def saelens(out: Path) -> Part:
    """All that SAELens writes."""
    version = peer("saelens", "in_saelens.py write", out)
    for other in out.glob("finished/*"):  # the way to what a checkpoint means, not a case
        if other.is_file():
            other.unlink()
    refused = {"layer-norm", "abstopk", "matching-pursuit", "transcoder", "jumprelu-transcoder"}
    found = read_all(out, {f"written/{name}" for name in refused})
    text = f"""## SAELens → here

{version}. `written`: `save_model` of random weights; `trained`: `save_inference_model` after thirty
steps of its `SAETrainer`; `checkpoint`: what the same trainer left half-way, compared with what
SAELens would have made of it in the end.

{found.text}"""
    return Part(text, found.ok)


def saelens_before_6(out: Path) -> Part:
    """The layouts of older versions, by their own writers."""
    versions = [peer(f"saelens{old}", "write_saelens_old.py", out / old) for old in ("5", "3")]
    found = read_all(
        out, {f"{old}/{name}" for old in ("5", "3") for name in ("layer-norm", "hook-z")}
    )
    text = f"""## SAELens before version 6 → here

{" and ".join(versions)}, random weights, `save_model`.

{found.text}"""
    return Part(text, found.ok)


def sparsify(out: Path) -> Part:
    """All that sparsify writes."""
    version = peer("sparsify", "write_sparsify.py", out)
    refused = {f"{name}/layers.3" for name in ("groupmax", "transcoder", "skip")}
    found = read_all(out, refused)
    return Part(f"## sparsify → here\n\n{version}, `save_to_disk`.\n\n{found.text}", found.ok)


def dictionary_learning(out: Path) -> Part:
    """All that dictionary_learning's trainers write."""
    version = peer("dictionary_learning", "write_dictionary_learning.py", out)
    found = read_all(out, set())
    text = f"""## dictionary_learning → here

{version}. Forty steps of `trainSAE` with each trainer, on normalised activations; compared with its
`load_dictionary`.

{found.text}"""
    return Part(text, found.ok)


PARTS: dict[str, tuple[Callable[[Path], Part], str]] = {
    "saelens": (saelens, READ),
    "saelens-before-6": (saelens_before_6, READ),
    "sparsify": (sparsify, READ),
    "dictionary-learning": (dictionary_learning, READ),
    "ours-in-saelens": (ours_in_saelens, WRITTEN),
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
