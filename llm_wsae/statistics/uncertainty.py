"""How sure a result is: 95 % intervals, and p-values corrected for several tests at once.

Intervals come from resampling documents, latents or concepts (percentile bootstrap, Efron 1979).
Tokens of one document resemble each other, so documents are resampled, not tokens. All quantities
of one resampling use the same documents: clean, ablated and spliced losses rise and fall together,
so the interval of their ratio is much narrower than their own.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

LEVEL = 0.95
# Numbers drawn at once, 8 bytes each; enough that 1000 resamplings of 30,000 items are one block.
_BLOCK = 2**25
Interval = tuple[float, float]


class Bootstrap:
    """Resamplings of ``num_items`` items, the same for every quantity."""

    def __init__(self, num_items: int, resamplings: int, seed: int):
        draw, rows = np.random.default_rng(seed), max(1, _BLOCK // num_items)
        # How often each item was drawn: [resamplings, items], a block of resamplings at a time. A
        # byte holds it: that an item is drawn 256 times has a probability of 10^-500.
        self._times = []
        for at in range(0, resamplings, rows):
            times = np.empty((min(rows, resamplings - at), num_items), dtype=np.uint8)
            for one in times:  # drawing them together as a multinomial takes five times as long
                one[:] = np.bincount(draw.integers(num_items, size=num_items), minlength=num_items)
            self._times.append(times)

    def interval(
        self,
        quantity: Callable[[Mapping[str, np.ndarray]], np.ndarray],
        sums: Mapping[str, np.ndarray],
    ) -> Interval:
        """The central 95 % of ``quantity`` over the resamplings.

        ``sums`` holds one number per item; ``quantity`` receives their totals under the same names,
        one per resampling. Resamplings where it is not defined (0/0) are ignored.
        """
        found: dict[str, list[np.ndarray]] = {name: [] for name in sums}
        for block in self._times:
            times = block.astype(np.float64)
            for name, column in sums.items():
                found[name].append(times @ column)
            del times  # before the next block is made
        totals = {name: np.concatenate(parts) for name, parts in found.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            values = quantity(totals)
        low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values after Holm's step-down adjustment (1979): reject those that are below the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
