"""Are harvest, training and evaluation as fast as in another checkout? Both in one run.

    git worktree add ../before 51a4de6
    python scripts/bench_commands.py --before ../before

Runs the same commands of both checkouts in turn, each in a process of its own, and prints the
median over rounds of the ratio of their times within a round. The start of the program, which is
printed too, is part of every command.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import CPU, ROOT, embedded_model, machine

from llm_wsae.terminal import markdown

SITE = "blocks.9.hook_resid_post"


def commands(folder: Path, model: str) -> dict[str, list[str]]:
    """What is timed, in an order in which each finds what it needs."""
    read = ["--model", model, "--corpus", "sotu"]
    store, trained = str(folder / "store"), folder / "training"
    train = ["--rule", "uniform", "--k", "32", "--tokens", "400000"]
    judge = ["--tokens", "15000", "--no-baselines", "--out", str(folder / "report.json")]
    return {
        "start": ["--version"],
        "harvest": ["harvest", *read, "--site", SITE, "--tokens", "60000", "--out", store],
        "train": ["train", store, "--site", SITE, *train, "--out", str(trained)],
        "evaluate": ["evaluate", str(trained / "uniform-k32"), *read, *judge],
    }


def seconds(checkout: Path, command: list[str]) -> float:
    """How long a command of that checkout takes."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    words = [sys.executable, "-m", "llm_wsae", *command]
    done = subprocess.run(words, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(command)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def main(before: Path, rounds: int) -> None:
    """Time everything, and print a table."""
    where, model = machine(os.cpu_count() or 1, CPU), embedded_model()
    taken: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            places = {"before": before.resolve(), "now": ROOT}
            lists = {name: commands(Path(folder, name), model) for name in places}
            order = list(places) if number % 2 == 0 else list(places)[::-1]
            for what in lists["now"]:
                pair = {name: seconds(places[name], lists[name][what]) for name in order}
                taken.setdefault(what, []).append((pair["before"], pair["now"]))
                print(f"{what}: {pair['before']:.1f} s, {pair['now']:.1f} s", file=sys.stderr)
    table = [["command", "before, s", "now, s", "now / before", "over the rounds"]]
    for what, pairs in taken.items():
        middle = [statistics.median(own) for own in zip(*pairs, strict=True)]
        ratios = sorted(now / before for before, now in pairs)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        ratio = f"{statistics.median(ratios):.2f}"
        table.append([what, *(f"{one:.1f}" for one in middle), ratio, spread])
    print(f"{where}; {rounds} rounds\n\n{markdown(table)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    main(asked.before, asked.rounds)
