"""The report of a study: verdicts, tables, JSON, a figure, and a page of all of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import write_json, write_text
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.lab.studies.comparison import Compared, compare
from llm_wsae.lab.studies.figures import figures_of_page, plot_differences
from llm_wsae.lab.studies.inference import Estimate
from llm_wsae.lab.studies.plan import PLAIN
from llm_wsae.lab.studies.results import Result, deciding
from llm_wsae.pages.frame import filled
from llm_wsae.statistics.measures import STUDIED
from llm_wsae.terminal import Table, aligned

REPORT_FILES = REPORT, MARKDOWN, PAGE, DIFFERENCES = (
    "report.json",
    "report.md",
    "report.html",
    "differences.png",
)
_QUESTION = "Is a dictionary with weights better than a plain one of the same k?"
_HOW_TO_READ = (
    "Each value less that of the plain dictionary of the same k and seed. Square brackets hold the "
    "95 % interval, over seeds and over documents, families of concepts or planted features. "
    "Differences of KL are shares of the plain dictionary's. "
    "Latents that fire on more than 10 % of the tokens count in none but KL. Verdicts are on {}, "
    "corrected together for everything tried in this folder (Holm): better than plain and than the "
    "control, worse than plain, or not shown. Fewer latents per token change every measure, too: "
    "where KL is worse, a plain dictionary with a smaller k may show the same gain. Decide on "
    "seeds and k beforehand: whoever looks, adds some and looks again errs more often than 5 times "
    "in 100."
)
_AFTER_FIRST = (
    "{} and their controls were trained on half of the rows, with weights of a first dictionary of "
    "the same seed that was trained on half as well: as many rows in all as for a plain one."
)
_BASELINES = (
    "Means over seeds. Baselines are untrained or half-trained TopK dictionaries: the "
    "dimensions themselves, and a decoder or an encoder that stays random (arXiv 2602.14111). "
    "Where they come close to the others, a measure says little of what was learnt. No verdict or "
    "correction depends on them."
)


Rows = list[list[str]]
_NONE = "–"


@dataclass(frozen=True)
class StudyReport:
    """Everything that a study found."""

    site: str
    basis: dict[str, Any]
    """What all dictionaries share: rows, text, settings."""
    results: list[Result]
    compared: list[Compared]

    @classmethod
    def of(cls, site: str, basis: dict[str, Any], results: Sequence[Result]) -> "StudyReport":
        """Compare finished dictionaries, in any order."""
        ordered = _ordered(results)
        return cls(site, basis, ordered, compare(ordered))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return plain(
            {
                "site": self.site,
                "deciding": deciding(self.results),
                "verdicts": {one.name: one.verdicts for one in self._claims()},
                "sentences": self.sentences(),
                "compared": {one.name: one for one in self.compared},
                "dictionaries": {result.name: result for result in self.results},
                "measures": STUDIED,
                "basis": self.basis,
                "versions": versions(),
            }
        )

    def write(self, out: Path) -> None:
        """Write JSON, Markdown, page and figure. Raises LlmWsaeError if that is impossible."""
        write_json(out / REPORT, self.to_dict())
        write_text(out / MARKDOWN, self.markdown())
        write_text(out / PAGE, self.page())
        plot_differences(self.compared, self._measures, self.site, out / DIFFERENCES)

    def sentences(self) -> list[str]:
        """One line for each rule and k, and what to know before relying on it."""
        return [*(f"{one.name}: {self._evidence(one)}" for one in self._claims()), *self._notes()]

    def table(self) -> str:
        """For the terminal."""
        parts = [aligned(dictionary_rows(self.results, self._measures))]
        if self.compared:
            rows = difference_rows(self.compared, deciding(self.results))
            parts += ["difference from the plain dictionaries of the same k", aligned(rows)]
        return "\n\n".join([*parts, *self.sentences()])

    def markdown(self) -> str:
        """The same and more, as Markdown."""
        parts = [f"# {self._title()}"]
        parts += [f"- {sentence}" for sentence in self.sentences()]
        parts += [f"![Differences from plain dictionaries]({DIFFERENCES})"]
        parts += [table.markdown() for table in self._tables()]
        measures = [STUDIED[name] for name in self._measures]
        parts += ["\n".join(f"- {one.title}: {one.meaning}" for one in measures)]
        return "\n\n".join(parts) + "\n"

    def page(self) -> str:
        """All of it as one HTML file that needs no network (``pages/report.html``)."""
        figures = figures_of_page(self.results, self.compared, self._measures)
        numbers = {one["name"]: number for number, one in enumerate(figures["series"])}
        about = {
            "title": self._title(),
            "words": [_QUESTION, *self._notes()],
            "facts": self._facts(),
            "evidence": [
                {"series": numbers[one.label], "name": one.name, "text": self._evidence(one)}
                for one in self._claims()
            ],
            "tables": [table.of_page() for table in self._tables()],
        }
        return filled("report.html", figures | about)

    def _title(self) -> str:
        return f"Study of weights at {self.site}, {self.basis['training']['architecture']}"

    def _facts(self) -> list[tuple[str, str]]:
        """What all dictionaries share, as far as it is known."""
        rows, text = self.basis.get("rows", {}), self.basis.get("text", {})
        own = [result for result in self.results if not result.is_baseline]
        made = f"{len(own)}, on seeds {', '.join(map(str, sorted({r.seed for r in own})))}"
        if beside := len(self.results) - len(own):
            made += f", and {beside} baselines"
        sizes = [result.text.text("held-out text") for result in own if result.text]
        return [
            ("model", str(rows.get("model", {}).get("name", "not known"))),
            ("text", str(text.get("name", "not known"))),
            ("measured on", sizes[0] if sizes else "not known"),
            ("rows trained on", f"{rows.get('num_rows', 0):,}"),
            ("dictionaries", made),
        ]

    @property
    def _measures(self) -> list[str]:
        return measures_of(self.results)

    def _tables(self) -> list[Table]:
        """Those of the Markdown and of the page."""
        return [
            Table(
                difference_rows(self.compared, self._measures),
                words=[self._how_to_read()],
                title="Differences from plain dictionaries of the same k",
            ),
            Table(
                dictionary_rows(self.results, self._measures),
                words=[_BASELINES],
                title="Dictionaries",
            ),
        ]

    def _how_to_read(self) -> str:
        titles = [STUDIED[measure].title for measure in deciding(self.results)]
        words = _HOW_TO_READ.format(f"{', '.join(titles[:-1])} and {titles[-1]}")
        halved = {r.label for r in self.results if r.control is not None and r.share < 1}
        return f"{words} {_AFTER_FIRST.format(', '.join(sorted(halved)))}" if halved else words

    def _claims(self) -> list[Compared]:
        return [one for one in self.compared if one.control is not None]

    def _notes(self) -> list[str]:
        """What to know before relying on the verdicts."""
        texts = [result.text for result in self.results if result.text is not None]
        return texts[0].warnings() if texts else []

    def _evidence(self, one: Compared) -> str:
        """The verdicts, and what they rest on."""
        parts = []
        for measure, p in one.adjusted.items():
            text = f"{STUDIED[measure].title} {difference_text(one, measure)}, p {p:.2g}"
            if measure in one.against_control:
                against = estimate_text(one.against_control[measure], measure)
                text += f", {against} beside its control"
            parts.append(text)
        return "; ".join([*(parts or ["not measured"]), f"{len(one.seeds)} seeds"])


def _ordered(results: Sequence[Result]) -> list[Result]:
    """Plain dictionaries first, then each rule followed by its control, then baselines; by k and
    seed."""
    owner = {r.control: r.label for r in results if r.control is not None}

    def place(result: Result) -> tuple:
        label = result.label
        rule = owner.get(label, label)
        first = result.is_baseline, label != PLAIN
        return *first, rule, label != rule, label, result.k, result.seed

    return sorted(results, key=place)


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
    """``better: −4.1 % [−5.0, −3.2]``; no verdict where the measure decides nothing."""
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
