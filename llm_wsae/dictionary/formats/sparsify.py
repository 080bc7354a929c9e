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

from llm_wsae.dictionary.folder import CFG, check_shapes, read_tensors
from llm_wsae.dictionary.formats.layout import (
    Layout,
    Weights,
    folded,
    foreign_info,
    site_of,
    sizes,
    sparsity_of,
    without_input_bias,
)
from llm_wsae.dictionary.info import Facts
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.outside import integer

_NAME, _WEIGHTS = "sparsify", "sae.safetensors"
_MODULE = re.compile(r"[\w.]+\.\d+(\.\w+)*", re.ASCII)


def _announce(cfg: Mapping[str, Any], place: PurePath) -> Facts:
    d_in, latents = integer(cfg.get("d_in")), integer(cfg.get("num_latents"))
    expansion = integer(cfg.get("expansion_factor"))
    if not latents and d_in and expansion:
        latents = d_in * expansion
    site = site_of(place.name) if _MODULE.fullmatch(place.name) else None
    info = foreign_info(_NAME, place, site)
    return Facts(place.name, "topk", d_in, latents, integer(cfg.get("k")), info)


def _read(folder: Path, cfg: Mapping[str, Any], said: Facts) -> Weights:
    path = folder / CFG
    odd = {key: cfg[key] for key in ("transcode", "skip_connection", "signed") if cfg.get(key)}
    if cfg.get("activation", "topk") != "topk":
        odd["activation"] = cfg["activation"]
    for key, value in odd.items():
        raise LlmWsaeError(
            f"{path} has {key} = {shown(value)}, so this package cannot represent it as a sparse "
            "autoencoder"
        )
    d_in, d_sae = sizes(path, said)
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    w = {name: tensor.float() for name, tensor in read_tensors(folder / _WEIGHTS).items()}
    check_shapes(folder / _WEIGHTS, w, shapes)
    W_enc = w["encoder.weight"].T
    b_enc = without_input_bias(W_enc, w["encoder.bias"], w["b_dec"])
    return folded(W_enc, w["W_dec"], b_enc, w["b_dec"], None), sparsity_of(path, said, "topk")


LAYOUT = Layout(_NAME, CFG, _WEIGHTS, _announce, _read)
