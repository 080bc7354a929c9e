"""Speed of the training step beside SAELens, eai-sparsify and dictionary_learning, in one run.

    python scripts/bench_train.py                                # random rows, 768 → 24576, k 32
    python scripts/bench_train.py --shapes 768x24576x32 576x4608x32 2048x65536x64 --write
    python scripts/bench_train.py --shapes 576x4608x32 --store runs/quickstart/store \\
        --site blocks.9.hook_resid_post                          # real activations
    python scripts/bench_train.py --dead 1000                    # with AuxK at work
    python scripts/bench_train.py --shapes 576x4608x32 --transcoder --peers sparsify
    python scripts/bench_train.py --device cuda --steps 20       # on a GPU

All tools train on the same rows with the same shape, number of threads and version of torch, each
in a process of its own (scripts/peers/), in which no latent dies; with ``--dead`` that many are
dead in every step, and every tool has its AuxK loss for them. In each round every worker takes a
turn: one untimed step, then some timed ones, while the others sleep; the next round begins one
worker later, so that a busy machine is busy for all of them. A ratio is the median over rounds of
the ratio within a round.

The floor is what no TopK step can do without: the encoder's matrix product in the fastest number
format, and fused Adam over all parameters; AuxK's products are not in it. Memory is what a step
needs beyond the parameters and the optimiser's state. With a store it also says what comparing its
rows with their checksums costs, which happens in a thread beside the steps.

Peers' environments are made once, outside the repository: ~/.cache/llm_wsae/peers, or the folder
named by LLM_WSAE_PEERS.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from benchmarks import PEERS, Worker, WorkerFailed, machine, write_benchmark
from tqdm import tqdm

from llm_wsae.data.rows import CHUNK_ROWS, RowReader
from llm_wsae.data.store import ActivationStore
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.hardware import choose_device
from llm_wsae.model.site import Site
from llm_wsae.training.normaliser import Normaliser

BATCHES = 4  # different batches of rows, used in turn
PASSES = 5  # over a store, to see what reading it for the first time costs
WARMUP_STEPS = 1  # untimed steps of a turn: the others have used the caches since the last one


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    d_in: int
    d_sae: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From ``768x24576x32``."""
        d_in, d_sae, k = (int(number) for number in text.split("x"))
        return cls(d_in, d_sae, k)

    def __str__(self) -> str:
        return f"{self.d_in} → {self.d_sae}, k {self.k}"


@dataclass
class Contestant:
    """One row of the table."""

    name: str
    step: str
    """Key of STEPS in peers/steps.py."""
    variant: str = ""
    peer: str | None = None
    """Key of PEERS; None runs in this environment."""
    arms: int = 1
    rounds: list[list[float]] = field(default_factory=list)
    """Seconds of each timed step, by round."""
    extra_bytes: int | None = None
    about: str = ""
    failure: str = ""
    """Why it did not run to the end; empty if it did."""

    @property
    def times(self) -> list[float]:
        """Seconds per step and arm, all rounds."""
        return [seconds / self.arms for turn in self.rounds for seconds in turn]

    @property
    def medians(self) -> list[float]:
        """Median seconds per step and arm of each round."""
        return [statistics.median(turn) / self.arms for turn in self.rounds]


OURS, MATMUL, ADAM = "llm_wsae", "encoder product", "Adam"


def contestants(peers: list[str], arms: int) -> list[Contestant]:
    """Everybody who takes part, ours first, the floor's two parts last."""
    known = {
        "sparsify": Contestant("eai-sparsify", "sparsify", "", "sparsify"),
        "saelens": Contestant("SAELens autocast", "saelens", "autocast", "saelens"),
        "saelens-float32": Contestant("SAELens", "saelens", "float32", "saelens"),
        "dictionary_learning": Contestant(
            "dictionary_learning", "dictionary_learning", "", "dictionary_learning"
        ),
    }
    ours = [Contestant(OURS, "ours", "1"), Contestant(f"{OURS}, rows of length 1", "ours", "unit")]
    if arms > 1:
        ours.append(Contestant(f"{OURS}, {arms} arms (per arm)", "ours", str(arms), None, arms))
    floor = [Contestant(MATMUL, "matmul"), Contestant(ADAM, "adam")]
    return ours + [known[name] for name in peers] + floor


def run(
    everybody: list[Contestant], job: dict, threads: int, rounds: int, steps: int, keep: bool
) -> str:
    """Let all contestants run and fill in their numbers; returns the versions of the peers.

    ``keep`` keeps the workers alive from round to round; otherwise each is started for its turn.
    """
    untimed = WARMUP_STEPS if keep else 0  # a worker that has just started is warm
    workers: dict[str, Worker] = {}
    versions: dict[str, str] = {}

    def take_turn(contestant: Contestant) -> None:
        worker = workers.get(contestant.name) or Worker(
            contestant.peer, contestant.step, job | {"variant": contestant.variant}, threads
        )
        workers[contestant.name] = worker
        contestant.about = worker.facts["about"]
        if worker.facts["version"]:
            ours = torch.__version__.split("+")[0]
            theirs = worker.facts["torch"].split("+")[0]
            other = f" (torch {theirs})" if theirs != ours else ""
            versions[PEERS[contestant.peer][1]] = worker.facts["version"] + other
        turn = worker.turn(untimed + steps)
        contestant.rounds.append(turn["seconds"][untimed:])
        if turn["extra_bytes"] is not None:
            contestant.extra_bytes = max(contestant.extra_bytes or 0, turn["extra_bytes"])
        if not keep:
            workers.pop(contestant.name).close()

    try:
        with tqdm(total=rounds * len(everybody), desc="turns", dynamic_ncols=True) as bar:
            for number in range(rounds):
                first = number % len(everybody)
                for contestant in everybody[first:] + everybody[:first]:
                    bar.set_postfix_str(contestant.name)
                    if not contestant.failure:
                        try:
                            take_turn(contestant)
                        except WorkerFailed as error:
                            contestant.failure = str(error)
                            workers.pop(contestant.name, None)
                    bar.update()
    finally:
        for worker in workers.values():
            worker.close()
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def fits_in_memory(everybody: list[Contestant], shape: Shape, batch: int, device: str) -> bool:
    """Whether all workers can live at once: parameters, Adam's two moments and gradients each, and
    the dense latents and their gradients of one of them, in float32, in 70 % of the memory. (On a
    GPU each keeps the memory of its largest step.)"""
    arms = sum(contestant.arms for contestant in everybody)
    resident = arms * 4 * (2 * shape.d_sae * shape.d_in) * 4
    working = 6 * batch * shape.d_sae * 4
    if device == "cuda":
        return resident + len(everybody) * working < 0.7 * torch.cuda.mem_get_info()[1]
    return resident + working < 0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write_rows(
    path: Path, shape: Shape, batch: int, store: Path | None, site: str | None, is_transcoder: bool
) -> str:
    """Write the rows everybody trains on, with a transcoder's targets beside them; returns what
    they are.

    Real activations are centred and scaled as for our own training, and massive ones left out: the
    peers do not do that themselves. Raises LlmWsaeError if the store does not have such rows.
    """
    wanted = BATCHES * batch
    if store is None:
        width = shape.d_in * (2 if is_transcoder else 1)
        rows = torch.randn(wanted, width, generator=torch.Generator().manual_seed(0))
        words = "random normal rows"
    else:
        source = ActivationStore.open(store).source(Site.parse(site))
        if source.d_in != shape.d_in:
            raise LlmWsaeError(
                f"the rows of {store} have {source.d_in} dimensions, not {shape.d_in}"
            )
        normaliser = Normaliser(source.statistics(), torch.device("cpu"), torch.float32)
        parts, found = [], 0
        batches = source.batches(batch, seed=0)
        while found < wanted:
            normalised = normaliser.batch(next(batches))
            parts.append(normalised.x[normalised.mask > 0])
            found += len(parts[-1])
        batches.close()
        rows = torch.cat(parts)[:wanted]
        words = f"activations of {source.identity().get('model', {}).get('name')} at {site}"
    np.save(path, rows.numpy())
    return words


def proof_cost(store: Path, site: str, batch: int) -> float:
    """Processor seconds of comparing a batch of rows with their checksums: what reading all rows
    for the first time costs more than for the second, the median of some readers."""
    opened = ActivationStore.open(store)
    rows = torch.empty(CHUNK_ROWS, opened.d_in, dtype=getattr(torch, opened.manifest.dtype))
    whole = opened.num_rows // CHUNK_ROWS * CHUNK_ROWS

    def seconds(reader: RowReader) -> float:
        before = time.process_time()
        for start in range(0, whole, CHUNK_ROWS):
            reader.read(start, rows)
        return time.process_time() - before

    more = []
    for _ in range(PASSES):
        reader = opened.reader(Site.parse(site))
        more.append(seconds(reader) - seconds(reader))
    return statistics.median(more) * batch / whole


def table(everybody: list[Contestant], batch: int) -> str:
    """The results as a Markdown table."""
    by_name = {contestant.name: contestant for contestant in everybody}
    ours, matmul, adam = by_name[OURS], by_name[MATMUL], by_name[ADAM]
    floor = [a + b for a, b in zip(matmul.medians, adam.medians, strict=False)]
    lines = [
        "| | s/step | quartiles | tokens/s | time / ours | floor reached | MB beyond state |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for one in everybody:
        if one.failure or not one.rounds:
            lines.append(f"| {one.name} | did not run: {one.failure} | | | | | |")
            continue
        middle, low, high = quartiles(one.times)
        is_floor = one in (matmul, adam)
        cells = [
            f"{one.name} ({one.about})" if one.about else one.name,
            f"{middle:.3g}",
            f"{low:.3g}–{high:.3g}",
            "" if is_floor else f"{batch / middle:,.0f}",
            f"{ratio(one.medians, ours.medians):.2f}",
            "" if is_floor else f"{ratio(floor, one.medians):.0%}",
            "" if is_floor or one.extra_bytes is None else f"{one.extra_bytes / 1e6:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if floor:
        middle, low, high = quartiles(floor)
        lines.append(
            f"| floor, the last two | {middle:.3g} | {low:.3g}–{high:.3g} "
            f"| {batch / middle:,.0f} | {ratio(floor, ours.medians):.2f} | 100% | |"
        )
    return "\n".join(lines)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds of the ratio within a round; NaN if there is no round with both."""
    ratios = [a / b for a, b in zip(above, below, strict=False)]
    return statistics.median(ratios) if ratios else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=Shape.parse,
        default=[Shape(768, 24576, 32)],
        metavar="D_INxD_SAExK",
        help="default: 768x24576x32",
    )
    parser.add_argument("--batch", type=int, default=4096, help="rows per step; default: 4096")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=["sparsify", "saelens", "saelens-float32", "dictionary_learning"],
        default=["sparsify", "saelens", "dictionary_learning"],
        help="default: all but saelens-float32; --peers alone: nobody",
    )
    parser.add_argument(
        "--transcoder",
        action="store_true",
        help="of random rows to random targets; of the peers, sparsify has one",
    )
    parser.add_argument("--dead", type=int, default=0, help="dead latents, for AuxK to revive")
    parser.add_argument("--arms", type=int, default=4, help="of our second row; 1: none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of our products and of the floor's; default: ours, and the faster one",
    )
    parser.add_argument("--store", type=Path, help="train on activations from here")
    parser.add_argument("--site", help="which of the store's")
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()
    if (args.store is None) != (args.site is None):
        parser.error("--store and --site go together")
    if args.transcoder and (args.store is not None or {*args.peers} - {"sparsify"}):
        parser.error("--transcoder is for random rows, and beside --peers sparsify")

    try:
        device = choose_device(args.device)
    except LlmWsaeError as error:
        sys.exit(str(error))
    about_machine = machine(args.threads, device)
    torch.set_num_threads(args.threads)
    for shape in args.shapes:
        everybody = contestants(args.peers, args.arms)
        keep = fits_in_memory(everybody, shape, args.batch, args.device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.npy"
            try:
                words = write_rows(path, shape, args.batch, args.store, args.site, args.transcoder)
            except LlmWsaeError as error:
                sys.exit(str(error))
            job = {"rows": str(path), "batch": args.batch, "device": args.device}
            job |= {"dtype": args.dtype}
            job |= {"dead": args.dead, **vars(shape)}
            versions = run(everybody, job, args.threads, args.rounds, args.steps, keep)
        how = "workers kept alive" if keep else "workers started anew for each"
        dead = f", {args.dead:,} latents dead" if args.dead else ""
        what = "Transcoder's step" if args.transcoder else "Training step"
        text = (
            f"## {what}, {shape}, batch {args.batch}, {words}{dead}\n\n"
            f"{table(everybody, args.batch)}\n\n"
            f"{about_machine}. Peers: {versions or 'none'}. "
            f"Rounds: {args.rounds}; timed steps in each: {args.steps}; {how}.\n"
        )
        if args.store is not None:
            seconds = proof_cost(args.store, args.site, args.batch)
            step = quartiles(everybody[0].times)[0] * args.threads
            text += (
                "\nComparing rows with their checksums, in the first epoch only: "
                f"{1000 * seconds:.2f} ms of processor time a step, {seconds / step:.2%} of ours.\n"
            )
        print(f"\n{text}", flush=True)
        if args.write:
            rows = "random" if args.store is None else args.site
            name = f"{shape.d_in}x{shape.d_sae}x{shape.k}x{args.batch} {rows}"
            name += f" with {args.dead} dead" if args.dead else ""
            name += " transcoder" if args.transcoder else ""
            write_benchmark(f"bench_train {name}", text, device)
        if failed := [one.name for one in everybody if one.failure]:
            sys.exit(f"did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
