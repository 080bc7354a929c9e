"""ReLU with an L1 penalty: the classic sparse autoencoder, and the paper's second one.

Half of all latents are active at the start and their number falls only with training. While they
are many, products are dense, in tiles of rows that bound the memory; once they are few, the sparse
operations take over. Both compute the same loss and the same gradients, up to rounding.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary import sparsity
from llm_wsae.hardware import DeferredScalar
from llm_wsae.sparse.codes import SlotCapacity
from llm_wsae.sparse.operations import encode_above
from llm_wsae.training.architecture import CPU, Architecture, exact, sparse_step, without_masked
from llm_wsae.training.parallel.strategy import SINGLE, Strategy
from llm_wsae.training.parameters import Batch, Parameters, Step, weighted_error
from llm_wsae.weights.loss_weights import Gamma

_TILE_ROWS = 1024
_FEW = 1 / 64
"""Share of active latents below which the sparse step is the faster one. A sparse latent costs its
rows of both matrices, a dense one its part of four matrix products."""


class ReLU(Architecture):
    """Every positive latent is active, under an L1 penalty.

    It remembers which share of the latents was active in the last step, for the next step's will be
    about the same.
    """

    name = "relu"
    setting = "l1"
    revives_dead = False

    def __init__(
        self,
        level: int | float,
        d_sae: int,
        device: torch.device = CPU,
        strategy: Strategy = SINGLE,
    ):
        super().__init__(level, d_sae, device, strategy)
        self._active_share: DeferredScalar | None = None
        self._capacity = SlotCapacity()

    @classmethod
    def label(cls, level: int | float) -> str:
        return f"relu-l{level:g}"

    @classmethod
    def recorded_name(cls) -> None:
        """The first checkpoints did not name their architecture, and still resume."""

    @property
    def sparsity(self) -> sparsity.ReLU:
        return sparsity.ReLU()

    def step(self, parameters: Parameters, batch: Batch, gamma: Gamma) -> Step:
        """Loss ‖Γ(x − x̂)‖² + l1·Σ_j z_j (means over rows; the first also over dimensions).

        Decoder rows have unit norm, so the plain sum of the latents is the penalty of the
        literature. A coefficient for a loss that sums over dimensions is d_in times this one.
        """
        share = self.active_share()
        if share is None or share >= _FEW:
            return self.dense_step(parameters, batch, gamma)
        return self._capacity.retry(
            lambda: self.sparse_step(parameters, batch, gamma), self.strategy.all_agree
        )

    def sparse_step(self, parameters: Parameters, batch: Batch, gamma: Gamma) -> Step:
        """``step`` along the active latents only, correct if there were slots enough."""
        fast = batch.x_fast.dtype
        codes = encode_above(
            batch.x_fast,
            parameters.encoder.to(fast),
            parameters.encoder_bias.to(fast),
            torch.zeros_like(parameters.encoder_bias),
            self._capacity,
        )
        codes = exact(without_masked(codes, batch), parameters, batch)
        by_active = self._penalty_gradient(batch)
        step = sparse_step(codes, parameters, batch, gamma, self.strategy, by_active)
        penalty = by_active * self.strategy.sum_over_latents(codes.values.sum())
        share = self._share_of(step.firings, batch)
        return step._replace(loss=step.loss + penalty, observed=share)

    def dense_step(self, parameters: Parameters, batch: Batch, gamma: Gamma) -> Step:
        """``step`` over all latents, a tile of rows at a time."""
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
        by_active, sum_over_latents = self._penalty_gradient(batch), self.strategy.sum_over_latents
        for start in range(0, len(batch.x), _TILE_ROWS):
            rows = slice(start, start + _TILE_ROWS)
            x, x_fast, mask = batch.x[rows], batch.x_fast[rows], batch.mask[rows]
            latents = torch.addmm(bias_fast, x_fast, encoder_fast.T).relu_()
            latents.masked_fill_(mask[:, None] == 0, 0)
            active = latents > 0
            decoded = sum_over_latents((latents @ decoder_fast).to(x.dtype))
            residual[rows] = decoded.add_(decoder_bias).sub_(x).mul_(mask[:, None])
            tile_loss, by_output = weighted_error(
                residual[rows], batch.counted[rows], gamma, batch.num_rows
            )
            loss += tile_loss + by_active * sum_over_latents(latents.sum(dtype=x.dtype))
            by_output_fast = by_output.to(fast)
            by_latent = by_output_fast @ decoder_fast.T
            by_latent.add_(by_active.to(fast)).mul_(active)
            gradients.encoder.add_(by_latent.T @ x_fast)
            gradients.decoder.add_(latents.T @ by_output_fast)
            gradients.encoder_bias.add_(by_latent.sum(0, dtype=x.dtype))
            gradients.decoder_bias.add_(by_output.sum(0))
            firings += active.sum(0)
        share = self._share_of(firings, batch)
        return Step(gradients[:3], gradients.decoder_bias, residual, firings, loss, share)

    def _penalty_gradient(self, batch: Batch) -> Float[Tensor, ""]:
        """Gradient of the penalty by an active latent."""
        return self.level / batch.num_rows

    def _share_of(self, firings: Float[Tensor, " latents"], batch: Batch) -> Float[Tensor, ""]:
        """Which share of all latents is active, over the whole batch."""
        return self.strategy.sum_over_all(firings.sum()) / (batch.num_rows * self.d_sae)

    def active_share(self) -> float | None:
        """Which share of the latents was active in the last step; None before the first."""
        return None if self._active_share is None else self._active_share.read()

    def follow(self, observed: Float[Tensor, ""], learning_rate: float) -> None:
        """Take in the share of one more step."""
        self._active_share = DeferredScalar(observed)

    def state(self) -> dict[str, Tensor]:
        share = self.active_share()
        return {} if share is None else {"active_share": torch.tensor(share)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Checkpoints of older versions do not have the share."""
        if "active_share" in tensors:
            self._active_share = DeferredScalar(tensors["active_share"])


ARCHITECTURE = ReLU
