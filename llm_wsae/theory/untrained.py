"""What dictionaries that nobody trained recover of planted features: rows to compare with.

A tied dictionary has one matrix, so one with a frozen random encoder has the same random decoder:
it is the dictionary as it begins.
"""

from dataclasses import asdict
from typing import Any

import torch

from llm_wsae.theory.recovery import measure
from llm_wsae.theory.superposition import Planted, Stream, generator
from llm_wsae.theory.tied import encode_tied, initial

RANDOM_DIRECTIONS, RAW_DIMENSIONS = UNTRAINED = ("random directions", "raw dimensions")
"""The dictionaries as they begin; and a latent for each dimension and sign."""


def untrained(data: Planted, latents: int, k: int, rows: int, seed: int) -> dict[str, Any]:
    """What each of ``UNTRAINED`` recovers, on the rows that the arms of a seed are measured on.
    JSON-able."""
    x = data.features(rows, generator(seed, Stream.TEST))
    n_p = len(data.mixing)
    dictionaries = {
        RANDOM_DIRECTIONS: initial(latents, n_p, generator(seed, Stream.TRAIN)),
        RAW_DIMENSIONS: torch.cat([torch.eye(n_p), -torch.eye(n_p)]),
    }
    observed = data.observe(x)
    return {
        name: asdict(measure(w, encode_tied(w, observed, k), data.mixing, x, data.relations()))
        for name, w in dictionaries.items()
    }
