"""What docs/results says of the study of weights on a real model, from the archives."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import numpy as np
import results_clean_rows as clean_rows
from study_claims import (
    ANNEALED,
    ANNEALING,
    CLAIMS,
    CONFIRMATION,
    FOUND,
    JUMPRELU,
    OF_BASELINES,
    ON_ALL_SEEDS,
    TODAY,
    TWELVE,
    WEIGHTS,
    Apart,
    Claim,
    K,
    Study,
    measured,
)

from llm_wsae.model.site import Site
from llm_wsae.studies.comparison import Compared
from llm_wsae.studies.plan import PLAIN
from llm_wsae.studies.report import CURVE, DIFFERENCES, StudyReport
from llm_wsae.studies.report_tables import estimate_text
from llm_wsae.studies.results import Result
from llm_wsae.terminal import markdown

BESIDE = ("selectivity", "absorbed")
"""Measures that decide nothing where spill does."""


def figure(block: int, name: str) -> str:
    """A figure of a site's study, by its name in docs/images."""
    return f"study_block_{block}_{name}"


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


def site_section(site: str, study: Study, baselines: Study) -> str:
    """What was found at one site, with the rows of baselines that were measured last."""
    massive, block = study.profile["massive"], Site.parse(site).block
    processors = Counter(result.processor for result in study.report.results)
    made = ", ".join(f"{count} on {name}" for name, count in processors.items())
    parts = [
        f"### `{site}`",
        f"{len(study.report.results)} dictionaries ({made}), each on {study.profile['rows']:,} "
        f"rows. Variance of the largest dimension over the median one: "
        f"{study.profile['variance_max_over_median']:.0f}, "
        f"{study.profile['robust_variance_max_over_median']:.0f} winsorised; massive activations: "
        f"{massive['rows']} rows ({massive['share']:.3%}).",
        f"![Differences from the plain curve at {site}](../images/{figure(block, DIFFERENCES)})",
        _verdicts(study.report),
        f"![Every rule next to the plain curve at {site}](../images/{figure(block, CURVE)})",
        "Means over seeds; controls are in the archive. Of baselines "
        "[detection](#what-baselines-score) is another measure.",
        _table(study, [r for r in baselines.report.results if r.is_baseline]),
    ]
    return "\n\n".join(parts)


def _verdicts(report: StudyReport) -> str:
    """What became of every rule."""
    measures, head = report.deciding, ["weights", "verdict"]
    for measure in measures:
        head += [measure, "p", "above its control"]
    equal = [f"{measure}, equal density" for measure in measures]
    rows = [[*head, "letters", "more scored", "detection, all", *equal]]
    for one, other in zip(report.compared, report.at_equal_density, strict=True):
        if one.is_control:
            continue
        cells = [f"`{one.label}`", one.verdict]
        for measure in measures:
            p = one.adjusted.get(measure)
            cells += [estimate_text(one.effects.get(measure)), "–" if p is None else f"{p:.2g}"]
            cells.append(estimate_text(one.against_control.get(measure)))
        scored = one.effects.get("eligible")
        cells.append(estimate_text(one.effects.get("selectivity_letters")))
        cells.append("–" if scored is None else f"{100 * scored.difference:+.1f} points")
        cells.append(estimate_text(one.effects.get("detection_all")))
        rows.append([*cells, *(estimate_text(other.effects.get(m)) for m in measures)])
    return markdown(rows, left=2)


def _beside(report: StudyReport) -> str:
    """What decides nothing, of every rule and of controls."""
    head = [cell for measure in BESIDE for cell in (measure, "above its control")]
    rows = [["weights", *head, *(f"{measure}, equal density" for measure in BESIDE)]]
    for one, other in zip(report.compared, report.at_equal_density, strict=True):
        cells = [
            estimate_text(estimates.get(measure))
            for measure in BESIDE
            for estimates in (one.effects, one.against_control)
        ]
        cells += [estimate_text(other.effects.get(measure)) for measure in BESIDE]
        rows.append([f"`{one.label}`", *cells])
    return markdown(rows)


def _table(study: Study, more: Sequence[Result] = ()) -> str:
    """Means of every kind of dictionary; and of ``more``, whose detection is another measure."""
    head = ["weights", "k", "seeds", "effective dimensions", "of its control", "CE recovered"]
    head += ["FVU", "dense %", "dead %", "scored %", "detection", "selectivity"]
    report = study.report
    harms = [m for m in ("spill", "absorbed") if any(m in r.point.values for r in report.results)]
    rows = [[*head, *harms]]
    controls = {r.control for r in report.results}
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in (*report.results, *more):
        if result.label not in controls:
            groups.setdefault((result.label, result.point.k), []).append(result)
    for (label, k), own in groups.items():

        def mean(value: Callable[[Result], float], own: list[Result] = own) -> float:
            return sum(map(value, own)) / len(own)

        cells = [_dimensions(study, one) for one in (label, own[0].control)]
        cells += [f"{mean(lambda r: r.ce_recovered):.4f}", f"{mean(lambda r: r.fvu):.4f}"]
        cells += [
            f"{100 * mean(lambda r, s=share: r.shares[s]):.1f}"
            for share in ("dense_share", "dead_share", "eligible_share")
        ]
        cells += [
            f"{mean(lambda r, m=measure: measured(r, m)):.4f}"
            for measure in ("detection", "selectivity")
        ]
        if more and own[0].is_baseline:
            cells[-2] = "–"
        for harm in harms:
            found = [r.point.values[harm].mean for r in own if harm in r.point.values]
            cells.append(f"{sum(found) / len(found):.4f}" if found else "–")
        rows.append([f"`{label}`", str(k), str(len(own)), *cells])
    return markdown(rows)


def _dimensions(study: Study, label: str | None) -> str:
    """Effective dimensions of the loss with some weights, where they are known."""
    weights = study.profile["weights"].get(label)
    return f"{weights['effective_dimensions']:.1f}" if weights else "–"


def _all_dimensions(study: Study) -> str:
    """Those of plain dictionaries, of every rule and of its control, in a sentence."""
    words = [f"`{PLAIN}` {_dimensions(study, PLAIN)}"]
    words += [
        f"`{one.label}` {_dimensions(study, one.label)}, its control "
        f"{_dimensions(study, one.control)}"
        for one in study.report.compared
        if not one.is_control
    ]
    return f"Effective dimensions: {'; '.join(words)}."


def apart_section(apart: Apart, studies: Mapping[str, Study]) -> str:
    """What became of a study with its own correction for multiple tests."""
    parts = [f"### {apart.title}", apart.words, claim_table(apart.claims, studies)]
    for site, study in studies.items():
        dictionaries = f"{len(study.report.results)} dictionaries"
        parts.append(f"`{site}`, {dictionaries}:")
        if study.report.compared:
            parts.append(_verdicts(study.report))
        if study.report.compared and "spill" in study.report.deciding:
            parts += ["What decides nothing there:", _beside(study.report)]
        if apart.has_values:
            parts += ["Means over seeds:", _table(study)]
        else:
            parts.append(_all_dimensions(study))
        if study.report.agreements:
            parts += [
                "How similar the seeds' decoders are ([half-random](free-lengths-settings.md"
                f"#where-nothing-is-planted) ones last):\n\n{_consistency(site, study)}"
            ]
    return "\n\n".join(parts)


def _consistency(site: str, study: Study) -> str:
    """PW-MCC of every kind of dictionary; below, where the study has none, of those of which one
    half stays random."""
    found = study.report.agreements
    without = not any("baseline" in label for label, _ in found)
    rows = [["weights", "k", "PW-MCC"]]
    rows += [[f"`{label}`", str(k), f"{one.pw_mcc:.4f}"] for (label, k), one in found.items()]
    for label, pw_mcc in clean_rows.agreement_of_half_random(site).items() if without else ():
        rows.append([f"`{label}`", str(K), f"{pw_mcc:.4f}"])
    rows.append([f"`{clean_rows.DIMENSIONS}`", str(K), "no seed"])
    return markdown(rows)


def study_table(studies: Mapping[str, Study], baselines: Mapping[str, Study]) -> str:
    """What became of every rule at both sites, in a few words: best in detection first; and what
    baselines score."""
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
    of_baselines: dict[str, dict[str, list[Result]]] = {}
    for site, study in baselines.items():
        for result in study.report.results:
            if result.is_baseline or result.point.k == K:  # and the plain ones beside them
                label = result.label.removeprefix("topk baseline: ")
                of_baselines.setdefault(label, {}).setdefault(site, []).append(result)
    for label, of_sites in of_baselines.items():
        cells = [_values_in_short(of_sites[site]) for site in found]
        rows.append([f"values: {label}", *cells])
    return markdown(rows, left=3)


def _values_in_short(results: Sequence[Result]) -> str:
    """Not differences: detection is another measure here than in the studies of weights."""
    ce = np.mean([one.ce_recovered for one in results])
    values = (np.mean([measured(one, m) for one in results]) for m in ("detection", "selectivity"))
    detection, selectivity = (f"{value:.3f}" for value in values)
    return f"CE recovered {ce:.3f}: {detection}, {selectivity}"


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
        + ", ".join(f"{m} {estimate_text(one.effects.get(m))}" for m in both[site].report.deciding)
        for site, one in found.items()
    )
    return f"{which}: {words}.\n\n{claim_table(claims, both)}"


def section() -> str:
    """The section of docs/results, from the archives."""
    studies = Study.read_all(WEIGHTS)
    again = Study.read_all(CONFIRMATION.folder)
    jumprelu, annealed, twelve, today, baselines = (
        Study.read_all(apart.folder) for apart in (JUMPRELU, ANNEALING, TWELVE, TODAY, OF_BASELINES)
    )
    parts = [
        "## A real model: do weights make latents more monosemantic?",
        "`bash scripts/reproduce.sh study`: SmolLM2-135M-Instruct on Wikipedia summaries and State "
        "of the Union addresses; TopK dictionaries of 8 × width, k = 32, one pass over a million "
        "tokens; cross-entropy on 50,000 and monosemanticity on 100,000 held-out tokens. How to "
        "read the tables:",
        "- A *difference* is a dictionary's value less that of the plain k-curve at the "
        "dictionary's own cross-entropy, without latents that fire on more than 10 % of the "
        "tokens. Its interval is over seeds and over latents or families of concepts; p and "
        "verdicts are corrected for looks at three and five seeds and for everything tried at the "
        "site.\n"
        "- *Selectivity* is averaged within each of nine families of concepts first, and every "
        "family counts once. *Letters*: the 23 first letters of words alone, one of the nine.\n"
        "- The *control* of a rule has the same weights on permuted dimensions or tokens, or the "
        "same spectrum with random eigenvectors. Its loss rests on another number of effective "
        "dimensions, which is told beside the rule's.\n"
        "- *Equal density* compares at an equal number of active latents per token, dense ones "
        "not counted, instead of equal cross-entropy.\n"
        "- *More scored*: latents that fire in enough contexts to be scored. *Detection, all* "
        "counts the others as chance.\n"
        "- *Effective dimensions* are coordinates for weights of dimensions and principal "
        "directions for a matrix; the two cannot be compared.\n"
        "- A rule is *selective* if its selectivity is at least .004 above the plain curve, with "
        "an interval above 0 there and relative to its control, if it costs at most .003 of the "
        "cross-entropy at the same k, if no family of concepts falls by more than .01, and unless "
        "spill is clearly higher. Verdicts rest on detection and spill; in older studies than "
        "today's, without spill, on selectivity instead.",
        "Except for [today's dictionaries](#as-dictionaries-are-trained-today), detection was "
        "measured before it was restricted to contexts of one genre from other documents than "
        "those of the top contexts, and its intervals do not cover the choice of documents: the "
        "archives hold neither.",
        "Three things were corrected after most dictionaries had been trained. Selectivity counted "
        "34 concepts once each, and its intervals took them for independent, although 23 are first "
        "letters of words, which rise and fall together: families count once each now. The "
        "intervals were "
        "too wide, because the plain curve's own error counted twice; all of them were recomputed "
        "from the same measurements. And Adam's ε was 1e-8, which is not small compared with the "
        "gradients of dimensions that count very little; it is 1e-15 now. `variance`, all "
        "dictionaries on fresh seeds, all JumpReLU and all annealed ones have the new ε. The "
        "others, and the plain curve of seeds 0 to 4, have the old one; of them only `negentropy` "
        "at block 9 and `kurtosis` at block 20 concentrate the loss enough for it to matter.",
        "### What was expected, and what holds",
        "What smaller trials had led to expect. The mean is compared with the expectation, unless "
        "an interval is named; the last entry is the family of concepts that loses most.",
        claim_table(CLAIMS, studies),
        "### Tried again",
        "The rule, the seeds and the expectation of each of the following studies were written "
        "down and committed before its first dictionary was trained. Each has its own correction "
        "for multiple tests.",
        apart_section(CONFIRMATION, again),
        _together(
            f"The seeds on which `{FOUND}` was found and the fresh ones together",
            FOUND,
            ON_ALL_SEEDS,
            studies,
            again,
        ),
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
        apart_section(TODAY, today),
        apart_section(OF_BASELINES, baselines),
        *(site_section(site, study, baselines[site]) for site, study in studies.items()),
    ]
    return "\n\n".join(parts)
