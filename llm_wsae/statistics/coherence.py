"""Do the texts of a latent, or of a dimension, have similar meanings? Mean cosine of all pairs.

Any two windows of a corpus are somewhat alike, and more so in a narrow corpus, so the mean cosine
of random windows of different contexts is subtracted. (The paper measures its vision features in
this way, with the embeddings of images: section 5 of arXiv 2506.15963.)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def coherence(embeddings: Float[Tensor, "latents examples width"]) -> Float[Tensor, " latents"]:
    """Mean cosine of all pairs of a latent's examples, given as unit vectors.

    The squared norm of the sum of n unit vectors is n + 2 Σ of the pairs' cosines.
    """
    n = embeddings.shape[1]
    return (embeddings.sum(1).square().sum(1) - n) / (n * (n - 1))


def coherence_of_strangers(
    embeddings: Float[Tensor, "windows width"], context: Int[Tensor, " windows"]
) -> float:
    """Mean cosine of all pairs of windows of different contexts; NaN if there are none."""
    numbers, group = context.unique(return_inverse=True)
    sums = torch.zeros(len(numbers), embeddings.shape[1], dtype=torch.float64)
    sums.index_add_(0, group, embeddings.double())
    sizes = torch.bincount(group).double()
    pairs = float(sizes.sum().square() - sizes.square().sum())
    cosines = float(sums.sum(0).square().sum() - sums.square().sum())
    return cosines / pairs if pairs else float("nan")
