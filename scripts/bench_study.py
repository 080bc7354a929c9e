"""How long a study takes outside training: for every dictionary, and beside another checkout.

    python scripts/bench_study.py
    python scripts/bench_study.py --beside ../older      # another checkout of this package

A small study of the embedded SmolLM2-135M is made once and keeps its dictionaries. Then its results
are deleted and the same command is given again: it trains nothing, but measures every dictionary
anew, with the default number of tokens. That time, with the start of the process, is what is shown.
Other options are given to ``study``.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmarks import ROOT, embedded_model, machine, write_benchmark

SITE, CORPUS = "blocks.9.hook_resid_post", "sotu"


def command(checkout: Path, *words: object) -> float:
    """Give a command of a checkout, from its folder, where Python looks first; the seconds that
    it took."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "llm_wsae", *map(str, words)],
        check=True,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", type=Path, help="folder of another checkout of this package")
    parser.add_argument("--tokens", type=int, default=100_000, help="rows of the store")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    asked, more = parser.parse_known_args()
    busy, model = machine(torch.get_num_threads()), embedded_model()
    checkouts = {"this checkout": ROOT}
    if asked.beside:
        checkouts["the other checkout"] = asked.beside.resolve()
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as place:
        store = Path(place) / "store"
        given = ("--model", model, "--corpus", CORPUS, "--site", SITE)
        command(ROOT, "harvest", *given, "--tokens", asked.tokens, "--out", store)
        folders = {name: Path(place) / str(number) for number, name in enumerate(checkouts)}
        study = ("study", store, *given, "--rule", "whitening", "--alpha", 0.5,
                 "--curve", 24, 48, "--seeds", 0, 1,
                 "--keep-dictionaries", "True", *more)  # fmt: skip
        for name, checkout in checkouts.items():
            command(checkout, *study, "--out", folders[name])
        for _ in range(asked.repeats):
            for name, checkout in checkouts.items():
                shutil.rmtree(folders[name] / "results")
                seconds[name].append(command(checkout, *study, "--out", folders[name]))
        measured = {  # an older checkout has no baselines
            name: len(list((folder / "dictionaries").iterdir())) for name, folder in folders.items()
        }
    of_each = {name: statistics.median(own) / measured[name] for name, own in seconds.items()}
    lines = [
        f"## A study outside training, SmolLM2-135M, {SITE}",
        "",
        "| | seconds, whole command | dictionaries | a dictionary | of the other |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, own in seconds.items():
        share = "" if name == "this checkout" else f"{of_each['this checkout'] / of_each[name]:.2f}"
        lines.append(
            f"| {name} | {statistics.median(own):.0f} [{min(own):.0f}, {max(own):.0f}] "
            f"| {measured[name]} | {of_each[name]:.1f} | {share} |"
        )
    lines += [
        "",
        f"All dictionaries were trained before; medians of {asked.repeats} repeats, in brackets "
        "the lowest and highest. *of the other*: this checkout's time for a dictionary, as a "
        f"share. {' '.join(more) or 'Default settings'}. {busy}.",
    ]
    print("\n".join(lines))
    if asked.write:
        write_benchmark("study outside training", "\n".join(lines))


if __name__ == "__main__":
    main()
