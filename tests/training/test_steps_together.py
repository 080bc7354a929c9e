"""A step in several processes is the step of one: by rows and by latents, to the last digits."""

import functools

import numpy as np
import torch
from looping import over
from several import run
from sparse_cases import of_all
from training_cases import BATCH, CPU, D_SAE, STEPS, gradients_of, problem, step_of

from llm_wsae.machine.processes import join
from llm_wsae.training.architecture import Batch, Parameters, squared
from llm_wsae.training.arm import DeadLatents, auxk_gradients
from llm_wsae.training.strategy import SINGLE, Strategy, strategy_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Of sums that were added up in another order; in bfloat16 many values tie for the last place among
the k largest, and which of them is taken depends on who has them."""
DEAD = [0, 3, 7, *range(100, 160)]  # unevenly shared, and more than take part in a row
PER_LATENT = ("encoder", "decoder", "encoder_bias", "firings")


def share(strategy: Strategy, parameters: Parameters, batch: Batch) -> tuple[Parameters, Batch]:
    """This process's part of a problem. Rows come in parts of different lengths, one of them 0."""
    own = strategy.own_latents(D_SAE)
    parts = [p[own.start : own.stop] for p in parameters[:3]]
    parameters = Parameters(*parts, parameters.decoder_bias)
    if strategy.shares_rows:
        bounds, rank = [0, 900, BATCH, BATCH], strategy.row_part[0]
        rows = slice(bounds[rank], bounds[rank + 1])
        elsewhere = batch.mask.sum() - batch.mask[rows].sum()
        batch = Batch(*(part[rows] for part in batch[:3]), elsewhere)
    return parameters, batch


def all_steps(shard: str, dtype: torch.dtype, matrix: bool) -> dict[str, dict]:
    """The numbers of every architecture from one's own part of the problem."""
    everyone = join()
    with everyone.together(), strategy_of(everyone, CPU, shard) as strategy:
        return {name: numbers(strategy, name, dtype, matrix) for name in STEPS}


@functools.cache
def outcomes(size: int, shard: str, dtype: torch.dtype, matrix: bool) -> list[dict[str, dict]]:
    found = run(size, all_steps, shard, dtype, matrix)
    assert all(isinstance(part, dict) for part in found), found
    return found


def numbers(strategy: Strategy, name: str, dtype: torch.dtype, matrix: bool) -> dict:
    """Everything that a step and AuxK tell, from one's own part of the problem."""
    parameters, batch, gamma = problem(dtype, matrix)
    parameters, batch = share(strategy, parameters, batch)
    own = strategy.own_latents(D_SAE)
    step = step_of(name, parameters, batch, gamma, strategy=strategy)
    dead = DeadLatents(torch.tensor([i - own.start for i in DEAD if i in own], dtype=torch.int64))
    more = auxk_gradients(parameters, batch, step.residual, dead, squared(gamma), 0.5, strategy)
    revived, gradients = of_all(more, parameters), gradients_of(step)
    strategy.sum_over_rows_([*gradients, step.firings, step.loss, *revived])
    found = {"residual": step.residual, "loss": step.loss, "firings": step.firings}
    found |= gradients._asdict()
    found |= {f"revived {name}": part for name, part in revived._asdict().items()}
    if step.observed is not None:
        found["observed"] = step.observed
    return {name: part.double().numpy() for name, part in found.items()}


def whole(parts: list[dict], shard: str) -> dict:
    """The numbers of all processes, put together; what all of them have must be the same bits."""
    together = {}
    for name, first in parts[0].items():
        every = [part[name] for part in parts]
        per_latent = name.removeprefix("revived ") in PER_LATENT or (
            name == "observed" and first.ndim
        )
        if (shard == "rows" and name == "residual") or (shard == "latents" and per_latent):
            together[name] = np.concatenate(every)
        else:
            assert all((part == first).all() for part in every), name
            together[name] = first
    return together


CASES = [
    *((2, shard, dtype, False) for shard in ("rows", "latents") for dtype in TOLERANCE),
    (3, "rows", torch.float64, True),  # the third has no row
    (4, "latents", torch.float64, True),  # the inner prefixes are all the first one's
]


@over(case=CASES, name=STEPS)
def test_a_step_of_several_is_that_of_one(case, name):
    size, shard, dtype, matrix = case
    alone = numbers(SINGLE, name, dtype, matrix)
    together = whole([part[name] for part in outcomes(size, shard, dtype, matrix)], shard)
    assert together.keys() == alone.keys()
    assert alone["revived encoder"].any()
    for key, expected in alone.items():
        error = np.linalg.norm(together[key] - expected) / max(np.linalg.norm(expected), 1e-30)
        assert error < TOLERANCE[dtype], (name, key)
    if dtype != torch.bfloat16:
        assert (together["firings"] == alone["firings"]).all()
    assert together["firings"].sum() == alone["firings"].sum()
