"""The report of a study: verdicts, tables, JSON and figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_wsae.files import write_json, write_text
from llm_wsae.provenance import plain, versions
from llm_wsae.studies.consistency import Agreements
from llm_wsae.studies.figures import plot_curve, plot_differences
from llm_wsae.studies.inference import Estimate
from llm_wsae.studies.plan import PLAIN
from llm_wsae.studies.results import DECIDING, MEASURES, Result
from llm_wsae.studies.verdict import (
    ONE_SEED,
    OUTSIDE,
    UNMEASURED,
    VERDICTS,
    Compared,
    compare,
    curve_against_itself,
)
from llm_wsae.tables import aligned, markdown

REPORT, MARKDOWN, CURVE, DIFFERENCES = "report.json", "report.md", "curve.png", "differences.png"
_HOW_TO_READ = (
    "Every difference is a dictionary's value less that of the plain curve at the dictionary's own "
    "cross-entropy, seed by seed, in square brackets its 95 % interval over seeds and over latents "
    "or concepts. Unless marked +, latents that fire on more than 10 % of the tokens take no part. "
    "At equal KL, or density (latents active on a token, without the dense ones), that stands for "
    "cross-entropy. "
    "The p of the two deciding measures are corrected together over all rules of the study (Holm). "
    "The text measured on is one sample: what another text would change is in no interval."
)


@dataclass(frozen=True)
class StudyReport:
    """Everything that a study found."""

    site: str
    basis: dict[str, Any]
    """What all dictionaries share: rows, text, settings."""
    results: list[Result]
    compared: list[Compared]
    at_equal_kl: list[Compared]
    """The same comparison where KL stands for cross-entropy: every prediction counts, not only that
    of the token that came."""
    at_equal_density: list[Compared]
    """The same where the number of active latents that are not dense stands for cross-entropy: how
    often latents fire moves every measure too."""
    against_itself: dict[int, dict[str, Estimate]]
    """By k: the plain curve beside what its other points say."""
    agreements: Agreements
    """Of the seeds of dictionaries that were kept."""

    @classmethod
    def of(
        cls,
        site: str,
        basis: dict[str, Any],
        results: Sequence[Result],
        agreements: Agreements | None = None,
    ) -> "StudyReport":
        """Compare finished dictionaries, in any order."""
        ordered = _ordered(results)
        return cls(
            site,
            basis,
            ordered,
            compare(ordered),
            _compare_at_equal(ordered, lambda result: result.kl),
            _compare_at_equal(ordered, lambda result: result.density),
            curve_against_itself(ordered),
            agreements or {},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return plain(
            {
                "site": self.site,
                "verdicts": {one.label: one.verdict for one in self._claims()},
                "sentences": self.sentences(),
                "compared": {one.label: one for one in self.compared},
                "at_equal_kl": {one.label: one for one in self.at_equal_kl},
                "at_equal_density": {one.label: one for one in self.at_equal_density},
                "curve_against_itself": self.against_itself,
                "consistency": list(self.agreements.values()),
                "dictionaries": {result.name: result for result in self.results},
                "measures": MEASURES,
                "basis": self.basis,
                "versions": versions(),
            }
        )

    def write(self, out: Path) -> None:
        """Write JSON, Markdown and figures. Raises LlmWsaeError if that is impossible."""
        write_json(out / REPORT, self.to_dict())
        write_text(out / MARKDOWN, self.markdown())
        plot_curve(self.results, self.site, out / CURVE)
        plot_differences(self.compared, self.against_itself, self.site, out / DIFFERENCES)

    def sentences(self) -> list[str]:
        """One line for each rule: the verdict and what it rests on."""
        return [self._sentence(one) for one in self._claims()]

    def table(self) -> str:
        """For people, at the terminal."""
        parts = [aligned(self._dictionaries())]
        if self.compared:
            parts.append("difference from the plain curve at equal CE\n\n"
                         + aligned(self._differences()))  # fmt: skip
        if self.against_itself:
            parts.append("the plain curve beside the line between its neighbours\n\n"
                         + aligned(self._itself()))  # fmt: skip
        return "\n\n".join([*parts, *self.sentences()])

    def markdown(self) -> str:
        """The same and more, as a page."""
        architecture = self.basis["training"]["architecture"]
        parts = [f"# Study of weights at {self.site}, {architecture}"]
        parts += [f"- {sentence}" for sentence in self.sentences()]
        parts += [f"![Monosemanticity against CE recovered]({CURVE})"]
        parts += [f"![Differences at equal CE]({DIFFERENCES})", _HOW_TO_READ]
        parts += ["## Differences from the plain curve at equal CE"]
        parts += [markdown(self._differences(everything=True))]
        against = [one for one in self.compared if one.against_control]
        if against:
            parts += ["## Differences from the control, each at its own CE"]
            parts += [markdown(self._against(against))]
        if self.against_itself:
            parts += ["## Is the curve fine enough?"]
            parts += [
                "Plain dictionaries of one k beside the line between their neighbours on the "
                "curve, which is about twice as long as those that rules are held against. "
                "Where it is far from 0, lines cut corners: a curve of more k would be needed to "
                "believe differences of a quarter of that."
            ]
            parts += [markdown(self._itself())]
        parts += ["## Families of concepts", _FAMILIES, markdown(self._families())]
        parts += ["## Dictionaries", markdown(self._dictionaries())]
        parts += ["\n".join(f"- {m.title}: {m.meaning}" for m in MEASURES.values())]
        if self.agreements:
            parts += [_PW_MCC]
        return "\n\n".join(parts) + "\n"

    def agreement_text(self, label: str, k: int) -> str:
        """PW-MCC of the dictionaries of one name and k, if it is known."""
        agreement = self.agreements.get((label, k))
        return f"{agreement.pw_mcc:.4f}" if agreement else "–"

    def _claims(self) -> list[Compared]:
        return [one for one in self.compared if not one.is_control]

    def _sentence(self, one: Compared) -> str:
        start = f"{one.label}: {VERDICTS[one.verdict]}"
        shown = one.ks or one.ce_recovered
        reached = ", ".join(f"{one.ce_recovered[k]:.4f}" for k in shown)
        if one.verdict in (UNMEASURED, ONE_SEED):
            return f"{start} (CE recovered {reached})"
        if one.verdict == OUTSIDE:
            plain_ce = [r.ce_recovered for r in self.results if r.label == PLAIN]
            return (
                f"{start} ({reached} recovered; the curve goes from {min(plain_ce):.4f} to "
                f"{max(plain_ce):.4f}; on some seed it is outside, or not there)"
            )
        numbers = []
        for measure in DECIDING:
            if measure in one.adjusted:
                effect = estimate_text(one.effects[measure])
                numbers.append(f"{measure} {effect}, p {one.adjusted[measure]:.2g}")
                if measure in one.against_control:
                    control = estimate_text(one.against_control[measure])
                    numbers[-1] += f", {control} against its control"
        if "detection_all" in one.effects:
            scored, everything = (one.effects[m] for m in ("eligible", "detection_all"))
            numbers.append(
                f"{100 * scored.difference:+.1f} points of latents that can be scored, detection "
                f"with the others at chance {estimate_text(everything)}"
            )
        for what, others in (("KL", self.at_equal_kl), ("density", self.at_equal_density)):
            other = next(other for other in others if other.label == one.label)
            same = "the same" if other.verdict == one.verdict else other.verdict
            numbers.append(f"at equal {what} {same}")
        numbers += [f"CE recovered {reached}", f"{len(one.seeds)} seeds"]
        return f"{start} ({'; '.join(numbers)})"

    def _dictionaries(self) -> list[list[str]]:
        """Means over seeds of every label and k."""
        rows = [["weights", "k", "seeds", "L0", "not dense", "CE recovered", "FVU", "KL", "dense %",
                 "dead %", "eligible %", *(MEASURES[m].title for m in _SHOWN)]]  # fmt: skip
        if self.agreements:
            rows[0].append("PW-MCC")
        groups: dict[tuple[str, int], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.label, result.point.k), []).append(result)
        for (label, k), own in groups.items():
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
            if self.agreements:
                rows[-1].append(self.agreement_text(label, k))
        return rows

    def _differences(self, everything: bool = False) -> list[list[str]]:
        shown = list(MEASURES) if everything else DECIDING
        titles = [MEASURES[m].title for m in shown]
        equal = [f"{measure}, equal {what}" for what in ("KL", "density") for measure in DECIDING]
        rows = [["weights", "verdict", "CE at same k", *titles, *equal]]
        everywhere = zip(self.compared, self.at_equal_kl, self.at_equal_density, strict=True)
        for one, *others in everywhere:
            change = ", ".join(f"{c:+.4f}" for c in one.ce_change.values()) or "–"
            cells = [estimate_text(one.effects.get(measure)) for measure in shown]
            cells += [estimate_text(o.effects.get(m)) for o in others for m in DECIDING]
            rows.append([one.label, one.verdict, change, *cells])
        return rows

    def _against(self, against: Sequence[Compared]) -> list[list[str]]:
        rows = [["weights", "control", *(measure.title for measure in MEASURES.values())]]
        for one in against:
            cells = [estimate_text(one.against_control.get(measure)) for measure in MEASURES]
            rows.append([one.label, one.control or "", *cells])
        return rows

    def _itself(self) -> list[list[str]]:
        rows = [["plain k", *(MEASURES[m].title for m in _SHOWN)]]
        for k, found in self.against_itself.items():
            rows.append([str(k), *(estimate_text(found.get(measure)) for measure in _SHOWN)])
        return rows

    def _families(self) -> list[list[str]]:
        names = sorted({name for one in self.compared for name in one.families})
        rows = [["weights", *names]]
        for one in self.compared:
            cells = (one.families.get(name) for name in names)
            rows.append([one.label, *("–" if c is None else f"{c:+.4f}" for c in cells)])
        return rows


_FAMILIES = "Difference in selectivity at equal CE, mean over seeds, by family of concepts."
_PW_MCC = (
    "PW-MCC: how alike the decoders of different seeds are, latents matched one to one, of the "
    "dictionaries that were kept."
)
_SHOWN = ("detection", "no_token", "purity", "coherence", "selectivity", "probe_1", "probe_5")


def _compare_at_equal(results: Sequence[Result], cost: Callable[[Result], float]) -> list[Compared]:
    """The comparison where something else stands for cross-entropy."""
    return compare([replace(r, point=replace(r.point, increase=cost(r))) for r in results])


def _ordered(results: Sequence[Result]) -> list[Result]:
    """The plain curve first, then rule by rule, each with its control behind it; by k and seed."""
    owner = {r.control: r.label for r in results if r.control is not None}

    def place(result: Result) -> tuple:
        label = result.label
        rule = owner.get(label, label)
        return label != PLAIN, rule, label != rule, label, result.point.k, result.point.seed

    return sorted(results, key=place)


def _mean(own: Sequence[Result], measure: str) -> str:
    values = [r.point.values[measure].mean for r in own if measure in r.point.values]
    return f"{sum(values) / len(values):.4f}" if values else "–"


def estimate_text(estimate: Estimate | None) -> str:
    """``+0.0041 [+0.0011, +0.0072]``."""
    if estimate is None:
        return "–"
    low, high = estimate.interval
    return f"{estimate.difference:+.4f} [{low:+.4f}, {high:+.4f}]"
