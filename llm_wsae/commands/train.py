"""The command that trains dictionaries."""

import time
from pathlib import Path

import tyro

from llm_wsae.commands.common import Config, Result, cost
from llm_wsae.model.site import Site
from llm_wsae.processes import leads
from llm_wsae.provenance import write_record
from llm_wsae.training.config import ArchitectureName, TrainConfig
from llm_wsae.weights.config import WeightConfig


def train(
    store: tyro.conf.Positional[Path],
    site: str,
    out: Path,
    rule: tuple[str, ...] = ("uniform", "variance"),
    alpha: tuple[float, ...] = (0.5,),
    weights: Path | None = None,
    k: tuple[int, ...] = (32,),
    architecture: tuple[ArchitectureName, ...] = ("topk",),
    l1: tuple[float, ...] = (),
    seeds: tuple[int, ...] = (0,),
    config: Config[TrainConfig] = TrainConfig(),  # noqa: B008 - frozen
    weigh: Config[WeightConfig] = WeightConfig(),  # noqa: B008 - frozen
) -> Result:
    """Train dictionaries on a store: every rule × α × sparsity × seed, in one pass over the rows.

    Args:
        store: Activation store.
        site: One of its sites.
        out: Folder that receives one dictionary folder per arm; a stopped training goes on.
        rule: Weight rules; the plain dictionary is "uniform".
        alpha: Exponents of the weights γ = score^α, for every rule but uniform.
        weights: A weights file, as one more choice of weights: one of weigh's, which knows where it
            acts, or a vector or matrix of your own.
        k: Active latents per token, a dictionary of every architecture each.
        architecture: Kinds of dictionary: topk has k latents in every token, the others on average.
        l1: L1 coefficients, a ReLU dictionary each; the error beside them is a mean over
            dimensions of rows scaled to variance 1.
        seeds: Seeds of the initial weights, a dictionary each.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.training.grid import make_arms
    from llm_wsae.training.trainer import train as train_arms
    from llm_wsae.weighing import measure_inputs
    from llm_wsae.weights.choosing import choose_weights
    from llm_wsae.weights.loss_weights import LossWeights
    from llm_wsae.weights.rules import Rule

    started = time.monotonic()
    opened, place = ActivationStore.open(store), Site.parse(site)
    rules = [Rule.parse(name) for name in rule]
    inputs = measure_inputs(rules, opened, place)  # only what weigh has measured of the store
    own = LossWeights.load(weights, weigh) if weights else None
    chosen = choose_weights(inputs, rules, alpha, own, weigh)
    arms = make_arms(chosen, k, l1, seeds, architecture)
    dictionaries = train_arms(opened.source(place), arms, config, out)
    asked = {"store": store, "site": site, "rule": rule, "alpha": alpha, "weights": weights}
    asked |= {"k": k, "architecture": architecture, "l1": l1, "seeds": seeds}
    if leads():
        write_record(out / "train.json", "train", {**asked, **vars(config), "weigh": weigh})
    facts = {name: d.info.metrics["training"] for name, d in dictionaries.items()}
    width = max(32, *(len(name) + 2 for name in facts))
    lines = [f"{'dictionary':<{width}}{'train FVU':>10}{'L0':>8}{'dead %':>8}"]
    for name, numbers in facts.items():
        lines.append(
            f"{name:<{width}}{numbers['fvu']:>10.4f}{numbers['l0']:>8.1f}"
            f"{100 * numbers['dead']:>8.1f}"
        )
    return facts, "\n".join([*lines, "", f"in {out}/<dictionary>", cost(started)])
