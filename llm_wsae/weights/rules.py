"""Weight rules: the text ``permuted:variance`` is parsed once, into an object that does the rest.

A rule estimates how monosemantic each dimension is; ``choosing.py`` turns its scores s into loss
weights γ = s^α. Most rules give one score per dimension (``score_rules.py``), some a matrix
(``matrix_rules.py``), one a score per token. A new rule is a function in one of those files and a
line in ``RULES``, nothing else.

Prefixes make a control of a rule: ``permuted:RULE`` gives its scores to other dimensions,
``deciles:RULE`` to others of nearly the same variance, ``rotated:RULE`` gives its matrix random
eigenvectors, and ``shares:RULE`` gives its shares of the loss to other directions, so that the loss
has as many effective dimensions (``other_shares.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.errors import UsageError, nearest
from llm_wsae.weights import matrix_rules, score_rules
from llm_wsae.weights import scores as formulae
from llm_wsae.weights.config import IN_LOSS, ControlName, WeightConfig
from llm_wsae.weights.inputs import Need, RuleInputs

Control = Literal["permuted", "deciles", "rotated", "shares"]
CONTROLS: tuple[Control, ...] = get_args(Control)
RuleForm = Literal["diagonal", "matrix", "tokens"]

_BRINGS: dict[Need, tuple[str, str]] = {
    "dictionary": ("a first dictionary", "--dictionary DICT"),
    "fisher": ("the model", "--model M"),
    "coherence": ("the model's tokenizer", "--model M"),
    "second_moment": ("the covariance of all rows", ""),
}


@dataclass(frozen=True)
class Rule:
    """A named way to score dimensions, as it is or as a control."""

    base: str
    """Its name without a control's prefix."""
    score_fn: Callable[..., Tensor] | None = field(default=None, repr=False)
    """RuleInputs → one score per dimension, [d_in] float64, ≥ 0. Takes the number of the draw as
    well if the rule is ``random``."""
    matrix_fn: Callable[[RuleInputs], Tensor] | None = field(default=None, repr=False)
    """RuleInputs → a symmetric positive matrix, [d_in, d_in] float64."""
    token_score_fn: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    """Normalised rows [rows, d_in] → one score per row, ≥ 0; all dimensions then count alike."""
    need: Need | None = None
    """What must be measured in addition to the statistics."""
    random: bool = False
    """Whether the scores are random themselves."""
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
        """The control of this rule. Raises UsageError for the rotation of what has no matrix, and
        for deciles or shares of what weighs tokens."""
        found = replace(self, control=control)
        if control == "rotated" and not self.has_matrix:
            raise UsageError(
                f"{found.name!r} is not possible: only rules with a matrix can be rotated "
                f"({_with_matrix()})"
            )
        if control in ("deciles", "shares") and self.weighs_tokens:
            raise UsageError(
                f"{found.name!r} is not possible: {control} are of dimensions, and {self.name!r} "
                "weighs tokens; its control is permuted"
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
    def weighs_tokens(self) -> bool:
        """Whether it weighs tokens and not dimensions."""
        return self.token_score_fn is not None

    @property
    def is_drawn(self) -> bool:
        """Whether its weights depend on a random draw, as those of every control do."""
        return self.random or self.control is not None

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
        """What the weights are under these settings: one per dimension, a matrix, one per token.

        Raises UsageError if the rule does not have the form, or ignores a setting that is set.
        """
        config = self.settings(config)
        if self.is_plain:
            return "diagonal"
        if self.weighs_tokens:
            if replace(config, draw=0) != IN_LOSS:
                raise UsageError(
                    f"the rule {self.name!r} weighs tokens, in the loss and throughout: leave "
                    "place, form, clip and anneal at their defaults"
                )
            return "tokens"
        if self.control == "shares" and config.clip is not None:
            raise UsageError(
                f"{self.name} cannot be clipped: it has the rule's shares of the loss, and clipped "
                "weights would have others; drop clip"
            )
        prefers_matrix = self.has_matrix and (config.in_space or not self.has_scores)
        if config.form == "matrix" or (config.form == "auto" and prefers_matrix):
            self._check_matrix()
            return "matrix"
        self._check_scores()
        return "diagonal"

    def matched_control(
        self, config: WeightConfig, control: ControlName = "permuted"
    ) -> "Rule | None":
        """The rule that gives the same weights to other dimensions or tokens, or the same spectrum
        to other directions; None for ``uniform`` and for what is random already.

        Of dimensions, ``control`` says which others: with those of nearly the same variance
        (``deciles``) the number of dimensions that dominate the loss changes less, but it changes
        where a few stand out. ``shares``, of dimensions and matrices, keeps that number. Raises as
        ``form`` does.
        """
        if self.is_plain or self.is_drawn:
            return None
        if self.form(config) == "matrix":
            found = self.as_control("shares" if control == "shares" else "rotated")
        else:
            found = self.as_control("permuted" if self.weighs_tokens else control)
        found.form(config)  # which may refuse a setting
        return found

    def scores(self, inputs: RuleInputs, draw: int = 0) -> Float[Tensor, " d_in"]:
        """The score of every dimension (float64, ≥ 0); ``draw`` is the number of the random draw.

        Raises UsageError if the rule scores no dimensions or needs what was not measured.
        """
        self._check_scores()
        self._check_inputs(inputs)
        assert self.score_fn is not None
        found = self.score_fn(inputs, draw) if self.random else self.score_fn(inputs)
        return found[self._order(inputs, draw)] if self._reorders else found

    def matrix(self, inputs: RuleInputs, draw: int = 0) -> Float[Tensor, "d_in d_in"]:
        """The symmetric positive matrix (float64); ``draw`` is the number of the random draw.

        Raises UsageError if the rule has none or needs what was not measured.
        """
        self._check_matrix()
        self._check_inputs(inputs)
        assert self.matrix_fn is not None
        found = self.matrix_fn(inputs)
        if self.control == "rotated":
            return matrix_rules.rotated(found, draw)
        if not self._reorders:
            return found
        order = self._order(inputs, draw)  # the same values and directions, on other axes
        return found[order][:, order]

    @property
    def _reorders(self) -> bool:
        """Whether it exchanges the scores of dimensions; shares are exchanged when weights are
        made."""
        return self.control in ("permuted", "deciles")

    def _order(self, inputs: RuleInputs, draw: int) -> Int[Tensor, " d_in"]:
        """Of the dimensions: a control gives each the score of the one in its place."""
        if self.control == "deciles":
            return formulae.order_within_deciles(inputs.statistics.robust_variance, draw)
        return formulae.random_order(inputs.statistics.d_in, draw)

    def token_scores(
        self, rows: Float[Tensor, "rows d_in"], mask: Float[Tensor, " rows"], draw: int = 0
    ) -> Float[Tensor, " rows"]:
        """The score of every normalised row, 0 where ``mask`` is 0, of a rule that weighs tokens.

        ``permuted`` gives each row the score of the unmasked one that is ``draw`` + 1 further on:
        rows come in random order. Each of several processes permutes its own rows.
        """
        assert self.token_score_fn is not None
        found = self.token_score_fn(rows) * mask
        if self.control is None:
            return found
        unmasked_first = mask.argsort(descending=True, stable=True)
        places = torch.arange(len(rows), device=rows.device)
        others = unmasked_first[(places + 1 + draw) % mask.sum().long().clamp(min=1)]
        return torch.zeros_like(found).index_copy_(0, unmasked_first, found[others]) * mask

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
            gives = "weighs tokens" if self.weighs_tokens else "gives only a matrix"
            raise UsageError(f"the rule {self.name!r} {gives}, not a weight for each dimension")


OWN = Rule("own")
"""Stands for custom weights, which no rule made. Not a name that ``parse`` knows."""

RULES: dict[str, Rule] = {
    rule.base: rule
    for rule in (
        Rule("uniform", score_rules.uniform),
        Rule("variance", score_rules.variance),
        Rule("robust-variance", score_rules.robust_variance),
        Rule("kurtosis", score_rules.kurtosis),
        Rule("hoyer", score_rules.hoyer),
        Rule("negentropy", score_rules.negentropy),
        Rule("participation", score_rules.participation, need="dictionary"),
        Rule("gap", score_rules.gap, need="dictionary"),
        Rule("sensitivity", score_rules.sensitivity, matrix_rules.sensitivity, need="fisher"),
        Rule("whitening", matrix_fn=matrix_rules.whitening, need="second_moment"),
        Rule("semantic", score_rules.semantic, need="coherence"),
        Rule("leading-sensitivity", matrix_fn=matrix_rules.leading_sensitivity, need="fisher"),
        Rule("token-norm", token_score_fn=formulae.token_norm),
        Rule("random", score_rules.random, random=True),
    )
}
"""Every rule by name, without its controls."""


def _with_matrix() -> str:
    return ", ".join(name for name, rule in RULES.items() if rule.has_matrix)
