"""Group bias adaptation: the tied step, the adaptation of thresholds, and their targets."""

from itertools import pairwise

import pytest
import torch
from looping import over
from training_cases import (
    CPU,
    D_IN,
    D_SAE,
    K,
    architecture,
    error,
    gradients_of,
    problem,
    step_of,
)

from llm_wsae.training.architecture import Parameters
from llm_wsae.training.architectures.gba import EVERY, GBA, RATE, STEPS_EACH, target_frequencies
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.weights.loss_weights import LossWeights


@over(name=("gba, dense", "gba, sparse"))
def test_gradients_through_the_tie_are_those_of_autograd(name):
    """The paper's model in its own terms: tied, thresholds on the reading of a unit row. Where
    weights give decoder rows another length than 1, that counts as fixed."""
    parameters, batch, gamma = problem(torch.float64)
    made, x, mask = architecture(name, batch.x), batch.x, batch.mask
    made.tie(parameters)
    step = step_of(name, parameters, batch, gamma, made=made)
    step = made.through_tie(step, parameters)
    w, b_dec, a = (
        p.clone().requires_grad_()
        for p in (parameters.decoder, parameters.decoder_bias, made.amplitude)
    )
    length = w.norm(dim=1).detach()
    reading = (x - b_dec) @ (w / length[:, None]).T
    active = (reading > made.threshold * length).double() * mask[:, None]
    missed = ((reading * active * a / length) @ w + b_dec - x) * gamma * mask[:, None]
    (missed.square().sum() / (mask.sum() * D_IN)).backward()
    assert torch.equal(step.firings, active.sum(0))
    assert 0.02 < float(active.mean()) < 0.4
    found = (gradients_of(step).decoder, step.by_decoder_bias, step.observed[:, 2])
    for one, leaf in zip(found, (w, b_dec, a), strict=True):
        assert error(one, leaf.grad) < 1e-12
    frequency, excess = step.observed[:, 0], step.observed[:, 1]
    torch.testing.assert_close(frequency, active.sum(0) / mask.sum())
    highest = ((reading / length - made.threshold) * active).amax(0)
    torch.testing.assert_close(excess, highest, rtol=1e-10, atol=1e-12)


def test_the_rounded_encoder_follows_the_tie():
    _, batch, gamma = problem(torch.bfloat16)
    arm = Arm(ArmConfig(LossWeights(gamma), K, architecture="gba"), D_IN, D_SAE, CPU)
    for number in (1, 2):
        arm.step(batch, number * len(batch.x), 1e-3, 0.0, 10**9)
    encoder, decoder, bias, decoder_bias = arm.parameters
    torch.testing.assert_close(encoder, decoder * arm.architecture.amplitude[:, None])
    torch.testing.assert_close(bias, -encoder @ decoder_bias)
    assert torch.equal(arm._optimiser.encoder(torch.bfloat16), encoder.bfloat16())


def follow(made, frequency, excess):
    made.follow(torch.stack([frequency, excess, torch.zeros_like(excess)], dim=1), 1e-3)


def test_a_latent_above_its_target_rises_and_one_that_never_fired_falls():
    made = GBA(3, 30)
    made.threshold.fill_(0.5)
    made.threshold[12] = 0.001
    frequency, excess = torch.zeros(30), torch.zeros(30)
    frequency[:10], excess[:10] = 0.9, torch.arange(10.0)  # one of every group; the first has r = 0
    frequency[[10, 11]], excess[[10, 11]] = 1e-5, 3.0  # below every target
    follow(made, frequency, excess)
    expected = torch.full((30,), 0.5)
    expected[:10] += RATE * excess[:10]
    group = torch.tensor([3.0, (1 + 3) / 2, *range(2, 10)])  # means over the positive r
    expected[12:] -= RATE * group[torch.arange(12, 30) % 10]
    expected[12] = 0  # not below
    torch.testing.assert_close(made.threshold, expected)
    made.threshold.fill_(100.0)  # not above the length of rows
    made.tie(Parameters(torch.ones(30, 4), torch.ones(30, 4), torch.ones(30), torch.ones(4)))
    assert made.threshold.tolist() == [2.0] * 30


def test_adaptations_become_rarer():
    made = GBA(3, 30)
    at, before = [], made.threshold.clone()
    for step in range(1, 12_000):
        follow(made, torch.full((30,), float(step % 2)), torch.ones(30))
        if not torch.equal(made.threshold, before):
            at.append(step)
        before = made.threshold.clone()
    gaps = [b - a for a, b in pairwise(at)]
    assert gaps[:100] == [1] * 100 and set(gaps) == set(range(1, EVERY + 1))
    assert at[gaps.index(EVERY)] == pytest.approx(STEPS_EACH * (EVERY - 1), abs=EVERY)


@over(d_sae=(4, 10, 64, 4608))
def test_targets_fall_geometrically_and_sum_to_k(d_sae):
    targets = target_frequencies(2, d_sae, 10, 100.0).double()
    assert float(targets[torch.arange(d_sae) % 10].sum()) == pytest.approx(2, rel=1e-5)
    ratios = targets[1:] / targets[:-1]
    torch.testing.assert_close(ratios, torch.full((9,), 100 ** (-1 / 9)).double())
