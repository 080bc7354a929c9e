"""What RESULTS.md says of the study of weights on a real model, from the folders of its sites."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_wsae.files import read_json
from llm_wsae.study.plan import PLAIN
from llm_wsae.study.report import StudyReport, estimate_text
from llm_wsae.study.results import DECIDING, Result, read_basis, read_result
from llm_wsae.study.runner import BASIS
from llm_wsae.study.verdict import BETTER, Compared
from llm_wsae.tables import markdown

FOLDER = Path(__file__).parent / "results"
SITES = ("blocks.9.hook_resid_post", "blocks.20.hook_resid_post")
PROFILE = "profile.json"
K = 32


@dataclass(frozen=True)
class Study:
    """What is known of a site: the report and the profile of its dimensions."""

    report: StudyReport
    profile: dict[str, Any]

    @classmethod
    def read_all(cls, folder: Path) -> "dict[str, Study]":
        """By site, where something was measured, from the folders of the sites in a folder."""
        found = {}
        for site in SITES:
            own = folder / site
            results = [read_result(path) for path in sorted((own / "results").glob("*.json"))]
            if any(result.label != PLAIN for result in results):
                report = StudyReport.of(site, read_basis(own / BASIS), results)
                found[site] = cls(report, read_json(own / PROFILE, "profile"))
        return found

    def of(self, label: str, k: int = K) -> list[Result]:
        """Its dictionaries of one k."""
        return [r for r in self.report.results if r.label == label and r.point.k == k]

    def compared(self, label: str) -> Compared | None:
        """What became of a rule."""
        return next((one for one in self.report.compared if one.label == label), None)

    def same_k(self, label: str, value: Callable[[Result], float]) -> float:
        """Mean difference from the plain dictionaries of the same k and seed."""
        plain = {r.point.seed: value(r) for r in self.of(PLAIN)}
        own = [r for r in self.of(label) if r.point.seed in plain]
        return sum(value(r) - plain[r.point.seed] for r in own) / max(1, len(own))


# What smaller trials had led to expect; each is held against what was measured.
Answer = tuple[str, bool]
Check = Callable[[Study], Answer]


@dataclass(frozen=True)
class Claim:
    """Something expected of a rule at some sites."""

    label: str
    sites: tuple[str, ...]
    words: str
    check: Check


def _measured(result: Result, measure: str) -> float:
    """NaN where too few latents could be scored."""
    value = result.point.values.get(measure)
    return math.nan if value is None else value.mean


def _inverse_helps(study: Study) -> Answer:
    label = "variance-a-0.25"
    detection = study.same_k(label, lambda r: _measured(r, "detection"))
    ce = study.same_k(label, lambda r: r.ce_recovered)
    return f"{detection:+.4f}, CE {ce:+.4f}", detection >= 0.003 and abs(ce) <= 0.003


def _robust_keeps_ce(study: Study) -> Answer:
    both = [study.of(label) for label in ("robust-variance-a0.5", "variance-a0.5")]
    seeds = set.intersection(*({r.point.seed for r in own} for own in both))
    if not seeds:
        return "variance-a0.5 was not measured", False
    robust, raw = (
        sum(r.ce_recovered for r in own if r.point.seed in seeds) / len(seeds) for own in both
    )
    return f"{robust:.4f} against {raw:.4f}", robust - raw >= 0.08


def _variance_collapses(label: str) -> Check:
    def check(study: Study) -> Answer:
        effective = study.profile["weights"][label]["effective_dimensions"]
        ce = study.same_k(label, lambda r: r.ce_recovered)
        return f"{effective:.1f} effective dimensions, CE recovered {ce:+.4f}", effective < 10

    return check


_WORST_FAMILY = -0.01


def _selective(label: str) -> Check:
    def check(study: Study) -> Answer:
        one = study.compared(label)
        if one is None or "selectivity" not in one.effects:
            return "not comparable", False
        effect = one.effects["selectivity"]
        low, high = effect.interval
        ce = one.ce_change[K]
        worst = min(one.families, key=one.families.get)
        words = (
            f"{effect.difference:+.4f} [{low:+.4f}, {high:+.4f}] on {len(one.seeds)} seeds, "
            f"CE at the same k {ce:+.4f}, worst family {worst} {one.families[worst]:+.4f}"
        )
        met = effect.difference >= 0.004 and low > 0 and ce >= -0.003
        return words, met and one.families[worst] >= _WORST_FAMILY

    return check


_POWERS = ("0.125", "0.25", "0.5", "1")
CLAIMS = (
    Claim("variance-a0.5", SITES, "collapses", _variance_collapses("variance-a0.5")),
    Claim("variance-a1", SITES, "collapses", _variance_collapses("variance-a1")),
    Claim(
        "robust-variance-a0.5",
        SITES[1:],
        "recovers ≥ .08 more CE than raw variance",
        _robust_keeps_ce,
    ),
    Claim(
        "variance-a-0.25",
        SITES[:1],
        "detection ≥ +.003 at the same k, CE within .003",
        _inverse_helps,
    ),
    *(
        Claim(
            f"sensitivity-matrix-a{power}-space",
            SITES,
            "selectivity ≥ +.004 at equal CE, interval above 0; CE ≥ −.003 at the same k; no "
            "family below −.01",
            _selective(f"sensitivity-matrix-a{power}-space"),
        )
        for power in _POWERS
    ),
)


# The one thing that the study found, to be found again elsewhere.
_FOUND = "sensitivity-matrix-a0.25-space"


def _better_again(study: Study) -> Answer:
    one = study.compared(_FOUND)
    if one is None or "detection" not in one.effects:
        return "not comparable", False
    words = (
        f"{one.verdict}: {estimate_text(one.effects['detection'])}, beside its control "
        f"{estimate_text(one.against_control.get('detection'))}, on {len(one.seeds)} seeds"
    )
    return words, one.verdict == BETTER


FOUND_AGAIN = (
    Claim(
        _FOUND,
        SITES,
        "detection above the plain curve and above its control: verdict *better*",
        _better_again,
    ),
)


@dataclass(frozen=True)
class Apart:
    """A study with folders of its own, hence its own correction for what was tried."""

    title: str
    folder: Path
    words: str
    """Why it was made, and of what; written before it was run."""
    claims: tuple[Claim, ...] = FOUND_AGAIN


CONFIRMATION = Apart(
    "On fresh seeds",
    FOLDER / "confirmation",
    f"`{_FOUND}` came out above the plain curve in detection at both sites, among everything "
    "that was tried there. So it was tried once more and alone, on seeds 5 to 9, between plain "
    "dictionaries of k = 24, 32 and 48; rule, seeds and what is asked of them were written "
    "down and committed before the first of these dictionaries was trained.",
)
JUMPRELU = Apart(
    "JumpReLU: where weights move thresholds too",
    FOLDER / "jumprelu",
    "In a TopK dictionary weights of the loss cannot change how many latents are active. In a "
    "JumpReLU dictionary every latent learns its threshold from the loss, so weights move the "
    "thresholds too. Two kinds of weights are tried on it, on three seeds, between plain JumpReLU "
    f"dictionaries of k = 24, 32 and 48: `{_FOUND}`, which is expected to be better as with TopK, "
    "and `variance-a-0.25`, the mildest of those that act in the loss. k is the mean number of "
    "active latents that training aims at.",
)
APART = (CONFIRMATION, JUMPRELU)


def claim_table(claims: Iterable[Claim], studies: Mapping[str, Study]) -> str:
    """Every claim at every site where its rule was tried."""
    rows = [["weights", "site", "expected", "measured", "holds"]]
    for claim in claims:
        for site in claim.sites:
            if site in studies and studies[site].of(claim.label):
                measured, holds = claim.check(studies[site])
                met = "yes" if holds else "**no**"
                rows.append([f"`{claim.label}`", f"`{site}`", claim.words, measured, met])
    return markdown(rows, left=4)


def _families_of_controls(studies: Mapping[str, Study]) -> str:
    """How much the demand on families asks: weights that know nothing are held against it too."""
    worst = [
        min(one.families.values())
        for study in studies.values()
        for one in study.report.compared
        if one.is_control and one.families
    ]
    below = sum(value < _WORST_FAMILY for value in worst)
    return (
        f"Some families are a single concept, which moves by more than that from seed to seed: of "
        f"the {len(worst)} controls, {below} have a family below {_WORST_FAMILY:.2f} too."
    )


def site_section(site: str, study: Study) -> str:
    """What was found at one site."""
    massive, folder = study.profile["massive"], f"results/{site}"
    processors = Counter(result.processor for result in study.report.results)
    made = ", ".join(f"{count} on {name}" for name, count in processors.items())
    parts = [
        f"### `{site}`",
        f"{len(study.report.results)} dictionaries ({made}), each on {study.profile['rows']:,} "
        f"rows. Variance of the largest dimension over the median one: "
        f"{study.profile['variance_max_over_median']:.0f}, "
        f"{study.profile['robust_variance_max_over_median']:.0f} winsorised; massive activations: "
        f"{massive['rows']} rows ({massive['share']:.3%}). [All tables]({folder}/report.md).",
        _verdicts(study.report),
        f"![Monosemanticity against CE recovered at {site}]({folder}/curve.png)",
        f"![Differences from the plain curve at {site}]({folder}/differences.png)",
        _table(study),
    ]
    return "\n\n".join(parts)


def _verdicts(report: StudyReport) -> str:
    """What became of every rule."""
    head = ["weights", "verdict"]
    for measure in DECIDING:
        head += [measure, "p", "beside its control"]
    rows = [[*head, "more scored", "detection, all"]]
    for one in report.compared:
        if one.is_control:
            continue
        cells = [f"`{one.label}`", one.verdict]
        for measure in DECIDING:
            p = one.adjusted.get(measure)
            cells += [estimate_text(one.effects.get(measure)), "–" if p is None else f"{p:.2g}"]
            cells.append(estimate_text(one.against_control.get(measure)))
        scored = one.effects.get("eligible")
        cells.append("–" if scored is None else f"{100 * scored.difference:+.1f} points")
        rows.append([*cells, estimate_text(one.effects.get("detection_all"))])
    return markdown(rows, left=2)


def _table(study: Study) -> str:
    head = ["weights", "k", "seeds", "effective dimensions", "CE recovered", "FVU"]
    head += ["dense %", "dead %", "detection", "selectivity"]
    rows = [head]
    keys = dict.fromkeys((r.label, r.point.k) for r in study.report.results)
    for label, k in keys:
        own = study.of(label, k)

        def mean(value: Callable[[Result], float], own: list[Result] = own) -> float:
            return sum(map(value, own)) / len(own)

        weights = study.profile["weights"].get(label)
        cells = [f"{weights['effective_dimensions']:.1f}" if weights else "–"]
        cells += [f"{mean(lambda r: r.ce_recovered):.4f}", f"{mean(lambda r: r.fvu):.4f}"]
        cells += [
            f"{100 * mean(lambda r, s=share: r.shares[s]):.1f}"
            for share in ("dense_share", "dead_share")
        ]
        cells += [
            f"{mean(lambda r, m=measure: _measured(r, m)):.4f}"
            for measure in ("detection", "selectivity")
        ]
        rows.append([f"`{label}`", str(k), str(len(own)), *cells])
    return markdown(rows)


def apart_section(apart: Apart, studies: Mapping[str, Study]) -> str:
    """What became of a study apart from the others."""
    parts = [f"### {apart.title}", apart.words, claim_table(apart.claims, studies)]
    for site, study in studies.items():
        report = (apart.folder / site / "report.md").relative_to(FOLDER.parent)
        made = f"{len(study.report.results)} dictionaries ([all tables]({report}))"
        parts += [f"`{site}`, {made}:", _verdicts(study.report)]
    return "\n\n".join(parts)


def section() -> str:
    """The section of RESULTS.md, from the folders."""
    studies = Study.read_all(FOLDER)
    others = [(apart, Study.read_all(apart.folder)) for apart in APART]
    parts = [
        "## A real model: do weights make latents more monosemantic?",
        "`bash scripts/results_study.sh`: SmolLM2-135M-Instruct on Wikipedia summaries and State "
        "of the Union addresses, TopK dictionaries of 8 × width, k = 32, one pass over the rows of "
        "a million tokens; cross-entropy on 50,000 and monosemanticity on 100,000 held-out tokens. "
        "Beside every rule stands its control: the same weights on permuted dimensions or "
        "tokens, or a matrix of the same spectrum with random eigenvectors. A difference is from "
        "the plain k-curve at the dictionary's own cross-entropy, without latents that fire on "
        "more than 10 % of the tokens, its interval over seeds and over latents or concepts; p and "
        "verdicts are corrected for everything that was tried at the site. *More scored* are "
        "latents that fire in enough contexts; *detection, all* has the others at chance.",
        "No interval covers another text, a longer training, another learning rate or another "
        "architecture. Every dictionary had one pass at a rate that was chosen for the plain one; "
        "what twice as many rows give, on one seed, stands in "
        "[checkpoints](../checkpoints/README.md).",
        "Two things were mended after most of these dictionaries had been made. (1) How "
        "differences are tested: the plain curve's own error was counted twice in a difference "
        "from the control, "
        "and where the latents' spread is larger than that of the seeds, it was taken for as "
        "uncertain as theirs. Intervals were too wide; every one below is computed anew from the "
        "same measurements, and nothing was chosen by what it says. (2) Adam's ε was 1e-8, which "
        "is not small beside the gradients of dimensions that count very little. By an estimate, "
        "`variance` with α = 1 and its control moved the decoder in most dimensions of block 9 at "
        "a tenth of the rate or less, so their numbers are partly the optimiser's; with α = ½ it "
        "is some 10 % at most. They are not trained anew yet. With the new ε, 1e-15, are all on "
        "fresh seeds, the powers ⅛, ½ and 1 of `sensitivity` on seeds 3 and 4 with their controls, "
        "and at k = 8 the plain ones of these seeds.",
        "*Effective dimensions* are coordinates for weights of dimensions, and principal "
        "directions for a matrix: the two do not compare.",
        "### What was expected, and what holds",
        "The mean is held against what was expected, unless an interval is named.",
        claim_table(CLAIMS, studies),
        _families_of_controls(studies),
        *(apart_section(apart, found) for apart, found in others if found),
        *(site_section(site, study) for site, study in studies.items()),
    ]
    return "\n\n".join(parts)
