"""Trains arms on one planted problem and measures what each recovers of its features."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.theory.jobs import Check
from llm_wsae.theory.recovery import Recovery, measure
from llm_wsae.theory.rules import ARMS, Known, weights
from llm_wsae.theory.superposition import Planted, Stream, number
from llm_wsae.theory.tied import Schedule, encode_tied, train_tied


@dataclass(frozen=True)
class ArmTrainer:
    """Trains and measures arms on one planted problem."""

    data: Planted
    schedule: Schedule
    x: Float[Tensor, "rows n"]
    """Fresh true features to measure on."""
    seed: int
    check: Check

    def __call__(
        self, names: list[str], known: Known
    ) -> tuple[dict[str, Recovery], dict[str, Tensor]]:
        """What each arm recovers, and its dictionary as it was trained."""
        found: dict[str, Recovery] = {}
        dictionaries: dict[str, Tensor] = {}
        for is_matrix in (False, True):
            alike = [name for name in names if ARMS[name].is_matrix == is_matrix]
            if alike:
                some, w = self._train(alike, known)
                found |= some
                dictionaries |= dict(zip(alike, w, strict=True))
        return found, dictionaries

    def _train(self, names: list[str], known: Known) -> tuple[dict[str, Recovery], Tensor]:
        """Arms whose weights have one form; no matrix is a space."""
        arms = [ARMS[name] for name in names]
        gamma = torch.stack([weights(arm, known) for arm in arms])
        factors = torch.ones(len(arms), len(self.data.mixing))
        for place, arm in enumerate(arms):
            if arm.space:
                factors[place], gamma[place] = gamma[place].clone(), 1.0
        w = train_tied(
            self.data,
            gamma,
            torch.tensor([arm.annealed for arm in arms]),
            factors,
            self.schedule,
            number(self.seed, Stream.TRAIN),
            self.check,
        )
        observed, relations = self.data.observe(self.x), self.data.relations()
        found = {}
        for name, one, factor in zip(names, w, factors, strict=True):
            codes = encode_tied(one, observed * factor, self.schedule.k)
            found[name] = measure(one / factor, codes, self.data.mixing, self.x, relations)
        return found, w
