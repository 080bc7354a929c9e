"""How much the model's predictions depend on each direction of the residual stream at a site.

The Fisher information of the next-token distribution: F = E[g gᵀ], g = ∂ log p(y | x) / ∂h, with y
drawn from the model itself. A small change δ of the activation moves the predictions by ½ δᵀFδ (KL
divergence, second order). One backward pass per context is enough: with independently drawn labels
the gradients of different predictions are uncorrelated, E[(Σ_t g_t)(Σ_t g_t)ᵀ] = Σ_t E[g_t g_tᵀ],
summed over all predictions after the position.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

_TOKENS_AT_ONCE = 1024  # memory holds three times the size of their float32 logits


def fisher_information(
    model: LanguageModel,
    contexts: Iterable[
        tuple[Integer[Tensor, "contexts positions"], Bool[Tensor, "contexts positions"]]
    ],
    site: Site,
    seed: int = 0,
) -> Float[Tensor, "d_model d_model"]:
    """Mean of g gᵀ over the kept positions of the contexts, float64 on the CPU.

    ``contexts`` yields token ids with a mask of the positions that count, some contexts at a time;
    about 40 k tokens are enough for a model of 576 dimensions. ``seed`` determines the labels.

    Raises UsageError for a site that the model lacks, LlmWsaeError if no position is kept or a
    gradient is not finite.
    """
    model.check_site(site)
    total = torch.zeros(model.d_model, model.d_model, dtype=torch.float64)
    count = 0
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for ids, keep in contexts:
        size = max(1, _TOKENS_AT_ONCE // ids.shape[1])
        for part, kept in zip(ids.split(size), keep.split(size), strict=True):
            gradients = _gradients(model, part, site, generator)[kept.to(model.device)].float()
            total += (gradients.T @ gradients).double().cpu()
            count += len(gradients)
    if count == 0:
        raise LlmWsaeError("there is no text on which to measure the model's sensitivity")
    if not bool(torch.isfinite(total).all()):
        raise LlmWsaeError(
            f"the gradients of {model.name} at {site} are not finite; load the model in float32 "
            "(--model-dtype float32)"
        )
    return total / count


def _gradients(
    model: LanguageModel, ids: Tensor, site: Site, generator: torch.Generator
) -> Float[Tensor, "contexts positions d_model"]:
    """∂ Σ_t log p(y_t) / ∂h at every position, y drawn from the model's predictions."""
    hidden = model.activations(ids, [site])[site].requires_grad_()
    with torch.enable_grad():
        logits = model.resume(ids, site, hidden).flatten(0, 1).float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        return torch.autograd.grad(-F.cross_entropy(logits, labels, reduction="sum"), hidden)[0]
