"""What the encoder makes of a latent's own direction, added to rows where the latent is silent."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import to_dense

_LATENTS_AT_ONCE = 64
_SHORT = 1.0  # seconds of work that need no bar


class Injection(NamedTuple):
    """What came of it; all tensors [d_sae], NaN for a latent that was not injected."""

    rows: Int[Tensor, " d_sae"]
    """Rows that each latent was injected into: those of the sample where it is silent."""
    missed: Float[Tensor, " d_sae"]
    """Share of them on which the latent stays silent (float64)."""
    answer: Float[Tensor, " d_sae"]
    """Slope of its activation z over the injected strength s, Σ z·s / Σ s² where it answers
    (float64). Below 1 it answers too weakly."""


def inject(
    dictionary: Dictionary,
    x: Float[Tensor, "rows d_in"],
    strength: Float[Tensor, "d_sae rows"],
) -> Injection:
    """Encode x + s·w_j for every latent j, with its decoder row w_j, and every row where j is
    silent.

    ``strength`` holds s; it is NaN for latents that are not injected. Pre-activations are linear in
    the row, so each row is encoded once and each direction once; only the selection is repeated.
    """
    pre = torch.addmm(dictionary.b_enc, x, dictionary.W_enc)
    silent = to_dense(dictionary.encode_sparse(x), dictionary.d_sae) == 0
    rows = torch.zeros(dictionary.d_sae, dtype=torch.int64)
    missed, answer = torch.full((2, dictionary.d_sae), torch.nan, dtype=torch.float64)
    wanted = (silent.any(0).cpu() & ~strength.isnan().any(1)).nonzero()[:, 0]
    groups = wanted.split(_LATENTS_AT_ONCE)
    for latents in tqdm(groups, desc="inject", unit="64 latents", leave=False, delay=_SHORT):
        directions = dictionary.W_dec[latents] @ dictionary.W_enc
        for latent, direction in zip(latents.tolist(), directions, strict=True):
            where = silent[:, latent]
            added = strength[latent].to(pre)[where]
            with_it = torch.addcmul(pre[where], added[:, None], direction)
            codes = dictionary.sparsity.select(with_it, dictionary.threshold)
            value = (codes.values * (codes.indices == latent)).sum(1)
            answers = value > 0
            rows[latent] = len(value)
            missed[latent] = 1 - answers.float().mean().cpu()
            power = (added * answers).square().sum()
            answer[latent] = ((value * added).sum() / power).cpu()  # NaN if there is none
    return Injection(rows, missed, answer)
