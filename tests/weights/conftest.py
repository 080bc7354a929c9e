"""A small site: four dimensions of known spread, and everything a rule can read of them."""

import pytest
import torch

from llm_wsae.statistics.moments import SecondMoment, Statistics
from llm_wsae.weights.scoring import RuleInputs


@pytest.fixture(scope="session")
def statistics():
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([0.5, 1.0, 2.0, 4.0])
    return Statistics(4, 16).update(x, torch.arange(len(x)) % 16)


@pytest.fixture(scope="session")
def inputs(statistics):
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    return RuleInputs(
        statistics,
        decoder=torch.randn(12, 4, generator=generator),
        energy=torch.rand(12, generator=generator),
        fisher=half @ half.T,
        second_moment=SecondMoment(4).update(statistics.usual_sample),
    )
