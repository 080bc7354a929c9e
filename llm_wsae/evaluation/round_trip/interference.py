"""Which other latents take most from each latent in the round trip.

On the way back, latent i adds z_i · ⟨w_i, e_j⟩ to the pre-activation of latent j, with w_i a
decoder row and e_j an encoder column: the off-diagonal part of W_pᵀW_p in theorem 1. Where it is
negative, i takes from j.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary

TAKERS = 3
_LATENTS_AT_ONCE = 256


def takers(
    dictionary: Dictionary, codes: csr_matrix
) -> tuple[Int[Tensor, "d_sae takers"], Float[Tensor, "d_sae takers"]]:
    """The three latents that take most from each, the most first, and how much: the mean of
    z_i · ⟨w_i, e_j⟩ over the rows where j fires, as a share of j's mean strength there (below 0).

    ``codes`` [rows, d_sae] holds z. −1 and 0 where fewer than three take anything.
    """
    d_sae = dictionary.d_sae
    count = min(TAKERS, d_sae)
    fires = codes.copy()
    fires.data = np.ones_like(fires.data)
    by_latent = fires.T.tocsr()
    strength = torch.from_numpy(np.asarray(codes.sum(0)).ravel())
    found = []
    for start in range(0, d_sae, _LATENTS_AT_ONCE):
        stop = min(start + _LATENTS_AT_ONCE, d_sae)
        together = torch.from_numpy((by_latent[start:stop] @ codes).toarray())
        overlap = (dictionary.W_dec @ dictionary.W_enc[:, start:stop]).T.cpu()
        given = together * overlap
        own = torch.arange(stop - start)
        given[own, own + start] = 0
        share = given / strength[start:stop, None].clamp(min=1e-30)
        found.append(share.topk(count, dim=1, largest=False))
    share = torch.cat([one.values for one in found])
    latent = torch.cat([one.indices for one in found])
    return latent.where(share < 0, -1), share.clamp(max=0)
