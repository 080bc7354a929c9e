"""Adam for an arm whose decoder rows have lengths of their own while it trains, as SAELens' do.

The optimiser moves raw rows v and e, and a raw bias b. With L the length of v, the latent has the
decoder row v/L, the encoder row L·e and the bias L·b; only these are seen elsewhere. So a latent's
strength is learnt in one number besides its rows, and the part of a gradient along the decoder row,
which the division by L undoes, does not enter Adam's moments.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.backends.pytorch import adam_tensors
from llm_wsae.sparse.backends.reference import SMALLEST_NORM, Gradients
from llm_wsae.sparse.codes import SparseGradients
from llm_wsae.sparse.operations import weight_gradients
from llm_wsae.training.normaliser import Space
from llm_wsae.training.optimiser import Optimiser
from llm_wsae.training.parameters import Parameters

INITIAL_LENGTH = 0.1
"""Of v and e, beside the rows that an arm begins with otherwise; SAELens' value."""


class FreeLengths(Optimiser):
    """Its state holds the rows as they are seen, and L: the raw ones follow from them."""

    def __init__(self, parameters: Parameters, space: Space | None = None):
        """L is the length of v, or the one that it has outside ``space``. Weakens the encoder, in
        place."""
        super().__init__(parameters)
        self._space = space
        self._lengths = torch.full_like(parameters.encoder_bias, INITIAL_LENGTH)
        parameters.encoder.mul_(INITIAL_LENGTH**2)

    def step(
        self,
        by_weights: SparseGradients | Gradients,
        by_decoder_bias: Float[Tensor, " d_in"],
        learning_rate: float,
    ) -> None:
        """See ``Optimiser.step``. Decoder rows get the length 1, outside the space if one is
        given."""
        encoder, decoder, bias, _ = self._parameters
        if isinstance(by_weights, SparseGradients):
            by_weights = weight_gradients(by_weights, len(decoder))
        gradients = self._by_raw(Parameters(*by_weights, by_decoder_bias))
        length = self._lengths
        decoder.mul_(length[:, None])
        encoder.div_(length[:, None])
        bias.div_(length)
        self._steps += 1
        state = (self._means, self._squares, self._steps)
        adam_tensors(self._parameters, gradients, *state, learning_rate)
        length.copy_(self._measured(decoder)).clamp_(min=SMALLEST_NORM)
        decoder.div_(length[:, None])
        encoder.mul_(length[:, None])
        bias.mul_(length)
        self.round_encoder()

    def _by_raw(self, gradients: Parameters) -> Parameters:
        """The gradients by v, e and b, from those by what is seen."""
        encoder, decoder, bias, _ = self._parameters
        by_encoder, by_decoder, by_bias, by_decoder_bias = gradients
        length = self._lengths
        along = decoder  # the gradient of L by v
        if self._space is not None:
            along = self._space.gradients_of_lengths(decoder, self._fast)
        by_length = (by_encoder * encoder).sum(1) + by_bias * bias - (by_decoder * decoder).sum(1)
        return Parameters(
            by_encoder * length[:, None],
            torch.addcmul(by_decoder, by_length[:, None], along).div_(length[:, None]),
            by_bias * length,
            by_decoder_bias,
        )

    def _measured(self, rows: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
        if self._space is None:
            return torch.linalg.vector_norm(rows, dim=1)
        return self._space.lengths_outside(rows, self._fast)[:, 0]

    @property
    def _fast(self) -> torch.dtype:
        return torch.float32 if self._encoder_fast is None else self._encoder_fast.dtype

    def state(self) -> dict[str, Tensor]:
        """As that of ``Optimiser``, and L."""
        return super().state() | {"decoder.length": self._lengths}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        super().load_state(tensors)
        self._lengths.copy_(tensors["decoder.length"])
