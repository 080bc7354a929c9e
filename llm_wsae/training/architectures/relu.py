"""ReLU with an L1 penalty: the classic sparse autoencoder, and the paper's second one.

Half of all latents are active at the start and their number falls only with training. While they
are many, products are dense, in tiles of rows that bound the memory; once they are few, the sparse
operations take over. Both are the same loss and the same gradients, but for rounding.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.hardware import DeferredScalar
from llm_wsae.sparse.operations import encode_above
from llm_wsae.sparse.slot_capacity import SlotCapacity
from llm_wsae.training.architectures.sparse_backward import exact, step_along, without_masked
from llm_wsae.training.parameters import Batch, Parameters, Step, weighted_error
from llm_wsae.weights.loss_weights import Gamma

_TILE_ROWS = 1024
_FEW = 1 / 64
"""Share of active latents below which the sparse step is the faster one. A sparse latent costs its
rows of both matrices, a dense one its part of four matrix products."""


def relu_step(
    parameters: Parameters,
    batch: Batch,
    gamma: Gamma,
    l1: float,
    share: float | None,
    room: SlotCapacity | None = None,
) -> Step:
    """Loss ‖Γ(x − x̂)‖² + l1·Σ_j z_j (means over rows; the first also over dimensions).

    Decoder rows have unit norm, so the plain sum of the latents is the penalty of the literature. A
    coefficient for a loss that sums over dimensions is d_in times this one.

    ``share`` of the latents was active in the step before, as far as is known; ``room`` as in
    ``encode_above``.
    """
    if share is not None and share < _FEW:
        return sparse_relu_step(parameters, batch, gamma, l1, room)
    return dense_relu_step(parameters, batch, gamma, l1)


def sparse_relu_step(
    parameters: Parameters, batch: Batch, gamma: Gamma, l1: float, room: SlotCapacity | None = None
) -> Step:
    """``relu_step`` along the active latents only."""
    fast = batch.x_fast.dtype
    codes = encode_above(
        batch.x_fast,
        parameters.encoder.to(fast),
        parameters.encoder_bias.to(fast),
        torch.zeros_like(parameters.encoder_bias),
        room,
    )
    codes = exact(without_masked(codes, batch), parameters, batch)
    push = _push(batch, l1)
    step = step_along(codes, parameters, batch, gamma, push)
    penalty = push * batch.split.over_latents(codes.values.sum())
    share = _active_share(step.firings, batch)
    return step._replace(loss=step.loss + penalty, for_memory=share)


def dense_relu_step(parameters: Parameters, batch: Batch, gamma: Gamma, l1: float) -> Step:
    """``relu_step`` over all latents, a tile of rows at a time."""
    encoder, decoder, encoder_bias, decoder_bias = parameters
    fast = batch.x_fast.dtype
    encoder_fast, decoder_fast = encoder.to(fast), decoder.to(fast)
    bias_fast = encoder_bias.to(fast)
    gradients = Parameters(
        torch.zeros_like(decoder),  # the encoder may be the rounded one
        *map(torch.zeros_like, (decoder, encoder_bias, decoder_bias)),
    )
    residual = torch.empty_like(batch.x)
    firings = torch.zeros_like(encoder_bias)
    loss = batch.x.new_zeros(())
    push, over_latents = _push(batch, l1), batch.split.over_latents
    for start in range(0, len(batch.x), _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        x, x_fast, mask = batch.x[rows], batch.x_fast[rows], batch.mask[rows]
        latents = torch.addmm(bias_fast, x_fast, encoder_fast.T).relu_()
        latents.masked_fill_(mask[:, None] == 0, 0)
        active = latents > 0
        decoded = over_latents((latents @ decoder_fast).to(x.dtype))
        residual[rows] = decoded.add_(decoder_bias).sub_(x).mul_(mask[:, None])
        tile_loss, by_output = weighted_error(
            residual[rows], batch.counted[rows], gamma, batch.num_rows
        )
        loss += tile_loss + push * over_latents(latents.sum(dtype=x.dtype))
        by_output_fast = by_output.to(fast)
        by_latent = by_output_fast @ decoder_fast.T
        by_latent.add_(push.to(fast)).mul_(active)
        gradients.encoder.add_(by_latent.T @ x_fast)
        gradients.decoder.add_(latents.T @ by_output_fast)
        gradients.encoder_bias.add_(by_latent.sum(0, dtype=x.dtype))
        gradients.decoder_bias.add_(by_output.sum(0))
        firings += active.sum(0)
    share = _active_share(firings, batch)
    return Step(gradients[:3], gradients.decoder_bias, residual, firings, loss, share)


def _push(batch: Batch, l1: float) -> Float[Tensor, ""]:
    """Gradient of the penalty by an active latent."""
    return l1 / batch.num_rows


def _active_share(firings: Float[Tensor, " latents"], batch: Batch) -> Float[Tensor, ""]:
    """Which share of all latents is active, over the whole batch."""
    d_sae = len(firings) * batch.split.latent_parts
    return batch.split.over_all(firings.sum()) / (batch.num_rows * d_sae)


class ActiveShare:
    """Which share of the latents was active in the last step: the next one's will be about it."""

    def __init__(self):
        self._last: DeferredScalar | None = None

    def follow(self, share: Float[Tensor, ""], learning_rate: float) -> None:
        """Take in one more step. A share has no use for the learning rate."""
        self._last = DeferredScalar(share)

    def share(self) -> float | None:
        """The share; None before the first step."""
        return None if self._last is None else self._last.read()

    def thresholds(self) -> None:
        """The threshold of every latent: the ReLU has none that must be remembered."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        share = self.share()
        return {} if share is None else {"active_share": torch.tensor(share)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``; nothing was known in the runs of older versions."""
        if "active_share" in tensors:
            self._last = DeferredScalar(tensors["active_share"])
