"""Weight rules. A rule estimates how monosemantic each dimension is, from what was measured of a
site; its scores s become loss weights γ = s^α. Some rules give a symmetric positive matrix S, and
Γ = S^α: a diagonal Γ can only stretch the axes that the model happens to have, a matrix any
direction. A new rule is a function here and a line in ``RULES``.

Prefixes make a control of a rule: ``permuted:RULE`` gives its scores to other dimensions, and
``rotated:RULE`` gives its matrix random eigenvectors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.statistics.moments import SecondMoment, Statistics, ratio, shrunk
from llm_wsae.weights.config import IN_LOSS, WeightConfig

Control = Literal["permuted", "rotated"]
Need = Literal["dictionary", "fisher", "second_moment"]
"""What a rule may need in addition to the statistics."""
EIGENVALUE_FLOOR = 1e-3
"""Smallest eigenvalue of S, in medians of the positive ones: Γ stays invertible, and a negative
power does not amplify the noise of the estimate. (A language model's Fisher information, whose
smallest eigenvalue is a fifth of the median, never reaches it.)"""


@dataclass(frozen=True)
class RuleInputs:
    """What was measured of a site's dimensions: the statistics, always, and what ``measure_inputs``
    adds for the rules that need it."""

    statistics: Statistics
    decoder: Float[Tensor, "latents d_in"] | None = None
    """Decoder rows of a first dictionary, only of the latents that fire."""
    energy: Float[Tensor, " latents"] | None = None
    """E z² of each of those latents: its frequency times its mean square."""
    fisher: Float[Tensor, "d_in d_in"] | None = None
    """Fisher information of the model's next-token distribution at the site."""
    second_moment: SecondMoment | None = None
    """Sums over all rows, behind ``covariance``."""

    @property
    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        """The covariance of all usual rows, shrunk where they are few (``shrunk``), float64. Raises
        LlmWsaeError if there are fewer rows than dimensions."""
        assert self.second_moment is not None
        check_rows_of_covariance(self.second_moment.count, self.statistics.d_in)
        return shrunk(self.second_moment.covariance(), self.second_moment.count)

    @classmethod
    def of(cls, measured: "RuleInputs | Statistics") -> "RuleInputs":
        """The inputs themselves, or those with nothing but the statistics."""
        return measured if isinstance(measured, RuleInputs) else cls(measured)


def check_rows_of_covariance(rows: int, d_in: int) -> None:
    """Raise LlmWsaeError if there are too few rows to measure a covariance of."""
    if rows <= d_in:
        raise LlmWsaeError(
            f"{rows:,} rows are too few for the covariance of {d_in:,} dimensions; harvest at "
            f"least {10 * d_in:,} tokens, or raise --statistics-tokens of a stream to that"
        )


@dataclass(frozen=True)
class Rule:
    """A named way to score dimensions, as it is or as a control."""

    base: str  # its name without a control's prefix
    score_fn: Callable[[RuleInputs], Tensor] | None = field(default=None, repr=False)
    """RuleInputs → one score per dimension, [d_in] float64, ≥ 0."""
    matrix_fn: Callable[[RuleInputs], Tensor] | None = field(default=None, repr=False)
    """RuleInputs → a symmetric positive matrix, [d_in, d_in] float64."""
    need: Need | None = None  # what must be measured in addition to the statistics
    control: Control | None = None  # if it is a control

    @classmethod
    def parse(cls, text: "Rule | str") -> "Rule":
        """The rule that a text names, such as ``permuted:variance``; a rule is returned as it is.
        Raises UsageError, with the nearest names, for an unknown rule or a control that the rule
        cannot have."""
        if isinstance(text, Rule):
            return text
        controls = [replace(rule, control=c) for c in get_args(Control) for rule in RULES.values()]
        known = {rule.name: rule for rule in (*RULES.values(), *controls)}
        if text not in known:
            raise UsageError(f"there is no weight rule {text!r}; {nearest(text, known)}")
        rule = known[text]
        if rule.control == "rotated" and rule.matrix_fn is None:
            raise UsageError(
                f"{text!r} is not possible: only rules with a matrix can be rotated "
                f"({_with_matrix()})"
            )
        return rule

    @property
    def name(self) -> str:
        """The text that ``parse`` reads."""
        return self.base if self.control is None else f"{self.control}:{self.base}"

    @property
    def has_scores(self) -> bool:
        """Whether it gives a score per dimension."""
        return self.score_fn is not None and self.control != "rotated"

    @property
    def is_drawn(self) -> bool:
        """Whether its weights depend on a random draw: those of controls do."""
        return self.control is not None

    @property
    def is_plain(self) -> bool:
        """Whether it is ``uniform``, which gives the plain dictionary whatever the settings."""
        return self.name == "uniform"

    @property
    def has_automatic_alpha(self) -> bool:
        """Whether its exponent can be left to short trainings: that of whitening can."""
        return self.base == "whitening"

    def settings(self, config: WeightConfig) -> WeightConfig:
        """The settings with the place that ``auto`` stands for; none of them for ``uniform``."""
        if self.is_plain:
            return IN_LOSS
        return replace(config, place="loss") if config.place == "auto" else config

    def form(self, config: WeightConfig) -> Literal["diagonal", "matrix"]:
        """What the weights are under these settings: one per dimension, or a matrix. Raises
        UsageError if the rule does not have the form."""
        form, has_matrix = config.form, self.matrix_fn is not None
        if self.is_plain:
            return "diagonal"
        if form == "auto":
            prefers_matrix = has_matrix and (config.in_space or not self.has_scores)
            return "matrix" if prefers_matrix else "diagonal"
        if form == "matrix" and not has_matrix:
            raise UsageError(
                f"the rule {self.name!r} has no matrix form; those with one are {_with_matrix()}"
            )
        if form == "diagonal" and not self.has_scores:
            raise UsageError(
                f"the rule {self.name!r} gives only a matrix, not a weight for each dimension"
            )
        return form

    def matched_control(self, config: WeightConfig) -> "Rule | None":
        """The rule that gives the same weights to other dimensions, or the same spectrum to other
        directions; None for ``uniform`` and for a control. Raises as ``form`` does."""
        if self.is_plain or self.is_drawn:
            return None
        return replace(self, control="rotated" if self.form(config) == "matrix" else "permuted")

    def apply(
        self, inputs: RuleInputs, config: WeightConfig = IN_LOSS
    ) -> Float[Tensor, " d_in"] | Float[Tensor, "d_in d_in"]:
        """The score of every dimension (≥ 0) or the symmetric positive matrix, as the settings say;
        float64. Raises UsageError for a form that the rule lacks or what was not measured."""
        measure = self.matrix_fn if self.form(config) == "matrix" else self.score_fn
        measured = "decoder" if self.need == "dictionary" else self.need
        if measured and getattr(inputs, measured) is None:
            raise self.missing_input()
        assert measure is not None
        found = measure(inputs)
        if self.control is None:
            return found
        if self.control == "rotated":
            return _rotated(found, config.draw)
        draw = torch.Generator().manual_seed(config.draw)
        order = torch.randperm(len(found), generator=draw)
        # a matrix keeps its values and directions, on other axes
        return found[order] if found.ndim == 1 else found[order][:, order]

    def missing_input(self) -> UsageError:
        """The error for a rule whose ``need`` was not measured."""
        if self.need == "second_moment":  # all commands measure it
            return UsageError(
                f"the rule {self.name!r} needs the covariance of all rows, not their statistics "
                f"alone: give it what llm_wsae.measure_inputs([{self.name!r}], store, site) returns"
            )
        what = "a first dictionary" if self.need == "dictionary" else "the model"
        option = "--dictionary DICT" if self.need == "dictionary" else "--model M"
        return UsageError(
            f"the rule {self.name!r} needs {what}: make its weights with llm-wsae weigh {option}, "
            "and train on that file with --weights"
        )


def uniform(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s = 1: the plain sparse autoencoder, to which every other rule is compared."""
    return torch.ones(inputs.statistics.d_in, dtype=torch.float64)


def variance(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = Var(x_i) over all rows: the proxy of Cui et al. 2026 (arXiv 2506.15963, §5)."""
    return inputs.statistics.variance


def kurtosis(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = E(x_i − μ_i)⁴ / Var(x_i)² of the usual rows: 3 for a Gaussian, large for something
    rarely active (sparse coding, e.g. Olshausen & Field 1996), 0 for a constant dimension."""
    rows = inputs.statistics.usual_sample.double()
    square = (rows - rows.mean(0)).square()
    return ratio(square.square().mean(0), square.mean(0).square())


def participation(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = 1/PR_i = Σ_j q_ij² / (Σ_j q_ij)², q_ij = E z_j²·W_ji²: one over the number of latents
    of a first dictionary that share dimension i, each counted by how often and how strongly it
    fires. Proposed here, after the participation ratio of Bell and Dean 1970."""
    assert inputs.decoder is not None and inputs.energy is not None
    q = inputs.decoder.double().square() * inputs.energy.double()[:, None]
    return ratio(q.square().sum(0), q.sum(0).square())


def sensitivity(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = F_ii, the diagonal of ``sensitivity_matrix``."""
    return sensitivity_matrix(inputs).diagonal().clone()


def sensitivity_matrix(inputs: RuleInputs) -> Float[Tensor, "d_in d_in"]:
    """S = F, the Fisher information of the model's next-token distribution (Amari 1998): with
    α = ½, ½‖Γδ‖² is the KL divergence that a small change δ of the activation causes, to second
    order."""
    assert inputs.fisher is not None
    return inputs.fisher.double()


def whitening(inputs: RuleInputs) -> Float[Tensor, "d_in d_in"]:
    """S = Σ^{−½}, Σ the covariance of the usual rows, eigenvalues from the floor: ZCA whitening
    (Bell & Sejnowski 1997). Γ = Σ^{−α/2} leaves covariance Σ^{1−α}: α = 1 whitens fully, ½ halfway.
    At 1 it is, up to its scale, the Γ that minimises ‖WᵀΓ²W − I‖ for independent features x,
    x_p = Wx, of equal variance: the optimum of theorem 5 (Cui et al. 2026) over all Γ
    (``llm_wsae.least_gap_weights``)."""
    values, vectors = spectrum(inputs.covariance)
    return (vectors * values.rsqrt()) @ vectors.T


def _rotated(matrix: Float[Tensor, "d_in d_in"], draw: int) -> Float[Tensor, "d_in d_in"]:
    """The same spectrum with random eigenvectors, uniform over rotations and reflections."""
    generator, size = torch.Generator().manual_seed(draw), len(matrix)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation = q * r.diagonal().sign()  # else QR's convention makes the rotation not uniform
    return (rotation * spectrum(matrix)[0]) @ rotation.T


def spectrum(matrix: Tensor) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
    """Eigenvalues in rising order, none below the floor, and eigenvectors as columns (float64).
    Raises LlmWsaeError if the matrix is not finite or has no positive eigenvalue."""
    if not bool(torch.isfinite(matrix).all()):
        raise LlmWsaeError("a matrix of weights holds NaN or infinite numbers; measure again")
    values, vectors = torch.linalg.eigh(matrix.double())
    if not float(values[-1]) > 0:
        raise LlmWsaeError(
            "a matrix of weights has no positive eigenvalue, so it prefers nothing; take another "
            "rule"
        )
    positive = values[values > values[-1] * 1e-12]
    return values.clamp(min=EIGENVALUE_FLOOR * float(positive.median())), vectors


OWN = Rule("own")
"""Stands for custom weights, which no rule made. Not a name that ``parse`` knows."""

RULES: dict[str, Rule] = {
    rule.base: rule
    for rule in (
        Rule("uniform", uniform),
        Rule("variance", variance),
        Rule("kurtosis", kurtosis),
        Rule("participation", participation, need="dictionary"),
        Rule("sensitivity", sensitivity, sensitivity_matrix, need="fisher"),
        Rule("whitening", matrix_fn=whitening, need="second_moment"),
    )
}
"""Every rule by name, without its controls."""


def _with_matrix() -> str:
    return ", ".join(name for name, rule in RULES.items() if rule.matrix_fn is not None)
