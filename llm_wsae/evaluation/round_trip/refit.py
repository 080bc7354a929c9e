"""Strengths that reconstruct a row best with the latents that the encoder chose."""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.sparse.codes import Codes

_RIDGE = 1e-6  # relative; decides between latents with the same direction
_NUMBERS_AT_ONCE = 1 << 23  # of the gathered decoder rows


def refit(
    dictionary: Dictionary, x: Float[Tensor, "batch d_in"], codes: Codes
) -> Float[Tensor, "batch k"]:
    """argmin over a of ‖x − b_dec − Σ_i a_i w_i‖² over the active latents i of every row (float64);
    0 in unused slots. They may be negative."""
    width = max(1, codes.indices.shape[1] * dictionary.d_in)
    rows = max(1, _NUMBERS_AT_ONCE // width)
    parts = zip(x.split(rows), codes.indices.split(rows), codes.values.split(rows), strict=True)
    return torch.cat([_refit(dictionary, *part) for part in parts])


def _refit(dictionary: Dictionary, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    active = values > 0
    decoder = dictionary.W_dec[indices] * active[:, :, None]
    gram = (decoder @ decoder.mT).cpu().double()
    along = (decoder @ (x - dictionary.b_dec)[:, :, None]).cpu().double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True).clamp(min=1e-30) + ~active.cpu()
    return torch.linalg.solve(gram, along)[:, :, 0] * active.cpu()
