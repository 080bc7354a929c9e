"""Decoder rows of free lengths: the same as Adam on raw rows that autograd folds."""

from dataclasses import replace

import pytest
import torch
from test_trainer import CONFIG, D_IN, MemorySource, arms_for, fvu

from llm_wsae.errors import UsageError
from llm_wsae.sparse.codes import EPSILON
from llm_wsae.statistics.second_moment import SecondMoment
from llm_wsae.training.architectures import architecture_names, find_architecture
from llm_wsae.training.free_lengths import INITIAL_LENGTH, FreeLengths
from llm_wsae.training.parameters import Parameters, initial_parameters
from llm_wsae.training.trainer import Interrupted, train
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs

WIDTH, LATENTS, STEPS, RATE = 12, 30, 6, 0.02
CPU = torch.device("cpu")
FREE = replace(CONFIG, lengths="free")


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

    ours = FreeLengths(drawn)
    for _ in range(STEPS):
        theirs.zero_grad()
        sum(((a - b) ** 2).sum() for a, b in zip(seen(), target, strict=True)).backward()
        theirs.step()
        *by_weights, by_decoder_bias = (2 * (a - b) for a, b in zip(drawn, target, strict=True))
        ours.step(tuple(by_weights), by_decoder_bias, RATE)
    for found, wanted in zip(drawn, seen(), strict=True):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn.decoder.norm(dim=1), torch.ones(LATENTS))


def two_arms(source):
    """A plain arm, and a whitened one."""
    inputs = RuleInputs(source.statistics(), second_moment=SecondMoment(D_IN).update(source.rows))
    weights = weights_from_rule("whitening", 0.5, inputs, WeightConfig(place="loss"))
    (plain,) = arms_for(source, rules=("uniform",))
    return [plain, replace(plain, weights=weights)]


def test_a_stopped_training_resumes_bit_for_bit(tmp_path):
    source = MemorySource()
    arms = two_arms(source)
    whole = train(source, arms, FREE, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(MemorySource(stop_after=23), arms, FREE, tmp_path / "halves")
    train(source, arms, FREE, tmp_path / "halves")
    for name, dictionary in whole.items():
        file = f"{name}/sae_weights.safetensors"
        one, other = ((tmp_path / way / file).read_bytes() for way in ("whole", "halves"))
        assert one == other, name
        ones = torch.ones(dictionary.d_sae)
        norms = dictionary.W_dec.norm(dim=1)  # measured by products in half precision
        torch.testing.assert_close(norms, ones, rtol=5e-3, atol=0)
        assert dictionary.info.training["lengths"] == "free"


FREE_ARCHITECTURES = [n for n in architecture_names() if find_architecture(n).has_free_lengths]


@pytest.mark.parametrize("name", FREE_ARCHITECTURES)
def test_what_chooses_the_largest_learns_with_them(name, tmp_path):
    source = MemorySource()
    arms = arms_for(source, ("uniform",), (4,), architectures=(name,))
    for dictionary in train(source, arms, FREE, tmp_path).values():
        assert fvu(dictionary, source.rows) < 0.35


def test_what_has_no_free_lengths_says_so(tmp_path):
    source = MemorySource()
    arms = arms_for(source, ("uniform",), (4,), architectures=("gba",))
    with pytest.raises(UsageError, match="these have: batch-topk, matryoshka, topk"):
        train(source, arms, FREE, tmp_path)
