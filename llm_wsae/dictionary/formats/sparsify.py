"""EleutherAI's sparsify (formerly ``sae``): ``cfg.json`` and ``sae.safetensors`` per module.

A linear encoder of x − b_dec, TopK of its ReLU, a decoder whose rows are latents. The folder is
named for the module whose output it explains (``layers.9``, ``gpt_neox.layers.9``, ``h.9``).
Transcoders, skip connections, the groupmax activation and signed latents compute something else and
are refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from llm_wsae.dictionary.checks import read_tensors
from llm_wsae.dictionary.folder import CFG
from llm_wsae.dictionary.formats.layout import (
    STORED_DTYPES,
    Announced,
    Layout,
    Weights,
    own_copy,
    site_of,
    without_input_bias,
)
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.outside import integer

WEIGHTS = "sae.safetensors"
_MODULE = re.compile(r"[\w.]+\.\d+(\.\w+)*", re.ASCII)
_UNLIKE = ("transcode", "skip_connection", "signed")


def announce(cfg: Mapping[str, Any], place: PurePath) -> Announced:
    """What ``cfg.json`` and the name of the folder say."""
    d_in, latents = integer(cfg.get("d_in")), integer(cfg.get("num_latents"))
    expansion = integer(cfg.get("expansion_factor"))
    if not latents and d_in and expansion:
        latents = d_in * expansion
    return Announced(
        architecture="topk",
        d_in=d_in,
        d_sae=latents,
        k=integer(cfg.get("k")),
        site=site_of(place.name) if _MODULE.fullmatch(place.name) else None,
    )


def read(folder: Path, cfg: Mapping[str, Any], announced: Announced) -> Weights:
    """The tensors with the centring folded in. Raises LlmWsaeError, naming file and fault."""
    path = folder / CFG
    for name in _UNLIKE:
        if cfg.get(name):
            raise LlmWsaeError(
                f"{path} has {name} = {shown(cfg[name])}, so this package cannot represent it as "
                "a sparse autoencoder"
            )
    if cfg.get("activation", "topk") != "topk":
        raise LlmWsaeError(
            f"{path} has activation = {shown(cfg['activation'])}, but only sparsify's topk can be "
            "represented"
        )
    d_in, d_sae = announced.sizes(path)
    sparsity = announced.sparsity(path, "topk", d_sae)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    found = read_tensors(folder / WEIGHTS, "weights file", shapes, STORED_DTYPES)
    w = {name: own_copy(tensor) for name, tensor in found.items()}
    W_enc = w["encoder.weight"].T
    b_enc = without_input_bias(W_enc, w["encoder.bias"], w["b_dec"])
    return Weights(
        {"W_enc": W_enc, "W_dec": w["W_dec"], "b_enc": b_enc, "b_dec": w["b_dec"]}, sparsity
    )


LAYOUT = Layout("sparsify", CFG, WEIGHTS, announce, read)
