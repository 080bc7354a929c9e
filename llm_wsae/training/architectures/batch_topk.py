"""BatchTopK (Bussmann, Leask & Nanda 2024): k active latents per row on average over the batch.

The largest pre-activations of the whole batch are active, so that a row with much in it may have
more of them than one with little. Encoding a row must not depend on its neighbours, so a finished
dictionary uses a threshold instead, as the paper does: the mean over batches of the smallest
pre-activation that was selected. It is saved as the JumpReLU that it then is.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.hardware import exact_dtype
from llm_wsae.sparse.codes import RaggedCodes
from llm_wsae.sparse.operations import encode_batch_topk
from llm_wsae.training.architectures.sparse_backward import exact, step_along
from llm_wsae.training.parameters import Batch, Parameters, Step
from llm_wsae.weights.loss_weights import Gamma

_LAST_SHARE, _MOST_STEPS = 10, 100
_BELOW = 0.9  # the smallest value varies little from batch to batch


def batch_topk_step(
    parameters: Parameters,
    batch: Batch,
    gamma: Gamma,
    k: int,
    guess: float | Float[Tensor, ""],
) -> Step:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) and its gradients.

    ``guess`` (see ``RunningThreshold``) makes it fast and never changes the result.
    """
    codes = batch_topk_codes(parameters, batch, k, guess)
    step = step_along(exact(codes, parameters, batch), parameters, batch, gamma)
    return step._replace(for_memory=smallest_value(codes, batch))


def batch_topk_codes(
    parameters: Parameters, batch: Batch, k: int, guess: float | Float[Tensor, ""]
) -> RaggedCodes:
    """The largest positive pre-activations of the batch, k per row that is not masked.

    A masked row is 0 and would otherwise be encoded by its biases.
    """
    fast, kept = batch.x_fast.dtype, batch.mask.bool()
    encoder, bias = parameters.encoder.to(fast), parameters.encoder_bias.to(fast)

    def largest(per_row: int) -> RaggedCodes:
        per_row = min(per_row, len(encoder))
        return encode_batch_topk(batch.x_fast, encoder, bias, per_row, guess, kept)

    return batch.split.batch_topk(largest, k, kept)


def smallest_value(codes: RaggedCodes, batch: Batch) -> Float[Tensor, ""]:
    """The smallest active value of the batch; 0 if no latent is active.

    Of the values that picked the latents: made again, the smallest of the many that nearly tie
    would be the one that rounding had raised most, and a threshold there lets in too many.
    """
    smallest = codes.values.new_full((), torch.inf)
    if len(codes.values):
        smallest = codes.values.masked_fill(codes.values <= 0, torch.inf).min()
    smallest = batch.split.least(smallest)
    return smallest.masked_fill(smallest.isinf(), 0)


class RunningThreshold:
    """The mean of what the last steps saw as their smallest value; one for all latents.

    It goes over about the last tenth of the steps, at most 100 of them: the value moves while the
    dictionary learns, fastest at the start, and the one of the finished dictionary is wanted.
    """

    def __init__(self, d_sae: int, device: torch.device):
        self.mean = torch.zeros((), dtype=exact_dtype(device), device=device)
        self._d_sae = d_sae
        self._steps = 0

    def follow(self, smallest: Float[Tensor, ""], learning_rate: float) -> None:
        """Take in one more step. The mean has no use for the learning rate."""
        self._steps += 1
        share = _LAST_SHARE / (self._steps + _LAST_SHARE - 1)
        self.mean.lerp_(smallest.to(self.mean.dtype), max(share, 1 / _MOST_STEPS))

    def guess(self) -> Float[Tensor, ""]:
        """A value that the next step's smallest one will not be much above, nor ever so below.

        It stays on the device: whoever has a use for it waits for it.
        """
        return _BELOW * self.mean

    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """The threshold of every latent, in normalised units."""
        return self.mean.float().expand(self._d_sae)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"threshold.mean": self.mean, "threshold.steps": torch.tensor(self._steps)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        self.mean.copy_(tensors["threshold.mean"])
        self._steps = int(tensors["threshold.steps"])
