"""Decoder rows of free lengths: the same as Adam on raw rows that autograd folds."""

from dataclasses import replace

import pytest
import torch
from training_cases import CONFIG, CPU, Planted, arms_for, check_same, fvu

from llm_wsae.errors import UsageError
from llm_wsae.sparse.codes import EPSILON
from llm_wsae.statistics.second_moment import SecondMoment
from llm_wsae.training.architecture import Parameters
from llm_wsae.training.architectures import architecture_names, find_architecture
from llm_wsae.training.arm import make_arms
from llm_wsae.training.optimiser import INITIAL_LENGTH, Optimiser, initial_parameters
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.loss_weights import weights_from_rule
from llm_wsae.weights.rules import RuleInputs

WIDTH, LATENTS, STEPS, RATE = 12, 30, 6, 0.02
FREE = replace(CONFIG, tokens=256 * 60, log_every=20, dtype="auto", lengths="free")


def test_it_is_adam_on_the_raw_rows():
    """On a loss that pulls all that is seen towards other parameters."""
    drawn = initial_parameters(WIDTH, LATENTS, 0, CPU)
    target = initial_parameters(WIDTH, LATENTS, 1, CPU)
    target.encoder_bias.normal_(generator=torch.Generator().manual_seed(2))

    raw = [INITIAL_LENGTH * drawn.encoder, INITIAL_LENGTH * drawn.decoder, *drawn[2:]]
    raw = [torch.nn.Parameter(one.double()) for one in raw]
    theirs = torch.optim.Adam(raw, lr=RATE, eps=EPSILON)

    def seen():
        encoder, decoder, bias, decoder_bias = raw
        length = decoder.norm(dim=1)
        rows = (encoder * length[:, None], decoder / length[:, None])
        return Parameters(*rows, bias * length, decoder_bias)

    ours = Optimiser(drawn, free_lengths=True)
    for _ in range(STEPS):
        theirs.zero_grad()
        sum(((a - b) ** 2).sum() for a, b in zip(seen(), target, strict=True)).backward()
        theirs.step()
        *by_weights, by_decoder_bias = (2 * (a - b) for a, b in zip(drawn, target, strict=True))
        ours.step(tuple(by_weights), by_decoder_bias, RATE)
    for found, wanted in zip(drawn, seen(), strict=True):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn.decoder.norm(dim=1), torch.ones(LATENTS))


def test_a_stopped_training_of_a_whitened_arm_resumes_bit_for_bit(tmp_path):
    source = Planted()
    inputs = RuleInputs(source.statistics(), second_moment=SecondMoment(16).update(source.rows))
    weights = [weights_from_rule(rule, 0.5, inputs) for rule in ("uniform", "whitening")]
    arms = make_arms(weights, (4,))
    whole = train(source, arms, FREE, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(Planted(stop_after=23), arms, FREE, tmp_path / "halves")
    train(source, arms, FREE, tmp_path / "halves")
    check_same(tmp_path / "halves", tmp_path / "whole", whole)
    for dictionary in whole.values():
        norms = dictionary.W_dec.norm(dim=1)  # measured by products in half precision
        torch.testing.assert_close(norms, torch.ones(64), rtol=5e-3, atol=0)
        assert dictionary.info.training["lengths"] == "free"


def test_architectures_that_choose_the_largest_learn_with_them(tmp_path):
    source = Planted()
    free = [n for n in architecture_names() if find_architecture(n).has_free_lengths]
    arms = arms_for(source, ks=(4,), l1s=(), architectures=free)
    found = train(source, arms, FREE, tmp_path)
    assert len(found) == 3 and all(fvu(one, source.rows) < 0.35 for one in found.values())


def test_what_has_no_free_lengths_says_so(tmp_path):
    source = Planted()
    arms = arms_for(source, l1s=(), architectures=("gba",))
    with pytest.raises(UsageError, match="these have: batch-topk, matryoshka, topk"):
        train(source, arms, FREE, tmp_path)
