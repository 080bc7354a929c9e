"""Dictionaries that SAELens before version 6 writes: ``SAE.save_model``."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from sae_lens import SAE, SAEConfig
from written import D_IN, D_SAE, LAYER, OUT, SITE, K, done, expect, randomise, rows

BASE: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "context_size": 128,
    "model_name": "tiny",
    "hook_name": SITE,
    "hook_layer": LAYER,
    "hook_head_index": None,
    "prepend_bos": True,
    "dataset_path": "words",
    "dataset_trust_remote_code": False,
    "normalize_activations": "none",
    "dtype": "float32",
    "device": "cpu",
    "sae_lens_training_version": None,
}
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
CASES = {
    "standard": {},
    "standard-uncentred": {"apply_b_dec_to_input": False},
    "finetuned": {"finetuning_scaling_factor": True},
    "standard-topk": TOPK,
    "topk": {"architecture": "topk", **TOPK},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "layer-norm": {"normalize_activations": "layer_norm"},
    "hook-z": {"hook_name": f"blocks.{LAYER}.attn.hook_z"},
}
known = {field.name for field in dataclasses.fields(SAEConfig)}


def from_disk(folder: Path) -> Any:
    """Its loader had another name once."""
    load = getattr(SAE, "load_from_disk", None) or SAE.load_from_pretrained
    found = load(str(folder), device="cpu")
    return found[0] if isinstance(found, tuple) else found


for name, changes in CASES.items():
    architecture = changes.get("architecture", "standard")
    if architecture not in inspect.getsource(SAE.__init__):
        continue  # came with a later version
    folder = OUT / name
    sae = SAE(SAEConfig(**{key: value for key, value in (BASE | changes).items() if key in known}))
    randomise(sae)
    sae.save_model(str(folder))
    if name == "hook-z":  # its rows have heads; there is nothing to compare, it must be refused
        expect(folder, rows(), rows())
        continue
    if name != "finetuned":  # which it writes and cannot load again
        sae = from_disk(folder)
    latents = sae.encode(rows())
    expect(folder, latents, sae.decode(latents))
done("sae-lens")
