"""The plain curve, and differences from it at equal cross-entropy.

Measures of monosemanticity change with k, and so does fidelity. A dictionary is therefore compared
with what plain dictionaries of neighbouring k would have at *its own* fidelity: a straight line
between two plain dictionaries of the same seed, over the logarithm of the cross-entropy that they
cost the model. Over it, measures are nearly straight. (Over the share recovered, which saturates
towards 1, a chord would cut the corner by more than the effects in question.) The curve is not
extrapolated beyond its ends.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

LEAST_INCREASE = 1e-4  # nats; less counts as none, and if negative has no logarithm


@dataclass(frozen=True)
class Value:
    """One measure of one dictionary, or of a mixture of dictionaries."""

    mean: float
    variance: float = 0.0
    """Of the mean, from its finite number of latents; 0 if it is not a mean over latents."""
    items: Mapping[str, float] | None = None
    """The parts of a mean over families of concepts or over planted features, by name."""
    resampled: tuple[float | None, ...] | None = None
    """The mean on resamplings of the text's documents, the same ones for all dictionaries; None, or
    NaN in a mixture, on one that lacks the documents of every latent."""

    @classmethod
    def mixture(cls, terms: Iterable[tuple[float, "Value"]]) -> "Value":
        """Σ weight · value of independent dictionaries, over the items that all of them have: NaN
        if they have none in common."""
        terms = list(terms)
        items, mean = None, math.fsum(w * value.mean for w, value in terms)
        parts = [(w, value.items) for w, value in terms if value.items is not None]
        if len(parts) == len(terms):
            shared = set.intersection(*(set(own) for _, own in parts))
            names = [name for name in parts[0][1] if name in shared]
            items = {name: sum(w * own[name] for w, own in parts) for name in names}
            if any(len(own) > len(shared) for _, own in parts):  # means of other families
                mean = math.fsum(items.values()) / len(items) if items else math.nan
        drawn = [(w, value.resampled) for w, value in terms if value.resampled is not None]
        resampled = None
        if len(drawn) == len(terms):
            rows = [w * np.array(own, dtype=float) for w, own in drawn]  # None becomes NaN
            resampled = tuple(np.sum(rows, 0).tolist())
        return cls(
            mean,
            math.fsum(w * w * value.variance for w, value in terms),
            items,
            resampled,
        )


@dataclass(frozen=True)
class Point:
    """One dictionary on the plane of fidelity and monosemanticity."""

    k: int
    seed: int
    increase: float
    """Cross-entropy per token that the reconstruction costs the model, in nats."""
    values: Mapping[str, Value]
    """By measure; a measure that does not exist for the dictionary is omitted."""

    @property
    def place(self) -> float:
        """Position along the curve: the logarithm of the increase."""
        return math.log(max(self.increase, LEAST_INCREASE))


class Curve:
    """Plain dictionaries of one seed, joined in the order of their fidelity."""

    def __init__(self, points: Iterable[Point]):
        self.points = sorted(points, key=lambda point: point.place)
        self._places = [point.place for point in self.points]

    def __contains__(self, point: Point) -> bool:
        """Whether the point's fidelity lies between the ends of the curve."""
        return len(self.points) > 1 and self._places[0] <= point.place <= self._places[-1]

    def beside(self, points: Iterable[tuple[float, Point]], measure: str) -> Value | None:
        """Σ weight · (the point's value less that of a plain dictionary at its fidelity).

        A plain dictionary that several points are compared with counts once, with all its weight:
        what it adds to two differences cancels in the difference between them.

        The points must lie within the curve. None if one, or a neighbour, lacks the measure, or
        if it is a mean over families and they have none in common.
        """
        terms: list[tuple[float, Point]] = []
        of_plain = [0.0] * len(self.points)
        for weight, point in points:
            terms.append((weight, point))
            for number, share in self._neighbours(point):
                of_plain[number] -= weight * share
        terms += [one for one in zip(of_plain, self.points, strict=True) if one[0]]
        if any(measure not in point.values for _, point in terms):
            return None
        found = Value.mixture((weight, point.values[measure]) for weight, point in terms)
        return None if math.isnan(found.mean) else found

    def _neighbours(self, point: Point) -> list[tuple[int, float]]:
        """The plain dictionaries on both sides of a point, and the weight of each in the line."""
        assert point in self
        above = int(np.searchsorted(self._places, point.place).clip(1, len(self.points) - 1))
        low, high = self._places[above - 1], self._places[above]
        share = (point.place - low) / (high - low) if high > low else 0.5
        return [(above - 1, 1 - share), (above, share)]

    def without(self, k: int) -> "Curve":
        """The curve through its other points."""
        return Curve(point for point in self.points if point.k != k)
