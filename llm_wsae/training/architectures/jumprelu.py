"""JumpReLU (Rajamanoharan et al. 2024): every latent learns the threshold above which it is active.

The loss jumps where a pre-activation z crosses its threshold θ, so its gradient by θ is estimated
from the pre-activations near it (the paper's eqs. 11 and 12): for a rectangle K of width ε,

    ∂z·[z > θ]/∂θ ≈ −θ/ε · K((z − θ)/ε)        ∂[z > θ]/∂θ ≈ −1/ε · K((z − θ)/ε)

As in the paper only θ gets this pseudo-gradient, and log θ is what is learnt.

What is not the paper's. The penalty is λ(L0/k − 1)², with L0 the mean over the batch: the number
of active latents is then chosen, as with the other architectures, instead of found by trying λ
(Gemma Scope 2 and dictionary_learning penalise the same way). Adam moves log θ by about its
learning rate a step whatever the loss, so a threshold that starts near 0 does not arrive in a
training of some hundred steps (SAELens learns θ itself for that reason). Here thresholds start
where about k latents are active, and learn ten times as fast as the weights.
"""

import math
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import SparseGradients
from llm_wsae.sparse.operations import encode_above, firing_counts, value_gradients
from llm_wsae.sparse.slot_capacity import SlotCapacity
from llm_wsae.training.architectures.sparse_backward import exact, without_masked
from llm_wsae.training.optimiser import adam_vector
from llm_wsae.training.parameters import Batch, Parameters, Step, weighted_error
from llm_wsae.weights.loss_weights import Gamma

BANDWIDTH = 0.5
"""ε, in units in which a dimension has variance 1 (0.05 in SAELens, 2 at Anthropic). On block 9 of
SmolLM2-135M, after 490 k rows at k = 32, a wide window left fewer latents dead, and FVU was no
worse: 9 % and 0.122 with 0.5, 24 % and 0.125 with 0.2."""
COEFFICIENT = 1.0
"""λ. The loss is a share of the variance, and L0 ended 2 % above k."""
THRESHOLD_RATE_MULTIPLIER = 10.0
"""How much faster thresholds learn than weights."""

_ROUNDING = 1 / 64  # relative and absolute: a value rounded to bfloat16 may seem too small by less


def jumprelu_step(
    parameters: Parameters,
    batch: Batch,
    gamma: Gamma,
    k: int,
    log_threshold: Float[Tensor, " d_sae"],
    room: SlotCapacity | None = None,
) -> Step:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) + λ(L0/k − 1)² and its gradients.

    A pre-activation that is not positive is in no window, however small θ. ``room`` as in
    ``encode_above``.
    """
    encoder, decoder, encoder_bias, decoder_bias = parameters
    d_sae, fast = len(encoder), batch.x_fast.dtype
    threshold = log_threshold.exp()
    window_start = (threshold - BANDWIDTH / 2).clamp_(min=0)
    sought = window_start
    if fast != batch.x.dtype:
        sought = (window_start - _ROUNDING * (1 + window_start)).clamp_(min=0)
    near = encode_above(batch.x_fast, encoder.to(fast), encoder_bias.to(fast), sought, room)
    # everything active, and what is just below its threshold
    near = exact(without_masked(near, batch), parameters, batch)
    its_threshold = threshold[near.indices]
    active = near.values > its_threshold
    codes = near._replace(values=near.values * active)

    decoded, num_rows = batch.split.decode(codes, decoder, decoder_bias), batch.num_rows
    residual = decoded.sub_(batch.x).mul_(batch.mask[:, None])
    loss, output_gradient = weighted_error(residual, batch.counted, gamma, num_rows)
    by_near = value_gradients(near, decoder, output_gradient)
    terms = SparseGradients(codes, batch.x_fast, output_gradient.to(fast), by_near * active)

    excess = batch.split.over_all(active.sum()) / num_rows / k - 1
    by_activity = 2 * COEFFICIENT * excess / (k * num_rows)
    above_start = near.values > window_start[near.indices]
    in_window = above_start & (near.values < its_threshold + BANDWIDTH / 2)
    by_threshold = (its_threshold * by_near + by_activity) * in_window / -BANDWIDTH
    by_log = torch.zeros_like(log_threshold).index_add_(  # on a GPU in any order: last bits vary
        0, near.indices, by_threshold * its_threshold
    )
    by_log = batch.split.over_rows(by_log)
    loss = loss + COEFFICIENT * excess**2 * (batch.mask.sum() / num_rows)  # one's share of it
    by_decoder_bias, firings = output_gradient.sum(0), firing_counts(codes, d_sae)
    return Step(terms, by_decoder_bias, residual, firings, loss, by_log)


class LearntThreshold:
    """The logarithm of every latent's threshold, and Adam for it."""

    def __init__(self, k: int, d_sae: int, device: torch.device, num_own: int | None = None):
        """``num_own`` is the number of latents here, if they are not all."""
        num_own, start = num_own or d_sae, initial_threshold(k, d_sae)
        self.log = torch.full((num_own,), math.log(start), dtype=torch.float32, device=device)
        self._mean, self._square = torch.zeros_like(self.log), torch.zeros_like(self.log)
        self._steps = 0

    def follow(self, gradient: Float[Tensor, " d_sae"], learning_rate: float) -> None:
        """One step of Adam. ``learning_rate`` is that of the weights."""
        self._steps += 1
        moments = self._mean, self._square
        adam_vector(
            self.log, gradient, *moments, self._steps, THRESHOLD_RATE_MULTIPLIER * learning_rate
        )

    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """The threshold of every latent, in normalised units."""
        return self.log.exp()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {
            "threshold.log": self.log,
            "threshold.exp_avg": self._mean,
            "threshold.exp_avg_sq": self._square,
            "threshold.steps": torch.tensor(self._steps),
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        self.log.copy_(tensors["threshold.log"])
        self._mean.copy_(tensors["threshold.exp_avg"])
        self._square.copy_(tensors["threshold.exp_avg_sq"])
        self._steps = int(tensors["threshold.steps"])


def initial_threshold(k: int, d_sae: int) -> float:
    """Where k of d_sae latents are active if pre-activations are normal with variance 1.

    That they have at the start: rows have variance 1 in a dimension, encoder rows have norm 1.
    """
    share = min(k / d_sae, 0.5)
    return max(NormalDist().inv_cdf(1 - share), BANDWIDTH / 2)
