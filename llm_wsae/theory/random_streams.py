"""Independent streams of random numbers, one for each thing that a seed draws."""

from enum import IntEnum

import torch

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
