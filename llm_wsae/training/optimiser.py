"""Adam for one arm.

Decoder rows have norm 1, or lengths of their own while they train, as SAELens' do. Then Adam moves
raw rows v and e, and a raw bias b. With L the length of v, the latent has the decoder row v/L, the
encoder row L·e and the bias L·b; only these are seen elsewhere.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.codes import BETAS, EPSILON, Gradients, Latents, RawRows, SparseGradients
from llm_wsae.sparse.operations import adam
from llm_wsae.training.architecture import Parameters

PAIR_BYTES = 2 * 3 * 4
"""Of a weight of the encoder and one of the decoder: each in float32, with its two moments."""
INITIAL_LENGTH = 0.1
"""Of free v and e, beside the rows that an arm begins with otherwise; SAELens' value."""


def initial_parameters(
    d_in: int, d_sae: int, seed: int, device: torch.device, own: range | None = None
) -> Parameters:
    """Random unit decoder rows, the encoder equal to them, biases 0; only of the latents ``own``,
    which are the same whatever others there are."""
    generator, own = torch.Generator().manual_seed(seed), own or range(d_sae)
    decoder = torch.randn(d_sae, d_in, generator=generator)[own.start : own.stop]
    decoder /= decoder.norm(dim=1, keepdim=True)
    return Parameters(
        decoder.clone().to(device),
        decoder.to(device),
        torch.zeros(len(own), device=device),
        torch.zeros(d_in, device=device),
    )


class Optimiser:
    """Adam with betas (0.9, 0.999) and its moments, float32."""

    def __init__(self, parameters: Parameters, free_lengths: bool = False):
        """With free lengths it weakens the encoder, in place."""
        self._parameters = parameters
        self._means = Parameters(*map(torch.zeros_like, parameters))
        self._squares = Parameters(*map(torch.zeros_like, parameters))
        self._steps = 0
        self._encoder_fast: Tensor | None = None
        self._lengths: Tensor | None = None
        if free_lengths:
            self._lengths = torch.full_like(parameters.encoder_bias, INITIAL_LENGTH)
            parameters.encoder.mul_(INITIAL_LENGTH**2)

    def encoder(self, dtype: torch.dtype) -> Float[Tensor, "d_sae d_in"]:
        """The encoder in the dtype of the products; float32 is the master itself."""
        encoder = self._parameters.encoder
        if dtype == encoder.dtype:
            return encoder
        if self._encoder_fast is None or self._encoder_fast.dtype != dtype:
            self._encoder_fast = encoder.to(dtype)
        return self._encoder_fast

    def round_encoder(self) -> None:
        """Take in that the encoder was changed by other means than a step."""
        if self._encoder_fast is not None:
            self._encoder_fast.copy_(self._parameters.encoder)

    def step(
        self,
        by_weights: SparseGradients | Gradients,
        by_decoder_bias: Float[Tensor, " d_in"],
        learning_rate: float,
    ) -> None:
        """Update the parameters in place; decoder rows have norm 1 again afterwards."""
        self._steps += 1
        bias, now = self._parameters.encoder_bias, (self._steps, learning_rate)
        weights = (*self._parameters[:2], *self._means[:2], *self._squares[:2])
        latents = Latents(*weights, self._encoder_fast)
        raw = before = None
        if self._lengths is not None:
            raw, before = RawRows(self._lengths, bias), self._lengths.clone()
        by_bias = adam(latents, by_weights, *now, raw)
        if before is not None:
            bias.div_(before)
            by_bias = by_bias * before
        for index, gradient in ((2, by_bias), (3, by_decoder_bias)):
            moments = self._means[index], self._squares[index]
            adam_vector(self._parameters[index], gradient, *moments, *now)
        if self._lengths is not None:
            bias.mul_(self._lengths)

    def state(self) -> dict[str, Tensor]:
        """The moments and the number of steps, named as in torch.optim.Adam, and L: with it the raw
        rows follow from those that are seen."""
        steps = torch.tensor(float(self._steps))
        return self._held() | {f"{name}.step": steps.clone() for name in Parameters._fields}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``, after the parameters themselves have been restored."""
        for name, held in self._held().items():
            held.copy_(tensors[name])
        self._steps = int(tensors["encoder.step"])
        self._encoder_fast = None

    def _held(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {} if self._lengths is None else {"decoder.length": self._lengths}
        for name, mean, square in zip(Parameters._fields, self._means, self._squares, strict=True):
            held |= {f"{name}.exp_avg": mean, f"{name}.exp_avg_sq": square}
        return held


def adam_vector(
    parameter: Float[Tensor, " size"],
    gradient: Float[Tensor, " size"],
    mean: Float[Tensor, " size"],
    square: Float[Tensor, " size"],
    step: int,
    learning_rate: float,
) -> None:
    """One step of Adam, in place; ``step`` counts from 1."""
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    root = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
    parameter.addcdiv_(mean, root, value=-learning_rate / (1 - BETAS[0] ** step))
