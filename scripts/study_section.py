"""What docs/results.md says of the study of weights on a real model, from the archives."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import reduce

from study_claims import (
    ANNEALED,
    ANNEALING,
    CLAIMS,
    CONFIRMATION,
    FOLDER,
    FOUND,
    JUMPRELU,
    ON_ALL_SEEDS,
    TWELVE,
    WORST_FAMILY,
    Apart,
    Claim,
    Study,
    measured,
)

from llm_wsae.model.site import Site
from llm_wsae.studies.comparison import Compared
from llm_wsae.studies.report import CURVE, DIFFERENCES, StudyReport
from llm_wsae.studies.report_tables import agreement_text, estimate_text
from llm_wsae.studies.results import DECIDING, Result
from llm_wsae.tables import markdown


def figure(block: int, name: str) -> str:
    """Where a figure of a site's study lies, as docs/results.md links to it."""
    return f"images/study_block_{block}_{name}"


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
    below = sum(value < WORST_FAMILY for value in worst)
    return (
        f"Some families are a single concept, which moves by more than that from seed to seed: of "
        f"the {len(worst)} controls, {below} have a family below {WORST_FAMILY:.2f} too."
    )


def site_section(site: str, study: Study) -> str:
    """What was found at one site."""
    massive, block = study.profile["massive"], Site.parse(site).block
    processors = Counter(result.processor for result in study.report.results)
    made = ", ".join(f"{count} on {name}" for name, count in processors.items())
    parts = [
        f"### `{site}`",
        f"{len(study.report.results)} dictionaries ({made}), each on {study.profile['rows']:,} "
        f"rows. Variance of the largest dimension over the median one: "
        f"{study.profile['variance_max_over_median']:.0f}, "
        f"{study.profile['robust_variance_max_over_median']:.0f} winsorised; massive activations: "
        f"{massive['rows']} rows ({massive['share']:.3%})."
        f"{_pace(study)}",
        _verdicts(study.report),
        f"![Monosemanticity against CE recovered at {site}]({figure(block, CURVE)})",
        f"![Differences from the plain curve at {site}]({figure(block, DIFFERENCES)})",
        _table(study),
    ]
    return "\n\n".join(parts)


def _verdicts(report: StudyReport) -> str:
    """What became of every rule."""
    head = ["weights", "verdict"]
    for measure in DECIDING:
        head += [measure, "p", "beside its control"]
    equal = [f"{measure}, equal density" for measure in DECIDING]
    rows = [[*head, "more scored", "detection, all", *equal]]
    for one, other in zip(report.compared, report.at_equal_density, strict=True):
        if one.is_control:
            continue
        cells = [f"`{one.label}`", one.verdict]
        for measure in DECIDING:
            p = one.adjusted.get(measure)
            cells += [estimate_text(one.effects.get(measure)), "–" if p is None else f"{p:.2g}"]
            cells.append(estimate_text(one.against_control.get(measure)))
        scored = one.effects.get("eligible")
        cells.append("–" if scored is None else f"{100 * scored.difference:+.1f} points")
        cells.append(estimate_text(one.effects.get("detection_all")))
        rows.append([*cells, *(estimate_text(other.effects.get(m)) for m in DECIDING)])
    return markdown(rows, left=2)


def _table(study: Study) -> str:
    head = ["weights", "k", "seeds", "effective dimensions", "CE recovered", "FVU"]
    head += ["dense %", "dead %", "scored %", "detection", "selectivity"]
    report = study.report
    rows = [[*head, "PW-MCC"] if report.agreements else head]
    keys = dict.fromkeys((r.label, r.point.k) for r in report.results)
    for label, k in keys:
        own = study.of(label, k)

        def mean(value: Callable[[Result], float], own: list[Result] = own) -> float:
            return sum(map(value, own)) / len(own)

        weights = study.profile["weights"].get(label)
        cells = [f"{weights['effective_dimensions']:.1f}" if weights else "–"]
        cells += [f"{mean(lambda r: r.ce_recovered):.4f}", f"{mean(lambda r: r.fvu):.4f}"]
        cells += [
            f"{100 * mean(lambda r, s=share: r.shares[s]):.1f}"
            for share in ("dense_share", "dead_share", "eligible_share")
        ]
        cells += [
            f"{mean(lambda r, m=measure: measured(r, m)):.4f}"
            for measure in ("detection", "selectivity")
        ]
        if report.agreements:
            cells.append(agreement_text(report.agreements, label, k))
        rows.append([f"`{label}`", str(k), str(len(own)), *cells])
    return markdown(rows)


def apart_section(apart: Apart, studies: Mapping[str, Study]) -> str:
    """What became of a study apart from the others."""
    parts = [f"### {apart.title}", apart.words, claim_table(apart.claims, studies)]
    for site, study in studies.items():
        made = f"{len(study.report.results)} dictionaries"
        parts += [
            f"`{site}`, {made}.{_pace(study)}",
            _verdicts(study.report),
            _table(study),
        ]
    return "\n\n".join(parts)


def study_table(studies: Mapping[str, Study]) -> str:
    """What became of every rule at both sites, in a few words: best in detection first."""
    found = {
        site: {one.label: one for one in study.report.compared if not one.is_control}
        for site, study in studies.items()
    }
    labels = list(dict.fromkeys(label for own in found.values() for label in own))
    labels.sort(key=lambda label: -_mean_detection(own.get(label) for own in found.values()))
    rows = [["weights", *(f"block {Site.parse(site).block}" for site in found)]]
    for label in labels:
        cells = [_in_short(own[label]) if label in own else "–" for own in found.values()]
        rows.append([f"`{label}`", *cells])
    return markdown(rows, left=3)


def _mean_detection(compared: Iterable[Compared | None]) -> float:
    values = [
        one.effects["detection"].difference if "detection" in one.effects else -1.0
        for one in compared
        if one
    ]
    return sum(values) / len(values)


def _in_short(one: Compared) -> str:
    if "detection" not in one.effects:
        return one.verdict
    measures = ("detection", "detection_all", "selectivity")
    scored, every, selectivity = (one.effects[name].difference for name in measures)
    return f"{one.verdict}: {scored:+.3f} ({every:+.3f}), {selectivity:+.3f}"


def _together(
    which: str, label: str, claims: Iterable[Claim], *studies: Mapping[str, Study]
) -> str:
    """What a rule is on the seeds of several studies together."""
    both = {}
    for site, study in studies[0].items():
        others = [other[site] for other in studies[1:] if site in other]
        both[site] = reduce(lambda known, more: known.with_seeds_of(more, label), others, study)
    found = {site: one.compared(label) for site, one in both.items()}
    words = "; ".join(
        f"`{site}`, {len(one.seeds)} seeds: "
        + ", ".join(f"{m} {estimate_text(one.effects.get(m))}" for m in DECIDING)
        for site, one in found.items()
    )
    return f"{which}: {words}.\n\n{claim_table(claims, both)}"


def _default(studies: Mapping[str, Study]) -> str:
    """Why `run` trains what it trains."""
    verdicts = "; ".join(
        f"`{label}` "
        + ", ".join(
            f"{study.compared(label).verdict} at `{site}`" for site, study in studies.items()
        )
        for label in ("variance-a0.5", "variance-a-0.25")
    )
    return (
        "`llm-wsae run` trains the plain dictionary, which is the one to use unless a study of "
        "one's own says otherwise. Beside it, for comparison, it trains the paper's rule with "
        "α = 0.5 and its mild inverse, so that everyone sees on their own model what weights do; "
        f"by this study they are no recommendation ({verdicts}). `{FOUND}` is *better* on fresh "
        "seeds, but it is not a default: its gain is small and smaller still at equal density, its "
        "matrix takes backward passes over 40,000 tokens, some minutes on two cores, and fewer of "
        "its latents fire often enough to be scored. `--rule uniform sensitivity --alpha 0.25 "
        "--place space` trains it. Annealed weights by `participation` need a first dictionary, so "
        "they cannot be a default either; `llm-wsae weigh --rule participation --anneal 0.6 "
        "--dictionary …` makes them."
    )


def _pace(study: Study) -> str:
    """What a study costs, from the steps whose time was taken."""
    made = sum(step["dictionaries"] for step in study.timing)
    if not made:
        return ""
    minutes = sum(step["seconds"] for step in study.timing) / 60
    names = ", ".join(dict.fromkeys(step["processor"] for step in study.timing))
    return (
        f" The last {made} took {minutes:.0f} minutes in all, training, measures and report "
        f"({names}): at that pace 12 kinds of dictionary on three seeds take "
        f"{36 * minutes / made:.0f}."
    )


def section() -> str:
    """The section of docs/results.md, from the folders."""
    studies = Study.read_all(FOLDER)
    again = Study.read_all(CONFIRMATION.folder)
    jumprelu, annealed, twelve = (
        Study.read_all(apart.folder) for apart in (JUMPRELU, ANNEALING, TWELVE)
    )
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
        "latents that fire in enough contexts; *detection, all* has the others at chance. At "
        "*equal density* a dictionary is held against the plain curve where as many latents are "
        "active on a token, dense ones not counted, in place of equal cross-entropy.",
        "No interval covers another text, a longer training or another learning rate. Every "
        "dictionary had one pass at a rate that was chosen for the plain one; what twice as many "
        "rows give, on one seed, stands in [checkpoints](pretrained.md).",
        "Two things were mended after most of these dictionaries had been made. (1) How "
        "differences are tested: the plain curve's own error was counted twice in a difference "
        "from the control, "
        "and where the latents' spread is larger than that of the seeds, it was taken for as "
        "uncertain as theirs. Intervals were too wide; every one below is computed anew from the "
        "same measurements, and nothing was chosen by what it says. (2) Adam's ε was 1e-8, which "
        "is not small beside the gradients of dimensions that count very little, and is 1e-15 now. "
        "`variance`, which concentrates the loss most, was trained anew with its control. With "
        "α = 1 the old numbers had partly been the optimiser's: FVU is 0.331 instead of 0.468 at "
        "block 9 and 0.517 instead of 0.727 at block 20, with three points of cross-entropy more. "
        "With α = ½ it is 0.1815 instead of 0.1822 and 0.318 instead of 0.324. With the new ε are "
        "also all dictionaries on fresh seeds, all JumpReLU ones, the annealed ones, the diagonal "
        "of `sensitivity`, `leading-sensitivity` at block 20, the powers ⅛, ½ and 1 of "
        "`sensitivity` on seeds 3 and 4, each with its control, and at k = 8 the plain ones of "
        "these seeds. The others, and the plain curve of seeds 0 to 4, have the old one; of them "
        "only `negentropy` at block 9 and `kurtosis` at block 20 concentrate the loss about as "
        "much as `variance` with α = ½.",
        "*Effective dimensions* are coordinates for weights of dimensions, and principal "
        "directions for a matrix: the two do not compare.",
        "### What `run` trains",
        _default(studies),
        "### What was expected, and what holds",
        "The mean is held against what was expected, unless an interval is named.",
        claim_table(CLAIMS, studies),
        _families_of_controls(studies),
        apart_section(CONFIRMATION, again),
        _together(
            f"The seeds on which `{FOUND}` was found and the fresh ones together",
            FOUND,
            ON_ALL_SEEDS,
            studies,
            again,
        ),
        "So a gain of .004 in selectivity is not shown for it, hence none of .008 either.",
        apart_section(JUMPRELU, jumprelu),
        apart_section(ANNEALING, annealed),
        apart_section(TWELVE, twelve),
        _together(f"`{ANNEALED}` on all fresh seeds", ANNEALED, ANNEALING.claims, annealed, twelve),
        _together(
            "And with those on which it was found",
            ANNEALED,
            ANNEALING.claims,
            studies,
            annealed,
            twelve,
        ),
        *(site_section(site, study) for site, study in studies.items()),
    ]
    return "\n\n".join(parts)
