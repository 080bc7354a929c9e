"""What docs/results says of the paper's claims, and the figure of the main finding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results_archive
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from study_claims import (
    ANNEALED,
    ANNEALING,
    CONFIRMATION,
    FOLDER,
    FOUND,
    JUMPRELU,
    SITES,
    WEIGHTS,
    K,
    Study,
)

from llm_wsae.drawing import BLUE, INK, ORANGE, save, tidy
from llm_wsae.model.site import Site
from llm_wsae.studies.comparison import BETTER
from llm_wsae.studies.report_tables import estimate_text
from llm_wsae.terminal import markdown

_PLANTED, _NAMED = FOLDER / "planted.jsonl.gz", FOLDER / "planted-named.jsonl.gz"
_TESTS = "`tests/theory/test_closed_form.py`"
_PROXY = "variance"
_STUDIED = ("variance-a0.5", "variance-a1")


def paper_section(studies: Mapping[str, Study]) -> str:
    """The section of docs/results, from the planted experiments and the studies of the sites."""
    planted, named = (results_archive.read(path)["theory.json"] for path in (_PLANTED, _NAMED))
    rows = [["claim of the paper", "replicates", "what is found here"]]
    rows += [*_theorems(planted["closed_form"]), *_sweeps(named["sweeps"])]
    rows += [_proxy(planted), _truth(planted)]
    rows += [_real(label, studies) for label in _STUDIED]
    rows += [_measured()]
    return "\n\n".join(
        [
            "## What of the paper replicates",
            "Cui et al., ICLR 2026 ([arXiv 2506.15963](https://arxiv.org/abs/2506.15963)), claim "
            "by claim. Theorems are known here from their statements, and are checked for a tied "
            "ReLU dictionary without a penalty. Where a number is not said to come from a test, it "
            "is from the tables on [planted data](planted-data.md) and on "
            "[monosemanticity](monosemanticity.md).",
            markdown(rows, left=3),
            "Why the variance is no proxy: a dimension that holds more features of equal strength "
            "varies more, so in mixtures variance ranks dimensions backwards, and in a residual "
            "stream the largest variances belong to few dimensions that are large in every row, or "
            "on few tokens of massive activations. The loss is then dominated by one or two "
            "dimensions, whatever they mean.",
            "Not repeated: the paper's own model, Pythia-160M, at every layer; dictionaries of 32 "
            "× width; its score of interpretability, for which a language model judges (3.8 "
            "points gained on average there); its vision models.",
        ]
    )


def _theorems(closed: Mapping[str, dict]) -> list[list[str]]:
    digon, toy = closed["digon"], closed["toy-200"]
    return [
        [
            "1: in digon or polygon position, with enough latents, (W_p, 0)ᵀ is optimal and "
            "recovers r = ReLU(W_pᵀ W_p x)",
            "in part",
            f"In digons at any sparsity. Of three features at 120° only on 1-sparse inputs: on "
            f"dense ones descent from there finds a lower loss. W_p as training makes it "
            f"(`toy-200`) is not in that position: interference up to "
            f"{toy['largest_interference']:.2f}. {_TESTS}",
        ],
        [
            "shrinking and vanishing: (0.5, 1, 0.8) comes back as (0.5, 0.2, 0)",
            "yes",
            f"To 1e-12, and in digons with the probabilities that follow. {_TESTS}",
        ],
        [
            "2: recovery is exact as sparsity goes to 1",
            "yes",
            "Exact on 1-sparse inputs; the error of digons falls as (1 − S)/2, and is "
            f"{digon['bound']:.0%} at S = {digon['sparsity_needed']:.2f} with lone features beside "
            f"them. {_TESTS}",
        ],
        [
            "3: with as many latents as features the solution is unique",
            "in part",
            "True of a digon alone on its line. With 2 n_p latents, (Q, −Q)ᵀ reconstructs "
            f"everything for any orthogonal Q. {_TESTS}",
        ],
        [
            "4 and 5: L_SAE − L_GT = E (x − r)ᵀ(W_pᵀΓ²W_p − I)(x − r), so Γ can close the gap",
            "in part",
            f"Identities to 1e-10. The best γ takes ‖W_pᵀΓ²W_p − I‖ from {_norms(digon)} in "
            f"digons, from {_norms(toy)} in `toy-200`; with more features than dimensions no Γ "
            f"closes it. That changes "
            f"what the loss says of a dictionary; what training finds is another matter. {_TESTS}",
        ],
    ]


def _sweeps(sweeps: Mapping[str, dict]) -> list[list[str]]:
    """The toy experiment by sparsity, and the three conditions."""

    def plain(sweep: str, point: str, measure: str) -> float:
        return sweeps[sweep]["points"][point]["measures"]["plain"][measure]["mean"]

    def both(point: str) -> str:
        found = (plain(f"conditions-{at}", point, "recovered") for at in ("digons", "crowd"))
        return " and ".join(f"{share:.2f}" for share in found)

    features = {
        kind: [
            plain(sweep, f"{kind}-{s:g}", "features_per_latent")
            for sweep in ("toy-claim", "toy-claim-fixed")
            for s in (0.5, 0.999)
        ]
        for kind in ("relu", "topk")
    }
    words = {
        kind: f"from {a:.0f} to {b:.1f}, and from {c:.0f} to {d:.1f} where W_p is fixed"
        for kind, (a, b, c, d) in features.items()
    }
    return [
        [
            "the toy experiment (n = 200, n_p = 20, n_m = 200): dictionaries become monosemantic "
            "as S goes to 1",
            "with TopK only",
            f"Features a latent from S = 0.5 to 0.999: TopK {words['topk']}; ReLU "
            f"{words['relu']}, and no feature is recovered at any S.",
        ],
        [
            "three conditions: extreme sparsity, sparse activation, enough latents",
            "the last two",
            f"Share of features recovered in 20 digons and of 60 crowded features. All three met: "
            f"{both('met')}. Sparsity of 0.9 instead of 0.99: {both('sparsity-0.9')}; of 0.5: "
            f"{both('sparsity-0.5')}. Sparse activation, k = 10 instead of 1: {both('k-10')}; "
            f"ReLU: {both('relu')}. Half as many latents as features: {both('latents-0.5')}.",
        ],
    ]


def _norms(closed: Mapping[str, Any]) -> str:
    norms = closed["gap_norms"]
    return (
        f"{norms['none']:.1f} to {norms['weights']['gap']:.1f} (one number for all dimensions: "
        f"{norms['best_scalar']:.1f}; the paper's rule, α = ½, at its best scale: "
        f"{norms['weights']['variance-a0.5']:.1f}; whitening: {norms['whitening']:.1f}; the bound: "
        f"{norms['bound']:.1f})"
    )


def _proxy(planted: Mapping[str, dict]) -> list[str]:
    found = {name: rules[_PROXY] for name, rules in planted["correlations"].items()}
    below = [name for name, value in found.items() if value < -0.5]
    best = max(found, key=found.get)
    return [
        "the variance of a dimension tells how monosemantic it is",
        "no",
        f"Rank correlation with the truth is below −0.5 in {len(below)} of {len(found)} planted "
        f"experiments ({min(found.values()):+.2f} at worst) and {found[best]:+.2f} at best "
        f"(`{best}`).",
    ]


def _truth(planted: Mapping[str, dict]) -> list[str]:
    words, best = [], 0
    for label in ("variance", "variance-a0.5", "participation-true", "participation-true-annealed"):
        verdicts = [arms[label]["verdict"] for arms in planted["arms"].values()]
        better, worse = verdicts.count("better"), verdicts.count("worse")
        words.append(f"`{label}` {better} and {worse}")
        best = max(best, better)
    return [
        "weights by monosemanticity recover more of the true features",
        f"in {best} of {len(planted['arms'])}",
        "Better than plain and every control, and worse than plain, in that many of "
        f"{len(planted['arms'])} planted experiments: {', '.join(words)}.",
    ]


def _measured() -> list[str]:
    """The paper's principle with a monosemanticity that a first dictionary measures."""
    words, verdicts = [], set()
    for site, study in Study.read_all(ANNEALING.folder).items():
        one = study.compared(ANNEALED)
        verdicts.add(one.verdict)
        measured = [f"{m} {estimate_text(one.effects.get(m))}" for m in study.report.deciding]
        found = ", ".join(measured)
        words.append(f"`{site}` {one.verdict}: {found}")
    return [
        "the principle itself: count the more monosemantic dimensions more",
        "yes" if verdicts == {BETTER} else "in part" if BETTER in verdicts else "no",
        f"`{ANNEALED}`, weights measured in a first dictionary and annealed to 1, on fresh "
        f"seeds: {'; '.join(words)}.",
    ]


def _real(label: str, studies: Mapping[str, Study]) -> list[str]:
    words, verdicts = [], set()
    for site in SITES:
        one, study = studies[site].compared(label), studies[site]
        verdicts.add(one.verdict)
        effective = study.profile["weights"][label]["effective_dimensions"]
        ce = study.same_k(label, lambda r: r.ce_recovered)
        detection = one.effects.get("detection")
        told = f"detection {estimate_text(detection)}" if detection else one.verdict
        words.append(f"`{site}` {effective:.1f} effective dimensions, CE {ce:+.4f}, {told}")
    return [
        f"`{label}` makes latents of a language model more monosemantic",
        "yes" if verdicts == {BETTER} else "no",
        f"{'; '.join(words)}.",
    ]


_ROWS = (
    ("the paper's rule: variance, α = ½", "variance-a0.5", WEIGHTS),
    ("its mild inverse: variance, α = −¼", "variance-a-0.25", WEIGHTS),
    ("random weights", "random-a0.5", WEIGHTS),
    ("sensitivity space, α = ¼ *", FOUND, CONFIRMATION.folder),
    ("the same, JumpReLU *", FOUND, JUMPRELU.folder),
    ("participation, annealed *", ANNEALED, ANNEALING.folder),
)
_PANELS = {
    "ce": "cross-entropy recovered,\npoints, at the same k",
    "detection": "detection of latents,\nat equal cross-entropy",
    "selectivity": "selectivity for concepts,\nat equal cross-entropy",
}
_MARKS = (("o", BLUE, -0.13), ("s", ORANGE, 0.13))  # of the sites


def plot_finding(sites: Sequence[str], path: Path) -> None:
    """Difference from plain dictionaries at each site, with its 95 % interval."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (panel, title) in zip(axes, _PANELS.items(), strict=True):
        axis.axvline(0, color=INK, lw=1)
        for row, (_, label, folder) in enumerate(_ROWS):
            studies = Study.read_all(folder)
            for site, (marker, colour, shift) in zip(sites, _MARKS, strict=True):
                value, low, high = _difference(studies, site, label, panel)
                error = [[value - low], [high - value]]
                style = {"fmt": marker, "color": colour, "ms": 6, "elinewidth": 1.6}
                axis.errorbar(value, row + shift, xerr=error, **style)
        axis.set_title(title, fontsize=11)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.08)
        tidy(axis, grid="x")
    axes[0].set_yticks(range(len(_ROWS)), [name for name, *_ in _ROWS])
    axes[0].set_ylim(len(_ROWS) - 0.5, -0.5)
    figure.suptitle(
        "Do weights help? Differences from plain dictionaries (right of 0: better), 95 % intervals"
    )
    handles = [
        Line2D([], [], marker=marker, color=colour, ls="", label=f"block {Site.parse(site).block}")
        for site, (marker, colour, _) in zip(sites, _MARKS, strict=True)
    ]
    handles.append(Line2D([], [], ls="", label="* expectation written down before training"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def _difference(
    studies: Mapping[str, Study], site: str, label: str, panel: str
) -> tuple[float, float, float]:
    """The difference and the ends of its interval, which cross-entropy has none of."""
    study = studies[site]
    one = study.compared(label)
    if panel == "ce":
        change = 100 * one.ce_change[K]
        return change, change, change
    effect = one.effects[panel]
    return effect.difference, *effect.interval
