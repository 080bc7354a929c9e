"""One measure of one dictionary, and its difference from another dictionary of the same seed."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Value:
    """One measure of one dictionary, or the difference of two."""

    mean: float
    items: Mapping[str, float] | None = None
    """The parts of a mean over families of concepts, letters or planted features, by name."""
    resampled: tuple[float | None, ...] | None = None
    """The mean on resamplings of the text's documents, the same ones for all dictionaries; None, or
    NaN in a difference, on one that lacks the documents of every latent."""
    documents: tuple[float, ...] | None = None
    """Sums over the predictions of each document, of a measure whose differences are shares."""

    def less(self, other: "Value") -> "Value | None":
        """This one less the other, over the items that both have; None if they share none."""
        mean, items, resampled = self.mean - other.mean, None, None
        if self.items is not None and other.items is not None:
            items = {n: v - other.items[n] for n, v in self.items.items() if n in other.items}
            if not items:
                return None
            mean = sum(items.values()) / len(items)
        if self.resampled is not None and other.resampled is not None:
            own, others = (np.array(one.resampled, dtype=float) for one in (self, other))
            resampled = tuple((own - others).tolist())
        return Value(mean, items, resampled)
