"""Compares every rule with plain dictionaries of the same k and seeds, and with its control.

KL, detection of latents and spill decide, the last two without latents that fire on more than a
tenth of the tokens, which sway them, whatever they stand for; of planted features their F1 as well.
Each gets a verdict of its own: a rule that lowers KL may cost what another measure shows.

Better means better than plain and better than the rule's control, because weights that know nothing
of the dimensions may help as well: the larger p of the two differences counts. Holm's correction
covers all rules, k and deciding measures of the study.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from llm_wsae.lab.studies.inference import Estimate, compared
from llm_wsae.lab.studies.plan import PLAIN
from llm_wsae.lab.studies.results import Result, deciding
from llm_wsae.statistics.measures import STUDIED
from llm_wsae.statistics.uncertainty import LEVEL, holm

BETTER, WORSE, NOT_SHOWN = "better", "worse", "not shown"
_SIGNIFICANT = 1 - LEVEL
_Kind = tuple[str, int]  # a label and a k
_BySeed = Mapping[int, Result]


@dataclass(frozen=True)
class Compared:
    """Weights of one name and k, over all their seeds, beside plain dictionaries of that k."""

    label: str
    k: int
    control: str | None
    seeds: tuple[int, ...]
    """Those that have a plain dictionary of that k."""
    effects: dict[str, Estimate]
    """Differences from the plain dictionaries, by measure."""
    against_control: dict[str, Estimate]
    """Differences from the control's dictionaries, by measure."""
    adjusted: dict[str, float]
    """p of the deciding measures, corrected for everything that was tried; none for a control."""
    verdicts: dict[str, str]
    """By deciding measure; none for a control."""

    @property
    def name(self) -> str:
        """Of its row in tables."""
        return f"{self.label}, k {self.k}"


def compare(results: Sequence[Result]) -> list[Compared]:
    """Every label and k except plain ones and baselines, in the order of the results."""
    groups: dict[_Kind, dict[int, Result]] = defaultdict(dict)
    for result in results:
        if not result.is_baseline:
            groups[result.label, result.k][result.seed] = result
    measures = deciding(results)
    found = [_beside(kind, groups) for kind in groups if kind[0] != PLAIN]
    adjusted = _adjusted(found, measures)
    return [_judged(one, adjusted) for one in found]


def _beside(kind: _Kind, groups: Mapping[_Kind, _BySeed]) -> Compared:
    label, k = kind
    own, plain = groups[kind], groups.get((PLAIN, k), {})
    control = next(iter(own.values())).control
    of_control = groups.get((control, k), {}) if control is not None else {}
    seeds = tuple(sorted(own.keys() & plain.keys()))
    return Compared(
        label, k, control, seeds, _differences(own, plain), _differences(own, of_control), {}, {}
    )


def _differences(own: _BySeed, other: _BySeed) -> dict[str, Estimate]:
    found = {}
    for measure in STUDIED:
        values = ({s: r.values[measure] for s, r in one.items() if measure in r.values}
                  for one in (own, other))  # fmt: skip
        difference = compared(*values)
        if difference is not None:
            found[measure] = difference
    return found


def _adjusted(found: Iterable[Compared], measures: Sequence[str]) -> dict[str, dict[str, float]]:
    """Row → measure → p, after Holm's correction over all."""
    tests = {
        (one.name, measure): _p(one, measure)
        for one in found
        if one.control is not None
        for measure in measures
        if measure in one.effects
    }
    corrected: dict[str, dict[str, float]] = defaultdict(dict)
    for (name, measure), p in zip(tests, holm(list(tests.values())), strict=True):
        corrected[name][measure] = p
    return corrected


def _p(one: Compared, measure: str) -> float:
    """Of no difference from plain, or of a gain that the control has, too."""
    effect, against = one.effects[measure], one.against_control.get(measure)
    if not is_gain(measure, effect):
        return effect.p
    if against is None or not is_gain(measure, against):
        return 1.0
    return max(effect.p, against.p)


def is_gain(measure: str, estimate: Estimate) -> bool:
    """Whether a difference is in the better direction."""
    sign = -1 if STUDIED[measure].lower_is_better else 1
    return sign * estimate.difference > 0


def _judged(one: Compared, adjusted: Mapping[str, dict[str, float]]) -> Compared:
    p = adjusted.get(one.name, {})
    verdicts = {}
    for measure in p:
        side = BETTER if is_gain(measure, one.effects[measure]) else WORSE
        verdicts[measure] = side if p[measure] < _SIGNIFICANT else NOT_SHOWN
    return replace(one, adjusted=p, verdicts=verdicts)
