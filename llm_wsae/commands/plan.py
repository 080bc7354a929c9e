"""The command that says what a run takes."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from llm_wsae.commands.options import (
    AutoGridOptions,
    EvaluateOptions,
    Flag,
    Flat,
    HarvestOptions,
    ModelOptions,
    Prefixed,
    Result,
    TrainOptions,
    cost,
    sites_of,
    stream_config,
)
from llm_wsae.data.config import StreamConfig
from llm_wsae.errors import UsageError
from llm_wsae.training.config import TrainConfig
from llm_wsae.weights.config import WeightConfig


@dataclass(frozen=True, kw_only=True)
class PlannedModelOptions(ModelOptions):
    """The language model."""

    device: str = "auto"  # type: ignore[assignment]
    """Device to compute on, which is measured: auto, cuda, mps or cpu. Or an accelerator that is
    not here, computed from published numbers: h200, h100, a100, l40s, l4 or rtx4090."""


@dataclass(frozen=True)
class PlannedTrainOptions(TrainOptions):
    """How dictionaries are trained."""

    expansion: Annotated[int, tyro.conf.arg(aliases=["--expansion"])] = TrainConfig.expansion


def plan(
    model: Flat[PlannedModelOptions],
    site: tuple[str, ...],
    corpus: str | None = None,
    text_column: str | None = None,
    out: Path = Path("runs"),
    arms: int | None = None,
    price_per_hour: float | None = None,
    stream: Flag = False,
    buffer_tokens: int = StreamConfig.buffer_tokens,
    statistics_tokens: int = StreamConfig.statistics_tokens,
    grid: Flat[AutoGridOptions] = AutoGridOptions(),  # noqa: B008 - frozen
    weigh: Flat[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
    harvest: Prefixed[HarvestOptions] = HarvestOptions(),  # noqa: B008 - frozen
    train: Prefixed[PlannedTrainOptions] = PlannedTrainOptions(),
    evaluate: Prefixed[EvaluateOptions] = EvaluateOptions(),  # noqa: B008 - frozen
) -> Result:
    """What a run takes, before anything is spent: disk, memory, time by stage, money.

    It takes the options of run. What does not fit is said in a sentence, with exit code 1.

    Args:
        site: Residual-stream sites, named as in TransformerLens: blocks.8.hook_resid_post.
        corpus: Text to measure on; without it, random tokens.
        text_column: Column that holds the text, if that is not clear.
        out: Folder of the run, whose disk is checked; it is not made.
        arms: Number of dictionaries trained side by side, instead of one for every combination.
        price_per_hour: What an hour costs, in any currency.
        stream: Keep no rows on the disk; train on them as the model computes them.
        buffer_tokens: With --stream: tokens whose rows are shuffled together.
        statistics_tokens: With --stream: first tokens of the text, which weights are measured on.
    """
    from llm_wsae.data.corpus import Corpus
    from llm_wsae.data.packing import Packer
    from llm_wsae.hardware import choose_device
    from llm_wsae.planning.planning import plan as plan_run
    from llm_wsae.planning.speeds import ACCELERATORS

    started, sites = time.monotonic(), sites_of(site)
    if price_per_hour is not None and not price_per_hour >= 0:
        raise UsageError(f"--price-per-hour must be a number of at least 0, not {price_per_hour:g}")
    accelerator = model.device if model.device in ACCELERATORS else None
    if accelerator is not None:  # the model is read for its shapes alone
        dtype = "bfloat16" if model.model_dtype == "auto" else model.model_dtype
        model = replace(model, device="cpu", model_dtype=dtype)
    else:
        choose_device(model.device)
    text = None if corpus is None else Corpus.open(corpus, "train", text_column=text_column)
    loaded = model.load(model.model)
    found = plan_run(
        loaded,
        sites,
        rules=grid.rule,
        alphas=grid.alpha,
        ks=grid.k,
        l1s=grid.l1,
        architectures=grid.architecture,
        init_seeds=grid.init_seeds,
        num_arms=arms,
        contexts=None if text is None else Packer.for_model(loaded, harvest).contexts(text),
        accelerator=accelerator,
        price_per_hour=price_per_hour,
        out=out,
        harvest_config=harvest,
        stream_config=stream_config(stream, buffer_tokens, statistics_tokens, harvest),
        weight_config=weigh,
        train_config=train.with_model_on(model.device),
        evaluate_config=evaluate,
    )
    found.check()
    return found.to_dict(), f"{found.table()}\n{cost(started)}"
