"""What was expected of each experiment of results_whitening.py, written down before its first
dictionary was trained, and what says whether it came out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from results_recovery import K

KINDS = ("batch-topk", "jumprelu")
PLAIN, WHITENED, INVERTED = f"uniform-k{K}", f"whitening-a0.5-space-k{K}", f"variance-a-0.5-k{K}"
INVERTED_SPACE = f"variance-a-0.5-space-k{K}"
WHITENED_MIXED = f"whitening-a0.5-mixed-k{K}"
FULLY = f"whitening-a1-space-k{K}"
PLAIN_OF = {"saelens-whitened": "saelens-plain"}
"""Dictionaries that are not compared with the plain one of ours."""
FREE_ONCE, FREE_TWICE = "free lengths, rate × 1", "free lengths, rate × 2"
STRETCHED, MIXED_INVERSE = f"{INVERTED}-stretched", f"variance-a-0.5-mixed-k{K}"


@dataclass(frozen=True)
class Expectation:
    """What was expected of an experiment, and a function that says what came out."""

    experiment: str
    place: str
    words: str
    found: Callable[["Found"], tuple[bool, str]]


class Found:
    """The means over seeds of an experiment at a site, by setting and label."""

    def __init__(self, records: Sequence[dict[str, Any]]):
        self._records = records

    def mean(self, setting: str, label: str, measure: str) -> float:
        chosen = [
            r["numbers"][measure]
            for r in self._records
            if (r["setting"], r["label"]) == (setting, label)
        ]
        if not chosen:
            raise KeyError(setting, label)
        return float(np.mean(chosen))

    def change(self, setting: str, label: str, measure: str) -> float:
        """Relative to plain under the same setting."""
        beside = PLAIN_OF.get(label, PLAIN)
        plain_one = self.mean(setting, beside, measure)
        return self.mean(setting, label, measure) / plain_one - 1

    def best(self, label: str) -> str:
        """The setting that keeps most of the model's cross-entropy."""
        settings = {r["setting"] for r in self._records if r["label"] == label}
        return max(settings, key=lambda setting: self.mean(setting, label, "ce"))

    def at_best(self, label: str, measure: str) -> float:
        """Under that setting."""
        return self.mean(self.best(label), label, measure)

    def change_at_best(self, label: str, measure: str) -> float:
        """Relative to plain, each at its best."""
        return self.at_best(label, measure) / self.at_best(PLAIN, measure) - 1


Outcome = Callable[[Found], tuple[bool, str]]
"""Whether something expected came out, and the number."""


def _between(low: float, high: float, change: Callable[[Found], float]) -> Outcome:
    def found(of: Found) -> tuple[bool, str]:
        share = change(of)
        return low <= share <= high, f"{100 * share:+.0f} %"

    return found


def changed(
    setting: str, low: float, high: float, label: str = WHITENED, measure: str = "kl"
) -> Outcome:
    """Beside plain under the same setting."""
    return _between(low, high, lambda of: of.change(setting, label, measure))


def changed_at_best(low: float, high: float, label: str = WHITENED, measure: str = "kl") -> Outcome:
    """Beside plain, each under its best setting."""
    return _between(low, high, lambda of: of.change_at_best(label, measure))


def plain_beside_usual(measure: str, low: float, high: float, setting: str = FREE_TWICE) -> Outcome:
    """The plain dictionary of free lengths beside the usual plain one."""

    def change(of: Found) -> float:
        return of.mean(setting, PLAIN, measure) / of.mean("rate × 1", PLAIN, measure) - 1

    return _between(low, high, change)


def nearer(label: str, to: str, than: str) -> Outcome:
    """What one form recovers is nearer to what a second recovers than to what a third does."""

    def found(of: Found) -> tuple[bool, str]:
        own, near, far = (of.mean("", one, "recovered") for one in (label, to, than))
        return abs(own - near) < abs(own - far), f"{own:.3f}; {near:.3f} and {far:.3f}"

    return found


EXPECTED = (
    Expectation(
        "form",
        "smollm2",
        "in the space, lengths in the model's units (mixed): recovers as in the loss",
        nearer(MIXED_INVERSE, INVERTED, INVERTED_SPACE),
    ),
    Expectation(
        "form",
        "smollm2",
        "in the loss, lengths after stretching: recovers as in the space",
        nearer(STRETCHED, INVERTED_SPACE, INVERTED),
    ),
    Expectation(
        "dose",
        "smollm2",
        "one dimension with 45 % of the variance: whitened KL at least 10 % below plain",
        changed("45 %", -1, -0.1),
    ),
    Expectation(
        "dose",
        "smollm2",
        "one dimension with 70 % of the variance: whitened KL at least 20 % below plain",
        changed("70 %", -1, -0.2),
    ),
    Expectation(
        "rate",
        "gemma",
        "each at its best of three rates: whitened KL at least 20 % below plain",
        changed_at_best(-1, -0.2),
    ),
    Expectation(
        "rate",
        "smollm2",
        "each at its best of three rates: whitened KL within 8 % of plain",
        changed_at_best(-0.08, 0.08),
    ),
    Expectation(
        "length",
        "gemma",
        "four million rows: whitened KL 10 to 30 % below plain",
        changed("4,000,000 rows", -0.3, -0.1),
    ),
    Expectation(
        "length",
        "gemma",
        "the same, mixed: KL 5 to 25 % below plain",
        changed("4,000,000 rows", -0.25, -0.05, WHITENED_MIXED),
    ),
    Expectation(
        "length",
        "gemma",
        "the same, mixed: at least 50 % more of the plants recovered",
        changed("4,000,000 rows", 0.5, 99, WHITENED_MIXED, "recovered"),
    ),
    Expectation(
        "length",
        "smollm2",
        "four million rows, mixed: KL at most 5 % above plain",
        changed("4,000,000 rows", -1, 0.05, WHITENED_MIXED),
    ),
    Expectation(
        "length",
        "smollm2",
        "the same: at least 30 % more of the plants recovered",
        changed("4,000,000 rows", 0.3, 99, WHITENED_MIXED, "recovered"),
    ),
    Expectation(
        "saelens",
        "smollm2",
        "its whitening: KL 5 to 30 % above its plain dictionary, as α = 1 here",
        changed("SAELens", 0.05, 0.3, "saelens-whitened", "kl"),
    ),
    Expectation(
        "saelens",
        "smollm2",
        "the same: no more plants recovered than plain (+10 % at most)",
        changed("SAELens", -1, 0.1, "saelens-whitened", "recovered"),
    ),
    *(
        Expectation(
            "saelens",
            "smollm2",
            f"ours, α = 1, {setting}: {what}",
            changed(setting, *bounds, FULLY, measure),
        )
        for setting, kl, plants in (
            (FREE_ONCE, (0.0, 0.3), (-0.5, 0.0)),
            (FREE_TWICE, (0.05, 0.3), (-0.4, 0.15)),
        )
        for what, measure, bounds in (
            (f"KL {100 * kl[0]:.0f} to {100 * kl[1]:.0f} % above plain", "kl", kl),
            (
                f"{100 * plants[0]:+.0f} to {100 * plants[1]:+.0f} % of the plants".replace(
                    "-", "−"
                ),
                "recovered",
                plants,
            ),
        )
    ),
    *(
        Expectation("every-rate", place, words, found)
        for place, least in (("gemma", 0.5), ("smollm2", 0.3))
        for words, found in (
            (
                "halfway whitened, mixed, each at its better rate: at least "
                f"{100 * least:.0f} % more of the plants recovered",
                changed_at_best(least, 99, WHITENED_MIXED, "recovered"),
            ),
            (
                "rotated whitening, mixed, each at its better rate: at most 10 % more",
                changed_at_best(-1, 0.1, f"rotated-{WHITENED_MIXED}", "recovered"),
            ),
            (
                "permuted inverse variance, each at its better rate: at most 10 % more",
                changed_at_best(-1, 0.1, f"permuted-{INVERTED}", "recovered"),
            ),
            (
                "the paper's variance, each at its better rate: at most a quarter of plain's",
                changed_at_best(-1, -0.75, f"variance-a0.5-k{K}", "recovered"),
            ),
        )
    ),
    *(
        Expectation(
            "length",
            place,
            f"two million rows: whitened KL {words}",
            changed("2,000,000 rows", low, high),
        )
        for place, words, low, high in (
            ("gemma", "at least 20 % below plain", -1, -0.2),
            ("gemma-5", "at least 30 % below plain", -1, -0.3),
            ("gemma-14", "at least 20 % below plain", -1, -0.2),
            ("smollm2", "within 8 % of plain", -0.08, 0.08),
            ("smollm2-20", "within 8 % of plain", -0.08, 0.08),
        )
    ),
    *(
        Expectation(
            "length",
            place,
            f"the same, mixed: at least {100 * least:.0f} % more of the plants recovered",
            changed("2,000,000 rows", least, 99, WHITENED_MIXED, "recovered"),
        )
        for place, least in (
            ("gemma", 0.5),
            ("gemma-5", 0.4),
            ("gemma-14", 0.5),
            ("smollm2", 0.4),
            ("smollm2-20", 0.4),
        )
    ),
    *(
        Expectation(
            "kind",
            "gemma",
            f"{kind}: whitened KL at least 15 % below plain",
            changed(kind, -1, -0.15),
        )
        for kind in KINDS
    ),
    *(
        Expectation(
            "kind",
            "smollm2",
            f"{kind}: whitened KL within 8 % of plain",
            changed(kind, -0.08, 0.08),
        )
        for kind in KINDS
    ),
    *(
        Expectation("lengths", place, words, found)
        for place, more, lead, most, kl in (
            ("smollm2", 0.5, 0.05, 0.4, 0.0),
            ("gemma", 0.3, 0.2, 99, -0.05),
        )
        for words, found in (
            (
                "free lengths at twice the rate: plain recovers at least "
                f"{100 * more:.0f} % more than usual plain",
                plain_beside_usual("recovered", more, 99),
            ),
            (
                "the same: KL at most 3 % higher",
                plain_beside_usual("kl", -1, 0.03),
            ),
            (
                "the same: mixed recovers at least "
                f"{100 * lead:.0f} {'' if most > 1 else f'and at most {100 * most:.0f} '}% more "
                "than plain",
                changed(FREE_TWICE, lead, most, WHITENED_MIXED, "recovered"),
            ),
            (
                f"the same: KL of mixed {'' if not kl else f'at least {-100 * kl:.0f} % '}below "
                "plain's",
                changed(FREE_TWICE, -1, kl, WHITENED_MIXED),
            ),
            (
                "its rotated control: at most 10 % more of the plants recovered than plain",
                changed(FREE_TWICE, -1, 0.1, f"rotated-{WHITENED_MIXED}", "recovered"),
            ),
        )
    ),
    *(
        Expectation("lengths-long", place, words, found)
        for place, lead in (("smollm2", 0.0), ("gemma", 0.1))
        for words, found in (
            (
                "free lengths: plain recovers at least 10 % more than usual plain",
                plain_beside_usual("recovered", 0.1, 99, FREE_ONCE),
            ),
            (
                "the same: KL at most 3 % higher",
                plain_beside_usual("kl", -1, 0.03, FREE_ONCE),
            ),
            (
                f"the same: mixed recovers {'' if not lead else 'at least 10 % '}more than plain",
                changed(FREE_ONCE, lead, 99, WHITENED_MIXED, "recovered"),
            ),
        )
    ),
)
