"""The planted experiments for RESULTS.md: run (or finish) them, then write section and figures.

    python scripts/results_theory.py

What was computed is in the archive ``results/planted.jsonl.gz`` and is not computed again: delete
the archive and ``runs/planted`` to do so. ``llm-wsae theory`` does the same with other seeds.

The seeds are none of those that anything was chosen on. What smaller trials had led to expect
stands below as ``CLAIMS`` and is held against what was measured, whether it holds or not.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import IMAGES, README, RESULTS, write_section
from results_archive import pack, unpack

from llm_wsae.tables import markdown
from llm_wsae.theory.comparison import ArmSummary
from llm_wsae.theory.config import EXPERIMENTS, TheoryConfig
from llm_wsae.theory.experiments import FIGURES, run_theory
from llm_wsae.theory.report import TheoryReport, change_text
from llm_wsae.theory.rules import ARMS, PLAIN, SHOWN

SEEDS = tuple(range(200, 210))
ARCHIVE = Path(__file__).parent / "results/planted.jsonl.gz"
RUN = README.parent / "runs/planted"


@dataclass(frozen=True)
class Demand:
    """Something asked of an arm: in words, whether it is met, and what was measured instead."""

    words: str
    met: Callable[[ArmSummary, int], bool]
    """Of the arm and the number of seeds."""
    measured: Callable[[ArmSummary, int], str]


def at_most(per_cent: float) -> Demand:
    """L_GT changes by so much, or falls further."""
    return Demand(
        f"L_GT ≤ {per_cent:+g} %",
        lambda arm, _: arm.change.mean <= per_cent,
        lambda arm, _: change_text(arm.change),
    )


def at_least(per_cent: float) -> Demand:
    """L_GT rises by so much or more."""
    return Demand(
        f"L_GT ≥ {per_cent:+g} %",
        lambda arm, _: arm.change.mean >= per_cent,
        lambda arm, _: change_text(arm.change),
    )


def lower_on(tenths: int) -> Demand:
    """L_GT is lower than plain on so many tenths of the seeds."""
    return Demand(
        f"lower on {tenths} of 10 seeds",
        lambda arm, num_seeds: 10 * arm.wins >= tenths * num_seeds,
        lambda arm, num_seeds: f"{arm.wins} of {num_seeds}",
    )


def mmcs_gain(gain: float) -> Demand:
    """MMCS rises by so much."""
    return Demand(
        f"MMCS ≥ {gain:+g}",
        lambda arm, _: arm.mmcs_change >= gain,
        lambda arm, _: f"{arm.mmcs_change:+.3f}",
    )


def ahead_of(control: str, points: float) -> Demand:
    """A control on the same schedule is so many points behind."""
    return Demand(
        f"`{control}` ≥ {points:g} points behind",
        lambda arm, _: arm.against[control].mean <= -points,
        lambda arm, _: f"difference {change_text(arm.against[control])}",
    )


@dataclass(frozen=True)
class Claim:
    """What an arm was expected to do, and on which data."""

    arm: str
    experiments: tuple[str, ...]
    """The same data at several learning rates."""
    demands: tuple[Demand, ...]


DENSE = ("mixed-0.5", "mixed-0.5-slow", "mixed-0.5-fast")
SPARSER = ("mixed-0.7", "mixed-0.7-slow")
CLAIMS = (
    Claim(
        "participation-true-annealed",
        DENSE,
        (at_most(-8), lower_on(8), mmcs_gain(0.05), ahead_of("random-annealed", 5)),
    ),
    Claim("gap-true", SPARSER, (at_most(-1), lower_on(7))),
    Claim("hoyer", SPARSER, (at_most(-1), lower_on(6))),
    Claim("variance", SPARSER, (at_least(0),)),
    Claim("variance-a0.5", ("outliers-0.7",), (at_least(30),)),
    Claim("standardised", ("outliers-0.7",), (at_most(-25),)),
)


def claim_table(report: TheoryReport) -> str:
    """Every claim on its experiments, demand by demand."""
    rows = [["arm", "experiment", "learning rate", "expected", "measured [95 %]", "holds"]]
    num_seeds = len(report.config.seeds)
    for claim in CLAIMS:
        for name in claim.experiments:
            arm = report.arms[name][claim.arm]
            for demand in claim.demands:
                met = "yes" if demand.met(arm, num_seeds) else "**no**"
                rate = f"{EXPERIMENTS[name].learning_rate:g}"
                measured = demand.measured(arm, num_seeds)
                rows.append([f"`{claim.arm}`", name, rate, demand.words, measured, met])
    return markdown(rows, left=4)


def verdict_table(report: TheoryReport) -> str:
    """Per experiment: which arms earned which word."""
    words = {
        "better": "better, than every control too",
        "as a control": "better, but not than every control",
        "worse": "worse",
    }
    rows = [["experiment", "L_GT of plain", *words.values()]]
    for name, arms in report.arms.items():
        cells = []
        for word in words:
            earned = [f"`{arm}`" for arm in SHOWN if arms[arm].verdict == word]
            cells.append(", ".join(earned) or "none")
        rows.append([name, f"{arms[PLAIN].l_gt:.3f}", *cells])
    return markdown(rows)


def section(report: TheoryReport) -> str:
    """The planted section of RESULTS.md."""
    config, names = report.config, list(report.arms)
    closed, experiments, correlations, changes = (
        f"{title}\n\n{markdown(rows, left=2 if len(rows[0]) == 2 else 1)}"
        for title, rows in (
            report.closed_form_table(),
            report.experiment_table(),
            report.correlation_table(names),
            report.change_table(names),
        )
    )
    parts = [
        "## Planted data: what weights do where the truth is known",
        f"`python scripts/results_theory.py`, or `llm-wsae theory` with other seeds: "
        f"{len(config.seeds)} seeds ({config.seeds[0]} to {config.seeds[-1]}), tied TopK "
        f"dictionaries, {config.steps:,} steps of {config.batch_size} rows, "
        f"{len(ARMS)} arms that share data, start and rows of their seed. L_GT is the share of the "
        "true features' energy that is missing when each is matched to one latent. A change is in "
        "per cent of the plain arm's mean, its interval a paired t over seeds. S is the "
        "probability that a feature is 0, n the number of features, n_p of dimensions, W_p how "
        "features lie in them; a dimension's true monosemanticity is 1 / PR, PR the participation "
        "ratio of the features in it; MMCS is the mean over features of the largest cosine with a "
        "decoder row. A *digon* is two features on one dimension with opposite signs. Rules named "
        "`-true` know W_p; *annealed* weights move to 1 between 40 and 70 % of the training; "
        "*standardised* is `variance` with α = −½ as the space. ",
        "### What was expected, and what holds",
        "The mean is held against what was expected, not its interval.",
        claim_table(report),
        "### Which weights help",
        "Against the plain arm after Holm's correction over all arms of an experiment, then "
        "against the controls used in the same way: the arm's own weights on the wrong dimensions, "
        "and random ones.",
        verdict_table(report),
        f"![Change of L_GT of every arm in every experiment](images/planted_{FIGURES[2]})",
        changes,
        "### Which rules see the truth",
        "Two rules ask a language model. Here `sensitivity` asks one that names the true features, "
        "x̂_j = ReLU(w_jᵀx_p / ‖w_j‖²), the toy model's own output where columns have norm 1, and "
        "`semantic` compares rows by their true features, as a perfect encoder would their texts. "
        "`leading-sensitivity` and `whitening` are matrices and have no score for a dimension, "
        "`token-norm` weighs rows, and `uniform` scores all dimensions the same.",
        f"![Rank correlation of rules with the truth](images/planted_{FIGURES[1]})",
        correlations,
        "### The closed form",
        f"![What the closed form loses, by sparsity](images/planted_{FIGURES[0]})",
        closed,
        "### The experiments",
        experiments,
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Run what is missing, write what is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=0, help="0: one on every core")
    workers = parser.parse_args().workers
    if ARCHIVE.exists() and not RUN.exists():
        unpack(ARCHIVE, RUN)
    report = run_theory(TheoryConfig(seeds=SEEDS, workers=workers), RUN)
    pack(RUN, ARCHIVE)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:
        shutil.copy(RUN / figure, IMAGES / f"planted_{figure}")
    write_section("planted", section(report), RESULTS)
    print(claim_table(report))


if __name__ == "__main__":
    main()
