"""The weighted classes for SAELens, as far as they come without it (with it: interop.py)."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from looping import over
from places import ROOT
from refusals import fails, misused

import llm_wsae.saelens
from llm_wsae.saelens import read_weights, squared_error
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

D_IN = 6
ABSENT = importlib.util.find_spec("sae_lens") is None


def saved(tmp_path: Path, gamma: torch.Tensor, **config) -> str:
    path = tmp_path / "weights.safetensors"
    LossWeights(gamma, RULES["variance"], -0.25, WeightConfig(**config)).save(path)
    return str(path)


@over(gamma=[torch.ones(D_IN), torch.rand(D_IN) + 0.1, torch.randn(D_IN, D_IN)])
def test_the_error_of_a_row_is_that_of_the_difference_weighted_by_a_file(tmp_path, gamma):
    weights = read_weights(saved(tmp_path, gamma), D_IN)
    assert (weights.rule.name, weights.alpha) == ("variance", -0.25)
    x, x_hat = torch.randn(2, 50, D_IN, generator=torch.Generator().manual_seed(0))
    full = torch.diag(gamma) if gamma.ndim == 1 else gamma
    found = squared_error(x_hat, x, weights.gamma)
    torch.testing.assert_close(found, ((x_hat - x) @ full.T) ** 2)


def test_weights_that_cannot_be_used(tmp_path):
    ones, wide = torch.ones(D_IN), torch.ones(D_IN + 1)
    misused("weights_file is not given", read_weights, "", D_IN)
    fails("are for 7 dimensions, but the site has 6", read_weights, saved(tmp_path, wide), D_IN)
    misused("in a weighted space", read_weights, saved(tmp_path, ones, place="space"), D_IN)
    misused("move to 1 during training", read_weights, saved(tmp_path, ones, anneal=0.5), D_IN)


@pytest.mark.skipif(not ABSENT, reason="sae-lens is installed here")
def test_without_saelens_a_class_is_a_sentence():
    for ask in (llm_wsae.saelens.register, lambda: llm_wsae.saelens.WeightedTopKTrainingSAE):
        fails("install sae-lens", ask)
    with pytest.raises(AttributeError, match="has no attribute 'WeightedTopk'"):
        llm_wsae.saelens.WeightedTopk  # noqa: B018


def test_the_docs_name_what_is_there():
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    (names,) = re.findall(r"from llm_wsae\.saelens import (.+)", page)
    assert set(names.split(", ")) <= set(llm_wsae.saelens.__all__)
