"""The dictionary that learnt nothing, beside which the numbers of a trained one are read."""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import TopK


def frozen_random(
    like: Dictionary, mean: Float[Tensor, " d_in"], l0: float, seed: int
) -> Dictionary:
    """A dictionary of the same shape with random unit decoder rows, its encoder their transpose,
    centred at ``mean``, with as many active latents in a row as ``l0``, rounded."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(like.d_sae, like.d_in, generator=draw)
    decoder = torch.nn.functional.normalize(rows, dim=1)
    mean = mean.float().cpu()
    new = Dictionary(
        W_enc=decoder.T,
        W_dec=decoder,
        b_enc=-(decoder @ mean),
        b_dec=mean,
        sparsity=TopK(min(max(1, round(l0)), like.d_sae)),
        info=DictionaryInfo(
            like.info.site, "frozen random", massive_threshold=like.info.massive_threshold
        ),
    )
    return new.to(like.W_enc.device)
