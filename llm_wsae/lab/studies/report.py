"""What a study keeps of each dictionary, and its report: verdicts, as table, JSON and page.

study.json              what all its dictionaries share; a command with other settings is refused
command.json            the last command
training/               dictionaries in training, those of one seed at a time
dictionaries/<name>/    trained dictionaries, and the raw dimensions
results/<name>.json     measured dictionaries, none twice; every report is made from these
report.json, report.html

Every rule is compared with plain dictionaries of the same k and seeds, and with its control. KL,
detection of latents and spill decide, the last two without latents that fire on more than a tenth
of the tokens, which sway them, whatever they stand for; of planted features their F1 as well. Each
gets a verdict of its own: a rule that lowers KL may cost what another measure shows.

Better means better than plain and better than the rule's control, because weights that know nothing
of the dimensions may help as well: the larger p of the two differences counts. Holm's correction
covers all rules, k and deciding measures of the study.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from llm_wsae.artifact.artifact import Artifact
from llm_wsae.artifact.files import read_own_json, write_json, write_text
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.evaluation.baselines import HALF_RANDOM
from llm_wsae.lab.studies.differences import Estimate, Value, compared
from llm_wsae.pages.frame import COLOURS, filled
from llm_wsae.statistics.measures import DRAWN, L0, STUDIED
from llm_wsae.statistics.uncertainty import LEVEL, TextSize, holm
from llm_wsae.terminal import Table, aligned

BASIS, COMMAND, REPORT, PAGE = "study.json", "command.json", "report.json", "report.html"
TRAINING, DICTIONARIES, RESULTS = "training", "dictionaries", "results"
PLAIN, RAW = "uniform", "topk baseline: raw dimensions"
FROZEN = {architecture: f"topk baseline: {label}" for architecture, label in HALF_RANDOM.items()}
"""Labels of the half-trained baselines, by their architecture."""
BASELINES = (RAW, *FROZEN.values())
BETTER, WORSE, NOT_SHOWN = "better", "worse", "not shown"
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
_WORDS_ON_BASELINES = (
    "Means over seeds. Baselines are untrained or half-trained TopK dictionaries: the "
    "dimensions themselves, and a decoder or an encoder that stays random (arXiv 2602.14111). "
    "Where they come close to the others, a measure says little of what was learnt. No verdict or "
    "correction depends on them."
)
_LEGEND = (
    "Filled: the rule. Hollow: its control. Bars are 95 % intervals. The scale is logarithmic far "
    "from 0."
)
_FIDELITY = [measure.key for measure in DRAWN]
_NONE = "–"


@dataclass(frozen=True)
class Result:
    """One finished dictionary."""

    name: str
    label: str
    control: str | None
    k: int
    seed: int
    values: Mapping[str, Value]
    """By measure; a measure that does not exist for the dictionary is omitted."""
    ce_recovered: float
    fvu: float
    shares: dict[str, float]  # ``eligible_share``, ``dense_share``, ``dead_share`` and ``l0``
    density: float  # latents active per token, dense ones not counted
    text: TextSize  # what fidelity was measured on

    @property
    def is_baseline(self) -> bool:
        """Whether it is an untrained or half-trained baseline: shown, and compared with nothing."""
        return self.label in BASELINES


def study_in(folder: Path) -> Artifact:
    """The study in a folder."""
    return Artifact(folder, BASIS, "study")


def read_results(folder: Path) -> list[Result]:
    """Every measured dictionary, by name. Raises LlmWsaeError if a file is damaged or another's."""
    return [_read(path) for path in sorted((folder / RESULTS).glob("*.json"))]


def _read(path: Path) -> Result:
    way_out = "delete it to measure that dictionary again"
    found = read_own_json(path, "result of a study", way_out)["result"]
    if found["name"] != path.stem:
        raise LlmWsaeError(f"{path} holds the result of {shown(found['name'])}; {way_out}")
    values = {name: Value(**value) for name, value in found["values"].items()}
    return Result(**{**found, "values": values, "text": TextSize(**found["text"])})


def deciding(results: Iterable[Result]) -> tuple[str, ...]:
    """The measures that verdicts rest on: of a study with planted features their F1 as well."""
    planted = any("planted_f1" in result.values for result in results)
    return ("kl", "detection", "spill", *(("planted_f1",) if planted else ()))


@dataclass(frozen=True)
class Compared:
    """Weights of one name and k, over all their seeds, beside plain dictionaries of that k."""

    label: str
    k: int
    control: str | None
    seeds: tuple[int, ...]  # those that have a plain dictionary of that k
    effects: dict[str, Estimate]  # differences from the plain dictionaries, by measure
    against_control: dict[str, Estimate]  # differences from the control's dictionaries, by measure
    adjusted: dict[str, float]
    """p of the deciding measures, corrected for everything that was tried; none for a control."""
    verdicts: dict[str, str]  # by deciding measure; none for a control

    @property
    def name(self) -> str:
        """Of its row in tables."""
        return f"{self.label}, k {self.k}"


def compare(results: Sequence[Result]) -> list[Compared]:
    """Every label and k except plain ones and baselines, in the order of the results."""
    groups = _grouped(result for result in results if not result.is_baseline)
    found = []
    for (label, k), own in groups.items():
        if label == PLAIN:
            continue
        plain_ones, control = groups.get((PLAIN, k), []), own[0].control
        seeds = {r.seed for r in own} & {r.seed for r in plain_ones}
        against = _differences(own, groups.get((control or "", k), []))
        effects = _differences(own, plain_ones)
        found.append(Compared(label, k, control, tuple(sorted(seeds)), effects, against, {}, {}))
    # corrected together
    tests = [
        (one, measure, _p(measure, one.effects[measure], one.against_control.get(measure)))
        for one in found
        for measure in deciding(results)
        if one.control is not None and measure in one.effects
    ]
    for (one, measure, _), p in zip(tests, holm([p for *_, p in tests]), strict=True):
        one.adjusted[measure] = p
        word = BETTER if _is_gain(measure, one.effects[measure]) else WORSE
        one.verdicts[measure] = word if p < 1 - LEVEL else NOT_SHOWN
    return found


def _grouped(results: Iterable[Result]) -> dict[tuple[str, int], list[Result]]:
    """By label and k."""
    groups: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.label, result.k].append(result)
    return groups


def _differences(own: Iterable[Result], others: Iterable[Result]) -> dict[str, Estimate]:
    """By measure, of dictionaries of the same k."""
    found = {}
    for measure in STUDIED:
        sides = (
            {r.seed: r.values[measure] for r in side if measure in r.values}
            for side in (own, others)
        )
        if (difference := compared(*sides)) is not None:
            found[measure] = difference
    return found


def _p(measure: str, effect: Estimate, against: Estimate | None) -> float:
    """Of no difference from plain, or of a gain that the control has, too."""
    if not _is_gain(measure, effect):
        return effect.p
    if against is None or not _is_gain(measure, against):
        return 1.0
    return max(effect.p, against.p)


def _is_gain(measure: str, estimate: Estimate) -> bool:
    sign = -1 if STUDIED[measure].lower_is_better else 1
    return sign * estimate.difference > 0


@dataclass(frozen=True)
class StudyReport:
    """Everything that a study found."""

    site: str
    basis: dict[str, Any]  # what all dictionaries share: rows, text, settings
    results: list[Result]
    compared: list[Compared]

    @classmethod
    def of(cls, site: str, basis: dict[str, Any], results: Sequence[Result]) -> "StudyReport":
        """Compare finished dictionaries, in any order."""
        owner = {r.control: r.label for r in results if r.control is not None}

        def place(result: Result) -> tuple:
            """Plain first, then each rule followed by its control, then baselines."""
            label, rule = result.label, owner.get(result.label, result.label)
            first = result.is_baseline, label != PLAIN
            return *first, rule, label != rule, label, result.k, result.seed

        ordered = sorted(results, key=place)
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
        """Write JSON and page. Raises LlmWsaeError if that is impossible."""
        write_json(out / REPORT, self.to_dict())
        write_text(out / PAGE, self.page())

    def sentences(self) -> list[str]:
        """One line for each rule and k, and what to know before relying on it."""
        return [*(f"{one.name}: {_evidence(one)}" for one in self._claims()), *self._notes()]

    def table(self) -> str:
        """For the terminal."""
        parts = [aligned(self._dictionaries())]
        if self.compared:
            rows = self._effects(deciding(self.results))
            parts += ["difference from the plain dictionaries of the same k", aligned(rows)]
        return "\n\n".join([*parts, *self.sentences()])

    def page(self) -> str:
        """All of it as one HTML file that needs no network (``pages/report.html``)."""
        figures = self.figures()
        numbers = {one["name"]: number for number, one in enumerate(figures["series"])}
        titles = [STUDIED[measure].title for measure in deciding(self.results)]
        words = _HOW_TO_READ.format(f"{', '.join(titles[:-1])} and {titles[-1]}")
        effects = "Differences from plain dictionaries of the same k"
        tables = (
            Table(self._effects(self._measures), words=[words], title=effects),
            Table(self._dictionaries(), words=[_WORDS_ON_BASELINES], title="Dictionaries"),
        )
        about = {
            "title": f"Study of weights at {self.site}, {self.basis['training']['architecture']}",
            "words": [_QUESTION, *self._notes()],
            "facts": self._facts(),
            "evidence": [
                {"series": numbers[one.label], "name": one.name, "text": _evidence(one)}
                for one in self._claims()
            ],
            "tables": [table.of_page() for table in tables],
        }
        return filled("report.html", figures | about)

    def figures(self) -> dict[str, Any]:
        """What the page draws, JSON-able; ``pages/report.html`` says what it expects."""
        of_others = {one.control for one in self.compared}
        shown = [one for one in self.compared if one.label not in of_others]
        by_kind = {(one.label, one.k): one for one in self.compared}
        owners = {one.label: one.control for one in shown}
        numbers = {label: number for number, label in enumerate((PLAIN, *owners))}
        of_control = {control: numbers[label] for label, control in owners.items() if control}
        series: list[dict[str, Any]] = [{"name": PLAIN, "group": "plain"}]
        for number, (name, control) in enumerate(owners.items()):
            colour = {"group": "weighted", "colour": number % COLOURS}
            series.append({"name": name, "control": control} | colour)
        points = [
            {
                "series": of_control.get(r.label, numbers.get(r.label)),
                "control": r.label in of_control,
                "name": r.label,
                "k": r.k,
                "values": {"l0": r.shares["l0"], "fvu": r.fvu, "ce_recovered": r.ce_recovered}
                | {measure: value.mean for measure, value in r.values.items()},
            }
            for r in self.results
            if not r.is_baseline
        ]
        rows = [
            {
                "series": numbers[one.label],
                "name": one.name,
                "word": ", ".join(f"{STUDIED[m].title} {word}" for m, word in one.verdicts.items()),
                "values": _numbers(one),
                "control": _numbers(by_kind.get((one.control or "", one.k))),
            }
            for one in shown
        ]
        others = [measure for measure in self._measures if measure not in _FIDELITY]
        measures = {m.key: m for m in (*DRAWN, L0)} | {m: STUDIED[m] for m in self._measures}
        return {
            "series": series,
            "points": points,
            "measures": {key: measure.of_page() for key, measure in measures.items()},
            "curves": [
                {"title": "Fidelity", "across": "l0", "up": _FIDELITY},
                {"title": "Monosemanticity", "across": "l0", "up": others},
            ],
            "legend": _LEGEND,
            "forest": self._measures,
            "differences": [{"equal": "k", "across": "l0", "rows": rows}],
        }

    @property
    def _measures(self) -> list[str]:
        """Those that some dictionary has."""
        return [m for m in STUDIED if any(m in result.values for result in self.results)]

    def _claims(self) -> list[Compared]:
        return [one for one in self.compared if one.control is not None]

    def _notes(self) -> list[str]:
        """What to know before relying on the verdicts."""
        return self.results[0].text.warnings()

    def _facts(self) -> list[tuple[str, str]]:
        """What all dictionaries share."""
        own = [result for result in self.results if not result.is_baseline]
        made = f"{len(own)}, on seeds {', '.join(map(str, sorted({r.seed for r in own})))}"
        if beside := len(self.results) - len(own):
            made += f", and {beside} baselines"
        return [
            ("model", self.basis["rows"]["model"]["name"]),
            ("text", self.basis["text"]["name"]),
            ("measured on", own[0].text.text("held-out text")),
            ("rows trained on", f"{self.basis['rows']['num_rows']:,}"),
            ("dictionaries", made),
        ]

    def _effects(self, measures: Sequence[str]) -> list[list[str]]:
        """Differences from plain dictionaries, with the verdict of a measure that decides."""
        rows = [["weights", "k", "seeds", *(STUDIED[m].title for m in measures)]]
        for one in self.compared:
            cells = (_difference(one, measure) for measure in measures)
            rows.append([one.label, str(one.k), str(len(one.seeds)), *cells])
        return rows

    def _dictionaries(self) -> list[list[str]]:
        """Means over seeds of every label and k."""
        rows = [["weights", "k", "seeds", "L0", "L0 not dense", "CE recovered", "FVU", "dense %",
                 "dead %", "scored %", *(STUDIED[m].title for m in self._measures)]]  # fmt: skip
        for (label, k), own in _grouped(self.results).items():
            shares = {name: fmean(r.shares[name] for r in own) for name in own[0].shares}
            of = {m: [r.values[m].mean for r in own if m in r.values] for m in self._measures}
            cells = [label, str(k), str(len(own)), f"{shares['l0']:.1f}"]
            cells.append(f"{fmean(r.density for r in own):.1f}")
            cells += [f"{fmean(getattr(r, m) for r in own):.4f}" for m in ("ce_recovered", "fvu")]
            cells += [f"{100 * shares[f'{s}_share']:.1f}" for s in ("dense", "dead", "eligible")]
            cells += [f"{fmean(known):.4f}" if known else _NONE for known in of.values()]
            rows.append(cells)
        return rows


def _evidence(one: Compared) -> str:
    """The verdicts, and what they rest on."""
    parts = []
    for measure, p in one.adjusted.items():
        text = f"{STUDIED[measure].title} {_difference(one, measure)}, p {p:.2g}"
        if measure in one.against_control:
            text += f", {_estimate(one.against_control[measure], measure)} beside its control"
        parts.append(text)
    return "; ".join([*(parts or ["not measured"]), f"{len(one.seeds)} seeds"])


def _difference(one: Compared, measure: str) -> str:
    """``better: −4.1 % [−5.0, −3.2]``; no verdict where the measure decides nothing."""
    verdict = one.verdicts.get(measure)
    text = _estimate(one.effects.get(measure), measure)
    return text if verdict is None else f"{verdict}: {text}"


def _estimate(estimate: Estimate | None, measure: str) -> str:
    """``+0.0041 [+0.0011, +0.0072]``, or per cent."""
    if estimate is None:
        return _NONE
    numbers = (estimate.difference, *estimate.interval)
    if STUDIED[measure].source == "fidelity":
        by, low, high = (f"{100 * number:+.1f}" for number in numbers)
        return f"{by} % [{low}, {high}]"
    by, low, high = (f"{number:+.4f}" for number in numbers)
    return f"{by} [{low}, {high}]"


def _numbers(one: Compared | None) -> dict[str, tuple[float, ...]]:
    effects = {} if one is None else one.effects
    return {name: (found.difference, *found.interval) for name, found in effects.items()}
