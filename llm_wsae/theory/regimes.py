"""The planted regimes by name: how a seed and a sparsity become data."""

from collections.abc import Callable

import torch

from llm_wsae.theory.superposition import (
    NUM_OBSERVED,
    Planted,
    alone,
    digon_mixing,
    mixed_mixing,
    more_frequent,
    outliers,
    planted,
    rotated,
    stronger,
    toy_model,
)

Regime = Callable[[float, torch.Generator], Planted]

# One dimension of each kind: with a lone feature, with a digon, with many features.
OUTLIER_DIMENSIONS = (0, 9, 15)
OUTLIER_FACTOR = 20.0


def _digon(sparsity: float, generator: torch.Generator) -> Planted:
    return planted(digon_mixing(), sparsity)


def _mixed(sparsity: float, generator: torch.Generator) -> Planted:
    return planted(mixed_mixing(generator), sparsity)


def _rotated(sparsity: float, generator: torch.Generator) -> Planted:
    return rotated(_digon(sparsity, generator), generator)


def _frequent(sparsity: float, generator: torch.Generator) -> Planted:
    data = _mixed(sparsity, generator)
    return more_frequent(data, alone(data), 3.0)


def _strong(sparsity: float, generator: torch.Generator) -> Planted:
    data = _mixed(sparsity, generator)
    return stronger(data, alone(data), 2.0)


def _outliers(sparsity: float, generator: torch.Generator) -> Planted:
    return outliers(_mixed(sparsity, generator), OUTLIER_DIMENSIONS, OUTLIER_FACTOR)


def _toy(n: int) -> Regime:
    def build(sparsity: float, generator: torch.Generator) -> Planted:
        return planted(toy_model(n, NUM_OBSERVED, sparsity, generator), sparsity)

    return build


REGIMES: dict[str, Regime] = {
    "digon": _digon,
    "mixed": _mixed,
    "rotated": _rotated,
    "frequent": _frequent,
    "strong": _strong,
    "outliers": _outliers,
    "toy-40": _toy(40),
    "toy-200": _toy(200),
}
