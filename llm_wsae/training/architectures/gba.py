"""Group bias adaptation (arXiv 2506.14002): thresholds are adapted to how often latents fire.

A latent has a direction w of norm 1, with which it reads and writes, an amplitude a > 0, and a
threshold θ ≥ 0 (the paper's bias is −θ): its value is a·w·(x − b_dec) where w·(x − b_dec) > θ. The
loss has no penalty. Adam learns w, a and b_dec, and no gradient reaches θ. Instead the latents are
in groups with target frequencies that fall geometrically, and from time to time, over the rows
since the last time,

    a latent above its target:  θ ← θ + ρ·r    r: by how much its largest reading exceeded θ
    a latent that never fired:  θ ← θ − ρ·s    s: the mean of r over its group, where r > 0

The encoder holds a·w and the threshold a·θ, so that decoder rows have norm 1, and the finished
dictionary is a JumpReLU one.

Where this differs from the paper, which is known here from secondary sources only: k sets the
targets, instead of a range of them. Thresholds are adapted more often at first, so that in a short
training latents become few at all. The root mean square of rows is √d_in, and so is the largest θ.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.sparse.operations import adam_vector
from llm_wsae.training.architecture import Batch, Parameters, Step
from llm_wsae.training.architectures.relu import DenseStart

GROUPS, SPAN = 10, 100.0  # of groups the number, and the highest target frequency over the lowest
RATE = 0.01  # ρ, the paper's γ₊ and γ₋
SILENT = 1e-6  # ε: the frequency below which a latent never fired
AMPLITUDE = 0.01
"""a at the start, and its least. From 1, half of all latents reconstruct several times the row, and
directions that learn to shrink that stay mixtures."""
EVERY, STEPS_EACH = 50, 200
"""Thresholds are first adapted in every step; every 200 steps the interval grows by one, to 50."""


class GBA(DenseStart):
    """About k active latents on average, by a target frequency for each latent."""

    name = "gba"
    memory: ClassVar[dict[str, str]] = {
        "threshold": "threshold",
        "amplitude": "amplitude",
        "amplitude.exp_avg": "_mean",
        "amplitude.exp_avg_sq": "_square",
        "since.frequency": "_frequency",
        "since.excess": "_excess",
        "since.steps": "_steps_since",
        "gba.steps": "_steps",
    }

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        own = self.strategy.own_latents(self.d_sae)
        # latents are drawn independently, so that groups by number are random groups
        self.group = torch.arange(own.start, own.stop, device=self.device) % GROUPS
        self.target = target_frequencies(self.k, self.d_sae).to(self.device)
        self.threshold = torch.zeros(len(own), device=self.device)
        self.amplitude = torch.full_like(self.threshold, AMPLITUDE)
        self._mean, self._square = (torch.zeros_like(self.threshold) for _ in range(2))
        self._frequency, self._excess = (torch.zeros_like(self.threshold) for _ in range(2))
        self._steps = self._steps_since = 0

    def thresholds(self) -> Float[Tensor, " latents"]:
        return self.threshold * self.amplitude

    def observed(self, step: Step, largest: Float[Tensor, " latents"], batch: Batch) -> Tensor:
        """The share of rows in which each latent fired, and its r."""
        frequency = self.strategy.sum_over_rows(step.firings) / batch.num_rows
        largest = self.strategy.largest_over_rows(largest)
        excess = (largest / self.amplitude - self.threshold).clamp(min=0)
        return torch.stack([frequency, excess], dim=1)

    def through_tie(self, step: Step, parameters: Parameters) -> Step:
        """The gradients by w (in the place of the decoder's), b_dec and a (observed)."""
        encoder, decoder, _, decoder_bias = parameters
        assert step.observed is not None
        by_encoder, by_decoder, by_bias = step.summed()
        by_encoder = torch.addr(by_encoder, by_bias, decoder_bias, alpha=-1)
        by_decoder_bias = self.strategy.sum_over_latents(by_bias @ encoder)
        by_decoder = torch.addcmul(by_decoder, by_encoder, self._slope(decoder)[:, None])
        by_amplitude = (by_encoder * encoder).sum(1) / self.amplitude
        return step._replace(
            by_weights=(by_encoder.zero_(), by_decoder, torch.zeros_like(by_bias)),
            by_decoder_bias=step.by_decoder_bias - by_decoder_bias,
            observed=torch.cat([step.observed, by_amplitude[:, None]], dim=1),
        )

    def tie(self, parameters: Parameters) -> bool:
        """The encoder reads along the decoder's rows, from b_dec, with the slope a."""
        encoder, decoder, encoder_bias, decoder_bias = parameters
        torch.mul(decoder, self._slope(decoder)[:, None], out=encoder)
        torch.mv(encoder, decoder_bias, out=encoder_bias).neg_()
        self.threshold.clamp_(max=decoder.shape[1] ** 0.5)
        return True

    def _slope(self, decoder: Float[Tensor, "latents d_in"]) -> Float[Tensor, " latents"]:
        """Encoder row over decoder row: a, unless weights give decoder rows another length."""
        return self.amplitude / decoder.square().sum(1)

    def follow(self, observed: Float[Tensor, "latents 3"], learning_rate: float) -> None:
        """One step of Adam for a; after enough steps, thresholds are adapted."""
        frequency, excess, by_amplitude = observed.unbind(1)
        self._steps += 1
        moments = (self._mean, self._square)
        adam_vector(self.amplitude, by_amplitude, *moments, self._steps, learning_rate)
        self.amplitude.clamp_(min=AMPLITUDE)
        active = self.strategy.sum_over_latents(frequency.sum())
        super().follow(active / self.d_sae, learning_rate)
        self._frequency += frequency
        torch.maximum(self._excess, excess, out=self._excess)
        self._steps_since += 1
        if self._steps_since >= min(EVERY, 1 + self._steps // STEPS_EACH):
            self._adapt()

    def _adapt(self) -> None:
        frequency, excess = self._frequency / self._steps_since, self._excess
        sums = excess.new_zeros(GROUPS, 2)
        sums.index_add_(0, self.group, torch.stack([excess, (excess > 0).to(excess)], dim=1))
        total, number = self.strategy.sum_over_latents(sums).unbind(1)
        typical = total / number.clamp(min=1)
        self.threshold += RATE * excess * (frequency > self.target[self.group])
        self.threshold -= RATE * typical[self.group] * (frequency < SILENT)
        self.threshold.clamp_(min=0)
        self._frequency.zero_()
        self._excess.zero_()
        self._steps_since = 0


def target_frequencies(k: int, d_sae: int) -> Float[Tensor, " groups"]:
    """Falling geometrically, and k / d_sae on average."""
    falling = torch.logspace(0, -1, GROUPS, base=SPAN, dtype=torch.float64)
    sizes = torch.bincount(torch.arange(d_sae) % GROUPS, minlength=GROUPS)
    return (falling * k / (falling @ sizes.double())).float()


ARCHITECTURE = GBA
