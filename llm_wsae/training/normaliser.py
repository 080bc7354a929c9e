"""Rows as the model made them → rows as the training wants them, in the space of each arm."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.parallel.strategy import SINGLE, Strategy
from llm_wsae.training.parameters import Batch
from llm_wsae.weights.loss_weights import Gamma, LossWeights


class Normaliser:
    """Centre at the mean, divide by one scale so that the mean variance of a dimension is 1.

    The centre is the mean of the row sample without its massive rows, and the variance the
    winsorised one: a few rows must not decide the units of all. Rows whose norm exceeds the
    massive threshold are masked.
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
        self._fast = fast
        self._strategy = strategy

    def batch(self, rows: Float[Tensor, "batch d_in"]) -> Batch:
        """Normalise this process's rows of a batch, of any floating type; the result is on the
        training's device."""
        if self.mean.is_cuda and not rows.is_cuda:
            rows = rows.pin_memory()  # or the copy would wait for the step before
        rows = rows.to(self.mean.device, non_blocking=True).float()
        mask = (torch.linalg.vector_norm(rows, dim=1) <= self._threshold).float()
        x = rows.sub(self.mean).div_(self.scale)
        x.masked_fill_(mask[:, None] == 0, 0)  # also if infinite
        here = mask.sum()
        elsewhere = self._strategy.sum_over_rows(here) - here
        return Batch(x, x.to(self._fast), mask, elsewhere)


class Space:
    """Where an arm is trained: x′ = Γx of normalised rows x, and the way back."""

    def __init__(self, gamma: Gamma, device: torch.device):
        """``gamma`` must be invertible, as weights that act as a space are."""
        self.gamma = gamma.to(device, torch.float32)
        self._inverse = inverse(gamma).to(device, torch.float32)

    @classmethod
    def of(
        cls, weights: LossWeights, device: torch.device, known: Sequence["Space | None"] = ()
    ) -> "Space | None":
        """The space that an arm of these weights is trained in, None for the plain one. A known
        one is taken again: arms that share it share its product with the batch."""
        if not weights.config.in_space:
            return None
        for space in known:
            if space is not None and torch.equal(space.gamma, weights.gamma.to(space.gamma)):
                return space
        return cls(weights.gamma, device)

    def enter(self, batch: Batch) -> Batch:
        """The batch in this space; massive rows stay 0."""
        x = _transform(batch.x, self.gamma)
        return batch._replace(x=x, x_fast=x.to(batch.x_fast.dtype))

    def leave(self, rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """Rows of this space, or differences of them, as normalised rows again."""
        return _transform(rows, self._inverse)


def in_spaces(batch: Batch, spaces: Iterable[Space | None]) -> Iterator[Batch]:
    """The batch in each of the spaces, one after the other."""
    entered: dict[Space | None, Batch] = {None: batch}
    for space in spaces:
        if space is not None and space not in entered:
            entered[space] = space.enter(batch)
        yield entered[space]


def inverse(gamma: Gamma) -> Gamma:
    """1/γ or Γ⁻¹, float64 on the CPU. Raises LlmWsaeError if there is none."""
    gamma = gamma.cpu().double()
    if gamma.ndim == 1:
        found, is_singular = 1 / gamma, not bool(gamma.all())
    else:
        found, info = torch.linalg.inv_ex(gamma)
        is_singular = bool(info)
    if is_singular:
        raise LlmWsaeError(
            "a space to train in cannot have weights of 0 in any direction, since nothing leads "
            "back from there; choose_weights refuses such weights"
        )
    return found


def _transform(rows: Tensor, gamma: Tensor) -> Tensor:
    return rows * gamma if gamma.ndim == 1 else rows @ gamma.T
