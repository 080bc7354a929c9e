"""AuxK (Gao et al. 2024, §A.2): dead latents learn to explain what the others leave unexplained.

The dead latents with the largest pre-activations reconstruct the residual, in the same weighted
norm as the main loss. Up to d_in / 2 of them are active in a row, too many for sparse products to
be faster, so all products are dense over the dead latents.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.sparse.codes import SubsetGradients
from llm_wsae.sparse.operations import dead_gradients, encode_dead
from llm_wsae.training.architecture import Batch, Parameters, times
from llm_wsae.training.strategy import SINGLE, Strategy
from llm_wsae.weights.loss_weights import Gamma

_TILE_BYTES = 16 * 2**20  # of a tile's rows × dead latents, which are held twice
_FEWEST_ROWS, _MOST_ROWS = 256, 1024
_MULTIPLE = 64  # of it, with zeros, is the number of latents in products on a CPU
_SEARCHES_PER_DEATH = 16  # on a GPU: searches in the time after which a latent counts as dead


class DeadLatents(NamedTuple):
    """Latents that have not fired for long, as indices among this process's latents."""

    indices: Int[Tensor, " some"]
    """The dead ones, and possibly some that are not dead."""
    dead: Bool[Tensor, " some"] | None = None
    """Which of them are dead; None if all."""


class DeadFinder:
    """Finds the dead latents of one arm.

    A GPU is asked for their number only now and then, since that means waiting. The search then
    includes latents that may die before the next one, and a mask says which are dead in a step.
    """

    def __init__(self, device: torch.device):
        self._waits = device.type != "cpu"
        self._found = torch.empty(0, dtype=torch.int64, device=device)
        self._until = -1  # ``_found`` has all dead latents until this many rows have been seen

    def find(
        self, last_fired: Int[Tensor, " latents"], rows_seen: int, dead_after: int
    ) -> DeadLatents:
        """The latents that have not fired for ``dead_after`` rows."""
        if not self._waits:
            return DeadLatents((rows_seen - last_fired > dead_after).nonzero().flatten())
        if rows_seen > self._until:
            self._until = rows_seen + dead_after // _SEARCHES_PER_DEATH
            self._found = (self._until - last_fired > dead_after).nonzero().flatten()
        return DeadLatents(self._found, rows_seen - last_fired[self._found] > dead_after)


def auxk_gradients(
    parameters: Parameters,
    batch: Batch,
    residual: Float[Tensor, "batch d_in"],
    latents: DeadLatents,
    metric: Gamma,
    coefficient: float,
    strategy: Strategy = SINGLE,
) -> SubsetGradients | None:
    """Gradients of coefficient · ‖Γ(e − ê)‖² / ‖Γe‖² by the weights of ``latents``; None if no
    latent is dead. ``metric`` is what ``squared`` gives of Γ.

    e = x − x̂ is a constant here, and ê has no bias: b_dec is already part of x̂. In each row the
    d_in / 2 dead latents with the largest pre-activations take part, or more where they tie.
    """
    indices, exact, fast = latents.indices, residual.dtype, batch.x_fast.dtype
    num_dead = int(strategy.sum_over_latents(torch.tensor(len(indices))))
    if num_dead == 0:
        return None
    # For every new shape of a product oneDNN generates code, and keeps about a quarter of a
    # megabyte for good. Zeros round the number up; they change no result.
    multiple = _MULTIPLE if residual.device.type == "cpu" else 1
    spare = -len(indices) % multiple
    encoder, decoder, bias = (_filled(part[indices].to(fast), spare) for part in parameters[:3])
    dead = None if latents.dead is None else _filled(latents.dead, spare)
    k_aux = min(num_dead, max(1, batch.x.shape[1] // 2))
    held = (num_dead + -num_dead % multiple) * fast.itemsize
    size = min(_MOST_ROWS, max(_FEWEST_ROWS, _TILE_BYTES // held))
    tiles = [slice(start, start + size) for start in range(0, len(residual), size)]
    unexplained = residual.new_zeros(())
    for rows in tiles:
        errors = (times(residual[rows], metric) * residual[rows]).sum(1)
        unexplained += errors @ batch.mask[rows]
    by_error = metric * (2 * coefficient / strategy.sum_over_rows(unexplained).clamp(min=1e-12))
    zeros = (torch.zeros_like(part, dtype=exact) for part in (encoder, decoder, bias))
    sums = SubsetGradients(indices, *zeros)
    for rows in tiles:
        x, mask = batch.x_fast[rows], batch.mask[rows, None]
        active = strategy.keep_largest(encode_dead(x, encoder, bias, dead, k_aux), k_aux)
        # residual is x̂ − x = −e, so ê − e = active · decoder + residual
        decoded = strategy.sum_over_latents((active @ decoder).to(exact))
        error = decoded.add_(residual[rows]).mul_(mask)
        dead_gradients(active, x, decoder, times(error, by_error).to(fast), sums)
    return SubsetGradients(indices, *(part[: len(indices)] for part in sums[1:]))


def _filled(part: Tensor, spare: int) -> Tensor:
    """The tensor with ``spare`` rows of zeros appended."""
    return torch.cat([part, part.new_zeros(spare, *part.shape[1:])]) if spare else part
