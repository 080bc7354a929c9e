"""The tables of a study's report, as rows of cells; the first row is the head."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llm_wsae.statistics.uncertainty import over_seeds_and_items
from llm_wsae.studies.comparison import Compared
from llm_wsae.studies.consistency import Agreements
from llm_wsae.studies.inference import Estimate
from llm_wsae.studies.plan import PLAIN
from llm_wsae.studies.results import EXPLAINED, MEASURES, PLANTED, Measure, Result

Rows = list[list[str]]


@dataclass(frozen=True)
class Table:
    """A table under its title."""

    title: str
    rows: Rows
    words: str | None = None
    """What to know before reading it."""


_SHOWN = ("detection", "no_token", "purity", "coherence", "spill", "selectivity",
          "selectivity_letters", "probe_1", "probe_5")  # fmt: skip
_NONE = "–"


def dictionary_rows(results: Sequence[Result], agreements: Agreements) -> Rows:
    """Means over seeds of every label and k."""
    rows = [["weights", "k", "seeds", "L0", "L0 not dense", "CE recovered", "FVU", "KL", "dense %",
             "dead %", "scored %", *(MEASURES[m].title for m in _SHOWN)]]  # fmt: skip
    if agreements:
        rows[0].append("PW-MCC")
    for (label, k), own in _grouped(results).items():
        shares = {s: 100 * sum(r.shares[s] for r in own) / len(own) for s in own[0].shares}
        rows.append(
            [
                label,
                str(k),
                str(len(own)),
                f"{sum(r.shares['l0'] for r in own) / len(own):.1f}",
                f"{sum(r.density for r in own) / len(own):.1f}",
                f"{sum(r.ce_recovered for r in own) / len(own):.4f}",
                f"{sum(r.fvu for r in own) / len(own):.4f}",
                f"{sum(r.kl for r in own) / len(own):.4f}",
                *(f"{shares[f'{s}_share']:.1f}" for s in ("dense", "dead", "eligible")),
                *(_mean(own, measure) for measure in _SHOWN),
            ]
        )
        if agreements:
            rows[-1].append(agreement_text(agreements, label, k))
    return rows


def difference_rows(
    compared: Sequence[Compared],
    at_equal_kl: Sequence[Compared],
    at_equal_density: Sequence[Compared],
    deciding: Sequence[str],
    everything: bool = False,
) -> Rows:
    """Differences from the plain curve: the deciding measures and selectivity, or all of them."""
    shown = list(MEASURES if everything else dict.fromkeys((*deciding, "selectivity")))
    titles = [MEASURES[m].title for m in shown]
    equal = [f"{measure}, equal {what}" for what in ("KL", "density") for measure in deciding]
    rows = [["weights", "verdict", "CE at same k", *titles, *equal]]
    for one, *others in zip(compared, at_equal_kl, at_equal_density, strict=True):
        change = ", ".join(f"{c:+.4f}" for c in one.ce_change.values()) or _NONE
        cells = [estimate_text(one.effects.get(measure)) for measure in shown]
        cells += [estimate_text(o.effects.get(m)) for o in others for m in deciding]
        rows.append([one.label, one.verdict, change, *cells])
    return rows


def kl_table(results: Sequence[Result]) -> list[Table]:
    """KL of each label and k beside the plain dictionaries of the same k and seeds, if any."""
    plain = {(r.point.k, r.point.seed): r.kl_per_document for r in results if r.label == PLAIN}
    rows = [["weights", "k", "seeds", "KL beside plain"]]
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        known = (result.point.k, result.point.seed) in plain
        is_weighted = result.label != PLAIN and not result.is_baseline
        if known and is_weighted and result.kl_per_document:
            groups.setdefault((result.label, result.point.k), []).append(result)
    for (label, k), own in groups.items():
        by, (low, high) = over_seeds_and_items(
            np.array([r.kl_per_document for r in own]),
            np.array([plain[k, r.point.seed] for r in own]),
        )
        change = f"{100 * by:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
        rows.append([label, str(k), str(len(own)), change])
    words = (
        "The share by which KL is higher (+) or lower (−), with its 95 % interval over documents "
        "and seeds, which are crossed."
    )
    return [Table("KL beside plain dictionaries of the same k", rows, words)] if groups else []


def control_rows(compared: Sequence[Compared]) -> Rows:
    """Differences from the control, of those that have one."""
    rows = [["weights", "control", *(measure.title for measure in MEASURES.values())]]
    for one in compared:
        if one.against_control:
            cells = [estimate_text(one.against_control.get(measure)) for measure in MEASURES]
            rows.append([one.label, one.control or "", *cells])
    return rows


def planted_rows(results: Sequence[Result]) -> Rows:
    """What every label and k recovers of the planted features, means over seeds."""
    rows = [["weights", "k", "seeds", *(m.title for m in PLANTED.values()), "L_GT"]]
    for (label, k), own in _with_plants(results).items():
        cells = [_mean(own, measure) for measure in PLANTED]
        cells.append(_mean_text([(r.planted or {})["l_gt"] for r in own], 4))
        rows.append([label, str(k), str(len(own)), *cells])
    return rows


def strata_rows(results: Sequence[Result], key: str) -> Rows:
    """Mean F1 by group of planted features; ``key`` is "by_stratum" or "by_strength"."""
    groups = _with_plants(results)
    names = list(dict.fromkeys(n for own in groups.values() for n in (own[0].planted or {})[key]))
    rows = [["weights", "k", *names]]
    for (label, k), own in groups.items():
        of_seeds = [[(r.planted or {})[key][name]["f1"] for r in own] for name in names]
        rows.append([label, str(k), *(_mean_text(f1, 3) for f1 in of_seeds)])
    return rows


def strata_difference_rows(compared: Sequence[Compared]) -> Rows:
    """Differences in mean F1 from the plain curve, by kind of direction."""
    names = list(dict.fromkeys(name for one in compared for name in one.strata))
    rows = [["weights", *names]]
    for one in compared:
        rows.append([one.label, *(estimate_text(one.strata.get(name)) for name in names)])
    return rows


def planted_difference_rows(at_equal: Mapping[str, Sequence[Compared]]) -> Rows:
    """Differences in recovery from the plain curve; ``at_equal`` are comparisons by what is equal
    in them."""
    names = ("planted_recovered", "planted_f1")
    return _at_equal_rows({name: PLANTED[name] for name in names}, at_equal)


def explained_rows(results: Sequence[Result]) -> Rows:
    """How well explanations fit the latents of every label and k, means over seeds."""
    rows = [["weights", "k", "seeds", *(m.title for m in EXPLAINED.values())]]
    for (label, k), own in _grouped(filter(was_explained, results)).items():
        rows.append([label, str(k), str(len(own)), *(_mean(own, name) for name in EXPLAINED)])
    return rows


def explained_difference_rows(at_equal: Mapping[str, Sequence[Compared]]) -> Rows:
    """Their differences from the plain curve; ``at_equal`` as in ``planted_difference_rows``."""
    return _at_equal_rows(EXPLAINED, at_equal)


def was_explained(result: Result) -> bool:
    """Whether a language model explained some of its latents."""
    return any(name in result.point.values for name in EXPLAINED)


def _at_equal_rows(
    measures: Mapping[str, Measure], at_equal: Mapping[str, Sequence[Compared]]
) -> Rows:
    heads = [f"{m.title}, equal {what}" for what in at_equal for m in measures.values()]
    rows = [["weights", *heads]]
    for several in zip(*at_equal.values(), strict=True):
        cells = [estimate_text(one.effects.get(name)) for one in several for name in measures]
        rows.append([several[0].label, *cells])
    return rows


def _with_plants(results: Sequence[Result]) -> dict[tuple[str, int], list[Result]]:
    return _grouped(result for result in results if result.planted is not None)


def _grouped(results: Iterable[Result]) -> dict[tuple[str, int], list[Result]]:
    """By label and k."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.label, result.point.k), []).append(result)
    return groups


def curve_rows(against_itself: Mapping[int, Mapping[str, Estimate]]) -> Rows:
    """The plain curve against the curve of its other points."""
    rows = [["plain k", *(MEASURES[m].title for m in _SHOWN)]]
    for k, found in against_itself.items():
        rows.append([str(k), *(estimate_text(found.get(measure)) for measure in _SHOWN)])
    return rows


def family_rows(compared: Sequence[Compared]) -> Rows:
    """Differences in selectivity by family of concepts."""
    names = sorted({name for one in compared for name in one.families})
    rows = [["weights", *names]]
    for one in compared:
        cells = (one.families.get(name) for name in names)
        rows.append([one.label, *(_NONE if c is None else f"{c:+.4f}" for c in cells)])
    return rows


def estimate_text(estimate: Estimate | None) -> str:
    """``+0.0041 [+0.0011, +0.0072]``."""
    if estimate is None:
        return _NONE
    low, high = estimate.interval
    return f"{estimate.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def agreement_text(agreements: Agreements, label: str, k: int) -> str:
    """PW-MCC of the dictionaries of one label and k, if it is known."""
    agreement = agreements.get((label, k))
    return f"{agreement.pw_mcc:.4f}" if agreement else _NONE


def _mean(own: Sequence[Result], measure: str) -> str:
    return _mean_text([r.point.values[measure].mean for r in own if measure in r.point.values], 4)


def _mean_text(values: Sequence[float | None], digits: int) -> str:
    """Of those that are known: a plant that does not fire in the measured rows has none."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else _NONE
