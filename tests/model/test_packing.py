"""Weights laid out beforehand: the same numbers, of the model as it is, and nothing left behind."""

import pytest
import torch
from tiny import tiny_hf_model
from torch import nn

from llm_wsae.model import packing
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

SITE = Site.parse("blocks.0.hook_resid_post")
needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)


@pytest.fixture
def model():
    return LanguageModel.from_live(tiny_hf_model("llama").to(torch.bfloat16).eval(), None)


def ends_and_logits(model):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.W_E), (16, 32), generator=draw)
    hidden = torch.randn(16, 32, model.d_model, generator=draw).bfloat16()
    end = model.resume_to_end(ids, SITE, hidden)
    with torch.no_grad(), model.unembedding() as unembedding:
        return end, unembedding(end.flatten(0, 1))


def layers(model):
    return [layer for layer in model.hf_model.modules() if type(layer) is nn.Linear]


@needs_bfloat16
def test_products_are_those_of_the_weights(model, monkeypatch):
    laid_out = []
    own = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_reorder_linear_weight",
        lambda weight: laid_out.append(weight.shape) or own(weight),
    )
    expected = ends_and_logits(model)
    assert not laid_out
    with model.packed(), model.packed():  # the inner one does nothing
        for found, wanted in zip(ends_and_logits(model), expected, strict=True):
            assert (found - wanted).float().norm() <= 2**-8 * wanted.float().norm()
    behind = [layer for layer in layers(model) if layer.weight.shape in laid_out]
    assert behind, "no product was made with a copy"
    for found, wanted in zip(ends_and_logits(model), expected, strict=True):
        assert torch.equal(found, wanted)
    assert all("forward" not in layer.__dict__ for layer in layers(model))


@needs_bfloat16
def test_weights_that_changed_between_two_evaluations_are_read_again(model):
    with model.packed():
        ends_and_logits(model)
    with torch.no_grad():
        layers(model)[-1].weight.mul_(2)
    expected = ends_and_logits(model)[1]
    with model.packed():
        found = ends_and_logits(model)[1]
    assert (found - expected).float().norm() <= 2**-8 * expected.float().norm()


@needs_bfloat16
def test_gradients_and_few_rows_take_the_weights(model):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, 32, model.d_model, generator=draw).bfloat16().requires_grad_()
    ids = torch.zeros(16, 32, dtype=torch.long)
    with model.packed():
        assert torch.equal(model.logits(ids[:1, :4]), model.logits(ids[:1, :4]))
        assert not model._packing._copies
        model.resume(ids, SITE, hidden).float().square().mean().backward()
        assert not model._packing._copies
    assert hidden.grad.isfinite().all() and hidden.grad.any()


def test_other_models_are_left_alone(monkeypatch):
    model = LanguageModel.from_live(tiny_hf_model("llama").eval(), None)  # float32
    with model.packed():
        assert all("forward" not in layer.__dict__ for layer in layers(model))
    large = LanguageModel.from_live(tiny_hf_model("llama").to(torch.bfloat16).eval(), None)
    monkeypatch.setattr(packing, "memory_of", lambda device: 1000)
    with large.packed():
        assert all("forward" not in layer.__dict__ for layer in layers(large))
