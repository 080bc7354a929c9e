"""Rows of the model → rows of the training, in the space of each arm; and back again, with what was
learnt from them."""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.architecture import Batch, Parameters
from llm_wsae.training.strategy import SINGLE, Strategy
from llm_wsae.weights.loss_weights import Gamma


class Normaliser:
    """Centre at the mean, divide by one scale so that the mean variance of a dimension is 1.

    A few rows must not decide the units of all: massive rows do not count in the mean and are
    masked, and the variance is the winsorised one. ``fast`` is the products' number format.
    """

    def __init__(
        self,
        statistics: Statistics,
        device: torch.device,
        fast: torch.dtype,
        strategy: Strategy = SINGLE,
    ):
        usual = statistics.usual_sample.double()
        self.mean = usual.mean(0).float().to(device)
        self.scale = float(statistics.robust_variance.mean().sqrt())
        self.variance = float((usual - usual.mean(0)).square().sum(1).mean())
        """E‖x − mean‖² of the rows that are not massive, in the units of the model."""
        self._threshold = statistics.massive_threshold
        self._fast, self._strategy = fast, strategy

    def batch(self, rows: Float[Tensor, "batch d_in"]) -> Batch:
        """Normalise this process's rows of a batch, of any floating type, on the device."""
        if self.mean.is_cuda and not rows.is_cuda:
            rows = rows.pin_memory()  # or the copy would wait for the step before
        rows = rows.to(self.mean.device, non_blocking=True).float()
        mask = (torch.linalg.vector_norm(rows, dim=1) <= self._threshold).float()
        x = rows.sub(self.mean).div_(self.scale)
        x.masked_fill_(mask[:, None] == 0, 0)  # also if infinite
        here = mask.sum()
        return Batch(x, x.to(self._fast), mask, self._strategy.sum_over_rows(here) - here)


class Space:
    """Where an arm is trained: x′ = Γx of normalised rows x, and the way back. Γ must be
    invertible, as weights that act as a space are."""

    def __init__(self, gamma: Gamma, device: torch.device):
        self._into = gamma.to(device, torch.float32)
        self._back = _inverse(gamma).to(device, torch.float32)

    def enter(self, batch: Batch) -> Batch:
        """The batch in this space; massive rows stay 0."""
        x = _transform(batch.x, self._into)
        return batch._replace(x=x, x_fast=x.to(batch.x_fast.dtype))

    def leave(self, rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """Rows of this space, or differences of them, as normalised rows again."""
        return _transform(rows, self._back)


def folded(
    parameters: Parameters,
    mean: Float[Tensor, " d_in"],
    scale: float,
    threshold: Float[Tensor, " d_sae"] | None = None,
    space: Gamma | None = None,
) -> dict[str, Tensor]:
    """The dictionary's tensors with input centring, scaling and space folded in, float32.

    Training sees x' = (x − mean)/scale. With latents in the units of x (scale times larger) only
    the vectors change: b_enc ← scale·b_enc − mean·W_enc, b_dec ← scale·b_dec + mean,
    threshold ← scale·threshold. In a space Γ it sees x' = Γ(x − mean)/scale, so W_enc ← Γᵀ W_enc
    first, W_dec ← W_dec Γ⁻ᵀ and b_dec ← b_dec Γ⁻ᵀ.
    """
    encoder, decoder, encoder_bias, decoder_bias = (p.detach().cpu().double() for p in parameters)
    mean = mean.cpu().double()
    if space is not None:
        into, back = space.cpu().double(), _inverse(space)
        if space.ndim == 1:
            into, back = into.diag(), back.diag()
        encoder = encoder @ into
        decoder, decoder_bias = decoder @ back.T, decoder_bias @ back.T
    tensors = {
        "W_enc": encoder.T.float().contiguous(),
        "W_dec": decoder.float(),
        "b_enc": (scale * encoder_bias - encoder @ mean).float(),
        "b_dec": (scale * decoder_bias + mean).float(),
    }
    if threshold is not None:
        tensors["threshold"] = (scale * threshold.cpu().double()).float()
    return tensors


def _inverse(gamma: Gamma) -> Gamma:
    """1/γ or Γ⁻¹, float64 on the CPU."""
    gamma = gamma.cpu().double()
    return 1 / gamma if gamma.ndim == 1 else torch.linalg.inv(gamma)


def _transform(rows: Tensor, gamma: Tensor) -> Tensor:
    return rows * gamma if gamma.ndim == 1 else rows @ gamma.T
