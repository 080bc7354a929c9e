"""JumpReLU (Rajamanoharan et al. 2024): every latent learns the threshold above which it is active.

The loss jumps where a pre-activation z crosses its threshold θ, so its gradient by θ is estimated
from the pre-activations near it (the paper's eqs. 11 and 12): for a rectangle K of width ε,

    ∂z·[z > θ]/∂θ ≈ −θ/ε · K((z − θ)/ε)        ∂[z > θ]/∂θ ≈ −1/ε · K((z − θ)/ε)

As in the paper only θ gets this pseudo-gradient, and log θ is what is learnt. Two things differ
from it. The penalty is λ(L0/k − 1)², with L0 the mean over the batch, as in Gemma Scope 2: the
number of active latents is chosen instead of found by trying λ. And thresholds start where about k
latents are active and learn ten times as fast as the weights: Adam moves log θ by about its
learning rate a step, so from near 0 it would not arrive within some hundred steps.
"""

import math
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import SlotCapacity, SparseGradients
from llm_wsae.sparse.operations import adam_vector, firing_counts, value_gradients
from llm_wsae.training.architecture import Architecture, Batch, Parameters, Step, weighted_error
from llm_wsae.weights.loss_weights import Gamma

BANDWIDTH = 0.5
"""ε, in units in which a dimension has variance 1. With 0.2 more latents stay dead."""
COEFFICIENT = 1.0  # λ; the loss is a share of the variance
THRESHOLD_RATE_MULTIPLIER = 10.0  # how much faster thresholds learn than weights
_ROUNDING = 1 / 64  # relative and absolute: a value rounded to bfloat16 may seem too small by less


class JumpReLU(Architecture):
    """k active latents on average, by a threshold for each latent and Adam for its logarithm."""

    name = "jumprelu"
    revives_dead = False
    memory: ClassVar[dict[str, str]] = {
        "threshold.log": "log_threshold",
        "threshold.exp_avg": "_mean",
        "threshold.exp_avg_sq": "_square",
        "threshold.steps": "_steps",
    }

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        start = math.log(initial_threshold(self.k, self.d_sae))
        self.log_threshold = torch.full((self.num_latents,), start, device=self.device)
        self._mean = torch.zeros_like(self.log_threshold)
        self._square = torch.zeros_like(self.log_threshold)
        self._steps = 0
        self._capacity = SlotCapacity()

    def step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) + λ(L0/k − 1)² and its gradients. A
        pre-activation that is not positive is in no window, however small θ."""
        return self._capacity.retry(
            lambda: self._step(parameters, batch, metric), self.strategy.all_agree
        )

    def _step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """``step``, correct if there were slots enough."""
        encoder, decoder, _, decoder_bias = parameters
        k, strategy, fast = self.k, self.strategy, batch.x_fast.dtype
        threshold = self.log_threshold.exp()
        window_start = (threshold - BANDWIDTH / 2).clamp_(min=0)
        sought = window_start
        if fast != batch.x.dtype:
            sought = (window_start - _ROUNDING * (1 + window_start)).clamp_(min=0)
        # everything active, and what is just below its threshold
        near = batch.above(sought, parameters, self._capacity)
        its_threshold = threshold[near.indices]
        active = near.values > its_threshold
        codes = near._replace(values=near.values * active)

        decoded, num_rows = strategy.decode(codes, decoder, decoder_bias), batch.num_rows
        residual = decoded.sub_(batch.y).mul_(batch.mask[:, None])
        loss, output_gradient = weighted_error(residual, batch.mask, metric, num_rows)
        by_near = value_gradients(near, decoder, output_gradient)
        gradients = SparseGradients(codes, batch.x_fast, output_gradient.to(fast), by_near * active)

        excess = strategy.sum_over_all(active.sum()) / num_rows / k - 1
        penalty_gradient = 2 * COEFFICIENT * excess / (k * num_rows)  # by one more active latent
        above_start = near.values > window_start[near.indices]
        in_window = above_start & (near.values < its_threshold + BANDWIDTH / 2)
        by_threshold = (its_threshold * by_near + penalty_gradient) * in_window / -BANDWIDTH
        by_log = torch.zeros_like(threshold).index_add_(  # on a GPU in any order: last bits vary
            0, near.indices, by_threshold * its_threshold
        )
        by_log = strategy.sum_over_rows(by_log)
        own_share = batch.mask.sum() / num_rows  # of the penalty, where rows are shared out
        loss = loss + COEFFICIENT * excess**2 * own_share
        by_decoder_bias, firings = output_gradient.sum(0), firing_counts(codes, len(encoder))
        return Step(gradients, by_decoder_bias, residual, firings, loss, by_log)

    def follow(self, observed: Float[Tensor, " latents"], learning_rate: float) -> None:
        """One step of Adam, by the gradient of log θ. ``learning_rate`` is that of the weights."""
        self._steps += 1
        rate = THRESHOLD_RATE_MULTIPLIER * learning_rate
        adam_vector(self.log_threshold, observed, self._mean, self._square, self._steps, rate)

    def thresholds(self) -> Float[Tensor, " latents"]:
        return self.log_threshold.exp()


def initial_threshold(k: int, d_sae: int) -> float:
    """Where k of d_sae latents are active if pre-activations are normal with variance 1, as they
    are at the start."""
    share = min(k / d_sae, 0.5)
    return max(NormalDist().inv_cdf(1 - share), BANDWIDTH / 2)


ARCHITECTURE = JumpReLU
