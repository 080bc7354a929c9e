"""Speed of training from a stream beside its floor, in one interleaved run.

    python scripts/bench_stream.py            # the embedded SmolLM2-135M and State of the Union

Three ways, seconds for the same number of tokens:

    forward   the model's forward to the last of the sites, on contexts that are there
    steps     one TopK arm's step at each site, on rows that are there
    stream    text to steps at all sites, as ``llm-wsae train --model`` does it

The floor is forward + steps. A ratio is the median over repeats of the ratio within a repeat; the
ways are timed one after the other, in turning order.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import torch
from benchmarks import embedded_model, machine, write_benchmark

from llm_wsae.data.config import StreamConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.streaming import ActivationStreams
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import Training
from llm_wsae.weights.loss_weights import weights_from_rule
from llm_wsae.weights.scoring import RuleInputs

SITES = ("blocks.9.hook_resid_post", "blocks.14.hook_resid_post", "blocks.20.hook_resid_post")


def ways(
    model: LanguageModel, corpus: Corpus, sites: list[Site], tokens: int, folder: Path
) -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    config = StreamConfig(buffer_tokens=tokens, statistics_tokens=16_384)
    streams = ActivationStreams(model, corpus, sites, config)
    how = TrainConfig(tokens=1_000_000, dtype="auto")
    trainings = []
    for site in sites:
        uniform = weights_from_rule("uniform", 1.0, RuleInputs(streams.statistics(site)))
        arms, out = [ArmConfig(uniform, k=32)], folder / str(site)
        trainings.append(Training(streams.source(site), arms, how, out, model.device))
    contexts = list(streams._first_contexts(tokens))
    batches = tokens // how.batch_size
    stream = streams.batches(sites, how.batch_size, 0)
    kept = cycle(list(islice(streams.batches(sites, how.batch_size, 1), 4)))

    def forward() -> None:
        for block in contexts:
            model.activations(torch.from_numpy(block.ids), sites[-1:])[sites[-1]].cpu()

    def train(rows_of_all: tuple[torch.Tensor, ...]) -> None:
        for training, rows in zip(trainings, rows_of_all, strict=True):
            training.step([rows])

    def steps() -> None:
        for _ in range(batches):
            train(next(kept))
        for training in trainings:
            training.read_numbers()

    def whole() -> None:
        for _ in range(batches):
            train(next(stream))
        for training in trainings:
            training.read_numbers()

    return {"forward": forward, "steps": steps, "stream": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--site", nargs="+", default=SITES)
    parser.add_argument("--tokens", type=int, default=65_536, help="per way and repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()

    busy = machine(torch.get_num_threads())
    torch.set_grad_enabled(False)
    model = LanguageModel.load(args.model or embedded_model())
    sites = [Site.parse(name) for name in args.site]
    seconds: dict[str, list[float]] = {"forward": [], "steps": [], "stream": []}
    with tempfile.TemporaryDirectory() as folder:
        timed = ways(model, Corpus.open(args.corpus), sites, args.tokens, Path(folder))
        names = list(timed)
        for repeat in range(args.repeats + 1):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                began = time.perf_counter()
                timed[name]()
                if repeat:
                    seconds[name].append(time.perf_counter() - began)
    floor = [sum(pair) for pair in zip(seconds["forward"], seconds["steps"], strict=True)]
    reached = statistics.median(
        low / own for low, own in zip(floor, seconds["stream"], strict=True)
    )
    lines = [
        f"## Stream, {model.name}, {len(sites)} sites with one arm each",
        "",
        "| | s | lowest to highest | tokens/s |",
        "|---|--:|--:|--:|",
    ]
    for name, values in {**seconds, "floor: forward + steps": floor}.items():
        middle = statistics.median(values)
        lines.append(
            f"| {name} | {middle:.2f} | {min(values):.2f} to {max(values):.2f} "
            f"| {args.tokens / middle:,.0f} |"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    lines += [
        "",
        f"The stream has **{reached:.2f}** of the floor's speed. Sites: {', '.join(args.site)}; "
        f"TopK, k = 32, 4,608 latents; {dtype} on {model.device}. {busy}. {args.repeats} repeats "
        f"of {args.tokens:,} tokens.",
    ]
    print("\n".join(lines))
    if args.write:
        write_benchmark("stream", "\n".join(lines))


if __name__ == "__main__":
    main()
