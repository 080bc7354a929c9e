"""The plain curve, and what lies beside it at the same cross-entropy.

Any measure of monosemanticity moves when k does, and so does fidelity; so a dictionary is compared
with what plain dictionaries of neighbouring k would have at *its own* fidelity. Between two plain
dictionaries of the same seed that is read off a straight line, over the logarithm of the
cross-entropy that they cost the model: along it, measures are nearly straight. (On the share
recovered, which crowds towards 1, a chord would cut the corner by more than the effects in
question.) Beyond the ends of the curve nothing is said.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

LEAST_INCREASE = 1e-4  # nats; less is as good as nothing, and has no logarithm when it is negative


@dataclass(frozen=True)
class Value:
    """One measure of one dictionary, or of a mixture of dictionaries."""

    mean: float
    variance: float = 0.0
    """Of the mean, from the finite number of latents behind it; 0 if it is no mean over latents."""
    items: Mapping[str, float] | None = None
    """The parts of a mean over concepts, by name."""

    @classmethod
    def mixture(cls, terms: Iterable[tuple[float, "Value"]]) -> "Value":
        """Σ weight · value of independent dictionaries, over the items that all of them have."""
        terms = list(terms)
        items = None
        if all(value.items is not None for _, value in terms):
            shared = set.intersection(*(set(value.items) for _, value in terms))
            names = [name for name in terms[0][1].items if name in shared]
            items = {name: sum(w * value.items[name] for w, value in terms) for name in names}
        return cls(
            math.fsum(w * value.mean for w, value in terms),
            math.fsum(w * w * value.variance for w, value in terms),
            items,
        )


@dataclass(frozen=True)
class Point:
    """One dictionary on the plane of fidelity and monosemanticity."""

    k: int
    seed: int
    increase: float
    """Cross-entropy per token that the reconstruction costs the model, in nats."""
    values: Mapping[str, Value]
    """By measure; a measure that does not exist for it is left out."""

    @property
    def place(self) -> float:
        """Where it stands along the curve: the logarithm of the increase."""
        return math.log(max(self.increase, LEAST_INCREASE))


class Curve:
    """Plain dictionaries of one seed, joined in the order of their fidelity."""

    def __init__(self, points: Iterable[Point]):
        self.points = sorted(points, key=lambda point: point.place)
        self._places = [point.place for point in self.points]

    def __contains__(self, point: Point) -> bool:
        """Whether the curve has something to say at the point's fidelity."""
        return len(self.points) > 1 and self._places[0] <= point.place <= self._places[-1]

    def at(self, point: Point, measure: str) -> Value | None:
        """What a plain dictionary would have there; None if a neighbour lacks the measure.

        The point must lie within the curve.
        """
        assert point in self
        above = int(np.searchsorted(self._places, point.place).clip(1, len(self.points) - 1))
        low, high = self.points[above - 1], self.points[above]
        if measure not in low.values or measure not in high.values:
            return None
        width = high.place - low.place
        share = (point.place - low.place) / width if width else 0.5
        terms = [(1 - share, low.values[measure]), (share, high.values[measure])]
        return Value.mixture(terms)

    def beside(self, point: Point, measure: str) -> Value | None:
        """The point's value less the curve's at its fidelity; None if either is lacking."""
        plain = self.at(point, measure)
        if plain is None or measure not in point.values:
            return None
        return Value.mixture([(1.0, point.values[measure]), (-1.0, plain)])

    def without(self, k: int) -> "Curve":
        """The curve that its other points make."""
        return Curve(point for point in self.points if point.k != k)
