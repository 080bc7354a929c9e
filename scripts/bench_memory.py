"""Peak memory of harvest and of training, at several numbers of tokens.

    python scripts/bench_memory.py            # the embedded SmolLM2-135M and State of the Union

Each command runs in a process of its own, whose largest resident memory the system reports when it
ends. A harvest of two forward passes shows what loading the model alone takes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmarks import embedded_model, machine, write_benchmark

SITE = "blocks.9.hook_resid_post"
FEW = 8192  # tokens of two forward passes


def peak_megabytes(*words: object) -> float:
    """Run one command; its largest resident memory."""
    command = [sys.executable, "-m", "llm_wsae", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--tokens", type=int, nargs=2, default=[100_000, 400_000])
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()

    busy = machine(torch.get_num_threads())
    model = args.model or embedded_model()
    lines = ["| tokens | harvest, peak MB | store, MB | training 8 × on it, k 32, peak MB |",
             "|--:|--:|--:|--:|"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for tokens in (FEW, *args.tokens):
            store = Path(folder) / str(tokens)
            harvest = peak_megabytes(
                "harvest", "--model", model, "--corpus", args.corpus, "--site", SITE,
                "--tokens", tokens, "--out", store,
            )  # fmt: skip
            on_disk = sum(path.stat().st_size for path in store.rglob("*.safetensors")) / 2**20
            trained = Path(folder) / f"trained-{tokens}"
            training = peak_megabytes(
                "train", store, "--site", SITE, "--rule", "uniform", "variance", "--alpha", 0.5,
                "--out", trained,
            )  # fmt: skip
            lines.append(f"| {tokens:,} | {harvest:,.0f} | {on_disk:,.0f} | {training:,.0f} |")
    text = "\n".join(
        [
            f"## Peak memory, {Path(str(model)).name}, {SITE}",
            "",
            *lines,
            "",
            "Resident memory of the whole process, Python and torch included (MB of 2^20 bytes); "
            "the first line is little more than loading the model.",
            "",
            f"{busy}.",
        ]
    )
    print(text)
    if args.write:
        write_benchmark("memory", text)


if __name__ == "__main__":
    main()
