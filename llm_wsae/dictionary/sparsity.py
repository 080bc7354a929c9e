"""How a dictionary turns pre-activations into sparse latents: one small frozen class per kind,
under the name and with the settings that SAELens ≥ 6 writes to ``cfg.json``."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError, UsageError, nearest, shown
from llm_wsae.sparse.codes import Codes, Product, padded
from llm_wsae.sparse.operations import encode_above, encode_topk


class Sparsity:
    """A kind of sparsity. Unless it says otherwise, every pre-activation above 0, and above its
    latent's threshold if there is one, is active."""

    architecture: ClassVar[str]  # its name in ``cfg.json``
    has_threshold: ClassVar[bool] = False  # one for each latent
    k: int | None = None  # active latents per row, at most, if the kind limits them

    @property
    def words(self) -> str:
        """Its name, and which pre-activations are active."""
        above = "their latent's threshold" if self.has_threshold else "0"
        active = f"all above {above}" if self.k is None else f"the {self.k} largest of every token"
        return f"{type(self).__name__}: {active}"

    def encode(
        self,
        rows: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        threshold: Float[Tensor, " d_sae"] | None = None,
    ) -> Codes:
        """The active latents of every row, from rows · encoderᵀ + bias, of which only a part ever
        exists; all values ≥ 0, in as many slots as the fullest row needs, at least 1."""
        least = torch.zeros_like(bias) if threshold is None else threshold.clamp(min=0)
        return padded(encode_above(Product(rows, encoder, bias), least))

    def check(self, d_sae: int) -> None:
        """Raises UsageError if a dictionary of ``d_sae`` latents cannot have this sparsity."""
        if self.k is not None and self.k > d_sae:
            raise UsageError(
                f"k = {self.k} active latents is more than the dictionary's {d_sae} latents; "
                "choose a smaller k or a larger expansion"
            )


@dataclass(frozen=True)
class TopK(Sparsity):
    """The k largest pre-activations of a row are active, through a ReLU (Gao et al. 2024)."""

    k: int
    architecture: ClassVar[str] = "topk"

    def __post_init__(self):
        if self.k < 1:
            raise UsageError(f"k = {self.k} active latents is impossible: k must be at least 1")

    def encode(
        self, rows: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor | None = None
    ) -> Codes:
        return encode_topk(Product(rows, encoder, bias), self.k)


@dataclass(frozen=True)
class ReLU(Sparsity):
    """Every positive pre-activation is active; an L1 penalty in training keeps them few."""

    architecture: ClassVar[str] = "standard"


@dataclass(frozen=True)
class JumpReLU(Sparsity):
    """Pre-activations above their latent's threshold are active (Rajamanoharan et al. 2024). Also
    of finished BatchTopK and Matryoshka dictionaries, with one threshold for all latents."""

    architecture: ClassVar[str] = "jumprelu"
    has_threshold: ClassVar[bool] = True


_KINDS: dict[str, type[Sparsity]] = {kind.architecture: kind for kind in (TopK, ReLU, JumpReLU)}


def sparsity_of(architecture: Any, k: Any) -> Sparsity:
    """The sparsity that these entries of SAELens' ``cfg.json`` describe. Raises LlmWsaeError for an
    unknown architecture or an impossible k."""
    kind = _KINDS.get(str(architecture))
    if kind is None:
        raise LlmWsaeError(
            f"architecture {shown(architecture)} is not supported; "
            f"{nearest(str(architecture), _KINDS)}"
        )
    if kind is not TopK:
        return kind()
    if type(k) is not int or not 1 <= k < 2**31:
        raise LlmWsaeError(f"k is {shown(k)}, but the topk architecture needs a positive integer")
    return TopK(k)


def architecture_of(sparsity: Sparsity, is_transcoder: bool, skip: bool) -> str:
    """SAELens' name of the architecture, such as ``jumprelu_skip_transcoder``. (TopK transcoders it
    has none of: ours are called as if it had.)"""
    if not is_transcoder:
        return sparsity.architecture
    kind = "" if isinstance(sparsity, ReLU) else f"{sparsity.architecture}_"
    return f"{kind}{'skip_' if skip else ''}transcoder"


def kind_of(architecture: Any, is_transcoder: bool) -> tuple[Any, bool]:
    """The kind of sparsity in the name of an architecture, and whether there is a skip: the inverse
    of ``architecture_of``."""
    name = str(architecture)
    if not is_transcoder or not name.endswith("transcoder"):
        return architecture, False
    kind = name.removesuffix("transcoder").removesuffix("skip_").removesuffix("_")
    return kind or ReLU.architecture, "skip_" in name


def to_dense(codes: Codes, d_sae: int) -> Float[Tensor, "*rows d_sae"]:
    """The codes of any number of rows as dense latents."""
    dense = codes.values.new_zeros(*codes.values.shape[:-1], d_sae)
    return dense.scatter_add_(-1, codes.indices, codes.values)  # unused slots: any index, value 0
