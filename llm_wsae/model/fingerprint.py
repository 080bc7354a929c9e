"""What tells a model from any other, whatever it is called and wherever its file is."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from llm_wsae.model.module_paths import text_config
from llm_wsae.model.spread import parameters

SAMPLES_PER_PARAMETER = 64
# Settings that change the computation; each architecture has some of them.
_SETTINGS = (
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "hidden_act",
    "activation_function",
    "sliding_window",
    "use_parallel_residual",
)


def fingerprint(hf_model: Any) -> str:
    """A hash that tells a model from any other: SHA-256 over the parameters' names, shapes and
    samples, and the settings.

    A manifest must distinguish the model that made a store from similar ones (another size,
    fine-tune or revision) without hashing gigabytes, and the answer must not depend on where the
    file is, on the device or on the float format. So the hash covers the name, the shape and a
    spread sample of every parameter, rounded to bfloat16, and the settings that change what the
    weights compute.
    """
    config = text_config(hf_model)
    settings = {key: getattr(config, key, None) for key in _SETTINGS}
    found = [(name, list(p.shape), _sample(p).cpu()) for name, p in parameters(hf_model)]
    shapes = [[name, shape] for name, shape, _ in found]
    digest = hashlib.sha256(json.dumps([settings, shapes], sort_keys=True, default=str).encode())
    samples = torch.cat([sample for *_, sample in found])
    digest.update(samples.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _sample(parameter: Tensor) -> Tensor:
    """Up to SAMPLES_PER_PARAMETER values spread over a parameter [samples], in bfloat16."""
    flat = parameter.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLES_PER_PARAMETER)
    return flat[::stride][:SAMPLES_PER_PARAMETER].to(torch.bfloat16)
