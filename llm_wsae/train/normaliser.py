"""Rows as the model made them → rows as the training wants them."""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.statistics.moments import Statistics
from llm_wsae.train.parameters import Batch


class Normaliser:
    """Centre at the mean, divide by one scale so that the mean variance of a dimension is 1.

    The centre is the mean of the row sample without its massive rows, and the variance the
    winsorised one: a few rows must not decide the units of all. Rows whose norm exceeds the
    massive threshold are masked.
    """

    def __init__(self, statistics: Statistics, device: torch.device, fast: torch.dtype):
        usual = statistics.usual_sample.double()
        self.mean = usual.mean(0).float().to(device)
        self.scale = float(statistics.robust_variance.mean().sqrt())
        self.variance = float((usual - usual.mean(0)).square().sum(1).mean())
        """E‖x − mean‖² of the rows that are not massive, in the units of the model."""
        self._threshold = statistics.massive_threshold
        self._fast = fast

    def batch(self, rows: Float[Tensor, "batch d_in"]) -> Batch:
        """Normalise rows of any floating type on the training's device."""
        rows = rows.to(self.mean.device).float()
        mask = (torch.linalg.vector_norm(rows, dim=1) <= self._threshold).float()
        x = rows.sub(self.mean).mul_(mask[:, None] / self.scale)
        return Batch(x, x.to(self._fast), mask)
