"""Weight rules: the text ``permuted:variance`` is parsed once, into an object that does the rest.

A rule estimates how monosemantic each dimension is; ``choosing.py`` turns its scores s into loss
weights γ = s^α. Rules give one score per dimension (``score_rules.py``), a matrix
(``matrix_rules.py``), or either. A new rule is a function in one of those files and a line in
``RULES``, nothing else.

Prefixes make a control of a rule: ``permuted:RULE`` gives its scores to other dimensions, and
``rotated:RULE`` gives its matrix random eigenvectors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import UsageError, nearest
from llm_wsae.weights import matrix_rules, score_rules
from llm_wsae.weights import scores as formulae
from llm_wsae.weights.config import IN_LOSS, WeightConfig
from llm_wsae.weights.inputs import Need, RuleInputs

Control = Literal["permuted", "rotated"]
CONTROLS: tuple[Control, ...] = get_args(Control)
RuleForm = Literal["diagonal", "matrix"]

_BRINGS: dict[Need, tuple[str, str]] = {
    "dictionary": ("a first dictionary", "--dictionary DICT"),
    "fisher": ("the model", "--model M"),
    "second_moment": ("the covariance of all rows", ""),
}


@dataclass(frozen=True)
class Rule:
    """A named way to score dimensions, as it is or as a control."""

    base: str
    """Its name without a control's prefix."""
    score_fn: Callable[[RuleInputs], Tensor] | None = field(default=None, repr=False)
    """RuleInputs → one score per dimension, [d_in] float64, ≥ 0."""
    matrix_fn: Callable[[RuleInputs], Tensor] | None = field(default=None, repr=False)
    """RuleInputs → a symmetric positive matrix, [d_in, d_in] float64."""
    need: Need | None = None
    """What must be measured in addition to the statistics."""
    control: Control | None = None
    """What the rule controls for, if it is a control."""

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """The rule that a text names: ``variance``, ``permuted:variance``, ``rotated:whitening``.

        Raises UsageError, with the nearest names, for an unknown rule or a control that the rule
        cannot have.
        """
        if text in RULES:
            return RULES[text]
        for control in CONTROLS:
            base = text.removeprefix(f"{control}:")
            if base != text and base in RULES:
                return RULES[base].as_control(control)
        known = [*RULES, *(f"{control}:{name}" for control in CONTROLS for name in RULES)]
        raise UsageError(f"there is no weight rule {text!r}; {nearest(text, known)}")

    @classmethod
    def of(cls, rule: "Rule | str") -> "Rule":
        """The rule itself, or the one that a text names. Raises as ``parse`` does."""
        return rule if isinstance(rule, Rule) else cls.parse(rule)

    def as_control(self, control: Control) -> "Rule":
        """The control of this rule. Raises UsageError for the rotation of what has no matrix."""
        found = replace(self, control=control)
        if control == "rotated" and not self.has_matrix:
            raise UsageError(
                f"{found.name!r} is not possible: only rules with a matrix can be rotated "
                f"({_with_matrix()})"
            )
        return found

    @property
    def name(self) -> str:
        """The text that ``parse`` reads."""
        return self.base if self.control is None else f"{self.control}:{self.base}"

    @property
    def has_scores(self) -> bool:
        """Whether it gives a score per dimension."""
        return self.score_fn is not None and self.control != "rotated"

    @property
    def has_matrix(self) -> bool:
        """Whether it gives a matrix."""
        return self.matrix_fn is not None

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
        """The settings with the place that ``auto`` stands for; of ``uniform``, no settings at
        all."""
        if self.is_plain:
            return IN_LOSS
        return replace(config, place="loss") if config.place == "auto" else config

    def form(self, config: WeightConfig) -> RuleForm:
        """What the weights are under these settings: one per dimension, or a matrix.

        Raises UsageError if the rule does not have the form.
        """
        config = self.settings(config)
        if self.is_plain:
            return "diagonal"
        prefers_matrix = self.has_matrix and (config.in_space or not self.has_scores)
        if config.form == "matrix" or (config.form == "auto" and prefers_matrix):
            self._check_matrix()
            return "matrix"
        self._check_scores()
        return "diagonal"

    def matched_control(self, config: WeightConfig) -> "Rule | None":
        """The rule that gives the same weights to other dimensions, or the same spectrum to other
        directions; None for ``uniform`` and for a control. Raises as ``form`` does."""
        if self.is_plain or self.is_drawn:
            return None
        return self.as_control("rotated" if self.form(config) == "matrix" else "permuted")

    def scores(self, inputs: RuleInputs, draw: int = 0) -> Float[Tensor, " d_in"]:
        """The score of every dimension (float64, ≥ 0); ``draw`` is the number of the random draw.

        Raises UsageError if the rule scores no dimensions or needs what was not measured.
        """
        self._check_scores()
        self._check_inputs(inputs)
        assert self.score_fn is not None
        found = self.score_fn(inputs)
        return found if self.control is None else found[formulae.random_order(len(found), draw)]

    def matrix(self, inputs: RuleInputs, draw: int = 0) -> Float[Tensor, "d_in d_in"]:
        """The symmetric positive matrix (float64); ``draw`` is the number of the random draw.

        Raises UsageError if the rule has none or needs what was not measured.
        """
        self._check_matrix()
        self._check_inputs(inputs)
        assert self.matrix_fn is not None
        found = self.matrix_fn(inputs)
        if self.control is None:
            return found
        if self.control == "rotated":
            return matrix_rules.rotated(found, draw)
        order = formulae.random_order(len(found), draw)
        return found[order][:, order]  # the same values and directions, on other axes

    def missing_input(self) -> UsageError:
        """The error for a rule whose ``need`` was not measured: what it is, and what brings it."""
        assert self.need is not None
        what, option = _BRINGS[self.need]
        if not option:  # all commands measure it
            return UsageError(
                f"the rule {self.name!r} needs {what}, not their statistics alone: give it what "
                f"llm_wsae.measure_inputs([{self.name!r}], store, site) returns"
            )
        return UsageError(
            f"the rule {self.name!r} needs {what}: make its weights with llm-wsae weigh {option}, "
            "and train on that file with --weights"
        )

    def _check_inputs(self, inputs: RuleInputs) -> None:
        if self.need is not None and not inputs.has(self.need):
            raise self.missing_input()

    def _check_matrix(self) -> None:
        if not self.has_matrix:
            raise UsageError(
                f"the rule {self.name!r} has no matrix form; those with one are {_with_matrix()}"
            )

    def _check_scores(self) -> None:
        if not self.has_scores:
            raise UsageError(
                f"the rule {self.name!r} gives only a matrix, not a weight for each dimension"
            )


OWN = Rule("own")
"""Stands for custom weights, which no rule made. Not a name that ``parse`` knows."""

RULES: dict[str, Rule] = {
    rule.base: rule
    for rule in (
        Rule("uniform", score_rules.uniform),
        Rule("variance", score_rules.variance),
        Rule("kurtosis", score_rules.kurtosis),
        Rule("participation", score_rules.participation, need="dictionary"),
        Rule("sensitivity", score_rules.sensitivity, matrix_rules.sensitivity, need="fisher"),
        Rule("whitening", matrix_fn=matrix_rules.whitening, need="second_moment"),
    )
}
"""Every rule by name, without its controls."""


def _with_matrix() -> str:
    return ", ".join(name for name, rule in RULES.items() if rule.has_matrix)
