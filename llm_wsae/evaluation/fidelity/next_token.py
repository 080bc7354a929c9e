"""The model's predictions: clean logits, and their cross-entropy and KL divergence.

A batch of logits is large (1024 tokens over 49,152 words: 100 MB in bfloat16), and its float32
softmax would take several times that. So positions are processed in chunks.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.activations import ActivationCache
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

# Numbers in one float32 chunk of logits. 4 MB stay in a CPU's cache from one operation to the next,
# which is about twice as fast as chunks of 64 MB.
_CHUNK_NUMBERS = 2**20


def scored_positions(
    keep: Bool[Tensor, "contexts positions"],
) -> Bool[Tensor, "contexts positions-1"]:
    """Which positions' predictions count.

    Position t counts if it is not before the context's first kept position and the token that it
    predicts, t + 1, is kept. So the first positions, which no dictionary is trained on and which
    are never replaced, are not scored, nor are predictions of special tokens or padding. Other
    positions that are not kept are scored: a replacement before them affects their prediction.
    """
    begun = keep.cumsum(1) > 0
    return begun[:, :-1] & keep[:, 1:]


@torch.no_grad()
def next_token_sums(
    logits: Float[Tensor, "contexts positions vocab"],
    clean: Float[Tensor, "contexts positions vocab"],
    ids: Integer[Tensor, "contexts positions"],
    scored: Bool[Tensor, "contexts positions-1"],
) -> tuple[Float[Tensor, " contexts"], Float[Tensor, " contexts"]]:
    """Per context, Σ over scored positions of −log p(next token) and of KL(p_clean ‖ p), in nats.

    Logits of any dtype are converted to float32; sums are float64, on the CPU.
    """
    counts = F.pad(scored, (0, 1)).flatten()
    target = ids.roll(-1, 1).flatten().long().where(counts, 0)  # other ids may have no logit
    found = torch.zeros(2, len(target), dtype=torch.float32, device=logits.device)
    size = max(1, _CHUNK_NUMBERS // logits.shape[2])
    chunks = zip(
        *(each.split(size) for each in (logits.flatten(0, 1), clean.flatten(0, 1), target)),
        counts.cpu().split(size),
        found.split(size, dim=1),
        strict=True,
    )
    for own, reference, following, wanted, (entropies, divergences) in chunks:
        if not wanted.any():
            continue
        own = own.log_softmax(1, dtype=torch.float32)
        reference = reference.log_softmax(1, dtype=torch.float32)
        torch.neg(own.gather(1, following[:, None])[:, 0], out=entropies)
        probability = reference.exp()
        torch.linalg.vecdot(probability, reference.sub_(own), out=divergences)
    by_context = found.where(counts, 0).unflatten(1, ids.shape).cpu().double().sum(2)
    return by_context[0], by_context[1]


_SAME_LOGITS = 0.05  # relative; half precision in another order of operations is far below


def clean_logits(
    model: LanguageModel,
    cache: ActivationCache,
    number: int,
    last: Site,
    activations: Mapping[Site, Tensor],
) -> Tensor:
    """Logits [contexts, positions, vocab] of a batch, resumed from its activations at ``last``.

    Every variant is resumed in the same way, so a perfect reconstruction gives the same numbers.
    The output of the last block is cached too. Raises LlmWsaeError for a model whose blocks pass on
    more than the residual stream.
    """
    ids, end = cache.batches[number][0], Site(model.num_blocks - 1, "post")
    known = cache.kept(number, end)
    if known is not None:
        return model.resume(ids, end, known)
    seen: dict[Site, Tensor] = {}  # the last visit counts: a model's first one is a trial
    with model.visiting({end: lambda hidden: seen.update({end: hidden})}):
        logits = model.resume(ids, last, activations[last])
    if number == 0:
        _check_clean(model, ids, last, logits)
    if seen[end].dtype == model.dtype:  # a wider stream would be rounded on its way back
        cache.keep(number, end, seen[end])
    return logits


def _check_clean(model: LanguageModel, ids: Tensor, site: Site, logits: Tensor) -> None:
    """Raise LlmWsaeError if the model, resumed at the site, is not the model as it is."""
    full = model.logits(ids).float()
    if not (logits.float() - full).norm() <= _SAME_LOGITS * full.norm():
        raise LlmWsaeError(
            f"{model.name} makes other predictions when it is resumed at {site} from its own "
            "activations: its blocks pass on more than the residual stream, so its predictions "
            "cannot be used to evaluate dictionaries there"
        )
