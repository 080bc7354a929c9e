"""What a foreign layout is, and what the readers share: site names and folding.

A layout is one module with a ``LAYOUT``. Its ``announce`` turns the tool's configuration into
``Announced`` without believing any of it (listings of other people's repositories show it too). Its
``read`` compares that with the tensors, whose names and sizes are known before any is allocated.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_wsae.artifact.files import open_tensors
from llm_wsae.dictionary.sparsity import Sparsity, sparsity_from_settings
from llm_wsae.errors import LlmWsaeError

STORED_DTYPES = {"F64", "F32", "BF16", "F16"}
_COLUMNS = 4096  # of an encoder, converted to float64 at once
_LARGEST_SIZE = 2**31
_BLOCK = re.compile(r"(?:.+\.)?(?:layers|layer|h|blocks)\.(\d+)", re.ASCII)


class Weights(NamedTuple):
    """A dictionary's tensors under this package's names, float32, and its kind of sparsity."""

    tensors: dict[str, Tensor]
    sparsity: Sparsity


@dataclass(frozen=True)
class Announced:
    """What a foreign dictionary's configuration says; None where it says nothing."""

    architecture: str | None = None
    """Name of the architecture, SAELens' if it has one."""
    d_in: int | None = None
    """Dimensions."""
    d_sae: int | None = None
    """Latents."""
    k: int | None = None
    """Active latents per row."""
    site: str | None = None
    """Where its rows come from, in TransformerLens names."""
    model: str | None = None
    """Name of the model."""
    corpus: str | None = None
    """Name of the text."""
    context_size: int | None = None
    """Tokens per context."""
    prepend_bos: bool | None = None
    """Whether each context began with the BOS token."""
    centred_stream: bool = False
    """Whether every row of the training stream had mean 0 over dimensions."""
    rule: str = "uniform"
    """Rule of the loss weights, if this package's SAELens plugin trained it."""
    alpha: float = 0.0
    """Exponent of that rule."""

    def sizes(self, path: Path) -> tuple[int, int]:
        """(d_in, d_sae). Raises LlmWsaeError, naming the file, if one is missing or impossible."""
        for size in (self.d_in, self.d_sae):
            if size is None or not 0 < size < _LARGEST_SIZE:
                raise LlmWsaeError(
                    f"{path} gives {self.d_in} dimensions and {self.d_sae} latents, so it does not "
                    "describe a dictionary"
                )
        assert self.d_in is not None and self.d_sae is not None
        return self.d_in, self.d_sae

    def sparsity(self, path: Path, architecture: str, d_sae: int) -> Sparsity:
        """The kind of sparsity; raises LlmWsaeError, naming the file, if it cannot be."""
        try:
            found = sparsity_from_settings({"architecture": architecture, "k": self.k})
            found.check(d_sae)
        except LlmWsaeError as error:
            raise LlmWsaeError(f"{path}: {error}") from None
        return found


@dataclass(frozen=True)
class Layout:
    """How one tool stores a dictionary in files."""

    name: str
    """The tool's name, for errors and listings."""
    config: str
    """Its JSON file."""
    weights: str
    """Its file of tensors."""
    announce: Callable[[Mapping[str, Any], PurePath], Announced]
    """What the JSON file and the folder's path say."""
    read: Callable[[Path, Mapping[str, Any], Announced], Weights]
    """The tensors of a folder. Raises LlmWsaeError, in one sentence, for whatever is wrong."""
    optional: tuple[str, ...] = ()
    """Small files that are read too where they exist."""

    @property
    def files(self) -> tuple[str, ...]:
        """Its files, small ones first."""
        return self.config, self.weights

    def __str__(self) -> str:
        return f"{self.name} ({' and '.join(self.files)})"


def site_of(name: str | None) -> str | None:
    """The site of a whole transformer block's output (``h.9``, ``model.layers.9``).

    Any other name, such as one of TransformerLens', is returned unchanged.
    """
    match = _BLOCK.fullmatch(name or "")
    return f"blocks.{match[1]}.hook_resid_post" if match else name


def tensor_names(path: Path) -> set[str]:
    """The names in a safetensors file's header. Raises LlmWsaeError if it cannot be read."""
    with open_tensors(path, "weights file") as file:
        return set(file.keys())


def own_copy(tensor: Tensor) -> Tensor:
    """A float32 copy: the tensor that was read is mapped from its file, which may be rewritten."""
    return tensor.to(torch.float32, copy=True)


def without_input_bias(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The encoder bias that makes x·W_enc + b equal (x − b_dec)·W_enc + b_enc. [d_sae]

    In float64: means of the residual stream can be far larger than the variation around them.
    """
    shift = [b_dec.double() @ columns.double() for columns in W_enc.split(_COLUMNS, dim=1)]
    return (b_enc.double() - torch.cat(shift)).float()


def with_decoder_norms(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decoder rows scaled to norm 1, their norms moved into the encoder.

    Returns encoder, encoder bias, decoder and the norms [d_sae]. A row of zeros stays zero.
    """
    norms = W_dec.float().norm(dim=1)
    rows = torch.where(norms > 0, norms, 1.0)
    return W_enc * norms, b_enc * norms, W_dec / rows[:, None], norms


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


def not_negative(threshold: Tensor) -> Tensor:
    """The threshold, at least 0: every tool applies a ReLU too, so a negative one means 0."""
    return threshold.float().clamp(min=0)
