"""The planted regimes by name, and the random streams: how a seed and a sparsity become data."""

from collections.abc import Callable
from enum import IntEnum

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


_STREAMS_PER_SEED = 8  # so that no two seeds share a stream


class Stream(IntEnum):
    """What is drawn."""

    DATA = 0
    """The mixture: W_p and everything else that is random about the data."""
    SAMPLE = 1
    """Rows that rules are computed from."""
    TRAIN = 2
    """The initial weights of a training and its batches."""
    TEST = 3
    """Rows that dictionaries are measured on."""
    CONTROL = 4
    """The controls' weights."""
    STRANGERS = 5
    """Random rows, with which those of a dimension are compared."""


def number(seed: int, stream: Stream) -> int:
    """The stream's own seed."""
    return seed * _STREAMS_PER_SEED + stream


def generator(seed: int, stream: Stream) -> torch.Generator:
    """A fresh generator of the stream."""
    return torch.Generator().manual_seed(number(seed, stream))
