"""Independent streams of random numbers of one seed, one for each thing that is drawn."""

from enum import IntEnum

import torch

_ROOM = 8  # streams of a seed, so that no two seeds share one


class Stream(IntEnum):
    """What is drawn."""

    DATA = 0
    """The mixture: W_p and whatever else is random about the data."""
    SAMPLE = 1
    """Rows that rules are computed from."""
    TRAIN = 2
    """The start of a training and its batches."""
    TEST = 3
    """Rows that dictionaries are measured on."""
    CONTROL = 4
    """The controls' weights."""
    STRANGERS = 5
    """Random rows, beside which those of a dimension are alike."""


def number(seed: int, stream: Stream) -> int:
    """The stream's own seed."""
    return seed * _ROOM + stream


def generator(seed: int, stream: Stream) -> torch.Generator:
    """A fresh generator of the stream."""
    return torch.Generator().manual_seed(number(seed, stream))
