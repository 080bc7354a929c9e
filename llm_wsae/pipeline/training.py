"""From a grid to the weights of a site: what ``run``, ``plan`` and ``train`` do alike."""

import torch

from llm_wsae.pipeline.request import Grid
from llm_wsae.weights.choosing import choose_weights
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES


def weights_of(
    inputs: RuleInputs,
    grid: Grid,
    config: WeightConfig,
    *,
    chosen: float | None = None,
    own: LossWeights | None = None,
) -> list[LossWeights]:
    """The weights of a site, those from a file last.

    ``chosen`` is the exponent that trials found, if the grid leaves one to them. The plain weights
    if nothing else is left. Raises as ``choose_weights`` does.
    """
    found: dict[str, LossWeights] = {}
    for rule in grid.rules:
        made = choose_weights(inputs, [rule], grid.exponents(rule, chosen), config=config)
        found |= {weights.name: weights for weights in made}
    if own is not None or not found:
        last = choose_weights(inputs, [] if own else [RULES["uniform"]], [], own, config)
        found |= {weights.name: weights for weights in last}
    return list(found.values())


def stand_ins(grid: Grid, config: WeightConfig, d_in: int) -> list[LossWeights]:
    """Weights with the names and forms of those that will be measured. Their values do not matter,
    except that arms which do not share a space must not seem to."""
    found: dict[str, LossWeights] = {}
    for rule in grid.rules:
        for alpha in (1.0,) if rule.is_plain else grid.exponents(rule, chosen=0.5):
            gamma = torch.eye(d_in) if rule.form(config) == "matrix" else torch.ones(d_in)
            gamma = gamma * (1 + len(found) / 1000)
            weights = LossWeights(gamma, rule, alpha, rule.settings(config))
            found.setdefault(weights.name, weights)
    return list(found.values())
