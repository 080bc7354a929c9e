"""The weighted classes for SAELens, as far as they come without it (with it: interop.py)."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from looping import over
from places import ROOT

import llm_wsae.saelens
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.saelens.loss import read_weights, squared_error
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights
from llm_wsae.weights.rules import RULES

D_IN = 6
ABSENT = importlib.util.find_spec("sae_lens") is None


def saved(tmp_path: Path, gamma: torch.Tensor, **config) -> str:
    path = tmp_path / "weights.safetensors"
    LossWeights(gamma, RULES["variance"], -0.25, WeightConfig(**config)).save(path)
    return str(path)


def test_the_error_of_a_row_is_that_of_the_weighted_difference():
    x, x_hat = torch.randn(2, 50, D_IN, generator=torch.Generator().manual_seed(0))
    for gamma in (torch.rand(D_IN), torch.randn(D_IN, D_IN)):
        full = torch.diag(gamma) if gamma.ndim == 1 else gamma
        rows = [float((full @ (a - b)).norm() ** 2) for a, b in zip(x, x_hat, strict=True)]
        found = squared_error(x_hat, x, gamma)
        assert found.shape == x.shape
        torch.testing.assert_close(found.sum(1), torch.tensor(rows))
    plain = torch.nn.functional.mse_loss(x_hat, x, reduction="none")
    assert torch.equal(squared_error(x_hat, x, torch.ones(D_IN)), plain)


@over(gamma=[torch.rand(D_IN) + 0.1, torch.randn(D_IN, D_IN)])
def test_weights_come_from_the_file(tmp_path, gamma):
    weights = read_weights(saved(tmp_path, gamma), D_IN)
    assert torch.equal(weights.gamma, gamma)
    assert (weights.rule.name, weights.alpha) == ("variance", -0.25)


def test_weights_that_cannot_be_used(tmp_path):
    for gamma, config, error, sentence in (
        (None, {}, UsageError, "weights_file is not given"),
        (torch.ones(D_IN + 1), {}, LlmWsaeError, "weights for 7 dimensions, but the rows have 6"),
        (torch.full((D_IN,), float("nan")), {}, LlmWsaeError, "must be finite"),
        (torch.ones(D_IN), {"place": "space"}, UsageError, "in a weighted space"),
        (torch.ones(D_IN), {"anneal": 0.5}, UsageError, "move to 1 during training"),
    ):
        with pytest.raises(error, match=sentence):
            read_weights("" if gamma is None else saved(tmp_path, gamma, **config), D_IN)


def test_it_comes_without_saelens():
    script = (
        "import sys, llm_wsae.saelens; print('sae_lens' in sys.modules, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.split() == ["False", "False"], found.stderr


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
