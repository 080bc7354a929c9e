"""The command that says what a run takes."""

import time
from pathlib import Path

from llm_wsae.commands.options import (
    AutoGridOptions,
    CorpusOptions,
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
from llm_wsae.weights.config import WeightConfig


def plan(
    model: Flat[ModelOptions],
    corpus: Flat[CorpusOptions],
    site: tuple[str, ...],
    out: Path = Path("runs"),
    stream: Flag = False,
    buffer_tokens: int = StreamConfig.buffer_tokens,
    statistics_tokens: int = StreamConfig.statistics_tokens,
    grid: Flat[AutoGridOptions] = AutoGridOptions(),  # noqa: B008 - frozen
    weigh: Flat[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
    harvest: Prefixed[HarvestOptions] = HarvestOptions(),  # noqa: B008 - frozen
    train: Prefixed[TrainOptions] = TrainOptions(),  # noqa: B008 - frozen
    evaluate: Prefixed[EvaluateOptions] = EvaluateOptions(),  # noqa: B008 - frozen
) -> Result:
    """What a run takes, before anything is spent: rows, disk, memory, time by stage.

    It takes the options of run. What does not fit is said in a sentence, with exit code 1.

    Args:
        site: Residual-stream sites, named as in TransformerLens: blocks.8.hook_resid_post.
        out: Folder of the run, whose disk is checked; it is not made.
        stream: Keep no rows on the disk; train on them as the model computes them.
        buffer_tokens: With --stream: tokens whose rows are shuffled together.
        statistics_tokens: With --stream: first tokens of the text, which weights are measured on.
    """
    from llm_wsae.pipeline.planning import plan as plan_run
    from llm_wsae.pipeline.planning import stand_ins
    from llm_wsae.training.arm import make_arms

    started, sites, text = time.monotonic(), sites_of(site), corpus.open("train")
    loaded = model.load(model.model)
    weights = stand_ins(grid.rule, grid.alpha, loaded.d_model, weigh)
    found = plan_run(
        loaded,
        text,
        sites,
        make_arms(weights, grid.k, grid.l1, grid.init_seeds, grid.architecture),
        out,
        harvest_config=harvest,
        stream_config=stream_config(stream, buffer_tokens, statistics_tokens, harvest),
        train_config=train.with_model_on(model.device),
        evaluate_config=evaluate,
    )
    found.check()
    return found.to_dict(), f"{found.table()}\n{cost(started)}"
