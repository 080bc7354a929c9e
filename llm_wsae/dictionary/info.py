"""What a dictionary says about itself, apart from its tensors: plain data, light to import."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any

from llm_wsae.errors import LlmWsaeError
from llm_wsae.model.site import Site
from llm_wsae.outside import integer, mapping, number, reason, text, typed

CENTRED = "center_writing_weights"
"""Key of ``model``, in TransformerLens' words: the rows of the stream had mean 0 over dimensions.
Such a dictionary encodes any stream correctly; its reconstruction lacks each row's mean."""
_KINDS = {"topk": "TopK", "standard": "ReLU", "jumprelu": "JumpReLU", "batchtopk": "BatchTopK"}


@dataclass(frozen=True)
class DictionaryInfo:
    """Everything about a dictionary except its tensors and its kind of sparsity.

    All of it is JSON. Each free dict belongs to the stage that fills it.
    """

    site: str
    """Where its rows come from, in TransformerLens names: ``blocks.9.hook_resid_post``."""
    name: str = "dictionary"
    """Name of the training arm."""
    rule: str = "uniform"
    """Name of the rule that made the loss weights γ."""
    alpha: float = 0.0
    """Exponent of the rule: γ = score^alpha."""
    weights: dict[str, Any] = field(default_factory=dict)
    """How γ was made from the scores, and whether it weighted the loss or the training space."""
    seed: int | None = None
    """Seed of the initial weights."""
    context_size: int | None = None
    """Tokens per context of the training text."""
    prepend_bos: bool | None = None
    """Whether each of those contexts began with the model's BOS token."""
    massive_threshold: float | None = None
    """Norm above which a row counted as a massive activation and was excluded from the loss."""
    model: dict[str, Any] = field(default_factory=dict)
    """Identity of the model (name, revision, dtype, …)."""
    corpus: dict[str, Any] = field(default_factory=dict)
    """Identity of the text (name, split, …)."""
    store: dict[str, Any] = field(default_factory=dict)
    """Identity of the activation store or stream."""
    training: dict[str, Any] = field(default_factory=dict)
    """Resolved training configuration."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was measured, at the end of training or by ``evaluate``."""

    def is_of_other_weights(self, identity: Mapping[str, Any]) -> bool:
        """Whether it explains another model than the one with that ``identity()``, as far as can be
        told: float16 rounds the samples of a fingerprint once more."""
        own, its = self.model, identity
        known = None not in (own.get("weights_sha256"), its.get("weights_sha256"))
        alike = (own.get("dtype") == "float16") == (its.get("dtype") == "float16")
        return known and alike and own["weights_sha256"] != its["weights_sha256"]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DictionaryInfo":
        """From JSON; fields of a later version are ignored. Raises LlmWsaeError
        for a value of another type, no site, or a threshold that leaves no row."""
        known = {f.name for f in fields(cls)}
        try:
            info = typed(cls(**{key: value for key, value in values.items() if key in known}))
        except TypeError as error:
            raise LlmWsaeError(reason(error)) from None
        Site.parse(info.site)
        threshold = info.massive_threshold
        if threshold is not None and not threshold > 0:
            raise LlmWsaeError(f"massive_threshold cannot be {threshold}: no row would count")
        return info


@dataclass(frozen=True)
class Facts:
    """What the small files of a dictionary say, this package's or another tool's, as far as they
    say anything; no tensor is read."""

    sae_id: str
    """Its folder in a repository."""
    architecture: str | None
    """Name of its kind, SAELens' if it has one."""
    d_in: int | None
    d_sae: int | None
    k: int | None
    """Active latents per token, if the kind fixes their number."""
    info: DictionaryInfo
    """How it was made. The site is empty if another tool's files do not name one."""
    package_version: str | None = None
    """Version of this package that saved it."""

    @classmethod
    def own(cls, sae_id: str, cfg: Any, info: Any) -> "Facts":
        """From the contents of ``cfg.json`` and ``wsae.json``. Raises as ``from_dict`` does."""
        cfg, info = mapping(cfg), mapping(info)
        d_in, d_sae, k = (integer(cfg.get(name)) for name in ("d_in", "d_sae", "k"))
        made, version = DictionaryInfo.from_dict(info), text(info.get("package_version"))
        return cls(sae_id, text(cfg.get("architecture")), d_in, d_sae, k, made, version)

    @classmethod
    def foreign(
        cls,
        tool: str,
        place: PurePath,
        site: str | None,
        architecture: str | None,
        sizes: tuple[Any, Any, Any],
        **info: Any,
    ) -> "Facts":
        """Of another tool's dictionary in the folder ``place``. ``sizes`` are d_in, d_sae and k, as
        far as they are numbers; ``info`` are more fields of its ``DictionaryInfo``."""
        d_in, d_sae, k = map(integer, sizes)
        name, by = place.name or "dictionary", {"trained with": tool}
        made = DictionaryInfo(site=site or "", name=name, training=by, **info)
        return cls(place.name, architecture, d_in, d_sae, k, made)

    @property
    def sparsity(self) -> str:
        """The kind of sparsity as text: ``TopK, k = 32``."""
        kind = _KINDS.get(self.architecture or "", self.architecture or "unknown")
        return f"{kind}, k = {self.k}" if self.k else kind

    def measured(self, group: str) -> Mapping[str, Any]:
        """What was measured under that name (``fidelity``, ``monosemanticity``, …)."""
        return mapping(self.info.metrics.get(group))

    def metric(self, name: str) -> float | None:
        """A number of its fidelity."""
        return number(self.measured("fidelity").get(name))

    @property
    def model(self) -> str | None:
        """Name of the model."""
        return text(self.info.model.get("name"))

    @property
    def corpus(self) -> str | None:
        """Name of the text."""
        return text(self.info.corpus.get("name"))
