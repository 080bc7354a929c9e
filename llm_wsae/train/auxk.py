"""AuxK (Gao et al. 2024, §A.2): dead latents learn to explain what the living ones leave over.

The dead latents with the largest pre-activations reconstruct the residual, in the same weighted
norm as the main loss. All products are dense over that subset: up to half as many of them take
part in a row as it has dimensions, too many for sparse ones to pay.

To find the subset means to wait for a GPU. There it is found now and then only, with those latents
that may yet die until it is found again, and what takes part in a step is told by a mask.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.sparse.codes import OfSome
from llm_wsae.statistics.weights import Gamma
from llm_wsae.train.parameters import Batch, Parameters, squared, times

threshold_backward = torch.ops.aten.threshold_backward  # of a ReLU: one pass, no mask

_TILE_ROWS, _TILE_ROWS_ON_CPU = 1024, 256  # rows × dead latents are held several times
_TILE_LATENTS = 2048
_LOOKS_PER_DEATH = 16  # how often the dead are looked for, on a GPU, while one dies


class DeadLatents(NamedTuple):
    """Latents that have not fired for long, as indices among those that are here."""

    indices: Int[Tensor, " some"]
    """Those that are dead, and possibly some that are not."""
    dead: Bool[Tensor, " some"] | None = None
    """Which of them are; None if all."""


class DeadFinder:
    """Finds the dead latents of one arm."""

    def __init__(self, device: torch.device):
        self._waits = device.type != "cpu"
        self._found = torch.empty(0, dtype=torch.int64, device=device)
        self._until = 0

    def find(
        self, last_fired: Int[Tensor, " latents"], rows_seen: int, dead_after: int
    ) -> DeadLatents:
        """Those that have not fired for ``dead_after`` rows."""
        if not self._waits:
            return DeadLatents((rows_seen - last_fired > dead_after).nonzero().flatten())
        if rows_seen > self._until:
            self._until = rows_seen + dead_after // _LOOKS_PER_DEATH
            self._found = (self._until - last_fired > dead_after).nonzero().flatten()
        return DeadLatents(self._found, rows_seen - last_fired[self._found] > dead_after)


def auxk_gradients(
    parameters: Parameters,
    batch: Batch,
    residual: Float[Tensor, "batch d_in"],
    latents: DeadLatents,
    gamma: Gamma,
    coefficient: float,
) -> OfSome | None:
    """Gradients of coefficient · ‖Γ(e − ê)‖² / ‖Γe‖² by the weights of ``latents``; None if no
    latent is dead.

    e = x − x̂ is a constant here, and ê has no bias: b_dec is part of x̂ already. In a row d_in / 2
    dead latents take part, those with the largest pre-activations, or more where they tie.
    """
    dead = latents.indices
    fast = batch.x_fast.dtype
    encoder, decoder = parameters.encoder[dead].to(fast), parameters.decoder[dead].to(fast)
    bias = parameters.encoder_bias[dead].to(fast)
    num_dead = batch.split.count_latents(len(dead))
    if num_dead == 0:
        return None
    k_aux = min(num_dead, max(1, batch.x.shape[1] // 2))
    metric = squared(gamma)
    unexplained = batch.split.over_rows((times(residual, metric) * residual).sum(1) @ batch.counted)
    scale = 1 / unexplained.clamp(min=1e-12)
    exact = residual.dtype
    by_encoder, by_decoder = torch.zeros(2, *encoder.shape, dtype=exact, device=dead.device)
    by_bias = torch.zeros(len(dead), dtype=exact, device=dead.device)
    tile = _TILE_ROWS_ON_CPU if residual.device.type == "cpu" else _TILE_ROWS
    for start in range(0, len(residual), tile):
        rows = slice(start, start + tile)
        x_fast, counted = batch.x_fast[rows], batch.counted[rows, None]
        active = torch.addmm(bias, x_fast, encoder.T).relu_()
        if latents.dead is not None:
            active *= latents.dead
        if k_aux < num_dead:
            active *= active >= batch.split.kth_largest(active, k_aux)
        # residual is x̂ − x = −e, so ê − e = active · decoder + residual
        decoded = batch.split.over_latents((active @ decoder).to(residual.dtype))
        error = (decoded + residual[rows]) * counted
        by_output = times(error, metric * (2 * coefficient * scale)).to(fast)
        by_latent = threshold_backward(by_output @ decoder.T, active, 0)
        by_bias += by_latent.sum(0, dtype=exact)
        for some in (slice(i, i + _TILE_LATENTS) for i in range(0, len(dead), _TILE_LATENTS)):
            by_encoder[some] += by_latent[:, some].T @ x_fast
            by_decoder[some] += active[:, some].T @ by_output
    return OfSome(dead, by_encoder, by_decoder, by_bias)
