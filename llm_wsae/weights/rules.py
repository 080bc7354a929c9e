"""Rules: each turns what is known of a site into one score s per dimension, or into a matrix.

A score estimates how monosemantic a dimension is; ``loss_weights.py`` makes the loss weights
γ = s^α from it. One rule scores tokens instead. A rule is a function here, or in
``matrix_rules.py`` if it gives a matrix, and a line in ``RULES``, nowhere else; the formulae that
serve planted data too are in ``scores.py``.

Two prefixes make a control of any rule: ``permuted:RULE`` deals its scores out to other dimensions,
``rotated:RULE`` gives its matrix random eigenvectors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import UsageError, nearest
from llm_wsae.weights import matrix_rules, scores
from llm_wsae.weights.inputs import Need, RuleInputs


@dataclass(frozen=True)
class Rule:
    """How scores are computed, and from what."""

    score: Callable[..., Tensor] | None
    """One score per dimension [d_in], float64, ≥ 0."""
    matrix: Callable[[RuleInputs], Tensor] | None = None
    """A symmetric positive matrix of it [d_in, d_in], float64."""
    need: Need | None = None
    """What must have been measured beyond the statistics."""
    of_tokens: Callable[[Tensor], Tensor] | None = None
    """One score per row of normalised rows: it weighs tokens, and dimensions all alike."""
    drawn: bool = False
    """Whether the score also takes the number of a random draw."""


def uniform(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s = 1: the plain sparse autoencoder, the control of every other rule."""
    return torch.ones(inputs.statistics.d_in, dtype=torch.float64)


def variance(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = Var(x_i) over all rows: the proxy of Cui et al. 2026 (arXiv 2506.15963, §5)."""
    return inputs.statistics.variance


def robust_variance(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = Var(x_i) winsorised (Tukey 1962) at ½ % each end, without massive rows: the paper's
    proxy, which massive activations cannot move."""
    return inputs.statistics.robust_variance


def kurtosis(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = E(x_i − μ_i)⁴ / Var(x_i)² of the usual rows: rarely active means heavy tails."""
    return scores.kurtosis(inputs.statistics.usual_sample)


def hoyer(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = sparsity of the usual rows (Hoyer 2004, JMLR 5), in [0, 1]: 1 for one active row."""
    return scores.hoyer(inputs.statistics.usual_sample)


def negentropy(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = distance from a Gaussian (Hyvärinen 1998, eq. 14): mixtures of many features near 0."""
    return scores.negentropy(inputs.statistics.usual_sample)


def participation(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = 1 / number of latents of a first dictionary that share the dimension.

    Our own: the participation ratio (Bell and Dean 1970) of q_ij = E z_j²·W_ji² over the latents j,
    so a latent counts by how often and how strongly it fires.
    """
    return scores.participation(inputs.decoder, inputs.energy)


def gap(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s = the γ ≥ 0 that minimise ‖W_pᵀΓ²W_p − I‖_F, a first dictionary's decoder being W_pᵀ.

    Theorem 5 of Cui et al. 2026: that matrix is the gap between the loss and the one on the true
    features. α = 1 takes these γ as they are; where one is 0 the dimension leaves the loss.
    """
    return scores.gap(inputs.decoder)


def sensitivity(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = F_ii: how much the model's next-token distribution depends on the dimension.

    Fisher information (Amari 1998); with α = ½ the loss is the diagonal approximation of the KL
    divergence that the reconstruction causes, to second order.
    """
    return inputs.fisher.diagonal().clone()


def semantic(inputs: RuleInputs) -> Float[Tensor, " d_in"]:
    """s_i = mean cosine between the texts that move the dimension most, beyond that of random ones.

    The paper's measure for vision (Cui et al. 2026, §5), with a sentence encoder for text.
    """
    return inputs.coherence


def random(inputs: RuleInputs, draw: int) -> Float[Tensor, " d_in"]:
    """s_i uniform on (0, 1]: our own control, which knows nothing of the dimensions."""
    return scores.random_scores(inputs.statistics.d_in, draw)


RULES: dict[str, Rule] = {
    "uniform": Rule(uniform),
    "variance": Rule(variance),
    "robust-variance": Rule(robust_variance),
    "kurtosis": Rule(kurtosis),
    "hoyer": Rule(hoyer),
    "negentropy": Rule(negentropy),
    "participation": Rule(participation, need="dictionary"),
    "gap": Rule(gap, need="dictionary"),
    "sensitivity": Rule(sensitivity, matrix_rules.sensitivity, need="fisher"),
    "whitening": Rule(None, matrix_rules.whitening),
    "semantic": Rule(semantic, need="coherence"),
    "leading-sensitivity": Rule(None, matrix_rules.leading_sensitivity, need="fisher"),
    "token-norm": Rule(uniform, of_tokens=scores.token_norm),
    "random": Rule(random, drawn=True),
}

_CONTROLS = ("permuted", "rotated")
_BRINGS: dict[Need, tuple[str, str]] = {
    "dictionary": ("a first dictionary", "--dictionary DICT"),
    "fisher": ("the model", "--model M"),
    "coherence": ("the model's tokenizer", "--model M"),
}


def check_rule(rule: str) -> None:
    """Raises UsageError, offering the nearest ones, when there is no such rule."""
    control, base = _parts(rule)
    if base not in RULES or control not in ("", *_CONTROLS):
        known = [*RULES, *(f"{c}:{r}" for c in _CONTROLS for r in RULES)]
        raise UsageError(f"there is no weight rule {rule!r}; {nearest(rule, known)}")
    if control == "rotated" and RULES[base].matrix is None:
        raise UsageError(
            f"{rule!r} cannot be: only rules with a matrix can be rotated "
            f"({', '.join(name for name, r in RULES.items() if r.matrix)})"
        )


def need_of(rule: str) -> Need | None:
    """What must be measured for a rule beyond the statistics. Raises as ``check_rule`` does."""
    check_rule(rule)
    return RULES[_parts(rule)[1]].need


def has_matrix(rule: str) -> bool:
    """Whether the rule can give a matrix. Raises as ``check_rule`` does."""
    check_rule(rule)
    return RULES[_parts(rule)[1]].matrix is not None


def has_scores(rule: str) -> bool:
    """Whether the rule can give a score per dimension. Raises as ``check_rule`` does."""
    check_rule(rule)
    control, base = _parts(rule)
    return control != "rotated" and RULES[base].score is not None


def weighs_tokens(rule: str) -> bool:
    """Whether the rule, or its ``permuted`` control, weighs tokens instead of dimensions."""
    control, base = _parts(rule)
    return control in ("", "permuted") and base in RULES and RULES[base].of_tokens is not None


def token_scores(
    rule: str, rows: Float[Tensor, "rows d_in"], mask: Float[Tensor, " rows"], draw: int
) -> Float[Tensor, " rows"]:
    """The score of every row under a rule that weighs tokens; 0 where ``mask`` is.

    The ``permuted`` control gives each row the score of another one, so many unmasked ones further
    on: rows come in random order. Of several processes each permutes its own.
    """
    control, base = _parts(rule)
    found = RULES[base].of_tokens(rows) * mask
    if not control:
        return found
    unmasked_first = mask.argsort(descending=True, stable=True)
    places = torch.arange(len(rows), device=rows.device)
    others = unmasked_first[(places + 1 + draw) % mask.sum().long().clamp(min=1)]
    return torch.zeros_like(found).index_copy_(0, unmasked_first, found[others]) * mask


def is_drawn(rule: str) -> bool:
    """Whether another random draw gives other weights."""
    control, base = _parts(rule)
    return bool(control) or (base in RULES and RULES[base].drawn)


def score(rule: str, inputs: RuleInputs, draw: int = 0) -> Float[Tensor, " d_in"]:
    """The score of every dimension under a named rule (float64).

    Raises UsageError when there is no such rule, it gives only a matrix, or it needs what was not
    measured.
    """
    check_form(rule, takes_matrix=False)
    check_evidence(rule, inputs)
    control, base = _parts(rule)
    chosen = RULES[base]
    found = chosen.score(inputs, draw) if chosen.drawn else chosen.score(inputs)
    return scores.permuted(found, draw) if control == "permuted" else found


def matrix(rule: str, inputs: RuleInputs, draw: int = 0) -> Float[Tensor, "d_in d_in"]:
    """The matrix of a named rule (float64).

    Raises UsageError when there is no such rule, it has no matrix, or it needs what was not
    measured.
    """
    check_form(rule, takes_matrix=True)
    check_evidence(rule, inputs)
    control, base = _parts(rule)
    found = RULES[base].matrix(inputs)
    if control == "rotated":
        return matrix_rules.rotated(found, draw)
    return matrix_rules.permuted(found, draw) if control == "permuted" else found


def check_form(rule: str, *, takes_matrix: bool) -> None:
    """Raises UsageError when there is no such rule, or it has not the form that is taken."""
    if takes_matrix and not has_matrix(rule):
        names = ", ".join(name for name, r in RULES.items() if r.matrix)
        raise UsageError(f"the rule {rule!r} has no matrix form; those with one are {names}")
    if not takes_matrix and not has_scores(rule):
        raise UsageError(f"the rule {rule!r} gives only a matrix, not a weight for each dimension")


def check_evidence(rule: str, inputs: RuleInputs) -> None:
    """Raises UsageError, saying which option brings it, when the rule needs what is not there."""
    need = need_of(rule)
    if need is not None and not inputs.has(need):
        raise lacks(rule, need)


def lacks(rule: str, need: Need) -> UsageError:
    """What to say of a rule that needs what was not measured."""
    what, option = _BRINGS[need]
    return UsageError(
        f"the rule {rule!r} needs {what}: let llm-wsae weigh make its weights with {option}, "
        "and train on the file with --weights"
    )


def _parts(rule: str) -> tuple[str, str]:
    """("permuted", "variance") of "permuted:variance", ("", "variance") of "variance"."""
    control, _, base = rule.rpartition(":")
    return control, base
