"""What an architecture decides; the files in ``architectures/`` are the architectures.

An arm holds one object of its architecture. The object computes the step and remembers what the
next step needs, such as a running threshold. The sparse architectures share the part of a step from
codes to gradients (``sparse_step``).
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.sparsity import Sparsity
from llm_wsae.sparse.codes import RaggedCodes, Reconstruction, SparseGradients
from llm_wsae.sparse.operations import exact_values, firing_counts, reconstruct, value_gradients
from llm_wsae.training.parallel.strategy import SINGLE, Strategy
from llm_wsae.training.parameters import Batch, Parameters, Step, error_weights, times
from llm_wsae.weights.loss_weights import Gamma

CPU = torch.device("cpu")


class Architecture(ABC):
    """The architecture of one arm, with its memory between steps."""

    name: ClassVar[str]
    """As on the command line: the name of its file, with hyphens."""
    setting: ClassVar[Literal["k", "l1"]] = "k"
    """The field of ArmConfig that sets its sparsity."""
    revives_dead: ClassVar[bool] = True
    """Whether dead latents get the AuxK loss. They need it where other latents crowd them out."""

    has_free_lengths: ClassVar[bool] = False
    """Whether it can train decoder rows of free lengths: latents are weak at first, so it must
    choose the largest of them, not those above a threshold."""

    is_tied: ClassVar[bool] = False
    """Whether something of the parameters is not learnt but set after each step (``tie``)."""

    is_baseline: ClassVar[bool] = False
    """Whether it is only trained beside others, to say what they should exceed."""

    def __init__(
        self,
        level: int | float,
        d_sae: int,
        device: torch.device = CPU,
        strategy: Strategy = SINGLE,
    ):
        """``level`` is the value of ``setting``; ``strategy`` says which latents are here."""
        self.level, self.d_sae, self.device = level, d_sae, device
        self.num_latents = len(strategy.own_latents(d_sae))
        self.strategy = strategy

    @property
    def k(self) -> int:
        """Active latents in a row, in every one or on average."""
        return int(self.level)

    @classmethod
    def label(cls, level: int | float) -> str:
        """What the name of an arm says of it."""
        return f"{cls.name}-k{level}"

    @property
    @abstractmethod
    def sparsity(self) -> Sparsity:
        """The sparsity of the finished dictionary, which must not look at the batch."""

    @abstractmethod
    def step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """The loss on a batch and its gradients; changes nothing.

        ``metric`` is γ², or ΓᵀΓ of a matrix (``parameters.squared``). The encoder may be rounded to
        the number format of ``batch.x_fast``.
        """

    def follow(self, observed: Tensor, learning_rate: float) -> None:  # noqa: B027 - optional
        """Take in what a step observed (``Step.observed``, if anything), once it counts."""

    def through_tie(self, step: Step, parameters: Parameters) -> Step:
        """If it is tied: the step with the gradients by what is learnt.

        ``step`` has its sums over all rows; ``parameters`` are those it was taken at.
        """
        return step

    def tie(self, parameters: Parameters) -> None:  # noqa: B027 - optional
        """If it is tied: set what is not learnt, in place. Called before the first step, too."""

    def thresholds(self) -> Float[Tensor, " latents"] | None:
        """The finished dictionary's thresholds in normalised units, None if it has none."""
        return None

    def state(self) -> dict[str, Tensor]:
        """The memory, for a checkpoint. A tensor with one entry a latent holds those that are
        here; any other is a single number."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 - optional
        """The inverse of ``state``; ``tensors`` holds the whole arm's state."""


def sparse_step(
    codes: RaggedCodes,
    parameters: Parameters,
    batch: Batch,
    metric: Gamma,
    strategy: Strategy,
    penalty_gradient: float | Float[Tensor, ""] = 0.0,
) -> Step:
    """Loss ‖Γ(x − x̂)‖² (mean over rows and dimensions) of these codes, and its gradients.

    ``penalty_gradient`` is the gradient of a penalty by every active latent; the loss does not
    include the penalty. The weights' gradients sum rows in the number format of the products.
    """
    encoder, decoder, _, decoder_bias = parameters
    weights = error_weights(batch.num_rows, metric)
    if weights.ndim == 1 and strategy.latent_parts == 1:
        found = reconstruct(
            codes, decoder, decoder_bias, batch.x, batch.mask, weights, batch.x_fast.dtype
        )
    else:
        found = _reconstruct_in_turn(codes, parameters, batch, weights, strategy)
    by_value = found.by_value
    by_value += penalty_gradient * (codes.values > 0)
    gradients = SparseGradients(codes, batch.x_fast, found.output_gradient, by_value)
    firings, loss = firing_counts(codes, len(encoder)), found.row_errors.sum() / 2
    return Step(gradients, times(found.residual.sum(0), weights), found.residual, firings, loss)


def _reconstruct_in_turn(
    codes: RaggedCodes, parameters: Parameters, batch: Batch, weights: Gamma, strategy: Strategy
) -> Reconstruction:
    """``operations.reconstruct`` where something comes in between: a product with a full matrix, or
    what the latents of other processes add."""
    _, decoder, _, decoder_bias = parameters
    residual = strategy.decode(codes, decoder, decoder_bias).sub_(batch.x).mul_(batch.mask[:, None])
    gradient = times(residual, weights)
    by_value = value_gradients(codes, decoder, gradient)
    errors = (residual * gradient).sum(1)
    return Reconstruction(residual, gradient.to(batch.x_fast.dtype), by_value, errors)


def exact(codes: RaggedCodes, parameters: Parameters, batch: Batch) -> RaggedCodes:
    """The codes with values summed in float32, not rounded by the product that picked them.

    A rounding error comes back several times as large in the encoder's gradient, since the
    reconstruction error is small compared with the values. The encoder may still be the rounded
    one, which halves what is read.
    """
    if batch.x_fast.dtype == batch.x.dtype:
        return codes
    return exact_values(codes, batch.x, parameters.encoder, parameters.encoder_bias)


def without_masked(codes: RaggedCodes, batch: Batch) -> RaggedCodes:
    """The codes with the slots of masked rows unused: those rows count nowhere."""
    return codes._replace(values=codes.values * batch.mask[codes.rows()])
