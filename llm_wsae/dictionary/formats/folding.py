"""What the readers of other tools' folders share: names and shapes of tensors, and their folding.

A reader is one module with two functions. ``announce`` turns the tool's configuration into
``Facts`` without believing any of it (listings of other people's repositories show it too).
``read`` compares that with the tensors, and folds them as the tool computes with them.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llm_wsae.dictionary.info import Facts
from llm_wsae.errors import LlmWsaeError

_COLUMNS = 4096  # of an encoder, converted to float64 at once
_BLOCK = re.compile(r"(?:.+\.)?(?:layers|layer|h|blocks)\.(\d+)", re.ASCII)
_TURNED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
_BIASES = ("b_dec", "bias", "decoder.bias", "decoder_bias")  # added by the decoder
_NAMES = {
    **_TURNED,
    **dict.fromkeys(_BIASES, "b_dec"),
    "encoder.bias": "b_enc",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}


def site_of(name: str | None) -> str | None:
    """The site of a whole transformer block's output (``h.9``, ``model.layers.9``); any other name,
    such as one of TransformerLens', unchanged."""
    match = _BLOCK.fullmatch(name or "")
    return f"blocks.{match[1]}.hook_resid_post" if match else name


def named(
    path: Path, tensors: Mapping[str, Tensor], wanted: Iterable[str], said: Facts
) -> dict[str, Tensor]:
    """The tensors of the file at ``path`` in float32, named and turned as in SAELens. Raises
    LlmWsaeError unless they are those ``wanted``, of the shapes that its configuration gives."""
    d_in, d_sae = said.d_in or 0, said.d_sae or 0
    known: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
        "topk_threshold": (),
        **dict.fromkeys(_BIASES, (d_in,)),
    }
    shapes = {name: known.get(name, (d_sae,)) for name in wanted}
    if tensors.keys() != shapes.keys():
        raise LlmWsaeError(f"{path} holds {sorted(tensors)} instead of {sorted(shapes)}")
    for name, shape in shapes.items():
        if (found := tuple(tensors[name].shape)) != shape:
            raise LlmWsaeError(
                f"{path}: {name} has the shape {list(found)}, but the configuration beside it asks "
                f"for {list(shape)}"
            )
    return {
        _NAMES.get(name, name): (tensor.T if name in _TURNED else tensor).float()
        for name, tensor in tensors.items()
    }


def fold(
    w: Mapping[str, Tensor],
    *,
    subtracts_bias: bool,
    scale: float = 1.0,
    selects_by_norm: bool = False,
    centred: bool = False,
    factor: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors with which ``Dictionary`` computes what a tool computes with those in ``w``,
    which has SAELens' names; b_gate, b_mag and r_mag in the place of b_enc for a gated encoder.

    The tool multiplies rows by ``scale``, subtracts b_dec if it ``subtracts_bias``, multiplies
    pre-activations by the norms of their decoder rows if it ``selects_by_norm``, and latents by
    ``factor`` [d_sae] before the decoder. ``centred`` rows have mean 0 over dimensions.
    """
    W_enc, W_dec, b_enc, b_dec = w["W_enc"], w["W_dec"], w.get("b_enc"), w["b_dec"]
    threshold = w.get("threshold")
    if scale != 1:
        W_enc, W_dec, b_dec = W_enc * scale, W_dec / scale, b_dec / scale
    if b_enc is None:
        W_enc, b_enc, threshold = _gated_as_jumprelu(W_enc, w["r_mag"], w["b_gate"], w["b_mag"])
    if selects_by_norm:  # a row of zeros stays zero
        norms = W_dec.norm(dim=1)
        W_enc, b_enc = W_enc * norms, b_enc * norms
        W_dec = W_dec / torch.where(norms > 0, norms, 1.0)[:, None]
    if subtracts_bias:  # (x − b_dec)·W_enc + b_enc = x·W_enc + b
        # In float64: means of the residual stream can be far larger than the variation around them.
        shift = [b_dec.double() @ columns.double() for columns in W_enc.split(_COLUMNS, dim=1)]
        b_enc = (b_enc.double() - torch.cat(shift)).float()
    if centred:  # (x − mean x)·W = x·(W − its mean over dimensions)
        W_enc = W_enc - W_enc.mean(0)
    if factor is not None:
        W_dec = W_dec * factor[:, None]
    weights = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    if threshold is not None:  # every tool applies a ReLU too, so below 0 means 0
        weights["threshold"] = threshold.float().clamp(min=0)
    return weights


def _gated_as_jumprelu(
    W_enc: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder, bias and threshold of the JumpReLU encoder that a gated one is (Rajamanoharan et al.
    2024, gated SAEs, appendix E).

    1[x·W + b_gate > 0] · ReLU(x·W·eʳ + b_mag): with p = x·W·eʳ + b_mag the gate opens where
    p > b_mag − eʳ·b_gate. (As with any threshold, a value within rounding of it may fall on the
    other side, the more so the smaller eʳ is compared with b_mag.)
    """
    stretch = r_mag.double().exp()
    threshold = b_mag.double() - stretch * b_gate.double()
    return W_enc * stretch.float(), b_mag, threshold.float()
