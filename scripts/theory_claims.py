"""What was expected of the planted experiments, written down before they ran."""

from collections.abc import Callable
from dataclasses import dataclass

from llm_wsae.theory.comparison import ArmSummary, change_text
from llm_wsae.theory.config import SWEPT
from llm_wsae.theory.rules import PLAIN


@dataclass(frozen=True)
class Demand:
    """One expectation about an arm: in words, whether it is met, and what was measured."""

    words: str
    met: Callable[[ArmSummary, int], bool]
    """Of the arm and the number of seeds."""
    measured: Callable[[ArmSummary, int], str]


def at_most(per_cent: float) -> Demand:
    """L_GT changes by at most ``per_cent``."""
    return Demand(
        f"L_GT ≤ {per_cent:+g} %",
        lambda arm, _: arm.change.mean <= per_cent,
        lambda arm, _: change_text(arm.change),
    )


def at_least(per_cent: float) -> Demand:
    """L_GT changes by at least ``per_cent``."""
    return Demand(
        f"L_GT ≥ {per_cent:+g} %",
        lambda arm, _: arm.change.mean >= per_cent,
        lambda arm, _: change_text(arm.change),
    )


def lower_on(tenths: int) -> Demand:
    """L_GT is lower than plain on at least this many tenths of the seeds."""
    return Demand(
        f"lower on {tenths} of 10 seeds",
        lambda arm, num_seeds: 10 * arm.wins >= tenths * num_seeds,
        lambda arm, num_seeds: f"{arm.wins} of {num_seeds}",
    )


def mmcs_gain(gain: float) -> Demand:
    """MMCS rises by at least ``gain``."""
    return Demand(
        f"MMCS ≥ {gain:+g}",
        lambda arm, _: arm.mmcs_change >= gain,
        lambda arm, _: f"{arm.mmcs_change:+.3f}",
    )


def ahead_of(control: str, points: float) -> Demand:
    """A control on the same schedule is at least ``points`` behind."""
    return Demand(
        f"`{control}` ≥ {points:g} points behind",
        lambda arm, _: arm.against[control].mean <= -points,
        lambda arm, _: f"difference {change_text(arm.against[control])}",
    )


def one_scale_at_most(per_cent: float) -> Demand:
    """L_GT with one global scale changes by at most ``per_cent``."""
    return Demand(
        f"L_GT, one scale ≤ {per_cent:+g} %",
        lambda arm, _: arm.change_one_scale.mean <= per_cent,
        lambda arm, _: change_text(arm.change_one_scale),
    )


def scales_cost(low: float, high: float) -> Demand:
    """L_GT with one global scale is between ``low`` and ``high`` above that with fitted scales."""
    return Demand(
        f"one scale costs {low:g} to {high:g}",
        lambda arm, _: low <= arm.l_gt_one_scale - arm.l_gt <= high,
        lambda arm, _: f"{arm.l_gt_one_scale - arm.l_gt:.3f}",
    )


def share(measure: str, low: float, high: float) -> Demand:
    """``absorbed`` or ``merged`` is between ``low`` and ``high``."""
    return Demand(
        f"{measure} {low:g} to {high:g}",
        lambda arm, _: low <= getattr(arm, measure).mean <= high,
        lambda arm, _: change_text(getattr(arm, measure), "+.3f"),
    )


@dataclass(frozen=True)
class Claim:
    """What an arm was expected to do, and in which experiments."""

    arm: str
    experiments: tuple[str, ...]
    """The same data at several learning rates."""
    demands: tuple[Demand, ...]


@dataclass(frozen=True)
class PointClaim:
    """What plain, or a change of its L_GT by weights, was expected to be at points of a sweep."""

    sweep: str
    points: tuple[str, ...]
    measure: str
    """A measure of the plain dictionary, or the name of an arm: its change of L_GT in %."""
    low: float
    high: float


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
# After one trial of seed 0 with 300 steps, before any of ``SEEDS``.
WHITENING_CLAIMS = (
    Claim("whitening", ("outliers-0.7",), (at_most(-20), one_scale_at_most(-20))),
    Claim("whitening", ("mixed-0.7",), (at_most(-3), lower_on(8))),
    Claim("whitening", ("mixed-0.9", "hierarchy-0.9", "correlated-0.9"), (at_least(2),)),
    Claim("whitening", ("digon-0.7", "mixed-0.5-fast"), (at_least(1),)),
    Claim("standardised", ("outliers-0.7",), (one_scale_at_most(-25),)),
)
SCALE_CLAIMS = (
    Claim(PLAIN, ("mixed-0.7", "mixed-0.9"), (scales_cost(0, 0.06),)),
    Claim(PLAIN, ("outliers-0.7",), (scales_cost(0.15, 1),)),
)
RELATED_CLAIMS = (
    Claim(PLAIN, ("hierarchy-0.9",), (share("absorbed", 0.10, 1), share("merged", 0, 0.1))),
    Claim(PLAIN, ("hierarchy-off-0.9",), (share("absorbed", -0.08, 0.08),)),
    Claim(PLAIN, ("correlated-0.9",), (share("merged", 0.5, 1),)),
    Claim(PLAIN, ("correlated-off-0.9",), (share("merged", 0, 0.1),)),
    # Weights see second moments only: they neither absorb less nor merge less.
    Claim("whitening", ("hierarchy-0.9",), (share("absorbed", 0.10, 1),)),
    Claim("whitening", ("correlated-0.9",), (share("merged", 0.5, 1),)),
)

_FIXED_RELU = tuple(f"relu-{s:g}" for s in SWEPT)
SPARSEST, DENSEST = ("0.99", "0.999"), ("0.5", "0.7")
# From the theory, before any run of these sweeps. ReLU: with 2 n_p latents (Q, −Q)ᵀ of any
# orthogonal Q is exact, so sparsity should not help. TopK with k = 1 has no such way out.
TOY_CLAIMS = (
    PointClaim("toy-claim-fixed", _FIXED_RELU, "features_per_latent", 5, 200),
    PointClaim("toy-claim-fixed", _FIXED_RELU, "recovered", 0, 0.2),
    *(
        PointClaim("toy-claim-fixed", tuple(f"topk-{s}" for s in S), measure, low, high)
        for S, measure, low, high in (
            (SPARSEST, "recovered", 0.8, 1),
            (SPARSEST, "features_per_latent", 1, 1.5),
            (DENSEST, "recovered", 0, 0.2),
            (DENSEST, "features_per_latent", 5, 200),
        )
    ),
    PointClaim("toy-claim", tuple(f"relu-{s}" for s in SPARSEST), "features_per_latent", 5, 200),
    PointClaim("toy-claim", tuple(f"topk-{s}" for s in SPARSEST), "recovered", 0.6, 1),
    PointClaim("toy-claim", tuple(f"relu-{s}" for s in DENSEST), "variance-a0.5", -2, 2),
    PointClaim("toy-claim-fixed", tuple(f"relu-{s}" for s in DENSEST), "variance-a0.5", -2, 2),
)
# After one trial of seed 0 with 400 steps.
CONDITION_CLAIMS = (
    PointClaim("conditions-digons", ("met", "sparsity-0.9"), "recovered", 0.9, 1),
    PointClaim("conditions-digons", ("sparsity-0.5", "k-10", "relu"), "recovered", 0, 0.1),
    PointClaim("conditions-digons", ("latents-0.5",), "recovered", 0, 0.55),
    PointClaim("conditions-digons", ("latents-1.5",), "recovered", 0.95, 1),
    PointClaim("conditions-crowd", ("met", "sparsity-0.9"), "recovered", 0.8, 1),
    PointClaim("conditions-crowd", ("sparsity-0.7", "k-10", "relu"), "recovered", 0, 0.1),
    PointClaim("conditions-crowd", ("latents-0.5",), "recovered", 0, 0.4),
    PointClaim("conditions-crowd", ("latents-1.5",), "recovered", 0.95, 1),
)
