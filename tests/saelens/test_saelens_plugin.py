"""The weighted classes for SAELens, as far as they come without it (with it: interop.py)."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from looping import over
from places import ROOT

import llm_wsae.saelens
from llm_wsae.errors import LlmWsaeError, UsageError
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
    for gamma, config, error, sentence in (
        (None, {}, UsageError, "weights_file is not given"),
        (torch.ones(D_IN + 1), {}, LlmWsaeError, "are for 7 dimensions, but the site has 6"),
        (torch.ones(D_IN), {"place": "space"}, UsageError, "in a weighted space"),
        (torch.ones(D_IN), {"anneal": 0.5}, UsageError, "move to 1 during training"),
    ):
        with pytest.raises(error, match=sentence):
            read_weights("" if gamma is None else saved(tmp_path, gamma, **config), D_IN)


@pytest.mark.skipif(not ABSENT, reason="sae-lens is installed here")
def test_without_saelens_a_class_is_a_sentence():
    for ask in (llm_wsae.saelens.register, lambda: llm_wsae.saelens.WeightedTopKTrainingSAE):
        with pytest.raises(LlmWsaeError, match="install sae-lens"):
            ask()
    with pytest.raises(AttributeError, match="has no attribute 'WeightedTopk'"):
        llm_wsae.saelens.WeightedTopk  # noqa: B018


def test_the_docs_name_what_is_there():
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    (names,) = re.findall(r"from llm_wsae\.saelens import (.+)", page)
    assert set(names.split(", ")) <= set(llm_wsae.saelens.__all__)
