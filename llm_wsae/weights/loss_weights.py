"""The weights of a reconstruction loss: one number γ per dimension, or a matrix Γ.

They come from a rule's scores s as γ = s^α (Cui et al. 2026), from its matrix S as Γ = S^α, or from
a file; clipped and normalised. Normalised means that the weighted variance equals the plain one,
Σ γ²·var = Σ var or tr ΓΣΓᵀ = tr Σ, so a dictionary that explains nothing has the same loss under
any weights, and one λ of a penalty means the same in all arms. Variances are winsorised throughout,
because the loss ignores massive rows too.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.files import load_own_tensors, save_own_tensors
from llm_wsae.errors import LlmWsaeError, UsageError, shown
from llm_wsae.model.site import Site
from llm_wsae.outside import LARGEST_NUMBER, check_number, reason, typed
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.config import IN_LOSS, WeightConfig
from llm_wsae.weights.rules import OWN, Rule
from llm_wsae.weights.scoring import RuleInputs, spectrum

Gamma = Float[Tensor, " d_in"] | Float[Tensor, "d_in d_in"]
_NOTHING_LEFT = "the weights leave no dimension that varies in the loss; one must be > 0"
_LEAST_LOG = math.log(torch.finfo(torch.float32).tiny)  # less than it is 0, or nearly, in float32
_MAX_CONDITION = 1e5  # of a space: beyond it the way there and back is too inexact in float32


@dataclass(frozen=True)
class LossWeights:
    """Weights of the reconstruction loss ‖Γ(x − x̂)‖², Γ = diag(γ) or a full matrix.

    Raises LlmWsaeError for a tensor that is no vector or square matrix of finite floating-point
    numbers, for a negative weight in a vector, and for all zeros; UsageError for custom weights of
    another form than the settings ask for.
    """

    gamma: Tensor
    """Weights γ [d_in] or matrix Γ [d_in, d_in], float32; normalised, unless only just loaded."""
    rule: Rule = OWN  # that made them
    alpha: float = 1.0  # exponent of γ = s^α; 1 for custom weights
    config: WeightConfig = IN_LOSS  # where they act, and how they were made from the scores

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", self.rule.settings(self.config))  # no place is auto
        gamma, form = self.gamma, "matrix" if self.is_matrix else "diagonal"
        is_square = self.is_matrix and gamma.shape[0] == gamma.shape[1]
        if not (gamma.ndim == 1 or is_square) or not gamma.is_floating_point():
            raise LlmWsaeError(
                f"the weights have shape {tuple(gamma.shape)} and type {gamma.dtype}; "
                "they must be one floating-point number per dimension, or a square matrix"
            )
        if not bool(gamma.isfinite().all()) or (gamma.ndim == 1 and bool((gamma < 0).any())):
            raise LlmWsaeError("the weights must be finite and not negative; check what made them")
        if not bool(gamma.any()):
            raise LlmWsaeError(_NOTHING_LEFT)
        if self.rule == OWN and self.config.form not in ("auto", form):
            raise UsageError(
                f"custom weights have the form that they are given in, {form}, not "
                f"{self.config.form}; leave form at auto"
            )

    @property
    def name(self) -> str:
        """Short name of the weights, e.g. ``variance-a0.5``; if all are one, ``uniform``."""
        draw, label = self.config.draw, self.label
        return f"{label}-d{draw}" if draw and self.rule.is_drawn and self.alpha else label

    @property
    def label(self) -> str:
        """The name without the number of a random draw."""
        config = self.config
        if self.rule.is_plain or self.alpha == 0:
            return "uniform"
        parts = [self.rule.name.replace(":", "-")]
        if self.is_matrix and self.rule.has_scores:
            parts.append("matrix")  # the rule's name alone does not say so
        if self.rule != OWN:
            parts.append(f"a{self.alpha:g}")
        if config.clip is not None:
            parts.append(f"c{config.clip:g}")
        if config.anneal:
            parts.append(f"n{config.anneal:g}")
        if config.in_space:
            parts.append(config.place)
        return "-".join(parts)

    @property
    def is_matrix(self) -> bool:
        """Whether there is a full matrix Γ."""
        return self.gamma.ndim == 2

    def check_for(self, d_in: int) -> None:
        """Raise LlmWsaeError unless the weights are for rows of that width."""
        if len(self.gamma) != d_in:
            raise LlmWsaeError(
                f"the weights are for {len(self.gamma)} dimensions, but the site has {d_in}; "
                "make them from this store with llm-wsae weigh"
            )

    def save(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """Write a safetensors file with γ or Γ, and ``facts`` (JSON) in its header. Raises
        LlmWsaeError when it cannot be written."""
        header = {"rule": self.rule.name, "alpha": self.alpha, **dataclasses.asdict(self.config)}
        save_own_tensors(path, {"gamma": self.gamma}, header | (facts or {}))

    @classmethod
    def load(
        cls, path: Path, own_config: WeightConfig | None = None, sites: Iterable[Site] = ()
    ) -> "LossWeights":
        """Read what ``save`` wrote, or any safetensors file with one vector or matrix in it.
        ``own_config`` are the settings of custom weights; those of a rule are in the file. Raises
        UsageError for others, or if the file names a site that is not one of ``sites``;
        LlmWsaeError when it is not a weights file, or not what was saved."""
        tensors, header = load_own_tensors(path, "weights file")
        made_for = header.get("site")
        for site in sites:  # one width fits all sites of a model, so nothing else would show it
            if isinstance(made_for, str) and made_for != str(site):
                raise UsageError(
                    f"{path} holds the weights of {shown(made_for)}, not of {site}; make a file "
                    f"with llm-wsae weigh --site {site}, and train each site with its own"
                )
        if "gamma" not in tensors and len(tensors) != 1:
            raise LlmWsaeError(
                f"{path} holds the tensors {sorted(tensors)}; a weights file has one, 'gamma'"
            )
        gamma = tensors.get("gamma", next(iter(tensors.values())))
        try:
            name, alpha = header.get("rule", OWN.name), float(header.get("alpha", 1.0))
            rule = OWN if name == OWN.name else Rule.parse(name)
            known = {field.name for field in dataclasses.fields(WeightConfig)}
            settings = {key: header[key] for key in known & header.keys()}
            config = typed(WeightConfig(**{"place": "loss"} | settings))
            loaded = cls(gamma.float() if gamma.is_floating_point() else gamma, rule, alpha, config)
        except (AttributeError, TypeError, ValueError, LlmWsaeError) as error:
            raise LlmWsaeError(f"{path} is no weights file: {reason(error)}") from error
        if own_config in (None, WeightConfig()):
            return loaded
        asked = rule.settings(own_config)
        if rule != OWN and asked != loaded.config:
            raise UsageError(
                f"{path} holds weights that the rule {rule.name} made for the place "
                f"{loaded.config.place}, and cannot take other settings; drop --place and similar "
                "options, or make the file again with llm-wsae weigh"
            )
        return replace(loaded, config=asked)


def is_weights_file(path: Path) -> bool:
    """Whether ``LossWeights.save`` wrote a file."""
    try:
        return "rule" in load_own_tensors(path, "weights file")[1]
    except LlmWsaeError:
        return False


def stretching(weights: LossWeights) -> Float[Tensor, " d_in"]:
    """The factors by which Γ changes lengths: γ, or the singular values of the matrix (float64)."""
    gamma = weights.gamma.double()
    return torch.linalg.svdvals(gamma) if weights.is_matrix else gamma


def choose_weights(
    inputs: RuleInputs | Statistics,
    rules: Iterable[Rule | str],
    alphas: Sequence[float],
    own: LossWeights | None = None,
    config: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
) -> list[LossWeights]:
    """Normalised weights of every rule and α, each once, and weights from a file last. Raises as
    ``weights_from_rule`` and ``own_weights`` do."""
    chosen: dict[str, LossWeights] = {}
    for rule in map(Rule.parse, rules):
        for alpha in (1.0,) if rule.is_plain else alphas:
            weights = weights_from_rule(rule, alpha, inputs, config)
            chosen.setdefault(weights.name, weights)
    if own is not None:
        weights = own_weights(own, inputs)
        chosen[weights.name] = weights
    return list(chosen.values())


def weights_from_rule(
    rule: Rule | str,
    alpha: float,
    inputs: RuleInputs | Statistics,
    config: WeightConfig = WeightConfig(),  # noqa: B008 - frozen
) -> LossWeights:
    """γ = s^α or Γ = S^α, clipped and normalised; 1 for ``uniform`` and α = 0.

    A score of 0 gives the weight 0 for α > 0, and for α < 0 that of the smallest positive score. A
    constant dimension carries no loss whatever its weight; it gets the smallest of the others.

    Raises UsageError for an unknown rule, a form that it does not have, an α that is not finite or
    so far from 0 that weights vanish, or an input that was not measured; LlmWsaeError when every
    score is 0, hardly any row differs from the others, or a space has directions of nearly no
    weight.
    """
    check_number("alpha", alpha, -LARGEST_NUMBER)
    rule, inputs = Rule.parse(rule), RuleInputs.of(inputs)
    if alpha == 0 and not rule.is_plain:
        rule, alpha = Rule.parse("uniform"), 1.0
    config, statistics = rule.settings(config), inputs.statistics
    statistics.check_varying()
    found = rule.apply(inputs, config)
    if found.ndim == 2:
        values, vectors = spectrum(found)
        gamma = (vectors * _powers(values, alpha, config.clip)) @ vectors.T
    else:
        varies = statistics.variance > 0
        if not bool(found.isfinite().all()):
            raise LlmWsaeError(f"scores of the rule {rule.name!r} are NaN or infinite")
        if not bool((found[varies] > 0).any()):
            raise LlmWsaeError(
                f"the rule {rule.name!r} scores every dimension 0, so it prefers none; take another"
            )
        raised = _powers(found[varies], alpha, config.clip)
        gamma = raised.min().expand(len(found)).clone()
        gamma[varies] = raised
    return _normalised(LossWeights(gamma, rule, alpha, config), statistics)


def own_weights(weights: LossWeights, inputs: RuleInputs | Statistics) -> LossWeights:
    """Weights from a file, checked against the site, clipped if they are custom, and normalised.
    Raises LlmWsaeError as ``check_for`` and ``weights_from_rule`` do."""
    statistics, clip = RuleInputs.of(inputs).statistics, weights.config.clip
    statistics.check_varying()
    weights.check_for(statistics.d_in)
    gamma = weights.gamma.double()
    if weights.rule == OWN and clip is not None:  # a rule's are clipped already
        if weights.is_matrix:
            left, values, right = torch.linalg.svd(gamma)
            gamma = (left * _clipped(values.log(), clip).exp()) @ right
        else:
            gamma = _clipped(gamma.log(), clip).exp()
    return _normalised(replace(weights, gamma=gamma), statistics)


def _powers(scores: Tensor, alpha: float, clip: float | None) -> Tensor:
    """scores^α up to a factor, clipped around their median."""
    if alpha <= 0:
        scores = scores.clamp(min=float(scores[scores > 0].min()))
    log = alpha * scores.clamp(min=0).log()  # −∞ is the weight 0
    if clip is not None:
        log = _clipped(log, clip)
    log = log - log.max()
    vanished = int((log.isfinite() & (log < _LEAST_LOG)).sum())
    if vanished:
        raise UsageError(
            f"α = {alpha:g} is so far from 0 that the weights vanish on {vanished} of {len(log)} "
            "dimensions; choose one nearer to 0, or set clip"
        )
    return log.exp()


def _clipped(log: Tensor, clip: float) -> Tensor:
    """Logarithms of weights within that factor of the median of those that are not 0."""
    middle = float(log[log.isfinite()].median())
    return log.clamp(middle - math.log(clip), middle + math.log(clip))


def _normalised(weights: LossWeights, statistics: Statistics) -> LossWeights:
    """The weights, float32, under which the winsorised rows have the variance that they have
    without. Raises LlmWsaeError if there is none, or Γ is a space of no way back."""
    gamma, variance = weights.gamma, statistics.robust_variance
    if weights.is_matrix:
        weighted = float(((gamma @ statistics.robust_covariance) * gamma).sum())
    else:
        weighted = float((gamma**2 * variance).sum())
    if not weighted > 0:
        raise LlmWsaeError(_NOTHING_LEFT)
    scaled = replace(weights, gamma=(gamma * math.sqrt(float(variance.sum()) / weighted)).float())
    if not weights.config.in_space:
        return scaled
    stretch = stretching(scaled)
    if not float(stretch.min()) * _MAX_CONDITION > float(stretch.max()):
        way_out = "set clip" if weights.rule == OWN else "choose an α nearer to 0, or set clip"
        raise LlmWsaeError(
            f"{weights.name} stretches one direction more than {_MAX_CONDITION:,.0f} times as much "
            f"as another, so it is no space to train in; {way_out}"
        )
    return scaled
