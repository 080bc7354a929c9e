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
    """Everything about a dictionary except its tensors and its kind of sparsity, JSON-able. Each
    free dict belongs to the stage that fills it."""

    site: str  # of its rows, in TransformerLens names: blocks.9.hook_resid_post
    name: str = "dictionary"  # name of the training arm
    rule: str = "uniform"  # name of the rule that made the loss weights γ
    alpha: float = 0.0  # exponent of the rule: γ = score^alpha
    weights: dict[str, Any] = field(default_factory=dict)  # how γ was made, and where it acts
    seed: int | None = None  # seed of the initial weights
    context_size: int | None = None  # tokens per context of the training text
    prepend_bos: bool | None = None  # whether each of those began with a BOS token
    massive_threshold: float | None = None  # norm above which a row was excluded as massive
    model: dict[str, Any] = field(default_factory=dict)  # identity of the model (name, revision, …)
    corpus: dict[str, Any] = field(default_factory=dict)  # identity of the text (name, split, …)
    store: dict[str, Any] = field(default_factory=dict)  # identity of the store or stream
    training: dict[str, Any] = field(default_factory=dict)  # resolved training configuration
    metrics: dict[str, Any] = field(default_factory=dict)  # measured in training or by ``evaluate``

    def is_of_other_weights(self, identity: Mapping[str, Any]) -> bool:
        """Whether it explains another model than the one with that ``identity()``, as far as can be
        told: float16 rounds the samples of a fingerprint once more."""
        own, its = self.model, identity
        known = None not in (own.get("weights_sha256"), its.get("weights_sha256"))
        alike = (own.get("dtype") == "float16") == (its.get("dtype") == "float16")
        return known and alike and own["weights_sha256"] != its["weights_sha256"]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DictionaryInfo":
        """From JSON; fields of a later version are ignored. Raises LlmWsaeError for a value of
        another type, no site, or a threshold that leaves no row."""
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

    sae_id: str  # its folder in a repository
    architecture: str | None  # name of its kind, SAELens' if it has one
    d_in: int | None
    d_sae: int | None
    k: int | None  # active latents per token, if the kind fixes their number
    info: DictionaryInfo  # how it was made; without a site if another tool's files name none
    package_version: str | None = None  # version of this package that saved it

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
