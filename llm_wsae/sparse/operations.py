"""The sparse operations a TopK training step is made of, in plain torch.

Only k of d_sae latents are active in a row, so everything after the encoder's matrix product costs
k/d_sae of its dense form. What is a sum of few rows is an embedding bag: decoding sums decoder rows
over a sample's latents, and a weight gradient sums samples over a latent's occurrences. Both weight
gradients need the occurrences grouped by latent, so one sort serves both.

Latents are rows here (``[d_sae, d_in]`` for encoder and decoder), because every operation reads or
writes whole latents.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.sparse.codes import Codes

_TILE_ROWS = 512  # pre-activations of one tile stay in cache and batch × d_sae is never held
_GROUP = 8  # members of a group in the two-stage selection


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
) -> Codes:
    """The k largest pre-activations x·encoderᵀ + bias of every row, negative ones set to 0.

    ``x``, ``encoder`` and ``bias`` share one dtype, that of the matrix product; values come back in
    float32, or float64 for float64 inputs.
    """
    indices, values = [], []
    for tile in x.split(_TILE_ROWS):
        best = select_topk(torch.addmm(bias, tile, encoder.T), k)
        indices.append(best.indices)
        values.append(best.values)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return Codes(torch.cat(indices), torch.cat(values).to(exact).relu_())


def select_topk(pre: Float[Tensor, "batch d_sae"], k: int) -> Codes:
    """Exactly the k largest entries of every row, in no particular order, sign kept.

    Two stages: the k largest entries lie in the k groups with the largest maxima. A group's members
    stand d_sae / 8 apart, so that its maximum is an elementwise maximum of contiguous runs.
    """
    batch, d_sae = pre.shape
    stride = d_sae // _GROUP
    if d_sae % _GROUP or k >= stride:
        values, indices = pre.topk(k, dim=1, sorted=False)
        return Codes(indices, values)
    groups = pre.view(batch, _GROUP, stride).amax(1).topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(0, d_sae, stride, device=pre.device)
    candidates = (groups[:, :, None] + offsets).flatten(1)
    values, chosen = pre.gather(1, candidates).topk(k, dim=1, sorted=False)
    return Codes(candidates.gather(1, chosen), values)


def decode(
    codes: Codes, decoder: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_in"]
) -> Float[Tensor, "batch d_in"]:
    """Σ_j values_j · decoder[indices_j] + bias."""
    return F.embedding_bag(
        codes.indices, decoder, per_sample_weights=codes.values.to(decoder.dtype), mode="sum"
    ).add_(bias)


def value_gradients(
    codes: Codes, decoder: Float[Tensor, "d_sae d_in"], output_gradient: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "batch k"]:
    """Gradient of the loss by each pre-activation: decoder[index] · output_gradient.

    0 where the value is 0: an unused slot was clipped by the ReLU and must not push any weight.
    """
    batch, k = codes.indices.shape
    device = codes.indices.device
    offsets = torch.arange(0, batch * k, k, device=device)
    bag_of = torch.arange(batch, device=device).repeat_interleave(k)
    gradient = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        output_gradient, decoder, codes.indices.flatten(), offsets, bag_of, 0
    )
    return gradient.view(batch, k).mul_(codes.values > 0)


class LatentGroups:
    """The active (row, latent) pairs of a batch, sorted by latent.

    ``sums`` then adds up weighted rows for each latent; both weight gradients of a step are that.
    """

    def __init__(self, codes: Codes, d_sae: int):
        flat, self._order = codes.indices.flatten().sort(stable=True)
        self._rows = self._order.div(codes.indices.shape[1], rounding_mode="floor")
        self._offsets = torch.searchsorted(flat, torch.arange(d_sae, device=flat.device))

    def sums(
        self, rows: Float[Tensor, "batch d_in"], coefficients: Float[Tensor, "batch k"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """For each latent, Σ over its occurrences of coefficient · row; 0 if it never occurs."""
        return F.embedding_bag(
            self._rows,
            rows,
            self._offsets,
            per_sample_weights=coefficients.flatten()[self._order],
            mode="sum",
        )


def latent_totals(
    indices: Int[Tensor, "batch k"], coefficients: Float[Tensor, "batch k"], d_sae: int
) -> Float[Tensor, " d_sae"]:
    """For each latent, the sum of its coefficients over the batch (the encoder bias' gradient)."""
    total = torch.zeros(d_sae, dtype=coefficients.dtype, device=coefficients.device)
    return total.index_add_(0, indices.flatten(), coefficients.flatten())
