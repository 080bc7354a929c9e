"""Cross-entropy and KL divergence of next-token predictions, in bounded memory.

A batch of logits is large (1024 tokens over 49,152 words: 100 MB in bfloat16), and its float32
softmax would take several times that. So positions are processed in chunks.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

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
