"""The weight rules by name: what each needs, and which forms and controls it has. Free of torch, so
that a misspelt name is found at once; what rules compute is in ``scoring``.

Prefixes make a control of a rule: ``permuted:RULE`` gives its scores to other dimensions, and
``rotated:RULE`` gives its matrix random eigenvectors.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from llm_wsae.errors import UsageError, nearest
from llm_wsae.weights.config import IN_LOSS, WeightConfig

if TYPE_CHECKING:
    from torch import Tensor

    from llm_wsae.weights.scoring import RuleInputs

Control = Literal["permuted", "rotated"]
Need = Literal["dictionary", "fisher", "second_moment"]
"""What a rule may need in addition to the statistics."""


@dataclass(frozen=True)
class Rule:
    """A named way to score dimensions, as it is or as a control."""

    base: str  # its name without a control's prefix
    score_fn: str | None = field(default=None, repr=False)
    """Function of ``scoring``: RuleInputs → one score per dimension, [d_in] float64, ≥ 0."""
    matrix_fn: str | None = field(default=None, repr=False)
    """Function of ``scoring``: RuleInputs → a symmetric positive matrix, [d_in, d_in] float64."""
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

    def apply(self, inputs: "RuleInputs", config: WeightConfig = IN_LOSS) -> "Tensor":
        """The score of every dimension (≥ 0), [d_in], or the symmetric positive matrix, [d_in,
        d_in], as the settings say; float64. Raises UsageError for a form that the rule lacks or
        what was not measured."""
        from llm_wsae.weights import scoring

        name = self.matrix_fn if self.form(config) == "matrix" else self.score_fn
        measured = "decoder" if self.need == "dictionary" else self.need
        if measured and getattr(inputs, measured) is None:
            raise self.missing_input()
        assert name is not None
        found: Tensor = getattr(scoring, name)(inputs)
        if self.control is None:
            return found
        drawn = scoring.rotated if self.control == "rotated" else scoring.permuted
        return drawn(found, config.draw)

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


OWN = Rule("own")
"""Stands for custom weights, which no rule made. Not a name that ``parse`` knows."""

RULES: dict[str, Rule] = {
    rule.base: rule
    for rule in (
        Rule("uniform", "uniform"),
        Rule("variance", "variance"),
        Rule("kurtosis", "kurtosis"),
        Rule("participation", "participation", need="dictionary"),
        Rule("sensitivity", "sensitivity", "sensitivity_matrix", need="fisher"),
        Rule("whitening", matrix_fn="whitening", need="second_moment"),
    )
}
"""Every rule by name, without its controls."""


def _with_matrix() -> str:
    return ", ".join(name for name, rule in RULES.items() if rule.matrix_fn is not None)
