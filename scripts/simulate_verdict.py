"""How often does a study call a rule better that does nothing? The whole verdict, simulated.

    python scripts/simulate_verdict.py [--repetitions 300]

Studies are made up, with no effect anywhere, and go through ``compare`` as real ones do: a plain
k-curve, rules with their controls, both deciding measures, Holm's correction, the shares of the
looks, and the comparison with the control. What is random is what is random in a real study: seeds,
latents, families of concepts (the same on all seeds of an arm) and documents (the same on all
seeds). How much each varies is estimated from the archive of the study in docs/results; for
documents, from that of today's dictionaries, which alone holds resamplings of them. Spill, which is
far from normal and of few families, is drawn from today's dictionaries themselves. Writes a table
into docs/results, in ten minutes.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from benchmarks import write_result
from study_claims import TODAY, WEIGHTS, Study
from tqdm import tqdm

from llm_wsae.studies.comparison import BETTER, INDISTINGUISHABLE, compare
from llm_wsae.studies.curve import Point, Value
from llm_wsae.studies.plan import PLAIN
from llm_wsae.studies.results import Result
from llm_wsae.terminal import markdown

CURVE = (24, 32, 48)
K, FAMILIES, RESAMPLINGS = 32, 9, 100
NATS = 0.3  # that a plain dictionary of k = 1 would cost; it falls as 1/k
DETECTION, SELECTIVITY, SPILL = "detection", "selectivity", "spill"


@dataclass(frozen=True)
class Spreads:
    """Standard deviations of one dictionary's measures."""

    seed: float = 0.002
    """Of detection, from seed to seed."""
    latents: float = 0.002
    """Of detection, by its finite number of latents."""
    family: float = 0.015
    """Of an arm's effect on the selectivity of a family, the same on all seeds."""
    cell: float = 0.02
    """Of one family's selectivity, from seed to seed."""
    document: float = 0.004
    """Of an arm's effect on detection through the choice of documents, the same on all seeds.
    Twice the spread over seeds, and more than ten times what the archive shows."""
    spill: np.ndarray | None = None
    """Of known dictionaries, [arms, seeds, families], NaN where a family has none: it decides, and
    is drawn from these. None: selectivity decides."""


@dataclass(frozen=True)
class Design:
    """A kind of study."""

    arms: int = 4
    looks: tuple[int, ...] = (3,)
    """Numbers of seeds at which it is looked at; it stops when a rule is called anything."""
    ks: tuple[int, ...] = (K,)
    """Of rules and controls, on all seeds. From the last look on, it is looked at again after each
    further one; noise is independent between them, as if each were another rule."""
    effect: float = 0.0
    """Of every rule, on both measures."""
    of_control: float | None = None
    """The same of its control; None: as the rule's, so that no rule is better than its control."""
    resampled: bool = True
    """Whether detection is known on resamplings of the documents."""


def estimated() -> Spreads:
    """What the archive shows, over the rules that cost little fidelity: others have effects."""
    cells, families, seeds, latents = [], [], [], []
    for study in Study.read_all(WEIGHTS).values():
        mild = [one for one in study.report.compared if one.verdict == INDISTINGUISHABLE]
        for one in mild:
            own = [r.point for r in study.of(one.label)]
            plain = {r.point.seed: r.point for r in study.of(PLAIN)}
            tables = [
                [list((p.values[SELECTIVITY].items or {}).values()) for p in points]
                for points in (own, [plain[p.seed] for p in own])
            ]
            table = np.subtract(*map(np.array, tables))  # [seeds, families]
            rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
            cell = (rest**2).sum() / np.prod(np.array(table.shape) - 1)
            cells.append(cell / 2)  # of one dictionary
            families.append(table.mean(0).var(ddof=1) - cell / len(table))
            change = [p.values[DETECTION].mean - plain[p.seed].values[DETECTION].mean for p in own]
            seeds.append(np.var(change, ddof=1) / 2)
            latents.append(np.mean([p.values[DETECTION].variance for p in own]))
    found = (seeds, latents, families, cells, list(of_documents()))
    return Spreads(*(max(0.0, float(np.mean(v))) ** 0.5 for v in found))


def of_documents() -> Iterator[float]:
    """Variance that the choice of documents adds to the difference in detection from plain, the
    same on all seeds, of every kind of weights whose resamplings are known; none below 0."""
    for study in Study.read_all(TODAY.folder).values():
        plain = {r.point.seed: r.point for r in study.of(PLAIN)}
        for one in study.report.compared:
            pairs = [(r.point, plain[r.point.seed]) for r in study.of(one.label)]
            drawn = ([p.values[DETECTION].resampled for p in pair] for pair in pairs)
            table = np.array([np.subtract(*pair) for pair in drawn])  # [seeds, resamplings]
            of_mean = table.mean(0).var(ddof=1)
            alone = (table.var(1, ddof=1).mean() - of_mean) / (len(table) - 1)
            yield max(0.0, float(of_mean - alone))


def known_spill() -> np.ndarray:
    """Spill of all dictionaries of today's study by kind, seed and family; NaN where none of a
    family's concepts loses enough."""
    (study,) = Study.read_all(TODAY.folder).values()
    found: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for result in study.report.results:
        if not result.is_baseline:
            items = result.point.values[SPILL].items or {}
            found[result.label, result.point.k].append(dict(items))
    families = sorted({family for own in found.values() for items in own for family in items})
    return np.array(
        [[[items.get(f, np.nan) for f in families] for items in own] for own in found.values()]
    )


class Studies:
    """Made-up results, with numbers drawn for all dictionaries of a study at once."""

    def __init__(self, spreads: Spreads, design: Design, draw: np.random.Generator):
        self._spreads, self._design, self._draw = spreads, design, draw

    def results(self) -> list[Result]:
        """A study on as many seeds as its last look has."""
        seeds = self._design.looks[-1]
        found = [r for k in CURVE for r in self._arm(PLAIN, None, k, seeds, 0.0)]
        for number, k in product(range(self._design.arms), self._design.ks):
            label, control = f"rule{number}", f"permuted-rule{number}"
            found += self._arm(label, control, k, seeds, self._spreads.family)
            found += self._arm(control, None, k, seeds, self._spreads.family)
        return found

    def _arm(
        self, label: str, control: str | None, k: int, seeds: int, family: float
    ) -> Iterator[Result]:
        spreads, draw = self._spreads, self._draw
        effect = 0.0 if label == PLAIN else self._design.effect
        if label != PLAIN and control is None and self._design.of_control is not None:
            effect = self._design.of_control
        document, resampled = 0.0, np.zeros(RESAMPLINGS)
        if label != PLAIN:
            document = draw.normal(0, spreads.document)
            resampled = draw.normal(document, spreads.document, RESAMPLINGS)
        detection = effect + document + draw.normal(0, spreads.seed, seeds)
        if spreads.spill is None:
            measure, table = SELECTIVITY, effect + self._selectivity(family, seeds)
        else:
            measure, table = SPILL, self._spill(spreads.spill, seeds) - effect
        increase = NATS / k * (1 if label == PLAIN else 1.1)
        for seed in range(seeds):
            items = {f"family {i}": float(v) for i, v in enumerate(table[seed]) if v == v}
            drawn = resampled - document + detection[seed] if self._design.resampled else None
            of_documents = None if drawn is None else tuple(drawn.tolist())
            values = {
                DETECTION: Value(
                    float(detection[seed]), spreads.latents**2, resampled=of_documents
                ),
                measure: Value(float(np.nanmean(table[seed])), 0.0, items),
            }
            point = Point(k, seed, increase, values)
            yield Result(
                name=f"{label}-k{k}-s{seed}", label=label, rule=label, control=control, point=point,
                ce_recovered=1 - increase, fvu=0.1, kl=increase, shares={}, density=float(k),
                processor="made up",
            )  # fmt: skip

    def _selectivity(self, family: float, seeds: int) -> np.ndarray:
        """By seed and family."""
        table = self._draw.normal(0, family, FAMILIES)
        return table + self._draw.normal(0, self._spreads.cell, (seeds, FAMILIES))

    def _spill(self, known: np.ndarray, seeds: int) -> np.ndarray:
        """By seed and family: of a family, that of one known arm, on seeds drawn from its own."""
        arms, of_arm, families = known.shape
        arm = self._draw.integers(arms, size=families)
        return known[arm, self._draw.integers(of_arm, size=(seeds, families)), range(families)]


def called_better(results: Sequence[Result], design: Design) -> bool:
    """Whether any rule is called better at any look, up to the one at which the study stops."""
    first, last = design.ks[:1], design.looks[-1]
    looks = [(seeds, first) for seeds in design.looks]
    looks += [(last, design.ks[:count]) for count in range(2, len(design.ks) + 1)]
    for seeds, ks in looks:
        seen = [
            r for r in results if r.point.seed < seeds and (r.label == PLAIN or r.point.k in ks)
        ]
        added = {r.label for r in seen} if ks != first else ()
        if BETTER in [one.verdict for one in compare(seen, added) if not one.is_control]:
            return True
    return False


def rate(spreads: Spreads, design: Design, repetitions: int, seed: int = 0) -> float:
    """Share of made-up studies in which some rule is called better."""
    studies = Studies(spreads, design, np.random.default_rng(seed))
    return float(np.mean([called_better(studies.results(), design) for _ in range(repetitions)]))


DESIGNS = {
    "one rule": Design(arms=1),
    "four rules": Design(arms=4),
    "eight rules": Design(arms=8),
    "four rules, as good as their controls": Design(arms=4, effect=0.03),
}
LOOKS = {
    "3 seeds": {"looks": (3,)},
    "5 seeds": {"looks": (5,)},
    "3, then 5": {"looks": (3, 5)},
    "5, then four more k": {"looks": (5,), "ks": (K, 28, 36, 40, 44)},
}


def section(repetitions: int) -> str:
    """The table of docs/results."""
    archive = estimated()
    spreads = {
        "selectivity, .015 between families": Spreads(),
        "selectivity, as in the archive": archive,
        "spill, as in today's study": replace(archive, spill=known_spill()),
    }
    rows = [["decides with detection", "study", *LOOKS]]
    kinds = [(name, words) for name in spreads for words in DESIGNS]
    for name, words in tqdm(kinds, desc="kinds of study", unit="kind"):
        found = [
            rate(spreads[name], replace(DESIGNS[words], **looks), repetitions)
            for looks in LOOKS.values()
        ]
        rows.append([name, words, *(f"{100 * share:.1f} %" for share in found)])
    error = 100 * (0.05 * 0.95 / repetitions) ** 0.5
    return "\n\n".join(
        [
            "## How often the verdict errs",
            f"`python scripts/simulate_verdict.py`: {repetitions:,} made-up studies in each cell, "
            "without any effect, or with the same effect on rules and controls, go through the "
            "whole verdict. The share in which any rule is called *better* is to be at most 5 % "
            f"(whose standard error is {error:.1f} points). Seeds, latents, families of concepts "
            "and documents are random; families and documents do not average out over seeds. In "
            f"the archive the spread between families is {archive.family:.3f}, and that of one "
            f"family over seeds {archive.cell:.3f}. Documents add {archive.document:.4f} to a "
            "difference in detection, as far as the study of today's dictionaries shows (the "
            f"others hold no resamplings); {Spreads.document:g} is assumed beside the families of "
            ".015. Spill is drawn from the dictionaries of that study, most of which have it "
            "for four families only, with rare large values. Columns: the numbers of seeds after "
            "which the study is looked at, until some rule is called better; in the last "
            "one, more k of all rules are added after a look, one after the other, on the same "
            "seeds; then no rule is called better until there are more seeds.",
            markdown(rows, left=2),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=300)
    asked = parser.parse_args()
    write_result("verdicts", section(asked.repetitions))
