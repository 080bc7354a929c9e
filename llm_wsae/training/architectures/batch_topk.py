"""BatchTopK (Bussmann, Leask & Nanda 2024): k active latents per row on average over the batch.

A row with much in it may have more of them than one with little. Encoding a row must not depend on
its neighbours, so a finished dictionary uses a threshold instead, as in the paper: the mean over
batches of the smallest pre-activation that was selected. It is saved as a JumpReLU.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.machine.hardware import exact_dtype
from llm_wsae.sparse.codes import RaggedCodes
from llm_wsae.sparse.operations import encode_batch_topk
from llm_wsae.training.architecture import Architecture, Batch, Parameters, Step, sparse_step
from llm_wsae.weights.loss_weights import Gamma

_LAST_SHARE, _MOST_STEPS = 10, 100
_BELOW = 0.9  # the smallest value varies little from batch to batch


class BatchTopK(Architecture):
    """Remembers a running mean of the smallest active value, over about the last tenth of the
    steps, at most 100: the value moves while the dictionary learns."""

    name = "batch-topk"
    has_free_lengths = True
    memory: ClassVar[dict[str, str]] = {
        "threshold.mean": "running_threshold",
        "threshold.steps": "_steps",
    }

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.running_threshold = torch.zeros((), dtype=exact_dtype(self.device), device=self.device)
        self._steps = 0

    def step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) and its gradients."""
        codes = self.codes(parameters, batch)
        active = batch.exact(codes, parameters)
        step = sparse_step(active, parameters, batch, metric, self.strategy)
        return step._replace(observed=self.smallest_value(codes))

    def codes(self, parameters: Parameters, batch: Batch) -> RaggedCodes:
        """The largest positive pre-activations of the batch, k per row that is not masked."""
        product, kept = batch.product(parameters), batch.mask.bool()
        # Makes the selection fast and never changes it.
        guess = _BELOW * self.running_threshold

        def largest(per_row: int) -> RaggedCodes:
            return encode_batch_topk(product, min(per_row, self.num_latents), guess, kept)

        return self.strategy.batch_topk(largest, self.k, kept)

    def smallest_value(self, codes: RaggedCodes) -> Float[Tensor, ""]:
        """The smallest of the values that picked the latents, 0 if none did. Of those recomputed
        exactly, the smallest would be the one that rounding had raised most: too small."""
        smallest = codes.values.new_full((), torch.inf)
        if len(codes.values):
            smallest = codes.values.masked_fill(codes.values <= 0, torch.inf).min()
        smallest = self.strategy.minimum(smallest)
        return smallest.masked_fill(smallest.isinf(), 0)

    def follow(self, observed: Float[Tensor, ""], learning_rate: float) -> None:
        """Take in the smallest value of one more step."""
        self._steps += 1
        share = _LAST_SHARE / (self._steps + _LAST_SHARE - 1)
        mean = self.running_threshold
        mean.lerp_(observed.to(mean.dtype), max(share, 1 / _MOST_STEPS))

    def thresholds(self) -> Float[Tensor, " latents"]:
        return self.running_threshold.float().expand(self.num_latents)


ARCHITECTURE = BatchTopK
