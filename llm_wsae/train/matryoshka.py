"""Matryoshka BatchTopK (Bussmann et al. 2025): nested dictionaries, each a prefix of the next.

Every prefix of the latents must reconstruct the row alone, which keeps general features in the
first ones instead of letting later ones absorb them. Active latents are those of BatchTopK over the
whole dictionary, and the loss is the sum of the prefixes' losses.

A prefix's reconstruction is the one before it plus what its own group of latents adds, so the codes
are split by group and every latent is decoded once, whatever the number of prefixes. Likewise a
latent is pushed by the sum of the gradients of all prefixes that hold it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import RaggedCodes
from llm_wsae.sparse.operations import firing_counts, value_gradients, weight_gradients
from llm_wsae.sparse.reference import Gradients
from llm_wsae.statistics.weights import Gamma
from llm_wsae.train.along import exact
from llm_wsae.train.batch_topk import batch_topk_codes, smallest_value
from llm_wsae.train.parameters import Batch, Parameters, Step, weighted_error

PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""Share of the latents in each prefix: groups of 1/32, 1/16, 1/8, 1/4 and the rest, as in the
dictionaries of SAEBench."""


def matryoshka_step(
    parameters: Parameters,
    batch: Batch,
    gamma: Gamma,
    k: int,
    guess: float | Float[Tensor, ""],
    out: Gradients | None = None,
    prefixes: Sequence[float] = PREFIXES,
) -> Step:
    """Loss Σ_prefixes ‖Γ(x − x̂_prefix)‖² (means over rows and dimensions) and its gradients.

    The residual is that of the whole dictionary. ``guess`` and ``out`` as in ``batch_topk_step``.
    """
    encoder, decoder, encoder_bias, decoder_bias = parameters
    codes = batch_topk_codes(parameters, batch, k, guess)
    groups = batch.split.own_groups(group_bounds(batch.split.latent_parts * len(encoder), prefixes))
    active = exact(codes, parameters, batch)
    parts = _by_group(active, groups)

    residuals, bias = [], decoder_bias
    for part, (start, stop) in zip(parts, groups, strict=True):
        added = batch.split.decode(part, decoder[start:stop], bias).mul_(batch.mask[:, None])
        residuals.append(added.add_(residuals[-1] if residuals else -batch.x))
        bias = torch.zeros_like(decoder_bias)  # is in the first prefix, hence in all

    if out is None:
        out = (torch.empty_like(decoder), torch.empty_like(decoder), torch.empty_like(encoder_bias))
    gradients = Parameters(*out, torch.empty_like(decoder_bias))
    loss, output_gradient = batch.x.new_zeros(()), None
    for part, (start, stop), residual in reversed(list(zip(parts, groups, residuals, strict=True))):
        prefix_loss, by_prefix = weighted_error(residual, batch.counted, gamma, batch.num_rows)
        loss = loss + prefix_loss
        output_gradient = by_prefix if output_gradient is None else output_gradient.add_(by_prefix)
        if start == stop:
            continue
        by_value = value_gradients(part, decoder[start:stop], output_gradient)
        places = tuple(whole[start:stop] for whole in gradients[:3])
        found = weight_gradients(part, batch.x, output_gradient, by_value, stop - start, out=places)
        for place, gradient in zip(places, found, strict=True):
            if place.data_ptr() != gradient.data_ptr():
                place.copy_(gradient)
    gradients.decoder_bias.copy_(output_gradient.sum(0))
    firings = firing_counts(active, len(encoder))
    return Step(gradients, residuals[-1], firings, loss, smallest_value(codes, batch))


def group_bounds(d_sae: int, prefixes: Sequence[float] = PREFIXES) -> list[tuple[int, int]]:
    """First latent and end of every group: what a prefix has beyond the one before it."""
    ends = sorted({max(1, round(share * d_sae)) for share in prefixes})
    return list(zip([0, *ends], ends, strict=False))


def _by_group(codes: RaggedCodes, groups: Sequence[tuple[int, int]]) -> list[RaggedCodes]:
    """The codes of each group of latents, counted from its first one.

    Waits for the device once, to learn how many there are of each.
    """
    indices, values, offsets = codes
    inside = torch.stack([(indices >= start) & (indices < stop) for start, stop in groups])
    before = torch.nn.functional.pad(inside.cumsum(1), (1, 0))
    parts = []
    for (start, _), mine, place, size in zip(
        groups, inside, before, before[:, -1].tolist(), strict=True
    ):
        slots = torch.where(mine, place[:-1], size)  # the others all go behind the end
        parts.append(
            RaggedCodes(
                indices.new_empty(size + 1).scatter_(0, slots, indices - start)[:size],
                values.new_empty(size + 1).scatter_(0, slots, values)[:size],
                place[offsets],
            )
        )
    return parts
