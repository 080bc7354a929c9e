"""Adam for an arm whose decoder rows have lengths of their own while it trains, as SAELens' do.

The optimiser moves raw rows v and e, and a raw bias b. With L the length of v, the latent has the
decoder row v/L, the encoder row L·e and the bias L·b; only these are seen elsewhere. So a latent's
strength is learnt in one number besides its rows, and the part of a gradient along the decoder row,
which the division by L undoes, does not enter Adam's moments.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import Gradients, RawRows, SparseGradients
from llm_wsae.sparse.operations import adam
from llm_wsae.training.optimiser import Optimiser
from llm_wsae.training.parameters import Parameters

INITIAL_LENGTH = 0.1
"""Of v and e, beside the rows that an arm begins with otherwise; SAELens' value."""


class FreeLengths(Optimiser):
    """Its state holds the rows as they are seen, and L: the raw ones follow from them."""

    def __init__(self, parameters: Parameters):
        """Weakens the encoder, in place."""
        super().__init__(parameters)
        self._lengths = torch.full_like(parameters.encoder_bias, INITIAL_LENGTH)
        parameters.encoder.mul_(INITIAL_LENGTH**2)

    def step(
        self,
        by_weights: SparseGradients | Gradients,
        by_decoder_bias: Float[Tensor, " d_in"],
        learning_rate: float,
    ) -> None:
        """See ``Optimiser.step``."""
        self._steps += 1
        bias, before = self._parameters.encoder_bias, self._lengths.clone()
        raw = RawRows(self._lengths, bias)
        by_bias = adam(self._latents(), by_weights, self._steps, learning_rate, raw)
        bias.div_(before)
        self._move_biases(by_bias * before, by_decoder_bias, learning_rate)
        bias.mul_(self._lengths)

    def state(self) -> dict[str, Tensor]:
        """As that of ``Optimiser``, and L."""
        return super().state() | {"decoder.length": self._lengths}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        super().load_state(tensors)
        self._lengths.copy_(tensors["decoder.length"])
