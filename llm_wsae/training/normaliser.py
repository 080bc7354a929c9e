"""Rows of the model → rows of the training, in the space of each arm; and back again, with what was
learnt from them. An autoencoder's targets are its rows; a transcoder's have units of their own."""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.architecture import Batch, Parameters
from llm_wsae.training.strategy import SINGLE, Strategy
from llm_wsae.weights.loss_weights import Gamma


class Units:
    """Of the rows of one point: centred at the mean, divided by one scale so that the mean variance
    of a dimension is 1. A few rows must not decide the units of all: massive rows do not count in
    the mean, and the variance is the winsorised one."""

    def __init__(self, statistics: Statistics, device: torch.device):
        usual = statistics.usual_sample.double()
        self.mean = usual.mean(0).float().to(device)
        self.scale = float(statistics.robust_variance.mean().sqrt())
        self.variance = float((usual - usual.mean(0)).square().sum(1).mean())
        """E‖x − mean‖² of the rows that are not massive, in the units of the model."""
        self._threshold = statistics.massive_threshold

    def enter(self, rows: Float[Tensor, "batch d_in"]) -> tuple[Tensor, Tensor]:
        """Rows of any floating type in these units, on the device; and which are not massive."""
        if self.mean.is_cuda and not rows.is_cuda:
            rows = rows.pin_memory()  # or the copy would wait for the step before
        rows = rows.to(self.mean.device, non_blocking=True).float()
        usual = torch.linalg.vector_norm(rows, dim=1) <= self._threshold
        return rows.sub(self.mean).div_(self.scale), usual

    def leave(self, rows: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """The way back."""
        return rows.mul(self.scale).add_(self.mean)


class Normaliser:
    """Rows, and a transcoder's ``target``, in the units of the training. Rows that are massive, or
    whose target is, are masked. ``fast`` is the products' number format."""

    def __init__(
        self,
        statistics: Statistics,
        device: torch.device,
        fast: torch.dtype,
        strategy: Strategy = SINGLE,
        target: Statistics | None = None,
    ):
        self.x = self.y = Units(statistics, device)
        if target is not None:
            self.y = Units(target, device)
        self._fast, self._strategy = fast, strategy

    def batch(
        self, rows: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_in"] | None = None
    ) -> Batch:
        """Normalise this process's rows of a batch."""
        x, usual = self.x.enter(rows)
        y = None
        if target is not None:
            y, also = self.y.enter(target)
            usual &= also
            y.masked_fill_(~usual[:, None], 0)
        x.masked_fill_(~usual[:, None], 0)  # also if infinite
        mask = usual.float()
        here = mask.sum()
        return Batch(x, x.to(self._fast), mask, self._strategy.sum_over_rows(here) - here, y)


class Space:
    """Where an arm is trained: x′ = Γx of normalised rows x, and the way back; a transcoder's
    target alone. Γ must be invertible, as weights that act as a space are."""

    def __init__(self, gamma: Gamma, device: torch.device):
        self._into = gamma.to(device, torch.float32)
        self._back = _inverse(gamma).to(device, torch.float32)

    def enter(self, batch: Batch) -> Batch:
        """The batch in this space; massive rows stay 0."""
        if batch.target is not None:
            return batch._replace(target=_transform(batch.target, self._into))
        x = _transform(batch.x, self._into)
        return batch._replace(x=x, x_fast=x.to(batch.x_fast.dtype))

    def leave(self, rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """Rows of this space, or differences of them, as normalised rows again."""
        return _transform(rows, self._back)

    def pull(self, gradient: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """A gradient by normalised rows, as one by rows of this space."""
        return _transform(gradient, self._back.T)


def folded(
    parameters: Parameters,
    x: Units,
    y: Units,
    threshold: Float[Tensor, " d_sae"] | None = None,
    space: Gamma | None = None,
    skip: Float[Tensor, "d_in d_in"] | None = None,
) -> dict[str, Tensor]:
    """The dictionary's tensors with centring, scaling and space folded in, float32.

    Training sees x' = (x − m_x)/s_x and y' = (y − m_y)/s_y, with latents in the units of y: s_y
    times larger. So W_enc ← (s_y/s_x)·W_enc, b_enc ← s_y·b_enc − m_x·W_enc, threshold ←
    s_y·threshold, W_skip ← (s_y/s_x)·W_skip and b_dec ← s_y·b_dec + m_y − W_skip·m_x. An
    autoencoder has y = x and no skip. In a space Γ it sees Γy', so W_dec ← W_dec Γ⁻ᵀ, b_dec ←
    b_dec Γ⁻ᵀ and W_skip ← Γ⁻¹W_skip first; and the autoencoder, which sees Γx', W_enc ← Γᵀ W_enc.
    """
    encoder, decoder, encoder_bias, decoder_bias = (p.detach().cpu().double() for p in parameters)
    through = None if skip is None else skip.cpu().double()
    m_x, m_y, stretch = x.mean.cpu().double(), y.mean.cpu().double(), y.scale / x.scale
    if space is not None:
        into, back = space.cpu().double(), _inverse(space)
        if space.ndim == 1:
            into, back = into.diag(), back.diag()
        encoder = encoder @ into if x is y else encoder
        decoder, decoder_bias = decoder @ back.T, decoder_bias @ back.T
        through = None if through is None else back @ through
    encoder = encoder * stretch
    b_dec = y.scale * decoder_bias + m_y
    tensors = {
        "W_enc": encoder.T.float().contiguous(),
        "W_dec": decoder.float(),
        "b_enc": (y.scale * encoder_bias - encoder @ m_x).float(),
    }
    if through is not None:
        through = through * stretch
        b_dec = b_dec - through @ m_x
        tensors["W_skip"] = through.float()
    tensors["b_dec"] = b_dec.float()
    if threshold is not None:
        tensors["threshold"] = (y.scale * threshold.cpu().double()).float()
    return tensors


def _inverse(gamma: Gamma) -> Gamma:
    """1/γ or Γ⁻¹, float64 on the CPU."""
    gamma = gamma.cpu().double()
    return 1 / gamma if gamma.ndim == 1 else torch.linalg.inv(gamma)


def _transform(rows: Tensor, gamma: Tensor) -> Tensor:
    return rows * gamma if gamma.ndim == 1 else rows @ gamma.T
