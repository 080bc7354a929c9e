"""The Fisher information equals what the model's predictions do when the activation is moved."""

import pytest
import torch
from tiny import tiny_model

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.fisher import fisher_information
from llm_wsae.model.site import Site

LAST = Site.parse("blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def model():
    return tiny_model(0, 16)


def contexts(model, number: int, positions: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(model.W_E), (number, positions), generator=generator)
    keep = torch.ones(ids.shape, dtype=torch.bool)
    keep[:, 0] = False
    return ids, keep


def exact(model, ids, keep, site):
    """Σ over predictions and labels of p(y) g gᵀ, by one backward pass each."""
    total = torch.zeros(model.d_model, model.d_model, dtype=torch.float64)
    for context, kept in zip(ids, keep, strict=True):
        hidden = model.activations(context[None], [site])[site].requires_grad_()
        log_p = model.resume(context[None], site, hidden)[0].float().log_softmax(-1)
        for row in log_p:
            for label in range(len(row)):
                (g,) = torch.autograd.grad(row[label], hidden, retain_graph=True)
                g = g[0, kept].double()
                total += float(row[label].detach().exp()) * g.T @ g
    return total / int(keep.sum())


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"])
def test_equals_the_sum_over_all_labels(model, name):
    """Labels are drawn, so the estimate is compared on many draws; its error falls as 1/√draws."""
    site = Site.parse(name)
    ids, keep = contexts(model, 1, 4)
    want = exact(model, ids, keep, site)
    draws = [(ids.repeat(3000, 1), keep.repeat(3000, 1))]
    found = fisher_information(model, draws, site, seed=1)
    assert (found - want).norm() < 0.05 * want.norm()
    assert torch.equal(found, found.T) and torch.linalg.eigvalsh(found).min() > -1e-12


def test_second_order_change_of_the_predictions(model):
    """½ δᵀFδ is the KL divergence between the predictions before and after a small move δ."""
    ids, keep = contexts(model, 1, 3)
    hidden = model.activations(ids, [LAST])[LAST]
    only_last = torch.zeros_like(keep)
    only_last[0, -1] = True  # the last position decides one prediction only
    fisher = fisher_information(
        model, [(ids.repeat(4000, 1), only_last.repeat(4000, 1))], LAST, seed=2
    )
    generator = torch.Generator().manual_seed(3)
    delta = 0.002 * torch.randn(model.d_model, generator=generator)
    with torch.no_grad():
        before = model.resume(ids, LAST, hidden)[0, -1].double().log_softmax(-1)
        moved = hidden.clone()
        moved[0, -1] += delta
        after = model.resume(ids, LAST, moved)[0, -1].double().log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum())
    assert kl == pytest.approx(float(0.5 * delta.double() @ fisher @ delta.double()), rel=0.1)


def test_bad_requests(model):
    ids, keep = contexts(model, 1, 4)
    with pytest.raises(UsageError, match=r"blocks\.7"):
        fisher_information(model, [(ids, keep)], Site.parse("blocks.7.hook_resid_post"))
    with pytest.raises(LlmWsaeError, match="no text"):
        fisher_information(model, [(ids, torch.zeros_like(keep))], LAST)
