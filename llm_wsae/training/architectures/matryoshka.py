"""Matryoshka BatchTopK (Bussmann et al. 2025): nested dictionaries, each a prefix of the next.

Every prefix of the latents must reconstruct the row alone, which keeps general features in the
first ones. Active latents are those of BatchTopK over the whole dictionary, and the loss is the sum
of the prefixes' losses. The codes are sorted by the group that a prefix adds, so that every latent
is decoded once; its gradient is the sum of those of all prefixes that contain it.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from llm_wsae.sparse.codes import RaggedCodes, SparseGradients
from llm_wsae.sparse.operations import firing_counts, value_gradients
from llm_wsae.training.architecture import Batch, Parameters, Step, weighted_error
from llm_wsae.training.architectures.batch_topk import BatchTopK
from llm_wsae.weights.loss_weights import Gamma

PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""Share of the latents in each prefix: groups of 1/32, 1/16, 1/8, 1/4 and the rest, as in the
dictionaries of SAEBench."""


class Matryoshka(BatchTopK):
    """BatchTopK whose prefixes must reconstruct alone."""

    name = "matryoshka"
    has_one_error = False
    prefixes: Sequence[float] = PREFIXES

    def step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """Loss Σ_prefixes ‖Γ(x − x̂_prefix)‖² (means over rows and dimensions) and its gradients;
        the residual is that of the whole dictionary."""
        encoder, decoder, _, decoder_bias = parameters
        codes = self.codes(parameters, batch)
        groups = self._own_groups()
        active = batch.exact(codes, parameters)
        grouped = _by_group(active, groups)

        no_bias = torch.zeros_like(decoder_bias)
        added = self.strategy.decode(grouped, decoder, no_bias)  # by each group
        residuals = added.view(len(groups), *batch.y.shape)
        residuals[0] += decoder_bias - batch.y
        for inner, outer in pairwise(residuals):
            outer += inner
        residuals *= batch.mask[:, None]

        residual, loss = residuals[-1].clone(), batch.x.new_zeros(())
        from_outer = torch.zeros_like(residual)
        for prefix in reversed(residuals.unbind()):  # overwritten by its gradient and outer ones'
            prefix_loss, by_prefix = weighted_error(prefix, batch.mask, metric, batch.num_rows)
            loss += prefix_loss
            from_outer = torch.add(by_prefix, from_outer, out=prefix)
        by_decoder_bias, by_output = from_outer.sum(0), residuals.flatten(0, 1)
        by_value = value_gradients(grouped, decoder, by_output)
        by_output_fast = by_output.to(batch.x_fast.dtype)
        gradients = SparseGradients(grouped, batch.x_fast, by_output_fast, by_value)
        firings, smallest = firing_counts(active, len(encoder)), self.smallest_value(codes)
        return Step(gradients, by_decoder_bias, residual, firings, loss, smallest)

    def _own_groups(self) -> list[tuple[int, int]]:
        """This process's part of every group, counted from its first latent."""
        own = self.strategy.own_latents(self.d_sae)

        def here(bound: int) -> int:
            return min(max(bound, own.start), own.stop) - own.start

        groups = group_bounds(self.d_sae, self.prefixes)
        return [(here(first), here(stop)) for first, stop in groups]


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


ARCHITECTURE = Matryoshka
