"""What an arm learns, what a step returns, and the weighted loss all architectures share.

Inputs are normalised before they come here: centred, divided by one global scale, massive rows set
to 0 and masked. Latents are rows, so ``encoder`` is W_encᵀ.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import Gradients, SparseGradients
from llm_wsae.sparse.operations import weight_gradients
from llm_wsae.weights.loss_weights import Gamma

_ROWS_DRAWN = 4096  # a multiple of 16


class Parameters(NamedTuple):
    """Master weights of one arm, or their gradients, in float32."""

    encoder: Float[Tensor, "d_sae d_in"]
    decoder: Float[Tensor, "d_sae d_in"]
    encoder_bias: Float[Tensor, " d_sae"]
    decoder_bias: Float[Tensor, " d_in"]


class Batch(NamedTuple):
    """Normalised rows, shared by all arms."""

    x: Float[Tensor, "batch d_in"]
    """Float32 rows; masked ones are 0."""
    x_fast: Float[Tensor, "batch d_in"]
    """The same in the number format of the matrix products."""
    mask: Float[Tensor, " batch"]
    """1, or 0 for a massive row: it has no part in any loss."""
    num_elsewhere: float | Float[Tensor, ""] = 0.0
    """Unmasked rows of the same batch in other processes."""

    @property
    def num_rows(self) -> Float[Tensor, ""]:
        """Unmasked rows of the whole batch, at least 1: what a mean over rows divides by."""
        return (self.mask.sum() + self.num_elsewhere).clamp(min=1)


class Step(NamedTuple):
    """One evaluation of an arm's loss on a batch. Scalars stay on the device: no host sync."""

    by_weights: SparseGradients | Gradients
    """Gradients by encoder, decoder and encoder bias, or the terms of their sums: those are summed
    where they are used, since all gradients together are as large as the weights."""
    by_decoder_bias: Float[Tensor, " d_in"]
    residual: Float[Tensor, "batch d_in"]
    """Reconstruction minus input, masked rows 0."""
    firings: Float[Tensor, " d_sae"]
    """How many rows each latent fired in, masked rows not counted."""
    loss: Float[Tensor, ""]
    observed: Float[Tensor, "*d_sae"] | None = None
    """What the architecture remembers of this step, if anything (``Architecture.follow``)."""

    def summed(self) -> "Step":
        """The step with its gradients summed."""
        if not isinstance(self.by_weights, SparseGradients):
            return self
        return self._replace(by_weights=weight_gradients(self.by_weights, len(self.firings)))

    @property
    def gradients(self) -> Parameters:
        """All of them, summed if they have not been."""
        by_weights = self.summed().by_weights
        assert not isinstance(by_weights, SparseGradients)
        return Parameters(*by_weights, self.by_decoder_bias)


def initial_parameters(
    d_in: int,
    d_sae: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    own: range | None = None,
) -> Parameters:
    """Random unit decoder rows, the encoder equal to them, biases 0; only for latents ``own``.

    The rows are those of ``torch.randn(d_sae, d_in)``, without holding the others: torch draws
    normal numbers 16 at a time, so pieces of 16 rows give the numbers of the whole.
    """
    generator, own = torch.Generator().manual_seed(seed), own or range(d_sae)
    decoder = torch.empty(len(own), d_in, dtype=dtype)
    for start in range(0, own.stop, _ROWS_DRAWN):
        piece = torch.randn(min(_ROWS_DRAWN, d_sae - start), d_in, generator=generator, dtype=dtype)
        first, stop = max(start, own.start), min(start + len(piece), own.stop)
        if first < stop:
            decoder[first - own.start : stop - own.start] = piece[first - start : stop - start]
    decoder /= decoder.norm(dim=1, keepdim=True)
    return Parameters(
        decoder.clone().to(device),
        decoder.to(device),
        torch.zeros(len(own), dtype=dtype, device=device),
        torch.zeros(d_in, dtype=dtype, device=device),
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
    """‖Γ·residual‖² averaged over unmasked rows and dimensions, and its gradient by the residual.

    ``metric`` is what ``squared`` gives of Γ: of a matrix it is dear, and the same at every step.
    ``num_rows`` is the number of unmasked rows in the batch, of which these may be a part.

    The loss of Cui et al. 2026, eq. (WSAE). γ only scales the gradient's columns, and a matrix only
    mixes them, so every sparse path after it stays as it is.
    """
    gradient = times(residual, error_weights(num_rows, metric)) * mask[:, None]
    return (gradient * residual).sum() / 2, gradient
