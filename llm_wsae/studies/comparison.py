"""Compares every rule with the plain curve and with its control, at equal cross-entropy.

A rule is compared at its dictionaries' own cross-entropy, seed by seed, over all its k. Two
measures decide the verdict, both without latents that fire on more than a tenth of the tokens,
which sway them, whatever they stand for: detection of latents, and spill, what the five other
concepts that are hit hardest lose with a concept. (Selectivity is nearly the concept's own loss. It
decides in place of spill where results are from before that was measured.)

Holm's correction covers all rules of the study and both measures, after each p was raised by what
its number of seeds may spend (``stopping``). Better also has to mean better than the rule's
control, corrected in the same way, because weights that know nothing of the dimensions may help as
well.

The curve is compared with itself, too: a plain dictionary with the curve of the others. Where that
is far from 0, the curve is too coarse for differences of that size.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from llm_wsae.studies.curve import Curve, Value
from llm_wsae.studies.inference import LEVEL, Estimate, Name, adjusted, estimates
from llm_wsae.studies.plan import PLAIN
from llm_wsae.studies.results import (
    EXPLAINED,
    FAMILY,
    MEASURES,
    PLANTED,
    STRATUM,
    Result,
    deciding,
)
from llm_wsae.studies.stopping import spent

BETTER = "better"
NO_BETTER_THAN_CONTROL = "no better than its control"
UNCONTROLLED = "better, uncontrolled"
LOOKED_AGAIN = "not decided"
INDISTINGUISHABLE = "indistinguishable"
MIXED = "mixed"
WORSE = "worse"
OUTSIDE = "not comparable"
ONE_SEED = "one seed"
UNMEASURED = "not measured"
CONTROL = "control"
VERDICTS = {
    BETTER: "better than the plain curve at equal CE, and better than its control",
    NO_BETTER_THAN_CONTROL: (
        "better than the plain curve at equal CE, but no better than its control"
    ),
    UNCONTROLLED: "better than the plain curve at equal CE, but its control cannot be compared",
    LOOKED_AGAIN: (
        "not decided: better than the plain curve at equal CE, and its control says nothing "
        "against it, but it or the curve was given more k after a report on as many seeds; more "
        "seeds decide"
    ),
    INDISTINGUISHABLE: "indistinguishable from the plain curve at equal CE",
    MIXED: "better than the plain curve at equal CE in one measure, worse in the other",
    WORSE: "worse than the plain curve at equal CE",
    OUTSIDE: "not comparable: at no k do all its seeds lie within the plain curve's CE",
    ONE_SEED: "not judged: a verdict needs two seeds",
    UNMEASURED: "not measured: too few latents fire often enough, and there is no concept to probe",
}
_SIGNIFICANT = 1 - LEVEL


def verdict_of(
    effects: Mapping[str, Estimate],
    corrected: Mapping[str, float],
    against: Mapping[str, Estimate],
    of_control: Mapping[str, float],
) -> str:
    """The word for a rule's differences, by measure: from the plain curve (``effects``, with their
    corrected p) and from the control (``against``, with theirs)."""
    found = [measure for measure, p in corrected.items() if p < _SIGNIFICANT]
    better = [measure for measure in found if _is_gain(measure, effects[measure])]
    if len(better) < len(found):
        return MIXED if better else WORSE
    if not better:
        return INDISTINGUISHABLE
    tested = [measure for measure in better if measure in of_control]
    if not tested:
        return UNCONTROLLED
    passed = any(_is_gain(m, against[m]) and of_control[m] < _SIGNIFICANT for m in tested)
    return BETTER if passed else NO_BETTER_THAN_CONTROL


def _is_gain(measure: str, estimate: Estimate) -> bool:
    if MEASURES[measure].lower_is_better:
        return estimate.difference < 0
    return estimate.difference > 0


@dataclass(frozen=True)
class Compared:
    """Weights of one name, over all their k and seeds, compared with the plain curve."""

    label: str
    rule: str
    control: str | None
    ks: tuple[int, ...]
    """Those that can be compared: within the curve on every seed."""
    seeds: tuple[int, ...]
    ce_recovered: dict[int, float]
    """By k, mean over seeds."""
    ce_change: dict[int, float]
    """By k, difference from the plain dictionaries of the same k and seeds, if there are any."""
    effects: dict[str, Estimate]
    """Difference from the plain curve at equal CE, by measure."""
    against_control: dict[str, Estimate]
    """Difference of those differences from the control's, by measure."""
    families: dict[str, float]
    """Difference in selectivity, by family of concepts."""
    strata: dict[str, Estimate]
    """Difference in mean F1 from the plain curve at equal CE, by kind of direction, if features
    were planted."""
    adjusted: dict[str, float]
    """p of the deciding measures, corrected for looks and for everything tried; none for a
    control."""
    verdict: str

    @property
    def is_control(self) -> bool:
        """Whether it is a control or drawn at random, so that no verdict is passed on it."""
        return self.verdict == CONTROL


def compare(results: Sequence[Result], looked_again: Collection[str] = ()) -> list[Compared]:
    """Every label except the plain one and baselines, in the order of the results, with its
    verdict. None of ``looked_again``, which were given more k after a look (``stopping.k_added``),
    is called better, controlled or not; if the plain one was, none at all."""
    curves, groups = _curves(results), _groups(results)
    comparable = {label: _comparable(group, curves) for label, group in groups.items()}
    beside = {
        label: _beside([(1.0, [r for r in groups[label] if r.point.k in ks])], curves)
        for label, ks in comparable.items()
    }
    claims = [label for label, group in groups.items() if group[0].is_claim]
    effects = _by_measure(beside, apart=groups.keys() - claims)
    # each of these contains the random draw of a control
    against = _by_measure(_against_controls(groups, comparable, curves), apart=groups.keys())
    measures = deciding(results)
    corrected, of_control = (_adjusted(found, claims, measures) for found in (effects, against))
    found, known = [], MEASURES | PLANTED | EXPLAINED
    for label, group in groups.items():
        own, theirs = corrected.get(label, {}), of_control.get(label, {})
        verdict = verdict_of(effects[label], own, against.get(label, {}), theirs)
        if verdict in (BETTER, UNCONTROLLED) and {label, PLAIN} & {*looked_again}:
            verdict = LOOKED_AGAIN
        seeds = tuple(sorted({r.point.seed for r in group}))
        if not comparable[label]:
            verdict = OUTSIDE
        elif not own:
            verdict = UNMEASURED if len(seeds) > 1 else ONE_SEED
        families = {
            name.removeprefix(FAMILY): estimate.difference
            for name, estimate in effects[label].items()
            if name.startswith(FAMILY)
        }
        ce, change = _cross_entropy(group, results)
        found.append(
            Compared(
                label=label,
                rule=group[0].rule,
                control=group[0].control,
                ks=comparable[label],
                seeds=seeds,
                ce_recovered=ce,
                ce_change=change,
                effects={m: e for m, e in effects[label].items() if m in known},
                against_control={m: e for m, e in against.get(label, {}).items() if m in known},
                families=families,
                strata={
                    name.removeprefix(STRATUM): estimate
                    for name, estimate in effects[label].items()
                    if name.startswith(STRATUM)
                },
                adjusted=own,
                verdict=verdict if label in claims else CONTROL,
            )
        )
    return found


def curve_against_itself(results: Sequence[Result]) -> dict[int, dict[str, Estimate]]:
    """By k, the curve's ends excluded: plain dictionaries against the curve of the others."""
    curves = _curves(results)
    plain = [result for result in results if result.label == PLAIN]
    beside = {}
    for k in sorted({result.point.k for result in plain})[1:-1]:
        rest = {seed: curve.without(k) for seed, curve in curves.items()}
        group = [r for r in plain if r.point.k == k]
        if _comparable(group, rest):
            beside[k] = _beside([(1.0, group)], rest)
    return {k: found for k, found in _by_measure(beside).items() if found}


def _curves(results: Iterable[Result]) -> dict[int, Curve]:
    points = defaultdict(list)
    for result in results:
        if result.label == PLAIN:
            points[result.point.seed].append(result.point)
    return {seed: Curve(own) for seed, own in points.items()}


def _groups(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups = defaultdict(list)
    for result in results:
        if result.label != PLAIN and not result.is_baseline:
            groups[result.label].append(result)
    return dict(groups)


def _comparable(group: Sequence[Result], curves: Mapping[int, Curve]) -> tuple[int, ...]:
    """The k that every seed has, and at which each lies within its curve."""
    seeds = {result.point.seed for result in group}
    inside: dict[int, set[int]] = defaultdict(set)
    for result in group:
        curve = curves.get(result.point.seed)
        if curve is not None and result.point in curve:
            inside[result.point.k].add(result.point.seed)
    return tuple(sorted(k for k, there in inside.items() if there == seeds))


def _against_controls(
    groups: Mapping[str, Sequence[Result]],
    comparable: Mapping[str, tuple[int, ...]],
    curves: Mapping[int, Curve],
) -> dict[str, dict[str, dict[int, Value]]]:
    """Label → measure → seed → its difference less that of its control, over the k at which both
    can be compared."""
    found = {}
    for label, group in groups.items():
        control = group[0].control
        if control is not None and control in groups:
            shared = set(comparable[label]) & set(comparable[control])
            own, other = (
                [r for r in groups[one] if r.point.k in shared] for one in (label, control)
            )
            found[label] = _beside([(1.0, own), (-1.0, other)], curves)
    return found


def _adjusted(
    found: Mapping[str, Mapping[str, Estimate]], claims: Iterable[str], measures: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Label → measure → p after what its look spends, and Holm's correction over all."""
    corrected: dict[str, dict[str, float]] = defaultdict(dict)
    tests = {
        (label, measure): spent(found[label][measure].p, len(found[label][measure].by_seed))
        for label in claims
        for measure in measures
        if measure in found.get(label, {})
    }
    for (label, measure), p in adjusted(tests).items():
        corrected[label][measure] = p
    return dict(corrected)


def _beside(
    groups: Sequence[tuple[float, Sequence[Result]]], curves: Mapping[int, Curve]
) -> dict[str, dict[int, Value]]:
    """Measure → seed → Σ weight · mean difference from the curve, over the groups, each of which
    has the same k on all its seeds; on the seeds that all have."""
    found: dict[str, dict[int, Value]] = defaultdict(dict)
    for seed in sorted(set.intersection(*({r.point.seed for r in own} for _, own in groups))):
        points = []
        for weight, group in groups:
            own = [result.point for result in group if result.point.seed == seed]
            points += [(weight / len(own), point) for point in own]
        for measure in dict.fromkeys(name for _, point in points for name in point.values):
            value = curves[seed].beside(points, measure)
            if value is not None:
                found[measure][seed] = value
    return dict(found)


def _by_measure(
    beside: Mapping[Name, Mapping[str, Mapping[int, Value]]], apart: Collection[Name] = ()
) -> dict[Name, dict[str, Estimate]]:
    """Label → measure → estimate, from label → measure → seed → difference."""
    found: dict[Name, dict[str, Estimate]] = {label: {} for label in beside}
    for measure in dict.fromkeys(name for own in beside.values() for name in own):
        of_measure = {label: own[measure] for label, own in beside.items() if measure in own}
        for label, estimate in estimates(of_measure, apart).items():
            found[label][measure] = estimate
    return found


def _cross_entropy(
    group: Sequence[Result], results: Sequence[Result]
) -> tuple[dict[int, float], dict[int, float]]:
    """CE recovered by k, and how far it lies above that of plain dictionaries of the same k."""
    plain = {(r.point.k, r.point.seed): r.ce_recovered for r in results if r.label == PLAIN}
    ce, change = {}, {}
    for k in sorted({result.point.k for result in group}):
        own = {r.point.seed: r.ce_recovered for r in group if r.point.k == k}
        ce[k] = sum(own.values()) / len(own)
        if all((k, seed) in plain for seed in own):
            change[k] = ce[k] - sum(plain[k, seed] for seed in own) / len(own)
    return ce, change
