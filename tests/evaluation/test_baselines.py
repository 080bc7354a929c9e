"""Untrained and half-trained baselines."""

import torch
from small_dictionaries import make_dictionary

from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.evaluation.baselines import half_random_beside, signed_dimensions

D_IN = 6
INFO = DictionaryInfo("blocks.1.hook_resid_post", massive_threshold=50.0)


def rows(count=400):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, D_IN, generator=draw) * torch.arange(1.0, D_IN + 1) + 5


def test_all_dimensions_together_are_the_row_and_the_largest_deviations_are_active():
    x = rows()
    mean, deviation = x.mean(0), x.std(0)
    every = signed_dimensions(INFO, deviation, mean, float(D_IN))
    torch.testing.assert_close(every(x), x, rtol=1e-4, atol=1e-4)
    latents, away = every.encode(x), (x - mean) / deviation
    # either sign has a latent, and at most one of the two is active
    torch.testing.assert_close(latents[:, :D_IN] - latents[:, D_IN:], away, rtol=1e-4, atol=1e-4)
    assert float((latents[:, :D_IN] * latents[:, D_IN:]).abs().max()) == 0
    two = signed_dimensions(INFO, deviation, mean, 2.2)
    assert two.sparsity == TopK(2) and two.info == INFO
    active, away = two.encode(x) > 0, away.abs()
    assert torch.equal((active[:, :D_IN] | active[:, D_IN:]), away >= away.topk(2).values[:, 1:])


def test_a_half_random_dictionary_of_the_same_k_stands_beside():
    def made(architecture: str, k: int, site: str = "blocks.1.hook_resid_post"):
        return make_dictionary(site=site, training={"architecture": architecture, "k": k})

    among = {
        "a": made("frozen-decoder", 2),
        "b": made("frozen-decoder", 4),
        "c": made("frozen-decoder", 8),
        "d": made("frozen-encoder", 8),
        "e": made("frozen-encoder", 4, "blocks.2.hook_resid_post"),
        "plain": made("topk", 4),
    }
    for k, names in ((2, "ad"), (4, "bd"), (8, "cd"), (16, "ad")):
        beside = half_random_beside(made("topk", k), among)
        assert beside == dict(zip(("frozen decoder", "frozen encoder"), names, strict=True))
