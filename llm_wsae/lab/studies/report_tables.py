"""The tables of a study's report, as rows of cells; the first row is the head."""

from collections.abc import Iterable, Sequence

from llm_wsae.lab.studies.comparison import Compared
from llm_wsae.lab.studies.inference import Estimate
from llm_wsae.lab.studies.results import Result
from llm_wsae.statistics.measures import STUDIED

Rows = list[list[str]]
_NONE = "–"


def measures_of(results: Sequence[Result]) -> list[str]:
    """Those that some dictionary has."""
    return [m for m in STUDIED if any(m in result.values for result in results)]


def difference_rows(compared: Sequence[Compared], measures: Sequence[str]) -> Rows:
    """Differences from plain dictionaries, with the verdict of a measure that decides."""
    rows = [["weights", "k", "seeds", *(STUDIED[m].title for m in measures)]]
    for one in compared:
        cells = [difference_text(one, measure) for measure in measures]
        rows.append([one.label, str(one.k), str(len(one.seeds)), *cells])
    return rows


def difference_text(one: Compared, measure: str) -> str:
    """``better: −4.1 % [−5.0, −3.2]``, without a word for what does not decide."""
    verdict = one.verdicts.get(measure)
    text = estimate_text(one.effects.get(measure), measure)
    return text if verdict is None else f"{verdict}: {text}"


def estimate_text(estimate: Estimate | None, measure: str) -> str:
    """``+0.0041 [+0.0011, +0.0072]``, or per cent."""
    if estimate is None:
        return _NONE
    numbers = (estimate.difference, *estimate.interval)
    if STUDIED[measure].per_document:
        by, low, high = (f"{100 * number:+.1f}" for number in numbers)
        return f"{by} % [{low}, {high}]"
    by, low, high = (f"{number:+.4f}" for number in numbers)
    return f"{by} [{low}, {high}]"


def dictionary_rows(results: Sequence[Result], measures: Sequence[str]) -> Rows:
    """Means over seeds of every label and k."""
    rows = [["weights", "k", "seeds", "L0", "L0 not dense", "CE recovered", "FVU", "dense %",
             "dead %", "scored %", *(STUDIED[m].title for m in measures)]]  # fmt: skip
    for (label, k), own in _grouped(results).items():
        shares = {name: _mean(r.shares[name] for r in own) for name in own[0].shares}
        rows.append(
            [
                label,
                str(k),
                str(len(own)),
                f"{shares['l0']:.1f}",
                f"{_mean(r.density for r in own):.1f}",
                f"{_mean(r.ce_recovered for r in own):.4f}",
                f"{_mean(r.fvu for r in own):.4f}",
                *(f"{100 * shares[f'{s}_share']:.1f}" for s in ("dense", "dead", "eligible")),
                *(_value_text(own, measure) for measure in measures),
            ]
        )
    return rows


def _grouped(results: Iterable[Result]) -> dict[tuple[str, int], list[Result]]:
    """By label and k."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.label, result.k), []).append(result)
    return groups


def _value_text(own: Sequence[Result], measure: str) -> str:
    known = [r.values[measure].mean for r in own if measure in r.values]
    return f"{_mean(known):.4f}" if known else _NONE


def _mean(numbers: Iterable[float]) -> float:
    known = list(numbers)
    return sum(known) / len(known)
