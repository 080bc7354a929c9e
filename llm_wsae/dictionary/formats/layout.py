"""What a foreign layout is, and what the readers share: site names and folding.

A layout is one module with a ``LAYOUT``. Its ``announce`` turns the tool's configuration into
``Facts`` without believing any of it (listings of other people's repositories show it too). Its
``read`` compares that with the tensors.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from llm_wsae.dictionary.info import CENTRED, DictionaryInfo, Facts
from llm_wsae.dictionary.sparsity import Sparsity, sparsity_from_settings
from llm_wsae.errors import LlmWsaeError

_COLUMNS = 4096  # of an encoder, converted to float64 at once
_BLOCK = re.compile(r"(?:.+\.)?(?:layers|layer|h|blocks)\.(\d+)", re.ASCII)
Weights = tuple[dict[str, Tensor], Sparsity]
"""A dictionary's tensors under this package's names, and its kind of sparsity."""


@dataclass(frozen=True)
class Layout:
    """How one tool stores a dictionary in files."""

    name: str
    """The tool's name, for errors and listings."""
    config: str
    """Its JSON file."""
    weights: str
    """Its file of tensors."""
    announce: Callable[[Mapping[str, Any], PurePath], Facts]
    """What the JSON file and the folder's path say."""
    read: Callable[[Path, Mapping[str, Any], Facts], Weights]
    """The tensors of a folder. Raises LlmWsaeError, in one sentence, for whatever is wrong."""
    optional: tuple[str, ...] = ()
    """Small files that are read too where they exist."""

    @property
    def files(self) -> tuple[str, ...]:
        """Its files, small ones first."""
        return self.config, self.weights

    def __str__(self) -> str:
        return f"{self.name} ({' and '.join(self.files)})"


def foreign_info(
    tool: str,
    place: PurePath,
    site: str | None,
    *,
    model: str | None = None,
    corpus: str | None = None,
    centred: bool = False,
    **more: Any,
) -> DictionaryInfo:
    """What is recorded about another tool's dictionary in the folder ``place``."""
    return DictionaryInfo(
        site=site or "",
        name=place.name or "dictionary",
        model={**({"name": model} if model else {}), **({CENTRED: True} if centred else {})},
        corpus={"name": corpus} if corpus else {},
        training={"trained with": tool},
        **more,
    )


def sizes(path: Path, said: Facts) -> tuple[int, int]:
    """(d_in, d_sae). Raises LlmWsaeError, naming the file, if one is missing or impossible."""
    if not said.d_in or not said.d_sae or min(said.d_in, said.d_sae) < 1:
        raise LlmWsaeError(
            f"{path} gives {said.d_in} dimensions and {said.d_sae} latents, so it does not "
            "describe a dictionary"
        )
    return said.d_in, said.d_sae


def sparsity_of(path: Path, said: Facts, architecture: str) -> Sparsity:
    """The kind of sparsity; raises LlmWsaeError, naming the file, if it cannot be."""
    try:
        found = sparsity_from_settings({"architecture": architecture, "k": said.k})
        found.check(said.d_sae or 0)
    except LlmWsaeError as error:
        raise LlmWsaeError(f"{path}: {error}") from None
    return found


def site_of(name: str | None) -> str | None:
    """The site of a whole transformer block's output (``h.9``, ``model.layers.9``).

    Any other name, such as one of TransformerLens', is returned unchanged.
    """
    match = _BLOCK.fullmatch(name or "")
    return f"blocks.{match[1]}.hook_resid_post" if match else name


def without_input_bias(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The encoder bias that makes x·W_enc + b equal (x − b_dec)·W_enc + b_enc. [d_sae]

    In float64: means of the residual stream can be far larger than the variation around them.
    """
    shift = [b_dec.double() @ columns.double() for columns in W_enc.split(_COLUMNS, dim=1)]
    return (b_enc.double() - torch.cat(shift)).float()


def with_decoder_norms(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder, encoder bias and decoder, whose rows are scaled to norm 1 and their norms moved into
    the encoder. A row of zeros stays zero."""
    norms = W_dec.norm(dim=1)
    return W_enc * norms, b_enc * norms, W_dec / torch.where(norms > 0, norms, 1.0)[:, None]


def gated_as_jumprelu(
    W_enc: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A gated encoder is a JumpReLU encoder (Rajamanoharan et al. 2024, gated SAEs, appendix E).

    1[x·W + b_gate > 0] · ReLU(x·W·eʳ + b_mag): with p = x·W·eʳ + b_mag the gate opens where
    p > b_mag − eʳ·b_gate. Returns encoder, bias and threshold. (As with any threshold, a value
    within rounding of it may fall on the other side, the more so the smaller eʳ is compared with
    b_mag.)
    """
    stretch = r_mag.double().exp()
    threshold = b_mag.double() - stretch * b_gate.double()
    return W_enc * stretch.float(), b_mag, threshold.float()


def folded(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor | None
) -> dict[str, Tensor]:
    """The tensors by name. Every tool applies a ReLU too, so a threshold below 0 means 0."""
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    if threshold is not None:
        tensors["threshold"] = threshold.float().clamp(min=0)
    return tensors
