"""What a dictionary's two JSON files say about it; no tensor is read.

A repository's card and listing show other people's files too, so a value that does not have the
expected type counts as missing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.outside import integer, mapping, number, text

_SITE = re.compile(r"[\w.]+", re.ASCII)
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+=-]+")


@dataclass(frozen=True)
class Facts:
    """One dictionary, as a card or a table shows it. None where its files say nothing."""

    sae_id: str
    """Its folder in a repository."""
    d_in: int | None
    """Dimensions."""
    d_sae: int | None
    """Latents."""
    sparsity: str
    """The kind of sparsity as text: ``TopK, k = 32``."""
    k: int | None
    """Active latents per token, if the kind fixes their number."""
    info: DictionaryInfo
    """How it was made; its dicts hold only JSON values."""
    package_version: str | None
    """Version of this package that saved it."""

    def metric(self, name: str) -> float | None:
        """A number of its fidelity."""
        return number(mapping(self.info.metrics.get("fidelity")).get(name))

    @property
    def model(self) -> str | None:
        """Name of the model."""
        return text(self.info.model.get("name"))

    @property
    def hub_model(self) -> str | None:
        """The model's id on the Hub, if it came from there (only then it has a revision)."""
        return self.model if text(self.info.model.get("revision")) else None

    @property
    def measured_on(self) -> str | None:
        """Name of the text that its fidelity was measured on, if it is not the training text."""
        found = text(mapping(self.info.metrics.get("fidelity")).get("corpus"))
        return None if found == self.corpus else found

    @property
    def corpus(self) -> str | None:
        """Name of the text."""
        return text(self.info.corpus.get("name"))

    @property
    def hub_datasets(self) -> list[str]:
        """The Hub datasets among the corpus' parts: those whose names have an owner."""
        parts = [part.split(":")[0] for part in (self.corpus or "").split("+")]
        return [part for part in parts if re.fullmatch(r"[\w.-]+/[\w.-]+", part)]


def facts(sae_id: str, cfg: Mapping[str, Any], info: Mapping[str, Any]) -> Facts:
    """Read the contents of ``cfg.json`` and ``wsae.json``."""
    k = integer(cfg.get("k"))
    architecture = text(cfg.get("architecture")) or "unknown"
    kinds = {"topk": "TopK", "standard": "ReLU", "jumprelu": "JumpReLU", "batchtopk": "BatchTopK"}
    kind = kinds.get(architecture, architecture)
    known = DictionaryInfo(
        site=site if _SITE.fullmatch(site := text(info.get("site")) or "") else "",
        name=text(info.get("name")) or "dictionary",
        rule=text(info.get("rule")) or "unknown",
        alpha=number(info.get("alpha")) or 0.0,
        weights=dict(mapping(info.get("weights"))),
        seed=integer(info.get("seed")),
        context_size=integer(info.get("context_size")),
        massive_threshold=number(info.get("massive_threshold")),
        model=dict(mapping(info.get("model"))),
        corpus=dict(mapping(info.get("corpus"))),
        store=dict(mapping(info.get("store"))),
        training=dict(mapping(info.get("training"))),
        metrics=dict(mapping(info.get("metrics"))),
    )
    return Facts(
        sae_id=sae_id,
        d_in=integer(cfg.get("d_in")),
        d_sae=integer(cfg.get("d_sae")),
        sparsity=f"{kind}, k = {k}" if k else kind,
        k=k,
        info=known,
        package_version=text(info.get("package_version")),
    )


def folder_name(info: DictionaryInfo) -> str:
    """``<site>/<name>``: the dictionary's folder in a repository, in harmless characters."""
    name = _UNSAFE.sub("-", info.name).strip("-.") or "dictionary"
    return f"{info.site}/{name}"
