"""How a dictionary turns pre-activations into sparse latents: one small frozen class a kind.

Every kind does the same one thing, ``select``, and knows under which architecture name and with
which keys SAELens ≥ 6 writes it into ``cfg.json``, so that both sides read the same file. A new
kind is a new class in ``SPARSITIES``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.sparse.codes import Codes
from llm_wsae.sparse.operations import select_topk


@runtime_checkable
class Sparsity(Protocol):
    """What a dictionary needs from its kind of sparsity."""

    architecture: ClassVar[str]
    """Name of the kind in SAELens' ``cfg.json``."""

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        """The active latents of every row, from its pre-activations; all values ≥ 0."""
        ...

    def settings(self) -> dict[str, Any]:
        """The keys of ``cfg.json`` that belong to this kind."""
        ...

    def check(self, d_sae: int) -> None:
        """Raise UsageError if a dictionary of ``d_sae`` latents cannot have this sparsity."""
        ...


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of a row are active, through a ReLU (Gao et al. 2024)."""

    k: int
    """Active latents in a row, at most."""

    architecture: ClassVar[str] = "topk"

    def __post_init__(self):
        if self.k < 1:
            raise UsageError(f"k = {self.k} active latents is impossible: k must be at least 1")

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        """The k largest pre-activations, negative ones set to 0: exactly k slots a row."""
        best = select_topk(pre, self.k)
        return Codes(best.indices, best.values.relu())

    def settings(self) -> dict[str, Any]:
        """Keys of ``cfg.json``: k, and that decoder norms play no part in the selection."""
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}

    def check(self, d_sae: int) -> None:
        """Raise UsageError if k exceeds ``d_sae``."""
        if self.k > d_sae:
            raise UsageError(
                f"k = {self.k} active latents is more than the dictionary's {d_sae} latents; "
                "choose a smaller k or a larger expansion"
            )


@dataclass(frozen=True)
class ReLU:
    """Every positive pre-activation is active; training keeps them few by an L1 penalty."""

    architecture: ClassVar[str] = "standard"

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Codes:
        """All positive pre-activations; as many slots as the fullest row needs (at least 1)."""
        width = max(1, int((pre > 0).sum(1).max())) if len(pre) else 1
        values, indices = pre.topk(width, dim=1, sorted=False)
        return Codes(indices, values.relu())

    def settings(self) -> dict[str, Any]:
        """Keys of ``cfg.json``: none."""
        return {}

    def check(self, d_sae: int) -> None:
        """Any width will do."""


SPARSITIES: dict[str, type[TopK] | type[ReLU]] = {kind.architecture: kind for kind in (TopK, ReLU)}


def sparsity_from_settings(cfg: Mapping[str, Any]) -> Sparsity:
    """The sparsity that a SAELens ``cfg.json`` describes.

    Raises LlmWsaeError for an unknown architecture (the known ones are named) or a bad k.
    """
    name = str(cfg.get("architecture"))
    if name not in SPARSITIES:
        raise LlmWsaeError(f"architecture {name!r} is not supported; {nearest(name, SPARSITIES)}")
    if name == ReLU.architecture:
        return ReLU()
    k = cfg.get("k")
    if type(k) is not int or k < 1:
        raise LlmWsaeError(f"k is {k!r}, but the topk architecture needs a positive whole number")
    return TopK(k)


def to_dense(codes: Codes, d_sae: int) -> Float[Tensor, "batch d_sae"]:
    """The codes as one dense row of latents each."""
    dense = torch.zeros(
        len(codes.indices), d_sae, dtype=codes.values.dtype, device=codes.values.device
    )
    return dense.scatter_(1, codes.indices, codes.values)
