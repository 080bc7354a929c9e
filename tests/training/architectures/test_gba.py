"""Group bias adaptation: the tied step, the adaptation of thresholds, and their targets."""

from itertools import pairwise

import pytest
import torch
from training_cases import CPU, D_IN, D_SAE, K, architecture, problem, take_step

from llm_wsae.training.architecture import Parameters
from llm_wsae.training.architectures.gba import (
    EVERY,
    GBA,
    RATE,
    STEPS_EACH,
    target_frequencies,
)
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.weights.loss_weights import LossWeights

WAYS = ("gba, dense", "gba, sparse")


def tied_loss(w, a, b_dec, threshold, x, mask, gamma):
    """The paper's model in its own terms: tied, thresholds on the reading of a unit row."""
    reading = (x - b_dec) @ (w / w.norm(dim=1, keepdim=True).detach()).T
    active = (reading > threshold).double() * mask[:, None]
    decoded = (reading * active * a / w.norm(dim=1).detach()) @ w + b_dec
    error = ((decoded - x) * gamma * mask[:, None]).square().sum() / (mask.sum() * len(gamma))
    return error, active, reading


@pytest.mark.parametrize("name", WAYS)
def test_gradients_through_the_tie_are_those_of_autograd(name):
    """Also where weights give decoder rows another length than 1, which then counts as fixed."""
    parameters, batch, gamma = problem(torch.float64)
    made = architecture(name, batch.x)
    # a threshold is on what a row of that length reads, and none must be at the edge of another
    made.tie(parameters)
    step = made.through_tie(take_step(made, name, parameters, batch, gamma), parameters)
    w, b_dec = (p.clone().requires_grad_() for p in (parameters.decoder, parameters.decoder_bias))
    a = made.amplitude.clone().requires_grad_()
    length = w.norm(dim=1).detach()
    loss, active, reading = tied_loss(
        w, a, b_dec, made.threshold * length, batch.x, batch.mask, gamma
    )
    loss.backward()
    assert torch.equal(step.firings, active.sum(0))
    assert 0.02 < float(active.mean()) < 0.4
    expected = ((step.gradients.decoder, w), (step.by_decoder_bias, b_dec))
    for found, leaf in (*expected, (step.observed[:, 2], a)):
        assert float((found - leaf.grad).norm() / leaf.grad.norm()) < 1e-12
    frequency, excess = step.observed[:, 0], step.observed[:, 1]
    torch.testing.assert_close(frequency, active.sum(0) / batch.mask.sum())
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


def test_a_latent_above_its_target_rises_and_one_that_never_fired_falls():
    made = GBA(3, 30)
    made.threshold.fill_(0.5)
    made.threshold[12] = 0.001
    frequency, excess = torch.zeros(30), torch.zeros(30)
    frequency[:10], excess[:10] = 0.9, torch.arange(10.0)  # one of every group; the first has r = 0
    frequency[[10, 11]], excess[[10, 11]] = 1e-5, 3.0  # below every target
    follow(made, frequency, excess)
    group = [3.0, (1 + 3) / 2, *range(2, 10)]  # means over the positive r
    expected = torch.full((30,), 0.5)
    expected[:10] += RATE * excess[:10]
    for latent in range(12, 30):
        expected[latent] -= RATE * group[latent % 10]
    expected[12] = 0  # not below
    torch.testing.assert_close(made.threshold, expected)


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


def follow(made, frequency, excess):
    made.follow(torch.stack([frequency, excess, torch.zeros_like(excess)], dim=1), 1e-3)


@pytest.mark.parametrize("d_sae", [4, 10, 64, 4608])
def test_targets_fall_geometrically_and_sum_to_k(d_sae):
    targets = target_frequencies(2, d_sae, 10, 100.0).double()
    sums = sum(float(targets[latent % 10]) for latent in range(d_sae))
    assert sums == pytest.approx(2, rel=1e-5)
    torch.testing.assert_close(
        targets[1:] / targets[:-1], torch.full((9,), 100 ** (-1 / 9)).double()
    )


def test_the_threshold_stays_below_the_length_of_rows():
    made = GBA(2, 8)
    made.threshold.fill_(100.0)
    made.tie(Parameters(*(torch.ones(8, 4), torch.ones(8, 4), torch.ones(8), torch.ones(4))))
    assert made.threshold.tolist() == [2.0] * 8
