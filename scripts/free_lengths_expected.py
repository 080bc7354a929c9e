"""What was expected of the dictionaries of results_free_lengths.py, and what says if it came out.

All was written down before the first of the dictionaries that it is about was trained: the controls
of random and permuted weights, the model's sensitivity and equal KL once the rest was known; what
is said of weights in the loss once inverse variance there was known after block 9 of SmolLM2;
``OF_SETTINGS`` once whitening in the loss was the default; of its JumpReLU, and ``OF_FRESH``, when
the first three seeds and the other settings were known; ``OF_POWERS`` when their seed 0 was known.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from results_recovery import PLACES, Expectation, K, Means, above, at_most, below, change

HALFWAY = f"whitening-a0.5-mixed-k{K}"
_WEAKER, _STRONGER = f"whitening-a0.25-mixed-k{K}", f"whitening-a0.75-mixed-k{K}"
HALFWAY_SPACE = f"whitening-a0.5-space-k{K}"
PLAIN, ROTATED = f"uniform-k{K}", f"rotated-{HALFWAY}"
INVERSE = f"variance-a-0.5-mixed-k{K}"
INVERSE_SPACE = f"variance-a-0.5-space-k{K}"
_PERMUTED, _PERMUTED_INVERSE = f"permuted-{HALFWAY}", f"permuted-{INVERSE}"
_RANDOM, SENSITIVITY = f"random-a1-mixed-k{K}", f"sensitivity-matrix-a0.25-space-k{K}"
IN_LOSS, HALFWAY_IN_LOSS = f"variance-a-0.5-k{K}", f"whitening-a0.5-k{K}"
PERMUTED_IN_LOSS = f"permuted-variance-a-0.5-k{K}"
_GEMMA = ("gemma", "gemma-5", "gemma-14")
_SMOLLM2 = ("smollm2", "smollm2-20")


def _range(low: float, high: float) -> str:
    bounds = [f"{100 * bound:+.0f}".replace("-", "−") for bound in (low, high)]
    if low <= -1:
        return f"at most {bounds[1]} %"
    return f"{bounds[0]} to {bounds[1]} %" if high < 9 else f"at least {bounds[0]} %"


def at_equal_kl(arm: str, low: float, high: float) -> Callable[[Means], tuple[bool, str]]:
    """It recovers so much more of the plants than plain dictionaries would at its KL."""

    def found(means: Means) -> tuple[bool, str]:
        curve = sorted((own["kl"], own["recovered"]) for name, own in means.items()
                       if name.startswith("uniform"))  # fmt: skip
        at, (kls, recovered) = means[arm]["kl"], zip(*curve, strict=True)
        if not kls[0] <= at <= kls[-1]:
            raise KeyError(arm)
        more = means[arm]["recovered"] - float(np.interp(np.log(at), np.log(kls), recovered))
        return low <= more <= high, f"{more:+.3f}"

    return found


Found = Callable[[Means], tuple[bool, str]]


def _gains_nothing(arm: str, name: str) -> tuple[tuple[str, Found], ...]:
    return (
        (
            f"{name}: at most 10 % more of the plants recovered than plain",
            change(arm, "recovered", -1, 0.1),
        ),
        ("the same: KL no lower than plain (−2 %)", change(arm, "kl", -0.02, 99)),
    )


def _of_sensitivity(
    kl: tuple[float, float], plants: tuple[float, float]
) -> tuple[tuple[str, Found], ...]:
    return (
        (
            f"the model's sensitivity as a space, α = ¼: KL relative to plain {_range(*kl)}",
            change(SENSITIVITY, "kl", *kl),
        ),
        (
            f"the same: recovered plants relative to plain {_range(*plants)}",
            change(SENSITIVITY, "recovered", *plants),
        ),
    )


EXPECTED = (
    *(
        Expectation(place, words, found)
        for place in _SMOLLM2
        for words, found in (
            (
                "halfway whitened, mixed: more of the plants recovered than plain, by 40 % at most",
                change(HALFWAY, "recovered", 0, 0.4),
            ),
            ("the same: KL within 5 % of plain", change(HALFWAY, "kl", -0.05, 0.05)),
            (
                "halfway whitened space: KL within 5 % of plain",
                change(HALFWAY_SPACE, "kl", -0.05, 0.05),
            ),
            (
                "the same: no more plants recovered than plain (+5 % at most)",
                change(HALFWAY_SPACE, "recovered", -1, 0.05),
            ),
            (
                "inverse variance, mixed: at least 10 % more of the plants recovered",
                change(INVERSE, "recovered", 0.1, 99),
            ),
            (
                "the same: KL at least 5 % above plain",
                change(INVERSE, "kl", 0.05, 99),
            ),
            (
                "whitened, mixed, α = ¼: KL no higher than at α = ½",
                below(_WEAKER, "kl", HALFWAY),
            ),
        )
    ),
    *(
        Expectation(place, words, found)
        for place in _GEMMA
        for words, found in (
            (
                "halfway whitened, mixed: at least 30 % more of the plants recovered than plain",
                change(HALFWAY, "recovered", 0.3, 99),
            ),
            ("the same: KL 2 to 30 % below plain", change(HALFWAY, "kl", -0.3, -0.02)),
            (
                "halfway whitened space: KL at least 15 % below plain",
                change(HALFWAY_SPACE, "kl", -1, -0.15),
            ),
            (
                "the same: at least 15 % more of the plants recovered",
                change(HALFWAY_SPACE, "recovered", 0.15, 99),
            ),
            (
                "inverse variance, mixed: at least 30 % more of the plants recovered",
                change(INVERSE, "recovered", 0.3, 99),
            ),
            (
                "whitened, mixed, α = ¾: more of the plants recovered than at α = ½",
                above(_STRONGER, "recovered", HALFWAY),
            ),
        )
    ),
    *(
        Expectation(place, words, found)
        for place in PLACES
        for words, found in (
            (
                "rotated control of mixed: at most 10 % more of the plants recovered than plain",
                change(ROTATED, "recovered", -1, 0.1),
            ),
            ("the same: KL no lower than plain", change(ROTATED, "kl", 0, 99)),
        )
    ),
    *(
        Expectation(place, words, found)
        for place, sensitivity_kl, sensitivity_plants in (
            ("smollm2", (-0.08, 0.02), (-0.15, 0.15)),
            ("gemma", (-1.0, -0.15), (0.2, 99.0)),
        )
        for words, found in (
            *(
                expectation
                for arm, name in (
                    (_PERMUTED_INVERSE, "permuted inverse variance, mixed"),
                    (_PERMUTED, "permuted whitening, mixed"),
                    (_RANDOM, "random weights, mixed"),
                )
                for expectation in _gains_nothing(arm, name)
            ),
            *_of_sensitivity(sensitivity_kl, sensitivity_plants),
            (
                "inverse variance, mixed: at least .02 more of the plants than plain of equal KL",
                at_equal_kl(INVERSE, 0.02, 1),
            ),
        )
    ),
    *(
        Expectation(place, words, found)
        for place in ("gemma", "smollm2")
        for words, found in (
            (
                "rotated control of whitening in the loss: at most 10 % more of the plants",
                change(f"rotated-{HALFWAY_IN_LOSS}", "recovered", -1, 0.1),
            ),
            (
                "the same: KL no lower than plain (−2 %)",
                change(f"rotated-{HALFWAY_IN_LOSS}", "kl", -0.02, 99),
            ),
        )
    ),
    *(  # of the default's controls, but for the first at blocks 9; written down last
        Expectation(place, words, found)
        for place in PLACES
        for arm, name in (
            (f"rotated-{HALFWAY_IN_LOSS}", "rotated"),
            (f"permuted-{HALFWAY_IN_LOSS}", "permuted"),
        )
        if name == "permuted" or place not in ("gemma", "smollm2")
        for words, found in (
            (
                f"{name} control of whitening in the loss: at most 10 % more of the plants",
                change(arm, "recovered", -1, 0.1),
            ),
            ("the same: KL no lower than plain (−2 %)", change(arm, "kl", -0.02, 99)),
        )
    ),
    *(
        Expectation(
            place,
            "permuted inverse variance in the loss: at most 10 % more of the plants than plain",
            change(PERMUTED_IN_LOSS, "recovered", -1, 0.1),
        )
        for place in ("gemma", "smollm2")
    ),
    *(  # of the sites beside blocks 9; written down after the default's controls
        Expectation(place, words, found)
        for place, paper_kl, sensitivity_kl, sensitivity_plants in (
            ("smollm2-20", 0.4, (-0.08, 0.02), (-0.15, 0.15)),
            ("gemma-5", 1.0, (-1.0, -0.3), (0.0, 99.0)),
            ("gemma-14", 1.0, (-1.0, -0.15), (0.2, 99.0)),
        )
        for words, found in (
            (
                "the paper's variance, α = ½: recovers at most .03",
                at_most(f"variance-a0.5-k{K}", "recovered", 0.03),
            ),
            (
                f"the same: KL relative to plain {_range(paper_kl, 99)}",
                change(f"variance-a0.5-k{K}", "kl", paper_kl, 99),
            ),
            *_of_sensitivity(sensitivity_kl, sensitivity_plants),
            *_gains_nothing(_RANDOM, "random weights, mixed"),
            (
                "plain: k = 24 recovers more than k = 64",
                above("uniform-k24", "recovered", "uniform-k64"),
            ),
            (
                "the default: at least .04 more of the plants than plain of equal KL",
                at_equal_kl(HALFWAY_IN_LOSS, 0.04, 1),
            ),
        )
    ),
    *(  # written down last
        Expectation(place, f"whitened in the loss, α = 2: {what} {_range(*bounds)}", found)
        for place, plants, kl in (
            ("smollm2", (-0.3, 0.3), (0.4, 99.0)),
            ("gemma", (0.2, 99.0), (0.0, 99.0)),
        )
        for what, measure, bounds in (
            ("recovered plants relative to plain", "recovered", plants),
            ("KL", "kl", kl),
        )
        for found in [change(f"whitening-a2-k{K}", measure, *bounds)]
    ),
    Expectation(
        "smollm2-20",
        "inverse variance in the loss: recovers more than mixed",
        above(IN_LOSS, "recovered", INVERSE),
    ),
    Expectation(
        "smollm2-20",
        "the same: KL at least 5 % above plain",
        change(IN_LOSS, "kl", 0.05, 99),
    ),
    *(
        Expectation(
            place,
            "halfway whitened in the loss: recovers more than mixed",
            above(HALFWAY_IN_LOSS, "recovered", HALFWAY),
        )
        for place in _SMOLLM2
    ),
    *(
        Expectation(
            place,
            "whitened in the loss: α = ¾ recovers more than α = ¼",
            above(f"whitening-a0.75-k{K}", "recovered", f"whitening-a0.25-k{K}"),
        )
        for place in PLACES
    ),
    *(
        Expectation(place, words, found)
        for place in _GEMMA
        for words, found in (
            (
                "inverse variance in the loss: at least 30 % more of the plants than plain",
                change(IN_LOSS, "recovered", 0.3, 99),
            ),
            ("the same: KL above that of mixed", above(IN_LOSS, "kl", INVERSE)),
            (
                "halfway whitened in the loss: KL above that of mixed",
                above(HALFWAY_IN_LOSS, "kl", HALFWAY),
            ),
        )
    ),
    *(
        Expectation(place, words, found)
        for place in ("gemma", "smollm2")
        for words, found in (
            (
                "the paper's variance, α = ½: recovers at most .03",
                at_most(f"variance-a0.5-k{K}", "recovered", 0.03),
            ),
            (
                "inverse variance in the loss: recovers less than mixed",
                below(IN_LOSS, "recovered", INVERSE),
            ),
        )
    ),
)

FRESH = (3, 4)
"""Seeds that were added, since whitening is called better than plain."""
OF_FRESH = tuple(
    Expectation(place, f"seeds 3 and 4, the default: {words} {_range(*bounds)}", found)
    for place, plants, kl in (
        ("smollm2", 0.12, (-0.02, 0.05)),
        # written down when the first place was known
        ("smollm2-20", 0.15, (-0.02, 0.04)),
        ("gemma-5", 0.25, (-0.35, -0.1)),
        ("gemma", 0.25, (-0.12, 0.04)),
        ("gemma-14", 0.3, (-0.32, -0.12)),
    )
    for words, bounds, found in (
        (
            "recovered plants relative to plain",
            (plants, 99.0),
            change(HALFWAY_IN_LOSS, "recovered", plants, 99),
        ),
        ("KL", kl, change(HALFWAY_IN_LOSS, "kl", *kl)),
    )
) + tuple(
    Expectation(
        place,
        "seeds 3 and 4: inverse variance in the loss recovers more than the default",
        above(IN_LOSS, "recovered", HALFWAY_IN_LOSS),
    )
    for place in ("gemma", "gemma-14")
)

POWERS = (1, 2)
"""Seeds that were added of other powers in the loss."""
_FIRST_SEED = {
    "smollm2": ((-0.02, 0.16), (0.08, 0.38), (0.23, 0.33), (-0.01, 0.10), (0.01, 0.24)),
    "gemma": ((-0.07, 0.32), (-0.05, 0.53), (0.02, 0.48), (-0.04, 0.20), (-0.05, 0.37)),
    "smollm2-20": ((0.00, 0.07), (0.07, 0.42), (0.19, 0.47), (-0.03, 0.05), (0.00, 0.23)),
    "gemma-5": ((-0.20, 0.29), (-0.22, 0.40), (-0.26, 0.39), (-0.10, 0.16), (-0.22, 0.40)),
    "gemma-14": ((-0.14, 0.27), (-0.22, 0.76), (-0.16, 0.83), (-0.10, 0.10), (-0.19, 0.37)),
}
"""For α = ¼, ¾ and 1, then ⅛ and ⅜: what seed 0 had found of KL and recovered plants, relative to
plain."""
_POWERS = dict(zip("¼¾1⅛⅜", (0.25, 0.75, 1.0, 0.125, 0.375), strict=True))
OF_POWERS = tuple(
    Expectation(place, f"seeds 1, 2: in the loss, α = {words}, {what} {_range(*bounds)}", found)
    for place, powers in _FIRST_SEED.items()
    for (kl, plants), (words, alpha) in zip(powers, _POWERS.items(), strict=True)
    for arm in [f"whitening-a{alpha:g}-k{K}"]
    for what, bounds, found in (
        ("KL", (kl - 0.08, kl + 0.08), change(arm, "kl", kl - 0.08, kl + 0.08)),
        (
            "recovered plants relative to plain",
            (plants - 0.12, 99.0),
            change(arm, "recovered", plants - 0.12, 99),
        ),
    )
)

_AGAIN = {
    "as many effective dimensions": f"shares-{HALFWAY_IN_LOSS}",
    "random weights": f"random-a1-k{K}",
    "α = 2": f"whitening-a2-k{K}",
}
_FIRST_OF_AGAIN = {
    "smollm2-20": ((0.35, 0.40), (0.15, 0.0), (7.9, 0.20)),
    "gemma-5": ((4.1, -0.15), (0.19, 0.01), (10.7, 0.07)),
    "gemma-14": ((0.15, 0.80), (0.07, -0.03), (4.75, 0.70)),
}
"""As ``_FIRST_SEED``, of what had one seed at these sites to the last."""


def around(kl: float, plants: float) -> tuple[tuple[str, str, float, float], ...]:
    """Within .15 of the plants that seed 0 found, and .08 or a third of its KL."""
    wide = max(0.08, abs(kl) / 3)
    return (
        ("KL", "kl", round(kl - wide, 2), round(kl + wide, 2)),
        (
            "recovered plants",
            "recovered",
            round(plants - 0.15, 2),
            round(plants + 0.15, 2),
        ),
    )


OF_AGAIN = tuple(
    Expectation(
        place,
        f"seeds 1, 2: {words}, {what} {_range(low, high)}",
        change(arm, measure, low, high),
    )
    for place, first in _FIRST_OF_AGAIN.items()
    for (words, arm), found in zip(_AGAIN.items(), first, strict=True)
    for what, measure, low, high in around(*found)
)


Settings = dict[str, Means]
"""Setting → means; the usual setting is the empty text."""
USUAL_RATE = "usual rate"
RATES = ("half-rate", USUAL_RATE, "twice-rate")
"""Of the same seeds."""


def best_rate(settings: Settings, arm: str) -> str:
    """The setting whose rate keeps most of the cross-entropy."""
    return max(RATES, key=lambda rate: settings[rate][arm]["ce"])


def of_best_rates(
    arm: str, measure: str, low: float, high: float
) -> Callable[[Settings], tuple[bool, str]]:
    """A dictionary relative to plain, each at the rate that keeps most of its cross-entropy."""

    def found(settings: Settings) -> tuple[bool, str]:
        rates = [best_rate(settings, one) for one in (arm, PLAIN)]
        own, its = settings[rates[0]][arm][measure], settings[rates[1]][PLAIN][measure]
        share = own / its - 1
        return low <= share <= high, f"{100 * share:+.0f} % ({' and '.join(rates)})"

    return found


def never_above(arm: str, measure: str, bound: float) -> Callable[[Settings], tuple[bool, str]]:
    """At all rates."""

    def found(settings: Settings) -> tuple[bool, str]:
        most = max(settings[rate][arm][measure] for rate in RATES)
        return most <= bound, f"{most:.3f}"

    return found


def at_every_rate(
    arm: str, measure: str, low: float, high: float
) -> Callable[[Settings], tuple[bool, str]]:
    """A dictionary relative to plain of the same rate."""

    def found(settings: Settings) -> tuple[bool, str]:
        shares = [settings[rate][arm][measure] / settings[rate][PLAIN][measure] - 1
                  for rate in RATES]  # fmt: skip
        text = ", ".join(f"{100 * share:+.0f} %" for share in shares)
        return low <= min(shares) and max(shares) <= high, text

    return found


def in_setting(
    setting: str, measure: str, low: float, high: float
) -> Callable[[Settings], tuple[bool, str]]:
    """The default relative to plain of the same setting."""
    return lambda settings: change(HALFWAY_IN_LOSS, measure, low, high)(settings[setting])


def gains_less(setting: str, other: str) -> Callable[[Settings], tuple[bool, str]]:
    """In recovered plants, relative to plain, the default gains less than in another setting."""

    def found(settings: Settings) -> tuple[bool, str]:
        own, its = (
            settings[one][HALFWAY_IN_LOSS]["recovered"] / settings[one][PLAIN]["recovered"] - 1
            for one in (setting, other)
        )
        return own < its, f"{100 * own:+.0f} % and {100 * its:+.0f} %"

    return found


def _of_settings() -> Iterator[tuple[str, str, Any]]:
    for place, plants, kl in (("smollm2", 0.1, (-0.05, 0.06)), ("gemma", 0.2, (-0.2, 0.05))):
        yield (
            place,
            "whitened and plain, each at the rate with most CE recovered: recovered plants "
            + _range(plants, 99),
            of_best_rates(HALFWAY_IN_LOSS, "recovered", plants, 99),
        )
        yield (place, f"the same: KL {_range(*kl)}", of_best_rates(HALFWAY_IN_LOSS, "kl", *kl))
        for setting, words, least, its in (
            ("batch-topk", "BatchTopK", plants, kl),
            ("four-million", "four million rows", plants / 2, kl),
            ("jumprelu", "JumpReLU", plants, kl if place == "smollm2" else (-0.4, 0.0)),
        ):
            yield (
                place,
                f"{words}: recovered plants {_range(least, 99)}",
                in_setting(setting, "recovered", least, 99),
            )
            yield (place, f"{words}: KL {_range(*its)}", in_setting(setting, "kl", *its))
        yield (
            place,
            "after four million rows the gain in plants is a smaller share than after two",
            gains_less("four-million", ""),
        )


def _of_shorter() -> Iterator[tuple[str, str, Any]]:
    """Written down when all other settings were known."""
    for place, plants, kl in (("smollm2", 0.2, (-0.08, 0.06)), ("gemma", 0.3, (-0.3, 0.05))):
        for setting, words in (("half-million", "half a million"), ("million", "one million")):
            yield (
                place,
                f"{words} rows: recovered plants {_range(plants, 99)}",
                in_setting(setting, "recovered", plants, 99),
            )
            yield (place, f"{words} rows: KL {_range(*kl)}", in_setting(setting, "kl", *kl))
        yield (
            place,
            "the gain in plants is a larger share after half a million rows than after two",
            gains_less("", "half-million"),
        )


OF_SETTINGS = (*_of_settings(), *_of_shorter())


Bounds = tuple[float, float]
Asked = tuple[str, str, Bounds, Bounds]
"""What it is called, its label, and bounds of its recovered plants and of its KL, both relative."""


def _of_pairs(
    start: str, of: Callable[..., Any], asked: Sequence[tuple[str, Sequence[Asked]]]
) -> tuple[tuple[str, str, Any], ...]:
    """Two expectations for everything asked of a place."""
    return tuple(
        (
            place,
            f"{start}, {name}: {what} {_range(*bounds)}",
            of(arm, measure, *bounds),
        )
        for place, ones in asked
        for name, arm, plants, kl in ones
        for what, measure, bounds in (
            ("recovered plants", "recovered", plants),
            ("KL", "kl", kl),
        )
    )


OF_RATES = _of_pairs(
    "at best rates",
    of_best_rates,
    (
        (
            "smollm2",
            (
                ("inverse variance in the loss", IN_LOSS, (0.1, 99.0), (0.02, 0.2)),
                ("whitened in the loss, α = 1", f"whitening-a1-k{K}", (0.1, 99.0), (0.1, 0.4)),
                ("whitened space", HALFWAY_SPACE, (-1.0, 0.0), (-0.06, 0.06)),
                ("rotated control", f"rotated-{HALFWAY_IN_LOSS}", (-1.0, 0.1), (-0.02, 9.0)),
                ("permuted control", f"permuted-{HALFWAY_IN_LOSS}", (-1.0, 0.1), (-0.02, 9.0)),
            ),
        ),
        (
            "gemma",
            (
                ("inverse variance in the loss", IN_LOSS, (0.25, 99.0), (-0.3, 0.05)),
                ("whitened in the loss, α = 1", f"whitening-a1-k{K}", (0.25, 99.0), (-0.2, 0.2)),
                ("whitened space", HALFWAY_SPACE, (0.05, 99.0), (-0.4, -0.1)),
                ("rotated control", f"rotated-{HALFWAY_IN_LOSS}", (-1.0, 0.1), (-0.02, 9.0)),
                ("permuted control", f"permuted-{HALFWAY_IN_LOSS}", (-1.0, 0.1), (-0.02, 9.0)),
            ),
        ),
    ),
) + tuple(
    (
        place,
        "the paper's variance, α = ½: recovers at most .05 at every rate",
        never_above(f"variance-a0.5-k{K}", "recovered", 0.05),
    )
    for place in ("smollm2", "gemma")
)
"""Of seed 0; written down when the settings of ``OF_SETTINGS`` were known."""


def beside(
    one: tuple[str, str], other: tuple[str, str], measure: str, low: float, high: float
) -> Callable[[Settings], tuple[bool, str]]:
    """A dictionary of one setting relative to a dictionary of another."""

    def found(settings: Settings) -> tuple[bool, str]:
        own, its = (settings[setting][arm][measure] for setting, arm in (one, other))
        return low <= own / its - 1 <= high, f"{100 * (own / its - 1):+.0f} %"

    return found


def _of_space() -> Iterator[tuple[str, str, Any]]:
    """Written down when one seed had shown that the space profits from twice the rate."""
    for place in ("smollm2", "gemma"):
        for words, arm in (("in the loss", HALFWAY_IN_LOSS), ("in the space", HALFWAY_SPACE)):
            yield (
                place,
                f"{words}, begun as at the other place: recovered plants relative to its own "
                + _range(-0.1, 0.1),
                beside(("start", arm), (USUAL_RATE, arm), "recovered", -0.1, 0.1),
            )
    for place, plants, kl, plants_too, kl_too in (
        ("smollm2", (0.1, 99.0), (-0.08, 0.0), (-0.05, 0.15), (-0.1, 0.0)),
        ("smollm2-20", (0.1, 99.0), (-0.08, 0.02), (-0.1, 0.3), (-0.1, 0.02)),
        ("gemma-5", (0.25, 99.0), (-0.7, -0.3), (0.2, 99.0), (-0.7, -0.3)),
        ("gemma", (0.25, 99.0), (-0.3, -0.1), (0.25, 99.0), (-0.35, -0.12)),
        ("gemma-14", (0.4, 99.0), (-0.5, -0.15), (0.3, 99.0), (-0.5, -0.15)),
    ):
        space = ("twice-rate", HALFWAY_SPACE)
        for words, other, bounds in (
            ("plain at the usual rate", (USUAL_RATE, PLAIN), (plants, kl)),
            ("plain at twice the rate", ("twice-rate", PLAIN), (plants_too, kl_too)),
        ):
            for what, measure, (low, high) in zip(
                ("recovered plants", "KL"), ("recovered", "kl"), bounds, strict=True
            ):
                yield (
                    place,
                    f"in the space at twice the rate: {what} relative to {words} "
                    + _range(low, high),
                    beside(space, other, measure, low, high),
                )
    for place, plants in (("smollm2", (0.0, 0.3)), ("gemma", (0.25, 99.0))):
        for what, measure, (low, high) in (
            ("recovered plants", "recovered", plants),
            ("KL", "kl", (-1.0, 0.0)),
        ):
            yield (
                place,
                f"in the space at four times the rate: {what} relative to plain at four times "
                + _range(low, high),
                beside(("four-times", HALFWAY_SPACE), ("four-times", PLAIN), measure, low, high),
            )


def _of_space_further() -> Iterator[tuple[str, str, Any]]:
    """Written down when three seeds had shown, after blocks 9 of SmolLM2 and Gemma, block 20 and
    block 14, that the space at twice the rate has both gains."""
    space = ("twice-rate", HALFWAY_SPACE)
    for place, plants, kl in (
        ("smollm2", 0.12, (-0.06, 0.02)),
        ("smollm2-20", 0.3, (-0.06, 0.02)),
        ("gemma-5", 0.2, (-0.6, -0.3)),
        ("gemma", 0.3, (-0.3, -0.1)),
        ("gemma-14", 0.4, (-0.4, -0.2)),
    ):
        for what, measure, (low, high) in (
            ("recovered plants", "recovered", (plants, 99.0)),
            ("KL", "kl", kl),
        ):
            yield (
                place,
                f"seeds 3 and 4, in the space at twice the rate: {what} relative to plain at the "
                f"usual rate {_range(low, high)}",
                beside(("fresh-twice", HALFWAY_SPACE), ("fresh", PLAIN), measure, low, high),
            )
        for control in ("rotated", "permuted"):
            yield (
                place,
                f"{control} control in the space at twice the rate: recovered plants relative to "
                f"plain at twice {_range(-1, 0.1)}",
                beside(
                    ("twice-rate", f"{control}-{HALFWAY_SPACE}"),
                    ("twice-rate", PLAIN),
                    "recovered",
                    -1,
                    0.1,
                ),
            )
            yield (
                place,
                f"the same: KL relative to the weights that it controls {_range(0, 99)}",
                beside(("twice-rate", f"{control}-{HALFWAY_SPACE}"), space, "kl", 0, 99),
            )
    for place, of_settings in (
        (
            "smollm2",
            (
                ("half a million rows", "half-million", (0.2, 99.0), (-0.12, 0.02)),
                ("one million rows", "million", (0.15, 99.0), (-0.1, 0.02)),
                ("four million rows", "four-million", (0.05, 99.0), (-0.06, 0.04)),
                ("BatchTopK", "batch-topk", (0.1, 99.0), (-0.08, 0.04)),
                ("JumpReLU", "jumprelu", (-0.3, 0.3), (-0.1, 0.1)),
            ),
        ),
        (
            "gemma",
            (("four million rows", "four-million", (0.15, 99.0), (-0.25, -0.05)),),
        ),
    ):
        for words, setting, plants_too, kl in of_settings:
            for what, measure, (low, high) in (
                ("recovered plants", "recovered", plants_too),
                ("KL", "kl", kl),
            ):
                yield (
                    place,
                    f"{words}, in the space at twice the rate: {what} relative to plain at the "
                    f"usual rate {_range(low, high)}",
                    beside(
                        (f"{setting}-twice", HALFWAY_SPACE), (setting, PLAIN), measure, low, high
                    ),
                )


def of_best_rate(
    arm: str, measure: str, low: float, high: float
) -> Callable[[Settings], tuple[bool, str]]:
    """A dictionary at its best rate relative to plain at the usual one."""

    def found(settings: Settings) -> tuple[bool, str]:
        rate = best_rate(settings, arm)
        share = settings[rate][arm][measure] / settings[USUAL_RATE][PLAIN][measure] - 1
        return low <= share <= high, f"{100 * share:+.0f} % ({rate})"

    return found


SHARES = f"shares-{HALFWAY_IN_LOSS}"


def _of_shares() -> Iterator[tuple[str, str, Any]]:
    """The control with as many effective dimensions as the default, before any was trained: it is
    full whitening with a random stretch of the same spread. Of three seeds after blocks 9."""
    usual = (USUAL_RATE, SHARES)
    of_first, full = ("first", SHARES), (USUAL_RATE, f"whitening-a1-k{K}")
    for place, plants, kl in (
        ("smollm2", (-0.15, 0.3), (0.2, 1.0)),
        ("gemma", (0.05, 0.55), (0.05, 0.8)),
    ):
        other = PLAIN if place == "smollm2" else HALFWAY_IN_LOSS
        beside_whom = "plain" if place == "smollm2" else "the default"
        yield (
            place,
            f"as many effective dimensions: recovered plants relative to plain {_range(*plants)}",
            beside(usual, (USUAL_RATE, PLAIN), "recovered", *plants),
        )
        yield (
            place,
            f"the same: KL relative to {beside_whom} {_range(*kl)}",
            beside(usual, (USUAL_RATE, other), "kl", *kl),
        )
    for place in ("smollm2-20", "gemma-5", "gemma-14"):
        yield (
            place,
            "as many effective dimensions (seed 0): recovered plants relative to full whitening "
            + _range(-1, 0.0),
            beside(of_first, full, "recovered", -1, 0.0),
        )
        yield (
            place,
            f"the same: KL relative to full whitening {_range(0.0, 99)}",
            beside(of_first, full, "kl", 0.0, 99),
        )


def _of_space_powers() -> Iterator[tuple[str, str, Any]]:
    """Of seed 0, beside plain of three seeds; written down when α = ½ alone was known."""
    of_smollm2 = {
        0.25: ((0.05, 99.0), (-0.06, 0.02)),
        0.75: ((0.15, 99.0), (-0.02, 0.12)),
        1.0: ((0.1, 99.0), (0.05, 0.4)),
    }
    of_gemma = {
        0.25: ((0.15, 99.0), (-0.45, -0.05)),
        0.75: ((0.35, 99.0), (-0.45, 0.0)),
        1.0: ((0.3, 99.0), (-0.4, 0.4)),
    }
    for place in PLACES:
        for alpha, bounds in (of_smollm2 if place in _SMOLLM2 else of_gemma).items():
            arm = f"whitening-a{alpha:g}-space-k{K}"
            for what, measure, (low, high) in zip(
                ("recovered plants", "KL"), ("recovered", "kl"), bounds, strict=True
            ):
                yield (
                    place,
                    f"in the space at twice the rate, α = {alpha:g}: {what} relative to plain "
                    + _range(low, high),
                    beside(("first-twice", arm), (USUAL_RATE, PLAIN), measure, low, high),
                )


def _of_plain_twice() -> Iterator[tuple[str, str, Any]]:
    """Written down when the other architectures were known in the space at twice the rate, beside
    plain ones at the usual."""
    for place, setting, plants, kl in (
        ("smollm2", "batch-topk", (-0.1, 0.2), (-0.15, -0.02)),
        ("smollm2", "jumprelu", (-0.1, 0.4), (-0.2, -0.03)),
        ("gemma", "batch-topk", (0.4, 99.0), (-0.5, -0.2)),
        ("gemma", "jumprelu", (0.1, 99.0), (-0.6, -0.1)),
    ):
        name = {"batch-topk": "BatchTopK", "jumprelu": "JumpReLU"}[setting]
        for what, measure, (low, high) in (
            ("recovered plants", "recovered", plants),
            ("KL", "kl", kl),
        ):
            twice = f"{setting}-twice"
            yield (
                place,
                f"{name}, in the space at twice the rate: {what} relative to plain at twice "
                + _range(low, high),
                beside((twice, HALFWAY_SPACE), (twice, PLAIN), measure, low, high),
            )


def _of_inverse_space() -> Iterator[tuple[str, str, Any]]:
    """Of three seeds; written down last, when inverse variance as a space was known with rows of
    length 1 alone, where it recovers no more than plain on SmolLM2."""
    for place, plants, kl in (
        ("smollm2", (-0.2, 0.2), (0.0, 0.2)),
        ("gemma", (0.2, 0.9), (-0.4, -0.05)),
    ):
        for what, measure, (low, high) in (("recovered plants", "recovered", plants),
                                           ("KL", "kl", kl)):  # fmt: skip
            yield (
                place,
                f"inverse variance in the space at twice the rate: {what} relative to plain at "
                f"twice {_range(low, high)}",
                beside(("twice-rate", INVERSE_SPACE), ("twice-rate", PLAIN), measure, low, high),
            )


def _of_space_again() -> Iterator[tuple[str, str, Any]]:
    """Relative to plain at the usual rate; written down when seed 0 was known. Of seeds 1 and 2:
    α = ¼, ¾ and 1, then plain, random directions and permuted."""
    powers = [(f"α = {words}", f"whitening-a{_POWERS[words]:g}-space-k{K}") for words in "¼¾1"]
    others = [("plain", PLAIN), ("random directions", f"rotated-{HALFWAY_SPACE}"),
              ("permuted", f"permuted-{HALFWAY_SPACE}")]  # fmt: skip
    first_seed = {
        "smollm2": ((0.0, 0.33), (0.07, 0.07), (0.2, 0.01)),
        "gemma": ((-0.12, 0.2), (-0.21, 0.59), (-0.17, 0.57)),
        "smollm2-20": (
            *((-0.02, 0.34), (0.06, 0.51), (0.16, 0.39)),
            *((0.01, 0.16), (0.06, 0.10), (0.06, 0.09)),
        ),
        "gemma-5": (
            *((-0.35, 0.25), (-0.53, 0.43), (-0.5, 0.39)),
            *((-0.09, 0.05), (0.92, -0.46), (0.49, -0.27)),
        ),
        "gemma-14": (
            *((-0.17, 0.2), (-0.3, 0.87), (-0.27, 0.85)),
            *((0.0, -0.02), (0.23, -0.16), (0.2, -0.06)),
        ),
    }
    for place, first in first_seed.items():
        for (words, arm), found in zip([*powers, *others], first, strict=False):
            for what, measure, low, high in around(*found):
                yield (
                    place,
                    f"seeds 1, 2: {words}, {what} {_range(low, high)}",
                    beside(("again-twice", arm), ("again", PLAIN), measure, low, high),
                )
    arm = f"whitening-a0.75-space-k{K}"  # what --alpha auto chooses on Gemma; of two seeds more
    for place in ("gemma-5", "gemma", "gemma-14"):
        for what, measure, low, high in around(*first_seed[place][1]):
            yield (
                place,
                f"seeds 3, 4: α = ¾, {what} {_range(low, high)}",
                beside(("fresh-twice", arm), ("fresh", PLAIN), measure, low, high),
            )


OF_SPACE = (
    *_of_space(),
    *_of_space_further(),
    *_of_space_powers(),
    *_of_shares(),
    *_of_plain_twice(),
    *_of_inverse_space(),
    *_of_space_again(),
)
LAST_RATED = _of_pairs(
    "at its best rate",
    of_best_rate,
    (
        (
            "smollm2",
            (
                (
                    "whitened in the loss, α = ¼",
                    f"whitening-a0.25-k{K}",
                    (0.05, 9.0),
                    (-0.06, 0.04),
                ),
                ("whitened in the loss, α = ¾", f"whitening-a0.75-k{K}", (0.15, 9.0), (0.03, 0.2)),
                ("whitened, mixed", HALFWAY, (-0.1, 0.5), (-0.06, 0.04)),
                ("inverse variance, mixed", INVERSE, (0.1, 99.0), (0.05, 0.2)),
                ("sensitivity, space", SENSITIVITY, (-0.1, 0.3), (-0.1, 0.0)),
            ),
        ),
        (
            "gemma",
            (
                ("whitened in the loss, α = ¼", f"whitening-a0.25-k{K}", (0.2, 99.0), (-0.2, 0.02)),
                (
                    "whitened in the loss, α = ¾",
                    f"whitening-a0.75-k{K}",
                    (0.35, 99.0),
                    (-0.2, 0.08),
                ),
                ("whitened, mixed", HALFWAY, (0.25, 99.0), (-0.25, 0.0)),
                ("inverse variance, mixed", INVERSE, (0.4, 99.0), (-0.2, 0.2)),
                ("sensitivity, space", SENSITIVITY, (0.15, 99.0), (-0.4, -0.12)),
            ),
        ),
    ),
) + _of_pairs(
    "at best rates",
    of_best_rates,
    tuple(
        (place, (("whitened halfway in the loss", HALFWAY_IN_LOSS, plants, kl),))
        for place, plants, kl in (
            ("smollm2-20", (0.1, 99.0), (-0.05, 0.06)),
            ("gemma-5", (0.2, 99.0), (-0.45, -0.05)),
            ("gemma-14", (0.3, 99.0), (-0.4, -0.05)),
        )
    ),
)
"""Of seed 0; the first are relative to plain at the usual rate, its best by three seeds."""

_IN_TURN = (
    ("inverse variance in the loss", IN_LOSS),
    ("whitened in the loss, α = ¼", f"whitening-a0.25-k{K}"),
    ("whitened in the loss, α = ¾", f"whitening-a0.75-k{K}"),
    ("whitened in the loss, α = 1", f"whitening-a1-k{K}"),
    ("whitened halfway, mixed", HALFWAY),
    ("inverse variance, mixed", INVERSE),
    ("sensitivity, space", SENSITIVITY),
)
_ELSEWHERE: dict[str, tuple[tuple[Bounds, Bounds], ...]] = {
    "smollm2-20": (
        ((0.15, 99.0), (-0.05, 0.1)),
        ((0.0, 0.5), (-0.06, 0.06)),
        ((0.2, 99.0), (0.0, 0.2)),
        ((0.25, 99.0), (0.08, 0.4)),
        ((0.05, 0.6), (-0.06, 0.06)),
        ((0.1, 99.0), (0.03, 0.25)),
        ((-0.15, 0.35), (-0.1, 0.0)),
    ),
    "gemma-5": (
        ((0.25, 99.0), (-0.5, -0.2)),
        ((0.15, 99.0), (-0.35, -0.08)),
        ((0.25, 99.0), (-0.4, -0.08)),
        ((0.25, 99.0), (-0.45, -0.1)),
        ((0.25, 99.0), (-0.5, -0.2)),
        ((0.25, 99.0), (-0.55, -0.25)),
        ((0.15, 99.0), (-0.5, -0.25)),
    ),
    "gemma-14": (
        ((0.5, 99.0), (-0.4, -0.12)),
        ((0.15, 99.0), (-0.3, -0.05)),
        ((0.5, 99.0), (-0.35, -0.08)),
        ((0.5, 99.0), (-0.35, 0.0)),
        ((0.4, 99.0), (-0.4, -0.12)),
        ((0.5, 99.0), (-0.4, -0.12)),
        ((0.35, 99.0), (-0.45, -0.2)),
    ),
}
_CONTROLLED = tuple(
    (f"{control} control", f"{control}-{HALFWAY_IN_LOSS}", (-1.0, 0.1), (-0.02, 9.0))
    for control in ("rotated", "permuted")
)
RATED_ELSEWHERE = _of_pairs(
    "at best rates",
    of_best_rates,
    tuple(
        (
            place,
            (
                *((*arm, *bounds) for arm, bounds in zip(_IN_TURN, asked, strict=True)),
                *_CONTROLLED,
            ),
        )
        for place, asked in _ELSEWHERE.items()
    ),
) + tuple(
    (
        place,
        "the paper's variance, α = ½: recovers at most .05 at every rate",
        never_above(f"variance-a0.5-k{K}", "recovered", 0.05),
    )
    for place in _ELSEWHERE
)
"""Of seed 0, each at the rate with most CE recovered; written down when their usual rate was known,
and all rates of blocks 9."""

OF_DECODER_ROWS = tuple(
    (place, words, beside(("rows" if of_rows else "", HALFWAY_IN_LOSS),
                          ("rows" if of_rows else "", PLAIN), measure, low, high))
    for place in _SMOLLM2[:1]
    for of_rows, measure, low, high in (
        (False, "recovered", 0.1, 99.0),
        (False, "kl", -0.04, 0.06),
        (True, "f1", -0.05, 99.0),
    )
    for words in [
        ("planted along decoder rows: mean F1" if of_rows else f"of all plants: {measure}")
        + f" relative to plain {_range(low, high)}"
    ]
)  # fmt: skip
"""Written down before any was planted. The latents that these rows come from fire for features of
the stream, so a plant along one of them is mixed with that feature."""

USUAL_ROWS = "usual-rows"
OF_USUAL_ROWS = (
    *(
        (place, f"without strong rows, {words}: {what} relative to plain {_range(low, high)}",
         beside((USUAL_ROWS, arm), (USUAL_ROWS, PLAIN), measure, low, high))
        for place, kl_in_loss, kl_in_space in (
            ("gemma", (-0.12, 0.04), (-0.3, -0.08)),
            ("gemma-5", (-0.3, -0.08), (-0.55, -0.25)),
        )
        for words, arm, kl in (
            ("in the loss", HALFWAY_IN_LOSS, kl_in_loss),
            ("in the space at twice the rate", HALFWAY_SPACE, kl_in_space),
        )
        for measure, what, (low, high) in (
            ("recovered", "recovered plants", (0.2, 99.0)),
            ("kl", "KL", kl),
        )
    ),
    *(
        (place, f"plain: recovered plants without them relative to with them {_range(-0.2, 0.2)}",
         beside((USUAL_ROWS, PLAIN), ("", PLAIN), "recovered", -0.2, 0.2))
        for place in ("gemma", "gemma-5")
    ),
)  # fmt: skip
"""Written down when the dictionaries that saw these rows were known, and before the first that did
not."""

_RANDOM_IN_LOSS, _FULLY_TWICE = f"random-a1-k{K}", f"whitening-a2-k{K}"
OF_LOSS_AGAIN = (
    *(
        (place, words, found)
        for place in PLACES
        for words, found in (
            (
                "random weights, in the loss: at most 10 % more of the plants recovered than plain",
                change(_RANDOM_IN_LOSS, "recovered", -1, 0.1),
            ),
            ("the same: KL no lower than plain (−2 %)", change(_RANDOM_IN_LOSS, "kl", -0.02, 99)),
        )
    ),
    *(
        (place, words, found)
        for place in ("smollm2-20", "gemma-5", "gemma-14")
        for words, found in (
            ("α = 2, in the loss: KL at least three times that of plain",
             change(_FULLY_TWICE, "kl", 2.0, 99)),
            ("the same: FVU at least twice that of plain", change(_FULLY_TWICE, "fvu", 1.0, 99)),
        )
    ),
)  # fmt: skip
"""Written down when random weights were known as `mixed`, and α = 2 after blocks 9; of Gemma's
sites, once both were known at those of SmolLM2."""

RANDOM_RATED = tuple(
    (place, f"random weights in the loss, {words} at every rate", found)
    for place in PLACES
    for words, found in (
        (
            "at most 15 % more of the plants recovered than plain",
            at_every_rate(_RANDOM_IN_LOSS, "recovered", -1, 0.15),
        ),
        (
            "KL no lower than plain (−2 %)",
            at_every_rate(_RANDOM_IN_LOSS, "kl", -0.02, 99),
        ),
    )
)
"""Of seed 0; written down when the usual rate was known, and all other weightings at all rates."""

_OF_EIGHTHS = {
    "smollm2": (((-0.05, 0.25), (-0.06, 0.03)), ((0.08, 99.0), (-0.05, 0.05))),
    "gemma": (((0.05, 99.0), (-0.2, 0.02)), ((0.2, 99.0), (-0.25, 0.03))),
    "smollm2-20": (((-0.1, 0.3), (-0.06, 0.03)), ((0.08, 99.0), (-0.06, 0.05))),
    "gemma-5": (((0.05, 99.0), (-0.3, -0.02)), ((0.18, 99.0), (-0.45, -0.08))),
    "gemma-14": (((0.05, 99.0), (-0.25, -0.01)), ((0.25, 99.0), (-0.4, -0.06))),
}


def _eighths(*bounds: tuple[Bounds, Bounds]) -> list[Asked]:
    """What is asked of the powers ⅛ and ⅜: bounds of recovered plants and of KL."""
    return [
        (f"whitened in the loss, α = {words}", f"whitening-a{_POWERS[words]:g}-k{K}", *of_both)
        for words, of_both in zip("⅛⅜", bounds, strict=True)
    ]


def _of_eighths(place: str) -> tuple[str, list[Asked]]:
    return place, _eighths(*_OF_EIGHTHS[place])


_RATED, _UNRATED = ("smollm2", "gemma"), ("smollm2-20", "gemma-5", "gemma-14")
EIGHTHS = _of_pairs("seed 0", change, list(map(_of_eighths, _UNRATED)))
"""The last two powers, of seed 0; written down when all others were known at all rates. They were
to be trained at three rates everywhere, and were so after blocks 9 alone at first."""
EIGHTHS_RATED = _of_pairs(
    "at best rates", of_best_rates, list(map(_of_eighths, _RATED))
) + _of_pairs(
    "at every rate",
    at_every_rate,
    [
        ("smollm2-20", _eighths(((-0.05, 0.35), (-0.06, 0.05)), ((0.1, 99.0), (-0.06, 0.08)))),
        ("gemma-5", _eighths(((0.02, 0.35), (-0.2, 0.02)), ((0.1, 99.0), (-0.4, -0.02)))),
        ("gemma-14", _eighths(((0.02, 0.35), (-0.2, 0.02)), ((0.25, 99.0), (-0.35, -0.06)))),
    ],
)
"""Beside blocks 9: written down when the usual rate was known there, and all three after blocks
9."""

_CONTROLS = (
    ("as many effective dimensions, in the loss", SHARES),
    ("whitened in the loss, α = 2", _FULLY_TWICE),
    ("permuted inverse variance in the loss", PERMUTED_IN_LOSS),
    ("rotated control, mixed", ROTATED),
    ("permuted control, mixed", _PERMUTED),
    ("permuted inverse variance, mixed", _PERMUTED_INVERSE),
)
CONTROLS_RATED = _of_pairs(
    "at every rate",
    at_every_rate,
    [
        (
            place,
            [(*arm, *bounds) for arm, bounds in zip(_CONTROLS, asked, strict=True)],
        )
        for place, asked in {
            "smollm2": (
                ((-0.1, 0.5), (0.15, 0.9)),
                ((-0.6, 0.2), (1.0, 99.0)),
                ((-1.0, 0.2), (-0.01, 99.0)),
                ((-1.0, 0.15), (-0.02, 99.0)),
                ((-1.0, 0.2), (-0.02, 99.0)),
                ((-1.0, 0.25), (0.0, 99.0)),
            ),
            "gemma": (
                ((-0.6, 0.3), (0.4, 99.0)),
                ((-0.2, 0.7), (1.0, 99.0)),
                ((-1.0, 0.25), (0.0, 99.0)),
                ((-1.0, 0.0), (0.1, 99.0)),
                ((-1.0, 0.1), (0.0, 99.0)),
                ((-1.0, 0.25), (0.0, 99.0)),
            ),
        }.items()
    ],
)
"""Of seed 0, beside plain ones of the same rate; written down when the usual rate was known, and
all other weightings at all rates."""

_MIXED_POWERS = (("whitened, mixed, α = ¼", _WEAKER), ("whitened, mixed, α = ¾", _STRONGER))
_POWERS_AND_CONTROLS = (*_MIXED_POWERS, *_CONTROLS[:2], _CONTROLS[3])
MIXED_RATED = _of_pairs(
    "at every rate",
    at_every_rate,
    [
        (
            place,
            [
                (*arm, *bounds)
                for arm, bounds in zip(
                    _MIXED_POWERS if place in _RATED else _POWERS_AND_CONTROLS, asked, strict=True
                )
            ],
        )
        for place, asked in {
            "smollm2": (((-0.1, 0.3), (-0.07, 0.05)), ((-0.1, 0.5), (-0.03, 0.12))),
            "gemma": (((0.1, 0.6), (-0.2, 0.0)), ((0.4, 0.9), (-0.25, 0.15))),
            "smollm2-20": (
                ((0.0, 0.4), (-0.05, 0.05)),
                ((0.15, 0.6), (0.0, 0.15)),
                ((-0.1, 0.6), (0.15, 0.9)),
                ((-0.3, 0.6), (1.0, 99.0)),
                ((-1.0, 0.15), (-0.02, 99.0)),
            ),
            "gemma-5": (
                ((0.15, 0.55), (-0.4, -0.1)),
                ((0.25, 0.7), (-0.5, -0.2)),
                ((-0.6, 0.3), (0.4, 99.0)),
                ((-0.5, 0.6), (1.0, 99.0)),
                ((-1.0, 0.0), (0.1, 99.0)),
            ),
            "gemma-14": (
                ((0.15, 0.55), (-0.3, -0.05)),
                ((0.55, 1.1), (-0.4, -0.1)),
                ((0.0, 1.2), (0.0, 1.0)),
                ((-0.5, 1.1), (1.0, 99.0)),
                ((-1.0, 0.1), (0.03, 99.0)),
            ),
        }.items()
    ],
)
"""`mixed` at further powers, and beside blocks 9 the controls: written down when the usual rate was
known, and the controls at all rates after blocks 9."""

_IN_SPACE = (
    *((f"as a space, α = {name}", f"whitening-a{_POWERS[name]:g}-space-k{K}") for name in "¼¾1"),
    ("rotated control, as a space", f"rotated-{HALFWAY_SPACE}"),
    ("permuted control, as a space", f"permuted-{HALFWAY_SPACE}"),
    ("random weights, mixed", f"random-a1-mixed-k{K}"),
)
_FULLY_MIXED = ("whitened, mixed, α = 1", f"whitening-a1-mixed-k{K}")
SPACE_RATED = _of_pairs(
    "at every rate",
    at_every_rate,
    [
        (
            place,
            [
                (*arm, *bounds)
                for arm, bounds in zip(
                    (*_IN_SPACE, _FULLY_MIXED) if place == "gemma-14" else _IN_SPACE,
                    asked,
                    strict=True,
                )
            ],
        )
        for place, asked in {
            "smollm2": (
                ((-0.25, 0.15), (-0.07, 0.04)),
                ((-0.5, 0.0), (-0.03, 0.12)),
                ((-0.6, 0.0), (0.05, 0.35)),
                ((-0.35, 0.1), (0.0, 99.0)),
                ((-0.35, 0.1), (-0.01, 99.0)),
                ((-1.0, 0.0), (0.5, 99.0)),
            ),
            "gemma": (
                ((0.05, 0.45), (-0.25, -0.08)),
                ((0.15, 0.8), (-0.35, -0.1)),
                ((0.1, 0.8), (-0.3, 0.0)),
                ((-1.0, 0.0), (0.1, 99.0)),
                ((-1.0, 0.05), (0.0, 99.0)),
                ((-1.0, 0.0), (0.5, 99.0)),
            ),
            "smollm2-20": (
                ((-0.05, 0.3), (-0.06, 0.03)),
                ((-0.05, 0.45), (-0.02, 0.15)),
                ((-0.1, 0.4), (0.0, 0.3)),
                ((-0.4, 0.1), (-0.02, 99.0)),
                ((-0.4, 0.1), (-0.02, 99.0)),
                ((-1.0, 0.0), (0.5, 99.0)),
            ),
            "gemma-5": (
                ((0.0, 0.4), (-0.55, -0.2)),
                ((0.1, 0.5), (-0.65, -0.35)),
                ((0.05, 0.5), (-0.65, -0.3)),
                ((-1.0, 0.0), (0.2, 99.0)),
                ((-1.0, 0.0), (0.1, 99.0)),
                ((-1.0, 0.0), (0.5, 99.0)),
            ),
            "gemma-14": (
                ((0.05, 0.5), (-0.4, -0.1)),
                ((0.3, 1.1), (-0.45, -0.15)),
                ((0.2, 1.1), (-0.4, -0.05)),
                ((-1.0, 0.05), (0.0, 99.0)),
                ((-1.0, 0.1), (0.0, 99.0)),
                ((-1.0, 0.0), (0.5, 99.0)),
                ((0.6, 1.3), (-0.4, 0.05)),
            ),
        }.items()
    ],
)
"""Of seed 0, beside plain ones of the same rate: written down when twice the usual rate was known
of the spaces, the usual one of `mixed`, and halfway whitening as a space at all rates. After block
14 of Gemma alone `mixed` has α = 1."""
