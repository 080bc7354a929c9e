"""The command that trains dictionaries."""

import time
from pathlib import Path

from llm_wsae.commands.options import Flat, GridOptions, Result, Store, cost
from llm_wsae.model.site import Site
from llm_wsae.outputs import check_file, is_record_of
from llm_wsae.processes import leads
from llm_wsae.provenance import write_record
from llm_wsae.training.config import TrainConfig
from llm_wsae.weights.config import WeightConfig

RECORD = "train.json"


def train(
    store: Store,
    site: str,
    out: Path,
    weights: Path | None = None,
    grid: Flat[GridOptions] = GridOptions(),  # noqa: B008 - frozen
    weigh: Flat[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
    training: Flat[TrainConfig] = TrainConfig(),  # noqa: B008 - frozen
) -> Result:
    """Train dictionaries on a store, all of them in one pass over its rows.

    Run it again to resume after an interruption.

    Args:
        store: Activation store.
        site: One of the store's sites.
        out: Folder that receives one dictionary folder per combination.
        weights: Weights file, as one more rule: weigh's, or a custom vector or matrix.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.training.arm import make_arms
    from llm_wsae.training.trainer import train as train_arms
    from llm_wsae.weighing import measure_inputs
    from llm_wsae.weights.choosing import choose_weights
    from llm_wsae.weights.loss_weights import LossWeights
    from llm_wsae.weights.rules import Rule

    started = time.monotonic()
    check_file(out / RECORD, is_record_of("train"))
    opened, place = ActivationStore.open(store), Site.parse(site)
    rules = [Rule.parse(name) for name in grid.rule]
    inputs = measure_inputs(rules, opened, place)  # only what weigh has measured of the store
    own = LossWeights.load(weights, weigh) if weights else None
    chosen = choose_weights(inputs, rules, grid.alpha, own, weigh)
    arms = make_arms(chosen, grid.k, grid.l1, grid.init_seeds, grid.architecture)
    dictionaries = train_arms(opened.source(place), arms, training, out)
    if leads():
        asked = {"store": store, "site": site, "weights": weights, **vars(grid), **vars(training)}
        write_record(out / RECORD, "train", {**asked, "weigh": weigh})
    facts = {name: d.info.metrics["training"] for name, d in dictionaries.items()}
    width = max(32, *(len(name) + 2 for name in facts))
    lines = [f"{'dictionary':<{width}}{'train FVU':>10}{'L0':>8}{'dead %':>8}"]
    for name, numbers in facts.items():
        lines.append(
            f"{name:<{width}}{numbers['fvu']:>10.4f}{numbers['l0']:>8.1f}"
            f"{100 * numbers['dead']:>8.1f}"
        )
    return facts, "\n".join([*lines, "", f"dictionaries in {out}", cost(started)])
