"""Transcoders: rows of two points, an affine skip, and the way back to the units of the model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from looping import over
from training_cases import (
    CONFIG,
    CPU,
    TOLERANCE,
    K,
    Planted,
    architecture,
    check_same,
    error,
    problem,
)

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.training.architecture import squared
from llm_wsae.training.arm import ArmConfig, Skip, make_arms
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import choose_weights, weights_from_rule
from llm_wsae.weights.weighing import measure_inputs

TAKE_SKIP = ("topk", "batch-topk", "jumprelu", "relu, sparse", "relu, dense")
SHORT = replace(CONFIG, tokens=256 * 60)


class Pairs(Planted):
    """What is read is ``Planted``; what is written, behind a norm of its own: the features that
    are active, each in another direction, and an affine map of the rows."""

    site = Site(3, "mlp")
    affine = True

    def __post_init__(self):
        super().__post_init__()
        draw = torch.Generator().manual_seed(9)
        codes = (self.rows - self.rows.mean(0)) @ self.directions.T
        away = torch.randn(24, 16, generator=draw)
        matrix = torch.randn(16, 16, generator=draw) / 4
        written = codes.clamp(min=1).sub(1) @ away
        if self.affine:
            written = 0.2 * written + self.rows @ matrix + 5
        self.target = Planted(self.num_rows)
        self.target.rows, self.target.site = written, Site(3, "mlp_out")
        self.target.massive = self.massive
        if self.massive:
            written[::500] *= 1000

    def batches(self, batch_size, seed, start=0, part=(0, 1)) -> Iterator[Any]:
        own = super().batches(batch_size, seed, start, part)
        return zip(own, self.target.batches(batch_size, seed, start, part), strict=True)


def uniform(source: Pairs, *names: str) -> list[ArmConfig]:
    weights = choose_weights(source.target.statistics(), ["uniform"], [])
    return make_arms(weights, [2], [0.1] if "relu" in names else [], architectures=names)


def missed(one: Dictionary, source: Pairs) -> float:
    y = source.target.rows
    return float((y - one(source.rows)).square().sum() / (y - y.mean(0)).square().sum())


@over(name=TAKE_SKIP, dtype=TOLERANCE, matrix=(False, True))
def test_a_skip_has_the_gradient_of_the_loss(name, dtype, matrix):
    """By autograd, of a target that is not what is read."""
    parameters, batch, gamma = problem(dtype, matrix)
    draw = torch.Generator().manual_seed(5)
    target = torch.randn(batch.x.shape, generator=draw, dtype=torch.float64).to(dtype)
    batch = batch._replace(target=target * batch.mask[:, None])
    skip = Skip(batch.x.shape[1], CPU)
    skip.weight = 0.1 * torch.randn(skip.weight.shape, generator=draw).to(dtype)
    rest, metric = skip.rest(batch), squared(gamma)
    first, _, way = name.partition(", ")
    made = architecture(first, batch.x, K)
    step = getattr(made, f"{way}_step" if way else "step")(parameters, rest, metric)

    x, mask = batch.x.double(), batch.mask.double()
    through = skip.weight.double().requires_grad_()
    latents = (step.residual + rest.y).double() * mask[:, None]  # what they write: constant here
    off = (latents + x @ through.T - target.double()) * mask[:, None]
    metric = metric.double() if metric.ndim == 2 else metric.double().diag()
    loss = (off @ metric * off).sum() / mask.sum() / x.shape[1]
    (expected,) = torch.autograd.grad(loss, through)
    assert error(skip.gradient(step, rest, squared(gamma)), expected) < 5e-3


def test_transcoders_learn_what_an_autoencoder_cannot_say(tmp_path):
    """Of an affine map, the skip explains nearly all; the latents add to it."""
    source = Pairs()
    arms = uniform(source, "topk", "batch-topk", "jumprelu", "relu")
    plain = train(source, arms, CONFIG, tmp_path / "plain")
    skipping = train(source, arms, replace(CONFIG, skip=True), tmp_path / "skip")
    for name, one in skipping.items():
        assert one.site == Site(3, "mlp") and one.W_skip is not None
        assert missed(one, source) < 0.7 * missed(plain[name], source) < 0.6, name
        assert one.info.training["skip"] and not plain[name].info.training["skip"]
        loaded = Dictionary.load(tmp_path / "skip" / name)
        assert torch.equal(loaded(source.rows[:100]), one(source.rows[:100]))
    with pytest.raises(UsageError, match="decode needs the rows x"):
        one.decode(one.encode_sparse(source.rows[:2]))


@over(place=("loss", "space"), rule=("whitening", "uniform"))
def test_the_saved_transcoder_writes_what_the_training_reconstructed(tmp_path, place, rule):
    """Also out of a space of the output, with massive rows on both sides."""
    source = Pairs(massive=True)
    inputs = measure_inputs([rule], source)
    weights = weights_from_rule(rule, 0.5, inputs, WeightConfig(place=place))
    assert torch.equal(inputs.statistics.mean, source.target.statistics().mean)
    config = replace(CONFIG, skip=True)
    (one,) = train(source, [ArmConfig(weights, 2)], config, tmp_path / f"{place}{rule}").values()
    usual = source.target.rows.norm(dim=1) < 100
    y = source.target.rows[usual]
    found = one(source.rows[usual])
    share = (y - found).square().sum() / (y - y.mean(0)).square().sum()
    assert float(share) == pytest.approx(one.info.metrics["training"]["fvu"], rel=0.2)
    assert one.info.massive_threshold == source.target.statistics().massive_threshold


def test_a_killed_training_ends_with_the_same_bytes(tmp_path):
    arms = uniform(Pairs(), "topk", "jumprelu")
    config = replace(SHORT, skip=True, checkpoint_seconds=0.0)
    train(Pairs(), arms, config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(Pairs(stop_after=20), arms, config, tmp_path / "killed")
    train(Pairs(), arms, config, tmp_path / "killed")
    check_same(tmp_path / "killed", tmp_path / "whole", [arm.name for arm in arms])


def test_what_cannot_be_trained_is_refused(tmp_path):
    source, skip = Pairs(), replace(SHORT, skip=True)
    of_stream, alone = Planted(), Planted()
    alone.site = Site(3, "mlp")
    for rows, arms, config, said in (
        (source, uniform(source, "matryoshka"), skip, "matryoshka takes no skip"),
        (of_stream, uniform(source, "topk"), skip, r"blocks\.3\.mlp, not for blocks\.3\.hook_res"),
        (alone, uniform(source, "topk"), SHORT, "what the MLP reads and what it writes"),
    ):
        with pytest.raises(UsageError, match=said):
            train(rows, arms, config, tmp_path / "no")
    assert not (tmp_path / "no").exists()
