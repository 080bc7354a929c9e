"""How sure a result is: of how many documents the text was, 95 % intervals, and p-values corrected
for several tests at once.

Tokens of one document resemble each other. So intervals come from resampling documents, latents or
concepts (percentile bootstrap, Efron 1979), not tokens. All quantities of one resampling use the
same documents: clean, ablated and spliced losses rise and fall together, so the interval of their
ratio is much narrower than their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

LEVEL = 0.95
# Numbers drawn at once, 8 bytes each; enough that 1000 resamplings of 30,000 items are one block.
_BLOCK = 2**25
Interval = tuple[float, float]
FEWEST = 20  # effective documents; results on fewer say little about other text


@dataclass(frozen=True)
class TextSize:
    """Tokens and documents of a text."""

    tokens: int
    documents: int
    effective: float
    """1/Σ share², where share is a document's part of the tokens: as many documents of one length
    would count as much."""

    @classmethod
    def of(cls, documents: Int[np.ndarray, " tokens"]) -> "TextSize":
        """From the number of each token's document."""
        counts = np.unique(documents, return_counts=True)[1].astype(np.float64)
        total = counts.sum()
        effective = total**2 / (counts**2).sum() if len(counts) else 0.0
        return cls(int(total), len(counts), float(effective))

    def text(self, of: str) -> str:
        """For example: 50,012 tokens of held-out text from 212 documents (effectively 180)."""
        return (
            f"{self.tokens:,} tokens of {of} from {self.documents:,} "
            f"document{'' if self.documents == 1 else 's'} (effectively {self.effective:.0f})"
        )

    def warnings(self) -> list[str]:
        """A sentence if these are too few documents."""
        if self.effective >= FEWEST:
            return []
        return [
            f"the text is effectively of {self.effective:.1f} documents, fewer than {FEWEST}: the "
            "results say little about other text; read more documents, or hold out more of them "
            "before training"
        ]


def owners(documents: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, " contexts"]:
    """The document that most of each context's tokens are of, numbered anew from 0."""
    most = []
    for own in documents:
        numbers, counts = np.unique(own, return_counts=True)
        most.append(numbers[counts.argmax()] if len(numbers) else -1)
    return np.unique(np.array(most), return_inverse=True)[1]


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
        """The central 95 % of ``quantity`` over the resamplings; those where it is 0/0 are ignored.
        ``sums`` holds one number per item; ``quantity`` receives their totals, one per resampling.
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
