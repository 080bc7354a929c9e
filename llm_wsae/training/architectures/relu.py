"""ReLU with an L1 penalty: the classic sparse autoencoder, and the paper's second one.

It begins with half of all latents active, as ``gba`` does (``DenseStart``). While they are many,
products are dense, in tiles of rows that bound the memory; once they are few, the sparse operations
take over. Both compute the same loss and gradients, up to rounding.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.machine.hardware import DeferredScalar
from llm_wsae.sparse.codes import SlotCapacity
from llm_wsae.training.architecture import (
    Architecture,
    Batch,
    Parameters,
    Step,
    sparse_step,
    weighted_error,
)
from llm_wsae.weights.loss_weights import Gamma

_TILE_ROWS = 1024
_FEW = 1 / 64  # share of active latents below which the sparse step is the faster one


class DenseStart(Architecture):
    """The loss ‖Γ(x − x̂)‖² + penalty · Σ z of the pre-activations z above their thresholds, summed
    over the batch. It remembers which share of the latents was active in the last step: the next
    one's will be about the same."""

    revives_dead = False

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._active_share = DeferredScalar(torch.ones(()))
        self._capacity = SlotCapacity()

    def penalty(self, batch: Batch) -> Float[Tensor, ""]:
        """Its gradient by an active latent."""
        return batch.x.new_zeros(())

    def observed(self, step: Step, largest: Float[Tensor, " latents"], batch: Batch) -> Tensor:
        """What ``follow`` takes in: here, which share of all latents is active in the whole batch.
        ``largest`` is every latent's largest value in the rows that are here, 0 if it has none."""
        return self.strategy.sum_over_all(step.firings.sum()) / (batch.num_rows * self.d_sae)

    def step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """Whichever of the two is the faster."""
        if self._active_share.read() >= _FEW:
            return self.dense_step(parameters, batch, metric)
        return self._capacity.retry(
            lambda: self.sparse_step(parameters, batch, metric), self.strategy.all_agree
        )

    def sparse_step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """The step along the active latents only, correct if there were slots enough."""
        codes = batch.above(self._bounds(parameters), parameters, self._capacity)
        by_active = self.penalty(batch)
        step = sparse_step(codes, parameters, batch, metric, self.strategy, by_active)
        penalty = by_active * self.strategy.sum_over_latents(codes.values.sum())
        largest = torch.zeros_like(step.firings)
        largest.scatter_reduce_(0, codes.indices, codes.values.to(largest.dtype), "amax")
        observed = self.observed(step, largest, batch)
        return step._replace(loss=step.loss + penalty, observed=observed)

    def dense_step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """The step over all latents, a tile of rows at a time."""
        _, decoder, encoder_bias, decoder_bias = parameters
        strategy, fast, by_active = self.strategy, batch.x_fast.dtype, self.penalty(batch)
        threshold, decoder_fast = self._bounds(parameters), decoder.to(fast)
        _, encoder_fast, bias_fast = batch.product(parameters)
        by_encoder, by_decoder = torch.zeros_like(decoder), torch.zeros_like(decoder)
        by_bias, by_decoder_bias = torch.zeros_like(encoder_bias), torch.zeros_like(decoder_bias)
        residual = torch.empty_like(batch.y)
        firings, largest = torch.zeros_like(encoder_bias), torch.zeros_like(encoder_bias)
        loss = batch.x.new_zeros(())
        for start in range(0, len(batch.x), _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            y, x_fast, mask = batch.y[rows], batch.x_fast[rows], batch.mask[rows]
            latents = torch.addmm(bias_fast, x_fast, encoder_fast.T)
            active = (latents > threshold).logical_and_(mask[:, None] > 0)
            latents.mul_(active)
            decoded = strategy.sum_over_latents((latents @ decoder_fast).to(y.dtype))
            missed = decoded.add_(decoder_bias).sub_(y).mul_(mask[:, None])
            residual[rows] = missed
            tile_loss, by_output = weighted_error(missed, mask, metric, batch.num_rows)
            loss += tile_loss + by_active * strategy.sum_over_latents(latents.sum(dtype=y.dtype))
            by_output_fast = by_output.to(fast)
            by_latent = by_output_fast @ decoder_fast.T
            by_latent.add_(by_active.to(fast)).mul_(active)
            by_encoder.add_(by_latent.T @ x_fast)
            by_decoder.add_(latents.T @ by_output_fast)
            by_bias.add_(by_latent.sum(0, dtype=y.dtype))
            by_decoder_bias.add_(by_output.sum(0))
            firings += active.sum(0)
            torch.maximum(largest, latents.amax(0).to(largest.dtype), out=largest)
        gradients = (by_encoder, by_decoder, by_bias)
        step = Step(gradients, by_decoder_bias, residual, firings, loss)
        return step._replace(observed=self.observed(step, largest, batch))

    def _bounds(self, parameters: Parameters) -> Float[Tensor, " latents"]:
        """What pre-activations must exceed, ≥ 0."""
        found = self.thresholds()
        return torch.zeros_like(parameters.encoder_bias) if found is None else found

    def follow(self, observed: Float[Tensor, ""], learning_rate: float) -> None:
        """Take in the share of one more step."""
        self._active_share = DeferredScalar(observed)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"active_share": torch.tensor(self._active_share.read())}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        self._active_share = DeferredScalar(tensors["active_share"])


class ReLU(DenseStart):
    """Every positive latent is active, under an L1 penalty.

    The loss is ‖Γ(x − x̂)‖² + l1·Σ_j z_j (means over rows; the first also over dimensions): a
    coefficient for a loss that sums over dimensions is d_in times this one.
    """

    name = "relu"
    setting = "l1"

    @classmethod
    def label(cls, level: int | float) -> str:
        return f"relu-l{level:g}"

    def penalty(self, batch: Batch) -> Float[Tensor, ""]:
        return self.level / batch.num_rows


ARCHITECTURE = ReLU
