"""ReLU with an L1 penalty: the classic sparse autoencoder, and the paper's second one."""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary import sparsity
from llm_wsae.training.architecture import sparse_step
from llm_wsae.training.dense_start import DenseStart, dense_step
from llm_wsae.training.parameters import Batch, Parameters, Step
from llm_wsae.weights.loss_weights import Gamma


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
