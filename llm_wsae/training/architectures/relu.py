"""ReLU with an L1 penalty: the classic sparse autoencoder, and the paper's second one.

It begins with half of all latents active, and their number falls with training, as in ``gba``
(``DenseStart``). While they are many, products are dense, in tiles of rows that bound the memory;
once they are few, the sparse operations take over. Both compute the same loss and the same
gradients, up to rounding.
"""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary import sparsity
from llm_wsae.machine.hardware import DeferredScalar
from llm_wsae.sparse.codes import RaggedCodes, SlotCapacity
from llm_wsae.sparse.operations import encode_above
from llm_wsae.training.architecture import (
    Architecture,
    Batch,
    Parameters,
    Step,
    exact,
    sparse_step,
    weighted_error,
    without_masked,
)
from llm_wsae.training.strategy import Strategy
from llm_wsae.weights.loss_weights import Gamma

_TILE_ROWS = 1024
_FEW = 1 / 64  # share of active latents below which the sparse step is the faster one


class DenseStart(Architecture):
    """It remembers which share of the latents was active in the last step: the next one's will be
    about the same."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._active_share: DeferredScalar | None = None
        self._capacity = SlotCapacity()

    def step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """Whichever of the two is the faster."""
        share = self.active_share()
        if share is None or share >= _FEW:
            return self.dense_step(parameters, batch, metric)
        return self._capacity.retry(
            lambda: self.sparse_step(parameters, batch, metric), self.strategy.all_agree
        )

    @abstractmethod
    def dense_step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """The step over all latents."""

    @abstractmethod
    def sparse_step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """The step along the active latents only, correct if there were slots enough."""

    def codes_above(
        self, parameters: Parameters, batch: Batch, threshold: Float[Tensor, " latents"]
    ) -> RaggedCodes:
        """The active latents of the rows that are not masked."""
        fast = batch.x_fast.dtype
        encoder, bias = parameters.encoder.to(fast), parameters.encoder_bias.to(fast)
        codes = encode_above(batch.x_fast, encoder, bias, threshold, self._capacity)
        return exact(without_masked(codes, batch), parameters, batch)

    def active_share(self) -> float | None:
        """Which share of the latents was active in the last step; None before the first."""
        return None if self._active_share is None else self._active_share.read()

    def follow(self, observed: Float[Tensor, ""], learning_rate: float) -> None:
        """Take in the share of one more step."""
        self._active_share = DeferredScalar(observed)

    def state(self) -> dict[str, Tensor]:
        share = self.active_share()
        return super().state() | ({} if share is None else {"active_share": torch.tensor(share)})

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """There is no share before the first step."""
        super().load_state(tensors)
        if "active_share" in tensors:
            self._active_share = DeferredScalar(tensors["active_share"])


def dense_step(
    parameters: Parameters,
    batch: Batch,
    metric: Gamma,
    strategy: Strategy,
    threshold: float | Float[Tensor, " latents"] = 0.0,
    penalty_gradient: float | Float[Tensor, ""] = 0.0,
) -> tuple[Step, Float[Tensor, " latents"]]:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) + ``penalty_gradient`` · Σ z, of the
    pre-activations z above their threshold (≥ 0), and its gradients, a tile of rows at a time.

    Also returns every latent's largest value, 0 if it has none, among the rows that are here.
    """
    encoder, decoder, encoder_bias, decoder_bias = parameters
    fast = batch.x_fast.dtype
    encoder_fast, decoder_fast = encoder.to(fast), decoder.to(fast)
    bias_fast = encoder_bias.to(fast)
    by_active = torch.as_tensor(penalty_gradient, dtype=batch.x.dtype, device=batch.x.device)
    gradients = Parameters(
        torch.zeros_like(decoder),  # the encoder may be the rounded one
        *map(torch.zeros_like, (decoder, encoder_bias, decoder_bias)),
    )
    residual = torch.empty_like(batch.x)
    firings, largest = torch.zeros_like(encoder_bias), torch.zeros_like(encoder_bias)
    loss = batch.x.new_zeros(())
    for start in range(0, len(batch.x), _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        x, x_fast, mask = batch.x[rows], batch.x_fast[rows], batch.mask[rows]
        latents = torch.addmm(bias_fast, x_fast, encoder_fast.T)
        active = (latents > threshold).logical_and_(mask[:, None] > 0)
        latents.mul_(active)
        decoded = strategy.sum_over_latents((latents @ decoder_fast).to(x.dtype))
        residual[rows] = decoded.add_(decoder_bias).sub_(x).mul_(mask[:, None])
        tile_loss, by_output = weighted_error(
            residual[rows], batch.mask[rows], metric, batch.num_rows
        )
        loss += tile_loss + by_active * strategy.sum_over_latents(latents.sum(dtype=x.dtype))
        by_output_fast = by_output.to(fast)
        by_latent = by_output_fast @ decoder_fast.T
        by_latent.add_(by_active.to(fast)).mul_(active)
        gradients.encoder.add_(by_latent.T @ x_fast)
        gradients.decoder.add_(latents.T @ by_output_fast)
        gradients.encoder_bias.add_(by_latent.sum(0, dtype=x.dtype))
        gradients.decoder_bias.add_(by_output.sum(0))
        firings += active.sum(0)
        torch.maximum(largest, latents.amax(0).to(largest.dtype), out=largest)
    return Step(gradients[:3], gradients.decoder_bias, residual, firings, loss), largest


class ReLU(DenseStart):
    """Every positive latent is active, under an L1 penalty.

    The loss is ‖Γ(x − x̂)‖² + l1·Σ_j z_j (means over rows; the first also over dimensions). Decoder
    rows have unit norm, so the plain sum of the latents is the penalty of the literature. A
    coefficient for a loss that sums over dimensions is d_in times this one.
    """

    name = "relu"
    setting = "l1"
    revives_dead = False

    @classmethod
    def label(cls, level: int | float) -> str:
        return f"relu-l{level:g}"

    @property
    def sparsity(self) -> sparsity.ReLU:
        return sparsity.ReLU()

    def sparse_step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """The step along the active latents only, correct if there were slots enough."""
        codes = self.codes_above(parameters, batch, torch.zeros_like(parameters.encoder_bias))
        by_active = self._penalty_gradient(batch)
        step = sparse_step(codes, parameters, batch, metric, self.strategy, by_active)
        penalty = by_active * self.strategy.sum_over_latents(codes.values.sum())
        share = self._share_of(step.firings, batch)
        return step._replace(loss=step.loss + penalty, observed=share)

    def dense_step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """The step over all latents, a tile of rows at a time."""
        by_active = self._penalty_gradient(batch)
        step, _ = dense_step(parameters, batch, metric, self.strategy, penalty_gradient=by_active)
        return step._replace(observed=self._share_of(step.firings, batch))

    def _penalty_gradient(self, batch: Batch) -> Float[Tensor, ""]:
        """Gradient of the penalty by an active latent."""
        return self.level / batch.num_rows

    def _share_of(self, firings: Float[Tensor, " latents"], batch: Batch) -> Float[Tensor, ""]:
        """Which share of all latents is active, over the whole batch."""
        return self.strategy.sum_over_all(firings.sum()) / (batch.num_rows * self.d_sae)


ARCHITECTURE = ReLU
