"""What all foreign layouts share: what a file announces, which names are sites, how things fold.

A layout is one module with a ``LAYOUT``. Its ``announce`` turns the tool's own configuration into
``Announced`` without believing any of it (listings of other people's repositories show it too);
its ``read`` holds that against the tensors, whose names and sizes are known before one is made.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_wsae.dictionary.sparsity import Sparsity, sparsity_from_settings
from llm_wsae.errors import LlmWsaeError

STORED_DTYPES = {"F64", "F32", "BF16", "F16"}
_COLUMNS = 4096  # of an encoder that are held in float64 together
_LARGEST_SIZE = 2**31
_BLOCK = re.compile(r"(?:.+\.)?(?:layers|layer|h|blocks)\.(\d+)", re.ASCII)


class Weights(NamedTuple):
    """A dictionary's tensors under our names, float32, and what makes its latents sparse."""

    tensors: dict[str, Tensor]
    sparsity: Sparsity


@dataclass(frozen=True)
class Announced:
    """What the configuration of a foreign dictionary says, in our words; None where it does not."""

    architecture: str | None = None
    """Name of the architecture, as SAELens calls it where SAELens knows it."""
    d_in: int | None = None
    """Dimensions."""
    d_sae: int | None = None
    """Latents."""
    k: int | None = None
    """Active latents in a row."""
    site: str | None = None
    """Where its rows come from, in TransformerLens names."""
    model: str | None = None
    """Name of the model."""
    corpus: str | None = None
    """Name of the text."""
    context_size: int | None = None
    """Tokens in a context."""
    prepend_bos: bool | None = None
    """Whether each context began with the BOS token."""
    centred_stream: bool = False
    """Whether every row of the stream it was trained on had mean 0 over dimensions."""
    rule: str = "uniform"
    """Rule of the loss weights, if our plugin trained it."""
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
    """How one tool lays a dictionary into files."""

    name: str
    """The tool, for errors and listings."""
    config: str | None
    """Its JSON file; None if it has none."""
    weights: str
    """Its file of tensors."""
    announce: Callable[[Mapping[str, Any], PurePath], Announced]
    """What the JSON file and the folder's path say."""
    read: Callable[[Path, Mapping[str, Any], Announced], Weights]
    """The tensors of a folder. Raises LlmWsaeError in one sentence for whatever is wrong."""

    @property
    def files(self) -> tuple[str, ...]:
        """Its files, small before large."""
        return (self.weights,) if self.config is None else (self.config, self.weights)

    def __str__(self) -> str:
        return f"{self.name} ({' and '.join(self.files)})"


def site_of(name: str | None) -> str | None:
    """A site for the output of a whole transformer block (``h.9``, ``model.layers.9``).

    Names of TransformerLens' and names of anything else come back as they are.
    """
    match = _BLOCK.fullmatch(name or "")
    return f"blocks.{match[1]}.hook_resid_post" if match else name


def tensor_names(path: Path) -> set[str]:
    """Names in a safetensors file, from its header. Raises LlmWsaeError if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise LlmWsaeError(f"{path} is not a readable weights file: {error}") from error


def own_copy(tensor: Tensor) -> Tensor:
    """The tensor as float32 in memory of its own: what is read lies on the file, which its tool
    may write again."""
    return tensor.to(torch.float32, copy=True)


def without_input_bias(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The encoder bias that makes x·W_enc + b equal (x − b_dec)·W_enc + b_enc. [d_sae]

    In float64: means of the residual stream can be far larger than what varies around them.
    """
    shift = [b_dec.double() @ columns.double() for columns in W_enc.split(_COLUMNS, dim=1)]
    return (b_enc.double() - torch.cat(shift)).float()


def with_decoder_norms(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents measured in the units of what they write: norms of decoder rows go to the encoder.

    Returns encoder, its bias, the decoder and the norms [d_sae]. A row of zeros stays one.
    """
    norms = W_dec.float().norm(dim=1)
    rows = torch.where(norms > 0, norms, 1.0)
    return W_enc * norms, b_enc * norms, W_dec / rows[:, None], norms


def gated_as_jumprelu(
    W_enc: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A gated encoder is a JumpReLU one (Rajamanoharan et al. 2024, gated SAEs, appendix E).

    1[x·W + b_gate > 0] · ReLU(x·W·eʳ + b_mag): with p = x·W·eʳ + b_mag the gate opens where
    p > b_mag − eʳ·b_gate. Returns encoder, bias and threshold. (Like any threshold this one can
    round the other way in the last digit, the more so the smaller eʳ is beside b_mag.)
    """
    stretch = r_mag.double().exp()
    threshold = b_mag.double() - stretch * b_gate.double()
    return W_enc * stretch.float(), b_mag, threshold.float()


def not_negative(threshold: Tensor) -> Tensor:
    """Every tool has a ReLU behind or before its threshold, so a negative one means 0."""
    return threshold.float().clamp(min=0)
