"""95 % intervals by resampling contexts.

Tokens of one context share their text, so contexts are what is resampled, and all variants of one
resampling use the same contexts: clean, ablated and spliced losses rise and fall together, and the
interval of their ratio is much narrower than theirs. (Percentile bootstrap, Efron 1979.)
"""

from collections.abc import Callable, Mapping

import numpy as np

LEVEL = 0.95


class Bootstrap:
    """Resamplings of ``num_contexts`` contexts, the same for every quantity asked of it."""

    def __init__(self, num_contexts: int, resamplings: int, seed: int):
        draw = np.random.default_rng(seed)
        share = np.full(num_contexts, 1 / num_contexts)
        # How often each context was drawn: [resamplings, contexts].
        self._times = draw.multinomial(num_contexts, share, size=resamplings).astype(np.float64)

    def interval(
        self,
        quantity: Callable[[Mapping[str, np.ndarray]], np.ndarray],
        sums: Mapping[str, np.ndarray],
    ) -> tuple[float, float]:
        """The central 95 % of ``quantity`` over the resamplings.

        ``sums`` holds one number per context; ``quantity`` receives their totals under the same
        names, one per resampling. Where it does not exist (0/0) that resampling says nothing.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            values = quantity({name: self._times @ column for name, column in sums.items()})
        low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)
