"""The report of a study: verdicts, tables, JSON, figures, and a page of all of them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm_wsae.files import write_json, write_text
from llm_wsae.pages.frame import filled
from llm_wsae.provenance import plain, versions
from llm_wsae.studies.comparison import (
    ONE_SEED,
    OUTSIDE,
    UNMEASURED,
    VERDICTS,
    Compared,
    compare,
    curve_against_itself,
)
from llm_wsae.studies.consistency import Agreements
from llm_wsae.studies.figures import figures_of_page, plot_curve, plot_differences
from llm_wsae.studies.first import needs_first
from llm_wsae.studies.inference import Estimate
from llm_wsae.studies.plan import PLAIN
from llm_wsae.studies.report_tables import (
    Rows,
    Table,
    control_rows,
    curve_rows,
    dictionary_rows,
    difference_rows,
    estimate_text,
    explained_difference_rows,
    explained_rows,
    family_rows,
    kl_table,
    planted_difference_rows,
    planted_rows,
    strata_difference_rows,
    strata_rows,
    was_explained,
)
from llm_wsae.studies.results import EXPLAINED, MEASURES, PLANTED, Result, deciding
from llm_wsae.studies.stopping import SPENT
from llm_wsae.terminal import aligned, markdown

REPORT_FILES = REPORT, MARKDOWN, PAGE, CURVE, DIFFERENCES = (
    "report.json",
    "report.md",
    "report.html",
    "curve.png",
    "differences.png",
)
_HOW_TO_READ = (
    "A difference is a dictionary's value less that of the plain curve at the dictionary's own "
    "cross-entropy, seed by seed. Square brackets hold its 95 % interval over seeds and over "
    "latents or families of concepts, for detection also over documents. Latents that fire on more "
    "than 10 % of the tokens are excluded unless a column says otherwise. The last columns compare "
    "at equal KL, or at equal density (latents active per token, dense ones not counted), instead "
    "of equal cross-entropy. "
    "Detection and {} decide{}; their p are corrected together over all rules of the study "
    "(Holm)."
)
_WITHOUT_SPILL = ", since spill was not measured"
_IS_IT_FINE = (
    "Plain dictionaries of one k, compared with the line between their neighbours on the curve. "
    "That line is about twice as long as the one rules are compared with. Where a value here is "
    "far from 0, lines cut corners, and only a curve with more k could support differences of a "
    "quarter of that value."
)
_AFTER_FIRST = (
    "{} and their controls were trained on half of the rows, with weights of a first dictionary of "
    "the same seed that was trained on half as well: as many rows in all as for a plain one."
)
_FIRST_GIVEN = (
    "{} took weights from a first dictionary that was given, one for all seeds: the rows that it "
    "was trained on are not counted, and plain dictionaries lacked them."
)
_QUESTION = "Is a dictionary with weights better than a plain one of the same fidelity?"
_FAMILIES = "Difference in selectivity at equal CE, mean over seeds, by family of concepts."
_PLANTED = (
    "Known features were planted into the rows that were trained on. Each is judged by its best "
    "latent, on rows that no dictionary was trained on."
)
_EXPLAINED = (
    "A language model explained a sample of each dictionary's latents, as many from every tenth of "
    "them by density, and had to recognise them by that in other documents."
)
_BASELINES = (
    "Baselines are TopK dictionaries that learnt nothing, or only one half: the dimensions "
    "themselves, and a decoder or an encoder that stays random (arXiv 2602.14111). Where they come "
    "close to the others, a measure says little of what was learnt. No curve, verdict or "
    "correction depends on them."
)
_MANY_SEEDS = (
    "This study has {} seeds. The verdict's 5 % cover looks at two to five seeds; of more seeds "
    "only if they were all decided on beforehand."
)
_MORE_K = (
    "{} had been reported on with other k and as many seeds: the verdict's 5 % cover one look at "
    "each number of seeds, so nothing that this concerns is called better."
)
_PW_MCC = (
    "PW-MCC: how similar the decoders of different seeds are, latents matched one to one, for the "
    "dictionaries that were kept."
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
    """The same comparison at equal KL: every prediction counts, not only that of the actual next
    token."""
    at_equal_density: list[Compared]
    """The same at an equal number of active latents that are not dense: how often latents fire
    affects every measure too."""
    at_equal_fvu: list[Compared]
    """The same at equal FVU."""
    against_itself: dict[int, dict[str, Estimate]]
    """By k: the plain curve compared with the curve of its other points."""
    agreements: Agreements
    """Similarity across seeds of the dictionaries that were kept."""

    @classmethod
    def of(
        cls,
        site: str,
        basis: dict[str, Any],
        results: Sequence[Result],
        agreements: Agreements | None = None,
    ) -> "StudyReport":
        """Compare finished dictionaries, in any order."""
        ordered, again = _ordered(results), basis.get("k_added") or ()
        return cls(
            site,
            basis,
            ordered,
            compare(ordered, again),
            _compare_at_equal(ordered, again, lambda result: result.kl),
            _compare_at_equal(ordered, again, lambda result: result.density),
            _compare_at_equal(ordered, again, lambda result: result.fvu),
            curve_against_itself(ordered),
            agreements or {},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return plain(
            {
                "site": self.site,
                "deciding": self.deciding,
                "verdicts": {one.label: one.verdict for one in self._claims()},
                "sentences": self.sentences(),
                "compared": {one.label: one for one in self.compared},
                "at_equal_kl": {one.label: one for one in self.at_equal_kl},
                "at_equal_density": {one.label: one for one in self.at_equal_density},
                "at_equal_fvu": {one.label: one for one in self.at_equal_fvu},
                "curve_against_itself": self.against_itself,
                "consistency": list(self.agreements.values()),
                "dictionaries": {result.name: result for result in self.results},
                "measures": MEASURES | PLANTED | EXPLAINED,
                "basis": self.basis,
                "versions": versions(),
            }
        )

    def write(self, out: Path) -> None:
        """Write JSON, Markdown, the page and figures. Raises LlmWsaeError if that is impossible."""
        write_json(out / REPORT, self.to_dict())
        write_text(out / MARKDOWN, self.markdown())
        write_text(out / PAGE, self.page())
        plot_curve(self.results, self.compared, self.site, out / CURVE)
        differences = out / DIFFERENCES
        plot_differences(self.compared, self.against_itself, self.deciding, self.site, differences)

    def sentences(self) -> list[str]:
        """One line for each rule: the verdict and what it rests on; and what to know of them."""
        return [*map(self._sentence, self._claims()), *self._notes()]

    def table(self) -> str:
        """For the terminal."""
        parts = [aligned(dictionary_rows(self.results, self.agreements))]
        if self.compared:
            parts += ["difference from the plain curve at equal CE", aligned(self._differences())]
        if self.against_itself:
            parts += ["each plain k against the line between its neighbours"]
            parts += [aligned(curve_rows(self.against_itself))]
        if self._has_plants:
            parts += ["recovery of planted features", aligned(planted_rows(self.results))]
        if self._is_explained:
            parts += ["explanations by a language model", aligned(explained_rows(self.results))]
            parts += [aligned(explained_difference_rows(self._at_equal))]
        return "\n\n".join([*parts, *self.sentences()])

    def markdown(self) -> str:
        """The same and more, as Markdown."""
        parts = [f"# {self._title()}"]
        parts += [f"- {sentence}" for sentence in self.sentences()]
        parts += [f"![Every rule beside the plain curve]({CURVE})"]
        parts += [f"![Differences at equal CE]({DIFFERENCES})"]
        for table in self._tables():
            parts += [f"## {table.title}", *([table.words] if table.words else [])]
            parts += [markdown(table.rows)]
        measures = MEASURES | (PLANTED if self._has_plants else {})
        measures |= EXPLAINED if self._is_explained else {}
        parts += ["\n".join(f"- {m.title}: {m.meaning}" for m in measures.values())]
        return "\n\n".join(parts) + "\n"

    def page(self) -> str:
        """All of it as one HTML file that needs no network (``pages/report.html``)."""
        at_equal = {"CE": self.compared, "KL": self.at_equal_kl}
        at_equal |= {"density": self.at_equal_density, "FVU": self.at_equal_fvu}
        figures = figures_of_page(self.results, at_equal, self.against_itself)
        series = {one["name"]: number for number, one in enumerate(figures["series"])}
        evidence = [
            {"series": series[one.label], "name": one.label, "text": self._evidence(one)}
            for one in self._claims()
        ]
        about = {
            "title": self._title(),
            "words": [_QUESTION, *self._notes()],
            "facts": self._facts(),
            "evidence": evidence,
            "tables": [asdict(table) for table in self._tables()],
        }
        return filled("report.html", figures | about)

    def _title(self) -> str:
        return f"Study of weights at {self.site}, {self.basis['training']['architecture']}"

    def _facts(self) -> list[tuple[str, str]]:
        """What all dictionaries share, as far as it is known."""
        rows, text = self.basis.get("rows", {}), self.basis.get("text", {})
        own = [result for result in self.results if not result.is_baseline]
        seeds = sorted({result.point.seed for result in own})
        made = f"{len(own)}, on seeds {', '.join(map(str, seeds))}"
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
    def deciding(self) -> tuple[str, str]:
        """The two measures that verdicts rest on."""
        return deciding(self.results)

    @property
    def _has_plants(self) -> bool:
        return any(result.planted is not None for result in self.results)

    @property
    def _is_explained(self) -> bool:
        return any(map(was_explained, self.results))

    @property
    def _at_equal(self) -> dict[str, list[Compared]]:
        return {"CE": self.compared, "KL": self.at_equal_kl, "FVU": self.at_equal_fvu}

    def _tables(self) -> list[Table]:
        """Those of the Markdown and of the page."""
        results, compared = self.results, self.compared
        title = "Differences from the plain curve at equal CE"
        found = [Table(title, self._differences(everything=True), self._how_to_read())]
        found += kl_table(results)
        if self._has_plants:
            found += [
                Table("Planted features", planted_rows(results), _PLANTED),
                Table(
                    "Planted features: differences from the plain curve",
                    planted_difference_rows(self._at_equal),
                ),
                Table(
                    "Planted features: mean F1 by kind of direction",
                    strata_rows(results, "by_stratum"),
                ),
                *(
                    Table(
                        "Planted features: differences in mean F1 from the plain curve at equal "
                        f"{equal}, by kind of direction",
                        strata_difference_rows(those),
                    )
                    for equal, those in self._at_equal.items()
                ),
                Table(
                    "Planted features: mean F1 by strength",
                    strata_rows(results, "by_strength"),
                    "Strengths are in median norms of the rows.",
                ),
            ]
        if self._is_explained:
            title = "Explanations by a language model"
            found += [
                Table(title, explained_rows(results), _EXPLAINED),
                Table(
                    f"{title}: differences from the plain curve",
                    explained_difference_rows(self._at_equal),
                ),
            ]
        if any(one.against_control for one in compared):
            title = "Differences from the control, each at its own CE"
            found += [Table(title, control_rows(compared))]
        if self.against_itself:
            rows = curve_rows(self.against_itself)
            found += [Table("Is the curve fine enough?", rows, _IS_IT_FINE)]
        found += [Table("Families of concepts", family_rows(compared), _FAMILIES)]
        known = (_BASELINES, any(r.is_baseline for r in results)), (_PW_MCC, self.agreements)
        words = " ".join(words for words, there in known if there) or None
        return [*found, Table("Dictionaries", dictionary_rows(results, self.agreements), words)]

    def _how_to_read(self) -> str:
        _, second = self.deciding
        words = _HOW_TO_READ.format(second, "" if second == "spill" else _WITHOUT_SPILL)
        claims = [r for r in self.results if r.is_claim]
        halved = {r.label for r in claims if r.share < 1}
        given = {r.label for r in claims if r.share == 1 and needs_first([r.rule])}
        for said, labels in ((_AFTER_FIRST, halved), (_FIRST_GIVEN, given)):
            words += f" {said.format(', '.join(sorted(labels)))}" if labels else ""
        return words

    def _differences(self, everything: bool = False) -> Rows:
        others = self.at_equal_kl, self.at_equal_density
        return difference_rows(self.compared, *others, self.deciding, everything)

    def _claims(self) -> list[Compared]:
        return [one for one in self.compared if not one.is_control]

    def _notes(self) -> list[str]:
        """What to know before relying on the verdicts."""
        seeds = max((len(one.seeds) for one in self._claims()), default=0)
        notes = [_MANY_SEEDS.format(seeds)] if seeds > max(SPENT) else []
        added = self.basis.get("k_added")
        notes += [_MORE_K.format(", ".join(added))] if added else []
        texts = [result.text for result in self.results if result.text is not None]
        return [*notes, *(texts[0].warnings() if texts else [])]

    def _sentence(self, one: Compared) -> str:
        return f"{one.label}: {VERDICTS[one.verdict]} ({self._evidence(one)})"

    def _evidence(self, one: Compared) -> str:
        """What a verdict rests on."""
        shown = one.ks or one.ce_recovered
        reached = ", ".join(f"{one.ce_recovered[k]:.4f}" for k in shown)
        if one.verdict in (UNMEASURED, ONE_SEED):
            return f"CE recovered {reached}"
        if one.verdict == OUTSIDE:
            plain_ce = [r.ce_recovered for r in self.results if r.label == PLAIN]
            curve = f"the curve goes from {min(plain_ce):.4f} to {max(plain_ce):.4f}"
            return f"{reached} recovered; {curve}"
        numbers = []
        for measure in self.deciding:
            if measure in one.adjusted:
                effect = estimate_text(one.effects[measure])
                numbers.append(f"{measure} {effect}, p {one.adjusted[measure]:.2g}")
                if measure in one.against_control:
                    control = estimate_text(one.against_control[measure])
                    numbers[-1] += f", {control} relative to its control"
        if "detection_all" in one.effects:
            scored, everything = (one.effects[m] for m in ("eligible", "detection_all"))
            numbers.append(
                f"{100 * scored.difference:+.1f} points of latents that can be scored, detection "
                f"counting the others as chance {estimate_text(everything)}"
            )
        for what, others in (("KL", self.at_equal_kl), ("density", self.at_equal_density)):
            other = next(other for other in others if other.label == one.label)
            same = "the same" if other.verdict == one.verdict else other.verdict
            numbers.append(f"at equal {what} {same}")
        numbers += [f"CE recovered {reached}", f"{len(one.seeds)} seeds"]
        return "; ".join(numbers)


def _compare_at_equal(
    results: Sequence[Result], looked_again: Collection[str], cost: Callable[[Result], float]
) -> list[Compared]:
    """The comparison at an equal cost other than cross-entropy."""
    changed = [replace(r, point=replace(r.point, increase=cost(r))) for r in results]
    return compare(changed, looked_again)


def _ordered(results: Sequence[Result]) -> list[Result]:
    """The plain curve first, then each rule followed by its control, then baselines; by k and
    seed."""
    owner = {r.control: r.label for r in results if r.control is not None}

    def place(result: Result) -> tuple:
        label = result.label
        rule = owner.get(label, label)
        first = result.is_baseline, label != PLAIN
        return *first, rule, label != rule, label, result.point.k, result.point.seed

    return sorted(results, key=place)
