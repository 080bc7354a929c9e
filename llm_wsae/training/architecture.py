"""What a step of training takes and returns, and what an architecture decides about it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, Sparsity, TopK
from llm_wsae.sparse import operations
from llm_wsae.sparse.codes import (
    Gradients,
    PerLatent,
    Product,
    RaggedCodes,
    Reconstruction,
    SlotCapacity,
    SparseGradients,
)
from llm_wsae.training.strategy import SINGLE, Strategy
from llm_wsae.weights.loss_weights import Gamma

CPU = torch.device("cpu")


class Parameters(NamedTuple):
    """Master weights of one arm, or their gradients, in float32; latents are rows. (The skip of a
    transcoder is the arm's own: it makes another target, of which an architecture sees the rest.)
    """

    encoder: Float[Tensor, "d_sae d_in"]
    decoder: Float[Tensor, "d_sae d_in"]
    encoder_bias: Float[Tensor, " d_sae"]
    decoder_bias: Float[Tensor, " d_in"]


class Batch(NamedTuple):
    """Rows, centred and divided by one global scale; shared by all arms."""

    x: Float[Tensor, "batch d_in"]  # float32 rows; masked ones are 0
    x_fast: Float[Tensor, "batch d_in"]  # the same in the number format of the matrix products
    mask: Float[Tensor, " batch"]  # 1, or 0 for a massive row: it has no part in any loss
    num_elsewhere: float | Float[Tensor, ""] = 0.0  # unmasked rows in other processes
    target: Float[Tensor, "batch d_in"] | None = None  # other rows, which a transcoder writes

    @property
    def y(self) -> Float[Tensor, "batch d_in"]:
        """What is to be reconstructed: x itself, unless there are other rows."""
        return self.x if self.target is None else self.target

    @property
    def num_rows(self) -> Float[Tensor, ""]:
        """Unmasked rows of the whole batch, at least 1: what a mean over rows divides by."""
        return (self.mask.sum() + self.num_elsewhere).clamp(min=1)

    def product(self, parameters: Parameters) -> Product:
        """Rows, encoder and bias as the encoding operations take them."""
        fast = self.x_fast.dtype
        return Product(self.x_fast, parameters.encoder.to(fast), parameters.encoder_bias.to(fast))

    def exact(self, codes: RaggedCodes, parameters: Parameters) -> RaggedCodes:
        """The codes with values summed in float32, not rounded by the product that picked them: a
        rounding error comes back several times as large in the encoder's gradient, since the
        reconstruction error is small compared with the values."""
        if self.x_fast.dtype == self.x.dtype:
            return codes
        return operations.exact_values(codes, self.x, parameters.encoder, parameters.encoder_bias)

    def above(
        self, threshold: PerLatent, parameters: Parameters, capacity: SlotCapacity
    ) -> RaggedCodes:
        """The pre-activations above their thresholds (≥ 0), none in masked rows; complete if
        ``capacity`` was enough."""
        codes = operations.encode_above(self.product(parameters), threshold, capacity)
        unmasked = codes._replace(values=codes.values * self.mask[codes.rows()])
        return self.exact(unmasked, parameters)


class Step(NamedTuple):
    """One evaluation of an arm's loss on a batch. Scalars stay on the device: no host sync."""

    by_weights: SparseGradients | Gradients
    """By encoder, decoder and encoder bias, or the terms of their sums: those are summed where they
    are used, since all gradients together are as large as the weights."""
    by_decoder_bias: Float[Tensor, " d_in"]
    residual: Float[Tensor, "batch d_in"]  # reconstruction minus input, masked rows 0
    firings: Float[Tensor, " d_sae"]  # how many rows each latent fired in, masked ones not counted
    loss: Float[Tensor, ""]
    observed: Float[Tensor, "*d_sae"] | None = None  # for ``Architecture.follow``

    def summed(self) -> Gradients:
        """Gradients by encoder, decoder and encoder bias, summed if they have not been."""
        if isinstance(self.by_weights, SparseGradients):
            return operations.weight_gradients(self.by_weights, len(self.firings))
        return self.by_weights


class Architecture(ABC):
    """The architecture of one arm: it computes the step, and remembers what the next one needs."""

    name: ClassVar[str]  # as on the command line: the name of its file, with hyphens
    setting: ClassVar[Literal["k", "l1"]] = "k"  # the field of ArmConfig that sets its sparsity
    revives_dead: ClassVar[bool] = True
    """Whether dead latents get the AuxK loss. They need it where other latents crowd them out."""
    has_free_lengths: ClassVar[bool] = False
    """Whether it can train decoder rows of free lengths: latents are weak at first, so it must
    choose the largest of them, not those above a threshold."""
    is_baseline: ClassVar[bool] = False  # trained beside others, which should exceed it
    has_one_error: ClassVar[bool] = True
    """Whether its loss has the error of one reconstruction alone: what a transcoder's skip learns
    from, and what a finish adds to."""
    memory: ClassVar[dict[str, str]] = {}
    """The attributes that a checkpoint keeps, by their names in it: tensors with one entry for each
    latent that is here, or single numbers."""

    def __init__(
        self,
        level: int | float,
        d_sae: int,
        device: torch.device = CPU,
        strategy: Strategy = SINGLE,
    ):
        """``level`` is the value of ``setting``; ``strategy`` says which latents are here."""
        self.level, self.d_sae, self.device, self.strategy = level, d_sae, device, strategy
        self.num_latents = len(strategy.own_latents(d_sae))

    @property
    def k(self) -> int:
        """Active latents in a row, in every one or on average."""
        return int(self.level)

    @classmethod
    def label(cls, level: int | float) -> str:
        """What the name of an arm says of it."""
        return f"{cls.name}-k{level}"

    @property
    def sparsity(self) -> Sparsity:
        """The sparsity of the finished dictionary, which must not look at the batch."""
        if self.thresholds() is not None:
            return JumpReLU()
        return TopK(self.k) if self.setting == "k" else ReLU()

    def thresholds(self) -> Float[Tensor, " latents"] | None:
        """The finished dictionary's thresholds in normalised units, None if it has none."""
        return None

    @abstractmethod
    def step(self, parameters: Parameters, batch: Batch, metric: Gamma) -> Step:
        """The loss on a batch and its gradients; changes nothing.

        ``metric`` is γ², or ΓᵀΓ of a matrix (``squared``). The encoder may be rounded to the number
        format of ``batch.x_fast``.
        """

    def follow(self, observed: Any, learning_rate: float) -> None:  # noqa: B027 - optional
        """Take in what a step observed (``Step.observed``), once it counts."""

    def through_tie(self, step: Step, parameters: Parameters) -> Step:
        """The step with the gradients by what is learnt, where ``tie`` sets the rest. ``step`` has
        its sums over all rows; ``parameters`` are those it was taken at."""
        return step

    def tie(self, parameters: Parameters) -> bool:
        """Set those parameters that are not learnt, in place; whether there are any. Called at the
        start and after each step."""
        return False

    def state(self) -> dict[str, Tensor]:
        """The memory, for a checkpoint."""
        return {name: torch.as_tensor(getattr(self, own)) for name, own in self.memory.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``; ``tensors`` holds the whole arm's state."""
        for name, own in self.memory.items():
            held = getattr(self, own)
            if isinstance(held, Tensor):
                held.copy_(tensors[name])
            else:
                setattr(self, own, int(tensors[name]))


def sparse_step(
    codes: RaggedCodes,
    parameters: Parameters,
    batch: Batch,
    metric: Gamma,
    strategy: Strategy,
    penalty_gradient: float | Float[Tensor, ""] = 0.0,
) -> Step:
    """Loss ‖Γ(y − ŷ)‖² (mean over rows and dimensions) of these codes, and its gradients, with
    ``penalty_gradient`` by every active latent, of a penalty that the loss lacks."""
    _, decoder, encoder_bias, decoder_bias = parameters
    weights, fast = error_weights(batch.num_rows, metric), batch.x_fast.dtype
    if weights.ndim == 1 and not strategy.shares_latents:
        found = operations.reconstruct(
            codes, decoder, decoder_bias, batch.y, batch.mask, weights, fast
        )
    else:
        # something comes in between: a product with a matrix, or the latents of other processes
        decoded = strategy.decode(codes, decoder, decoder_bias)
        residual = decoded.sub_(batch.y).mul_(batch.mask[:, None])
        gradient = times(residual, weights)
        by_value = operations.value_gradients(codes, decoder, gradient)
        found = Reconstruction(residual, gradient.to(fast), by_value, (residual * gradient).sum(1))
    by_value = found.by_value
    by_value += penalty_gradient * (codes.values > 0)
    return Step(
        SparseGradients(codes, batch.x_fast, found.output_gradient, by_value),
        times(found.residual.sum(0), weights),
        found.residual,
        operations.firing_counts(codes, len(encoder_bias)),
        found.row_errors.sum() / 2,
    )


def squared(gamma: Gamma) -> Gamma:
    """γ², or ΓᵀΓ of a matrix: ‖Γr‖² = r·ΓᵀΓr."""
    return gamma**2 if gamma.ndim == 1 else gamma.T @ gamma


def times(residual: Float[Tensor, "*rows d_in"], metric: Gamma) -> Float[Tensor, "*rows d_in"]:
    """Rows times what ``squared`` gave; it is symmetric."""
    return residual * metric if metric.ndim == 1 else residual @ metric


def error_weights(num_rows: Float[Tensor, ""], metric: Gamma) -> Gamma:
    """What the residual is multiplied by (see ``times``) in the gradient of ``weighted_error``."""
    return metric * (2 / (num_rows * len(metric)))


def weighted_error(
    residual: Float[Tensor, "rows d_in"],
    mask: Float[Tensor, " rows"],
    metric: Gamma,
    num_rows: Float[Tensor, ""],
) -> tuple[Tensor, Tensor]:
    """‖Γ·residual‖² averaged over unmasked rows and dimensions, and its gradient by the residual:
    the loss of Cui et al. 2026, eq. (WSAE). These may be a part of the batch's ``num_rows``."""
    gradient = times(residual, error_weights(num_rows, metric)) * mask[:, None]
    return (gradient * residual).sum() / 2, gradient
