"""EleutherAI's sparsify (formerly ``sae``): ``cfg.json`` and ``sae.safetensors`` per module.

A linear encoder of x − b_dec, TopK of its ReLU, a decoder whose rows are latents. The folder is
named for the module whose output it explains (``layers.9``, ``gpt_neox.layers.9``, ``h.9``). That
of a transcoder is the MLP that it stands for (``layers.9.mlp``), maybe with a skip; it does not
subtract b_dec. The groupmax activation and signed latents compute something else and are refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from llm_wsae.dictionary.folder import CFG, read_tensors
from llm_wsae.dictionary.formats.folding import fold, named, site_of
from llm_wsae.dictionary.info import Facts
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.outside import integer

WEIGHTS = "sae.safetensors"
_NAMES = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_MODULE = re.compile(r"[\w.]+\.\d+(\.\w+)*", re.ASCII)


def announce(cfg: Mapping[str, Any], place: PurePath) -> Facts:
    """What ``cfg.json`` and the folder's name say."""
    d_in, latents = integer(cfg.get("d_in")), integer(cfg.get("num_latents"))
    expansion = integer(cfg.get("expansion_factor"))
    if not latents and d_in and expansion:
        latents = d_in * expansion
    of_module = _MODULE.fullmatch(place.name)
    site = site_of(place.name, cfg.get("transcode") is True) if of_module else None
    return Facts.foreign("sparsify", place, site, "topk", (d_in, latents, cfg.get("k")))


def read(folder: Path, cfg: Mapping[str, Any], said: Facts) -> dict[str, Tensor]:
    """The tensors of ``sae.safetensors``, folded."""
    odd = {key: cfg[key] for key in ("signed",) if cfg.get(key)}
    yes_or_no = {key: cfg[key] for key in ("transcode", "skip_connection") if key in cfg}
    odd |= {key: value for key, value in yes_or_no.items() if not isinstance(value, bool)}
    if cfg.get("activation", "topk") != "topk":
        odd["activation"] = cfg["activation"]
    for key, value in odd.items():
        raise LlmWsaeError(
            f"{folder / CFG} has {key} = {shown(value)}, so this package cannot represent it as a "
            "dictionary"
        )
    skip = {"W_skip": "W_skip"} if cfg.get("skip_connection") else {}
    w = named(folder / WEIGHTS, read_tensors(folder / WEIGHTS), _NAMES | skip, said)
    return fold(w, subtracts_bias=not cfg.get("transcode"))
