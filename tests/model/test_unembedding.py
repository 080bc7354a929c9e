"""Logits of chosen rows, and prepacked weights: the same numbers, and nothing left behind."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
import torch
from looping import over
from tiny import BLOCKS, FAMILIES, VOCAB, WIDTH, model_of, tiny_hf_model
from torch import nn

from llm_wsae.machine.hardware import onednn_is_faster
from llm_wsae.model import forward
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

SITE = Site.parse("blocks.0.hook_resid_post")
PREPACKED = [one for one in (torch.float32, torch.bfloat16) if onednn_is_faster(one)]
needs_layout = pytest.mark.skipif(not PREPACKED, reason="oneDNN is not faster here")


@pytest.fixture(params=PREPACKED or [torch.float32], ids=str)
def model(request):
    return LanguageModel.from_live(tiny_hf_model("llama").to(request.param).eval(), None)


def drawn(model):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(model.W_E), (16, 32), generator=draw)
    return ids, torch.randn(16, 32, model.d_model, generator=draw).to(model.dtype)


def ends_and_logits(model):
    end = model.resume_to_end(drawn(model)[0], SITE, drawn(model)[1])
    with torch.no_grad(), model.unembedding() as unembedding:
        return end, unembedding(end.flatten(0, 1))


def layers(model):
    return [layer for layer in model.hf_model.modules() if type(layer) is nn.Linear]


def are_as_they_were(model):
    return all("forward" not in layer.__dict__ for layer in layers(model))


def agree(one, other):
    precision = 2**-8 if one.dtype == torch.bfloat16 else 2**-20
    return bool((one - other).float().norm() <= precision * other.float().norm())


@over(family=FAMILIES, run=[2048, 7])
def test_logits_of_chosen_rows_are_those_of_resume(family, run):
    """Up to the last block in contexts of their own, after it in rows of their own, whose
    vocabulary is divided into runs."""
    model, draw = model_of(family), torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (3, 11), generator=draw)
    for site in (Site(0, "pre"), Site(2, "post"), Site(BLOCKS - 1, "post")):
        new = torch.randn(*ids.shape, WIDTH, generator=draw)
        expected = model.resume(ids, site, new).detach().flatten(0, 1)[3:]
        end = model.resume_to_end(ids, site, new)
        with patch.object(forward, "RUN", run), torch.no_grad(), model.unembedding() as logits:
            assert len(logits.runs) == -(-model.W_U.shape[1] // run)
            found = logits(end.flatten(0, 1)[3:])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_layout
def test_products_are_those_of_the_weights(model):
    expected, laid_out = ends_and_logits(model), []
    with model.prepacked(), model.prepacked():  # the inner one does nothing
        for found, wanted in zip(ends_and_logits(model), expected, strict=True):
            assert agree(found, wanted)
        laid_out += model._prepacked._copies
        assert len(laid_out) == len(set(laid_out)) > 7  # blocks behind the site, and the head
    for found, wanted in zip(ends_and_logits(model), expected, strict=True):
        assert torch.equal(found, wanted)
    with torch.no_grad():
        layers(model)[-1].weight.mul_(2)
    expected = ends_and_logits(model)[1]
    with model.prepacked():  # weights that have changed are read again
        assert agree(ends_and_logits(model)[1], expected)
    assert are_as_they_were(model) and model._prepacked._copies is None
    exact = LanguageModel.from_live(tiny_hf_model("llama").double().eval(), None)
    with exact.prepacked():  # which oneDNN does not multiply faster
        assert are_as_they_were(exact)


@needs_layout
@over(whole_first=[True, False])
def test_the_head_and_its_runs_have_copies_of_their_own(model, whole_first):
    ids, _ = drawn(model)
    expected = model.logits(ids)
    with patch.object(forward, "RUN", 20), model.prepacked():
        if whole_first:
            assert agree(model.logits(ids), expected)
        end = model.activations(ids, [Site(model.num_blocks - 1, "post")]).popitem()[1]
        with torch.no_grad(), model.unembedding() as made:
            assert len(made.runs) == 3
            assert agree(made(end.flatten(0, 1)), expected.flatten(0, 1))
        assert agree(model.logits(ids), expected)


@needs_layout
def test_gradients_and_few_rows_take_the_weights(model):
    ids, hidden = drawn(model)
    hidden.requires_grad_()
    with model.prepacked():
        model.logits(ids[:1, :4])
        model.resume(ids, SITE, hidden).float().square().mean().backward()
        assert not model._prepacked._copies
    assert hidden.grad.isfinite().all() and hidden.grad.any()


@needs_layout
def test_it_is_closed_behind_the_passes_of_other_threads(model):
    """One closes what it opened while another unembeds: both leave the modules as they were."""
    opened, unembeds = threading.Event(), threading.Event()

    def first():
        with model.prepacked():
            opened.set()
            unembeds.wait(10)

    def second():
        opened.wait(10)
        with model.unembedding():
            unembeds.set()
            time.sleep(0.2)  # the first one waits for its turn

    with ThreadPoolExecutor(2) as pool:
        for done in (pool.submit(first), pool.submit(second)):
            done.result(20)
    assert are_as_they_were(model)
