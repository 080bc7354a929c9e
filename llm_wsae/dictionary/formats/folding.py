"""What the readers of other tools' folders share: names and shapes of tensors, and their folding.

A reader is one module with two functions. ``announce`` turns the tool's configuration into
``Facts`` without believing any of it. ``read`` compares that with the tensors, and folds them as
the tool computes with them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llm_wsae.dictionary.info import Facts
from llm_wsae.errors import LlmWsaeError
from llm_wsae.model.site import HOOKS

_COLUMNS = 4096  # of an encoder, converted to float64 at once
_BLOCK = re.compile(r"(?:.+\.)?(?:layers|layer|h|blocks)\.(\d+)(\.mlp)?", re.ASCII)


def site_of(name: str | None, transcoder: bool = False) -> str | None:
    """The site of a whole transformer block's output (``h.9``, ``model.layers.9``), or that of its
    MLP (``layers.9.mlp``); any other name, such as one of TransformerLens', unchanged. That of a
    transcoder is a whole MLP."""
    match = _BLOCK.fullmatch(name or "")
    if match is None:
        return name
    if match[2] is None:
        return name if transcoder else f"blocks.{match[1]}.{HOOKS['post']}"
    return f"blocks.{match[1]}.{HOOKS['mlp' if transcoder else 'mlp_out']}"


def transcoded(reads: str | None, writes: str | None) -> str:
    """The site of a transcoder between two of TransformerLens' points, if that is a whole MLP;
    otherwise both, which are no site."""
    block, _, hook = (reads or "").rpartition(f".{HOOKS['mlp_in']}")
    ends = (f"{block}.{HOOKS['mlp_out']}", f"{block}.mlp.hook_out")
    if block and not hook and writes in ends:
        return f"{block}.{HOOKS['mlp']}"
    return f"{reads or 'nowhere'} to {writes or 'nowhere'}"


def named_only(name: str | None) -> dict[str, str]:
    """The identity of a model or text of which nothing but the name is said."""
    return {"name": name} if name else {}


def named(
    path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str], said: Facts
) -> dict[str, Tensor]:
    """The tensors of the file at ``path`` in float32, under SAELens' names. ``names`` leads to them
    from the file's, with ".T" for a matrix that is transposed there. Raises LlmWsaeError unless the
    tensors are these, of the shapes that the configuration gives."""
    d_in, d_sae = said.d_in or 0, said.d_sae or 0
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "W_enc.T": (d_sae, d_in),
        "W_dec": (d_sae, d_in),
        "W_dec.T": (d_in, d_sae),
        "b_dec": (d_in,),
        "W_skip": (d_in, d_in),
        "topk_threshold": (),
    }
    if tensors.keys() != names.keys():
        raise LlmWsaeError(f"{path} holds {sorted(tensors)} instead of {sorted(names)}")
    made = {}
    for name, ours in names.items():
        tensor, shape = tensors[name], shapes.get(ours, (d_sae,))
        if tuple(tensor.shape) != shape:
            raise LlmWsaeError(
                f"{path}: {name} has the shape {list(tensor.shape)}, but the configuration beside "
                f"it asks for {list(shape)}"
            )
        made[ours.removesuffix(".T")] = (tensor.T if ours.endswith(".T") else tensor).float()
    return made


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
    if "W_skip" in w:
        weights["W_skip"] = w["W_skip"]
    if threshold is not None:  # every tool applies a ReLU too, so below 0 means 0
        weights["threshold"] = threshold.float().clamp(min=0)
    return weights


def _gated_as_jumprelu(
    W_enc: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The JumpReLU encoder that a gated one is (Rajamanoharan et al. 2024, gated SAEs, app. E)."""
    # 1[x·W + b_gate > 0] · ReLU(p) with p = x·W·eʳ + b_mag: it opens where p > b_mag − eʳ·b_gate
    stretch = r_mag.double().exp()
    threshold = b_mag.double() - stretch * b_gate.double()
    return W_enc * stretch.float(), b_mag, threshold.float()
