"""Matryoshka BatchTopK (Bussmann et al. 2025): nested dictionaries, each a prefix of the next.

Every prefix of the latents must reconstruct the row alone, which keeps general features in the
first ones instead of letting later ones absorb them. Active latents are those of BatchTopK over the
whole dictionary, and the loss is the sum of the prefixes' losses.

A prefix's reconstruction is the one before it plus what its own group of latents adds, so the codes
are put in order by group and every latent is decoded once, whatever the number of prefixes.
Likewise a latent is pushed by the sum of the gradients of all prefixes that hold it.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import RaggedCodes, SparseGradients
from llm_wsae.sparse.operations import firing_counts, value_gradients
from llm_wsae.training.architectures.batch_topk import batch_topk_codes, smallest_value
from llm_wsae.training.architectures.sparse_backward import exact
from llm_wsae.training.parameters import Batch, Parameters, Step, weighted_error
from llm_wsae.weights.loss_weights import Gamma

PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""Share of the latents in each prefix: groups of 1/32, 1/16, 1/8, 1/4 and the rest, as in the
dictionaries of SAEBench."""


def matryoshka_step(
    parameters: Parameters,
    batch: Batch,
    gamma: Gamma,
    k: int,
    guess: float | Float[Tensor, ""],
    prefixes: Sequence[float] = PREFIXES,
) -> Step:
    """Loss Σ_prefixes ‖Γ(x − x̂_prefix)‖² (means over rows and dimensions) and its gradients.

    The residual is that of the whole dictionary. ``guess`` as in ``batch_topk_step``.
    """
    encoder, decoder, _, decoder_bias = parameters
    codes = batch_topk_codes(parameters, batch, k, guess)
    groups = batch.split.own_groups(group_bounds(batch.split.latent_parts * len(encoder), prefixes))
    active = exact(codes, parameters, batch)
    grouped = _by_group(active, groups)

    no_bias = torch.zeros_like(decoder_bias)
    added = batch.split.decode(grouped, decoder, no_bias)  # by each group
    residuals = added.view(len(groups), *batch.x.shape)
    residuals[0] += decoder_bias - batch.x
    for inner, outer in pairwise(residuals):
        outer += inner
    residuals *= batch.mask[:, None]

    residual, loss = residuals[-1].clone(), batch.x.new_zeros(())
    later = torch.zeros_like(residual)
    for place in reversed(residuals.unbind()):  # takes the gradient of its prefix and later ones
        prefix_loss, by_prefix = weighted_error(place, batch.counted, gamma, batch.num_rows)
        loss += prefix_loss
        later = torch.add(by_prefix, later, out=place)
    by_decoder_bias, by_output = later.sum(0), residuals.flatten(0, 1)
    by_value = value_gradients(grouped, decoder, by_output)
    terms = SparseGradients(grouped, batch.x_fast, by_output.to(batch.x_fast.dtype), by_value)
    firings = firing_counts(active, len(encoder))
    return Step(terms, by_decoder_bias, residual, firings, loss, smallest_value(codes, batch))


def group_bounds(d_sae: int, prefixes: Sequence[float] = PREFIXES) -> list[tuple[int, int]]:
    """First latent and end of every group: what a prefix has beyond the one before it."""
    ends = sorted({max(1, round(share * d_sae)) for share in prefixes})
    return list(zip([0, *ends], ends, strict=False))


def _by_group(codes: RaggedCodes, groups: Sequence[tuple[int, int]]) -> RaggedCodes:
    """The codes as rows of each group of latents: all rows of one before all rows of the next."""
    indices, values, offsets = codes
    inside = torch.stack([(indices >= start) & (indices < stop) for start, stop in groups])
    before = torch.nn.functional.pad(inside.cumsum(1), (1, 0))  # slots of a group that come first
    sizes = before[:, -1]
    place = before + (sizes.cumsum(0) - sizes)[:, None]
    slots = (place[:, :-1] * inside).sum(0)
    return RaggedCodes(
        torch.empty_like(indices).scatter_(0, slots, indices),
        torch.empty_like(values).scatter_(0, slots, values),
        torch.cat([place[:, offsets[:-1]].flatten(), offsets[-1:]]),
    )
