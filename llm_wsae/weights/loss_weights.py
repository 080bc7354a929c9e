"""The weights of a reconstruction loss, and where the weighted loss lies.

Weights are γ, one per dimension, or a matrix Γ. ``choosing.py`` makes and normalises
them; a weights file keeps them. Where few dimensions dominate the loss, there is a warning.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.files import load_own_tensors, open_tensors, save_own_tensors
from llm_wsae.errors import LlmWsaeError, UsageError, shown
from llm_wsae.model.site import Site
from llm_wsae.outside import mapping, parse_json, reason, typed
from llm_wsae.statistics.moments import Statistics
from llm_wsae.weights.config import IN_LOSS, WeightConfig
from llm_wsae.weights.rules import OWN, Rule

Gamma = Float[Tensor, " d_in"] | Float[Tensor, "d_in d_in"]
NOTHING_LEFT = "the weights leave no dimension in the loss; at least one must be > 0"
COLLAPSE_SHARE = 0.1  # warn when fewer than this share of the dimensions carry the loss


@dataclass(frozen=True)
class LossWeights:
    """Weights of the reconstruction loss ‖Γ(x − x̂)‖², Γ = diag(γ) or a full matrix."""

    gamma: Gamma
    """Weights γ or matrix Γ, float32; normalised, unless they were only just loaded."""
    rule: Rule = OWN
    """The rule that made them."""
    alpha: float = 1.0
    """Exponent α of γ = s^α; 1 for custom weights."""
    config: WeightConfig = IN_LOSS
    """Where they act, and how they were made from the scores."""

    def __post_init__(self) -> None:
        """Raises LlmWsaeError for a tensor that is no vector or square matrix of floating-point
        numbers, UsageError for custom weights of another form than the settings ask for."""
        object.__setattr__(self, "config", self.rule.settings(self.config))  # no place is auto
        _check_form(self.gamma)
        form = "matrix" if self.is_matrix else "diagonal"
        if self.rule == OWN and self.config.form not in ("auto", form):
            raise UsageError(
                f"custom weights have the form that they are given in, {form}, not "
                f"{self.config.form}; leave form at auto"
            )

    @property
    def name(self) -> str:
        """Short name of the weights, e.g. ``variance-a0.5``; if all are one, ``uniform``."""
        config, label = self.config, self.label
        drawn = config.draw and self.rule.is_drawn and label != "uniform"
        return f"{label}-d{config.draw}" if drawn else label

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
        """Raise LlmWsaeError if rows of that width cannot be weighted: on another number of
        dimensions, a negative weight in a vector, a non-finite one, or all zeros."""
        if len(self.gamma) != d_in:
            raise LlmWsaeError(
                f"the weights are for {len(self.gamma)} dimensions, but the site has {d_in}; "
                "make them from this store with llm-wsae weigh"
            )
        is_negative = not self.is_matrix and bool((self.gamma < 0).any())
        if is_negative or not bool(torch.isfinite(self.gamma).all()):
            raise LlmWsaeError("the weights must be finite and not negative; check what made them")
        if not bool(self.gamma.any()):
            raise LlmWsaeError(NOTHING_LEFT)

    def save(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """Write a safetensors file with γ or Γ; ``facts`` (JSON) go into its header, and a digest.

        Raises LlmWsaeError when the file cannot be written.
        """
        header = {"rule": self.rule.name, "alpha": self.alpha, **dataclasses.asdict(self.config)}
        save_own_tensors(path, {"gamma": self.gamma}, header | (facts or {}))

    @classmethod
    def load(
        cls, path: Path, own_config: WeightConfig | None = None, sites: Iterable[Site] = ()
    ) -> "LossWeights":
        """Read what ``save`` wrote, or any safetensors file with one vector or matrix in it.

        ``own_config`` are the settings of custom weights; those of a rule are in the file, and
        others are refused. ``sites`` are those to be weighted; a file that does not say whose
        weights it holds fits all of them. Raises UsageError for other settings or another site,
        LlmWsaeError when the file is not a weights file, or not what was saved.
        """
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
        _check_form(gamma, f"{path}: ")
        if bad := int((~gamma.isfinite()).sum()):
            raise LlmWsaeError(
                f"{path}: the weights must be finite, but {bad:,} are not; make it again"
            )
        try:
            name, alpha = header.get("rule", OWN.name), float(header.get("alpha", 1.0))
            rule = OWN if name == OWN.name else Rule.parse(name)
            known = {field.name for field in dataclasses.fields(WeightConfig)}
            settings = {key: header[key] for key in known & header.keys()}
            config = rule.settings(typed(WeightConfig(**{"place": "loss"} | settings)))
        except (AttributeError, TypeError, ValueError, LlmWsaeError) as error:
            raise LlmWsaeError(
                f"{path} does not say how its weights were made: {reason(error)}"
            ) from error
        if own_config is not None and own_config != WeightConfig():
            asked = rule.settings(own_config)
            if rule != OWN and asked != config:
                raise UsageError(
                    f"{path} holds weights that the rule {rule.name} made for the place "
                    f"{config.place}, and cannot take other settings; drop --place and similar "
                    "options, or make the file again with llm-wsae weigh"
                )
            config = asked
        return cls(gamma.float(), rule, alpha, config)


def _check_form(gamma: Tensor, where: str = "") -> None:
    square = gamma.ndim == 2 and gamma.shape[0] == gamma.shape[1]
    if not (gamma.ndim == 1 or square) or not gamma.is_floating_point():
        raise LlmWsaeError(
            f"{where}the weights have shape {tuple(gamma.shape)} and type {gamma.dtype}; "
            "they must be one floating-point number per dimension, or a square matrix"
        )


def is_weights_file(path: Path) -> bool:
    """Whether ``LossWeights.save`` wrote a file."""
    try:
        with open_tensors(path, "weights file") as file:
            header = (file.metadata() or {}).get("llm_wsae", "{}")
        return "rule" in mapping(parse_json(header, str(path)))
    except LlmWsaeError:
        return False


def annealed(gamma: Gamma, done: float, share: float) -> Gamma:
    """γ (or Γ) after the share ``done`` of all steps, on its linear way to 1 (or I).

    It starts moving at the first step and arrives when ``done`` reaches ``share``.
    """
    one = torch.ones(len(gamma), dtype=gamma.dtype, device=gamma.device)
    return torch.lerp(gamma, one if gamma.ndim == 1 else one.diag(), min(1.0, done / share))


def stretching(weights: LossWeights) -> Float[Tensor, " d_in"]:
    """The factors by which Γ changes lengths: γ, or the singular values of the matrix (float64)."""
    gamma = weights.gamma.double()
    return torch.linalg.svdvals(gamma) if weights.is_matrix else gamma


def loss_share(weights: LossWeights, statistics: Statistics) -> Float[Tensor, " d_in"]:
    """Share of the weighted variance that each dimension carries: γ²·var / Σ γ²·var.

    For a matrix: the share of each principal direction of the weighted rows, i.e. of the
    eigenvalues of ΓΣΓᵀ, the largest first.
    """
    gamma = weights.gamma.double()
    if weights.is_matrix:
        covariance = gamma @ statistics.robust_covariance @ gamma.T
        share = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    else:
        share = gamma**2 * statistics.robust_variance
    return share / share.sum()


def effective_dimensions(weights: LossWeights, statistics: Statistics) -> float:
    """Participation ratio (Σw)²/Σw² of the shares w: how many dimensions the loss depends on.

    For a matrix, how many directions: fewer for correlated dimensions, even when Γ = 1.
    """
    return float(1 / (loss_share(weights, statistics) ** 2).sum())


def collapse_warning(weights: LossWeights, statistics: Statistics) -> str | None:
    """A sentence if fewer than a tenth of the dimensions dominate the weighted loss, else None."""
    effective, d_in = effective_dimensions(weights, statistics), statistics.d_in
    if effective >= COLLAPSE_SHARE * d_in:
        return None
    share, dimension = loss_share(weights, statistics).max(0)
    what = "one direction" if weights.is_matrix else f"dimension {int(dimension)}"
    consequence = (
        "as it is in the activations themselves, without weights"
        if weights.rule.is_plain
        else "so a dictionary trained with it explains those and neglects the rest"
    )
    return (
        f"{weights.name}: the loss is dominated by {effective:.1f} of {d_in} "
        f"{'directions' if weights.is_matrix else 'dimensions'} "
        f"({effective / d_in:.1%}; {what} alone carries {float(share):.0%}), {consequence}"
    )
