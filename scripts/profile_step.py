"""Where our training step's time goes: each operation's share, beside the floor's two parts.

    python scripts/profile_step.py                               # 768 → 24576, k 32, batch 4096
    python scripts/profile_step.py --shape 2048x65536x64 --write
    python scripts/profile_step.py --dead 1000                   # with AuxK at work

The step is that of bench_train.py, here with a clock around every sparse operation and around the
matrix product inside the encoding. (``value_gradients`` makes the picked latents' values again;
those of the gradient are part of ``reconstruct``.) What is left over is everything between them:
normalising the batch, biases, counts. On a CPU, where every call returns when its work is done.

With ``--dead`` AuxK is a part of the step, and is shown beside its five matrix products alone.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from bench_train import Shape
from benchmarks import machine, write_benchmark
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import steps
from steps import Job

from llm_wsae.number_format import fast_dtype
from llm_wsae.sparse import operations
from llm_wsae.sparse.backends import cpu, pytorch
from llm_wsae.training import arm

OPERATIONS = (
    "encode_topk",
    "value_gradients",
    "reconstruct",
    "firing_counts",
    "sparse_adam",
)
AUXK = "auxk_gradients"
PRODUCT = "encoder product, inside it"


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds spent in each operation since the block began, by name."""
    spent: dict[str, float] = defaultdict(float)
    module = cpu if cpu.available() else pytorch
    before = {(module, name): getattr(module, name) for name in OPERATIONS}
    before[torch, "mm"] = torch.mm
    before[arm, AUXK] = arm.auxk_gradients

    def timed(name: str, operation: Callable) -> Callable:
        def call(*arguments, **named):
            begin = time.perf_counter()
            result = operation(*arguments, **named)
            spent[name] += time.perf_counter() - begin
            return result

        return call

    for (owner, name), operation in before.items():
        setattr(owner, name, timed(PRODUCT if owner is torch else name, operation))
    try:
        with operations.using("cpu" if module is cpu else "pytorch"):
            yield spent
    finally:
        for (owner, name), operation in before.items():
            setattr(owner, name, operation)


def products(job: Job) -> Callable[[Tensor], None]:
    """AuxK's five matrix products: two to the dead latents, one back, two to their weights."""
    fast = fast_dtype(torch.device("cpu"), "encoder")
    weights = torch.randn(job.dead, job.d_in).to(fast)
    latents = torch.randn(job.batch, job.dead).to(fast)

    def multiply(x: Tensor) -> None:
        x = x.to(fast)
        for _ in range(2):
            x @ weights.T
            latents.T @ x
        latents @ weights

    return multiply


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each name over steps."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=Shape.parse, default=Shape(768, 24576, 32))
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dead", type=int, default=0, help="dead latents, for AuxK to revive")
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()

    about_machine = machine(args.threads)
    torch.set_num_threads(args.threads)
    rows = torch.randn(args.batch, args.shape.d_in, generator=torch.Generator().manual_seed(0))
    what = {"batch": args.batch, "threads": args.threads, "dead": args.dead}
    job = Job("", variant="1", **what, **vars(args.shape))
    ours = steps.ours(job, rows)
    floor = {"matmul": steps.matmul(job, rows).step, "adam": steps.adam(job, rows).step}
    if args.dead:
        floor["products"] = products(job)
    found = []
    for number in range(args.steps + 2):
        with clocks() as spent:
            begin = time.perf_counter()
            ours.step(rows)
            whole = time.perf_counter() - begin
        parts = dict(spent)
        for part, alone in floor.items():
            begin = time.perf_counter()
            alone(rows)
            parts[part] = time.perf_counter() - begin
        if number >= 2:
            found.append({"whole": whole, **parts})
    middle = medians(found)
    lines = ["| part of the step | ms | of the step |", "|---|--:|--:|"]
    listed = [OPERATIONS[0], PRODUCT, *OPERATIONS[1:], *([AUXK] if args.dead else [])]
    rest = middle["whole"] - sum(middle[name] for name in listed if name != PRODUCT)
    for name, seconds in [*((n, middle[n]) for n in listed), ("everything else", rest)]:
        lines.append(f"| {name} | {1e3 * seconds:.1f} | {seconds / middle['whole']:.0%} |")
    least = middle["matmul"] + middle["adam"]
    lines += [
        f"| whole step | {1e3 * middle['whole']:.1f} | 100% |",
        f"| floor: encoder product {1e3 * middle['matmul']:.1f} + Adam {1e3 * middle['adam']:.1f} "
        f"| {1e3 * least:.1f} | {least / middle['whole']:.0%} |",
    ]
    if args.dead:
        alone = middle["products"]
        lines.append(
            f"| AuxK's five products alone | {1e3 * alone:.1f} | {alone / middle['whole']:.0%} |"
        )
    dead = f", {args.dead:,} latents dead" if args.dead else ""
    text = (
        f"## Where the step's time goes, {args.shape}, batch {args.batch}{dead}\n\n"
        + "\n".join(lines)
        + f"\n\nMedians of {args.steps} steps. {about_machine}."
    )
    print(text)
    if args.write:
        shape = args.shape
        name = f"{shape.d_in}x{shape.d_sae}x{shape.k}x{args.batch}"
        name += f" with {args.dead} dead" if args.dead else ""
        write_benchmark(f"profile_step {name}", text)


if __name__ == "__main__":
    main()
