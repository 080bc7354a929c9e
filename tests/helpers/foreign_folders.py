"""Dictionaries laid into files as other tools do, with what those tools would compute from them.

Written from the published layouts; that the tools really do so is what scripts/interop.py is for.
Latents and reconstructions are computed here in float64, step by step as each tool describes
itself, never by folding anything.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 12, 48, 5
SITE = "blocks.3.hook_resid_post"
Active = Callable[[Tensor], Tensor]


class Expected(NamedTuple):
    """What the tool makes of some rows, float64."""

    x: Tensor
    latents: Tensor
    reconstruction: Tensor


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def base() -> dict[str, Tensor]:
    """Tensors under SAELens' names; decoder rows of any norm."""
    return {
        "W_enc": draw(1, D_IN, D_SAE, scale=0.4),
        "W_dec": draw(2, D_SAE, D_IN, scale=0.5),
        "b_enc": draw(3, D_SAE, scale=0.3),
        "b_dec": draw(4, D_IN, scale=2),
    }


def topk(pre: Tensor) -> Tensor:
    """The K largest positive entries of each row, the rest 0."""
    best = pre.topk(K, dim=1)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# Which latents are active; gated encoders have biases of their own.
THRESHOLD, SHARED, SCALE = draw(7, D_SAE), torch.tensor(0.7, dtype=torch.float64), 0.25
GATES = {"b_gate": draw(8, D_SAE), "b_mag": draw(9, D_SAE), "r_mag": draw(10, D_SAE, scale=0.5)}


def gated(pre: Tensor) -> Tensor:
    opens = pre + GATES["b_gate"] > 0
    return opens * (pre * GATES["r_mag"].double().exp() + GATES["b_mag"]).relu()


def above_its_own(pre: Tensor) -> Tensor:
    return pre.relu() * (pre > THRESHOLD)


def above_one(pre: Tensor) -> Tensor:
    return pre * (pre > SHARED)


def computed(
    active: Active,
    subtracts: bool = True,
    scale: float = 1.0,
    by_norm: bool = False,
    factor: Tensor | float = 1.0,
) -> Expected:
    """Scale, subtract b_dec, encode, ``active``, decode, scale back, with ``base``."""
    x = draw(99, 50, D_IN) + draw(98, D_IN, scale=3)  # a mean far from 0, as the stream has
    w = {name: tensor.double() for name, tensor in base().items()}
    pre = (x.double() * scale - subtracts * w["b_dec"]) @ w["W_enc"]
    if active is not gated:
        pre = pre + w["b_enc"]
    norms = w["W_dec"].norm(dim=1) if by_norm else torch.ones(D_SAE)
    latents = active(pre * norms)
    reconstruction = (latents / norms * factor @ w["W_dec"] + w["b_dec"]) / scale
    # Folding the scale leaves decoder rows of norm/scale, and with them latents in those units.
    return Expected(x, latents / (scale if by_norm else 1), reconstruction)


# SAELens

KINDS: dict[str, tuple[dict[str, Any], dict[str, Tensor], Active]] = {
    "standard": ({}, {}, torch.relu),
    "topk": ({"k": K}, {}, topk),
    "jumprelu": ({}, {"threshold": THRESHOLD}, above_its_own),
    "gated": ({}, GATES, gated),
    "batchtopk": ({"k": 5.5}, {"topk_threshold": SHARED}, above_one),
}
"""Each architecture: settings, tensors beside those of ``base``, which latents are active."""


def saelens(
    folder: Path, kind: str, subtracts: bool = True, by_norm: bool = False, **changes: Any
) -> Expected:
    """As version 6 writes it; a checkpoint of BatchTopK, in the middle of a training on rescaled
    activations, has their scale beside it."""
    settings, own, active = KINDS[kind]
    tensors, scale, how = base() | own, 1.0, "none"
    if kind == "gated":
        del tensors["b_enc"]
    if kind == "batchtopk":
        scale, how = SCALE, "expected_average_only_in"
        write_json(folder / "activation_scaler.json", {"scaling_factor": scale})
    about = {"model_name": "tiny", "hook_name": SITE, "context_size": 64, "prepend_bos": True,
             "dataset_path": "words"}  # fmt: skip
    cfg = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "apply_b_dec_to_input": subtracts,
        "rescale_acts_by_decoder_norm": by_norm,
        "normalize_activations": how,
        "metadata": about,
        "architecture": kind,
        **settings,
        **changes,
    }
    write_json(folder / "cfg.json", cfg)
    save_file(tensors, folder / "sae_weights.safetensors")
    return computed(active, subtracts, scale, by_norm)


def saelens_old(
    folder: Path, factor: Tensor | None = None, active: Active = torch.relu, **changes: Any
) -> Expected:
    """As version 3 wrote it: everything side by side, perhaps without an architecture."""
    cfg = {"model_name": "tiny", "hook_point": SITE, "dataset_path": "words", "d_in": D_IN,
           "d_sae": D_SAE, "context_size": 64, **changes}  # fmt: skip
    write_json(folder / "cfg.json", cfg)
    own = {} if factor is None else {"scaling_factor": factor}
    save_file(base() | own, folder / "sae_weights.safetensors")
    subtracts = cfg.get("apply_b_dec_to_input", True)
    return computed(active, subtracts, factor=1.0 if factor is None else factor.double())


OLD_TOPK = {"architecture": "standard", "activation_fn_str": "topk", "apply_b_dec_to_input": False,
            "activation_fn_kwargs": {"k": K}, "normalize_activations": False,
            "finetuning_scaling_factor": False}  # fmt: skip
FINETUNED = {"architecture": "standard", "finetuning_scaling_factor": True}


# sparsify


def sparsify(folder: Path, **changes: Any) -> Expected:
    """``folder`` should have the name of a module."""
    w = base()
    cfg = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": K,
           "skip_connection": False, "transcode": False, "d_in": D_IN, **changes}  # fmt: skip
    write_json(folder / "cfg.json", cfg)
    encoder = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    tensors = {**encoder, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save_file(tensors, folder / "sae.safetensors")
    return computed(topk)


# dictionary_learning

CLASSES: dict[str, tuple[str, Active, bool]] = {
    "AutoEncoder": ("bias", torch.relu, True),
    "AutoEncoderNew": ("decoder.bias", torch.relu, False),
    "GatedAutoEncoder": ("decoder_bias", gated, True),
    "AutoEncoderTopK": ("b_dec", topk, True),
    "BatchTopKSAE": ("b_dec", above_one, True),
    "MatryoshkaBatchTopKSAE": ("b_dec", above_one, True),
    "JumpReluAutoEncoder": ("b_dec", above_its_own, False),
}
"""Each class: the name of b_dec, which latents are active, whether it subtracts b_dec."""


def learning(folder: Path, dict_class: str, **changes: Any) -> Expected:
    trainer = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "k": K,
               "layer": 3, "lm_name": "owner/tiny", "submodule_name": "resid_post_layer_3",
               **changes}  # fmt: skip
    buffer = {"d_submodule": D_IN, "io": "out", "ctx_len": 64}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer})
    bias, active, subtracts = CLASSES[dict_class]
    w = base()
    turned = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"],
              "decoder.weight": w["W_dec"].T.contiguous(), bias: w["b_dec"]}  # fmt: skip
    tensors = w if dict_class.startswith(("Matryoshka", "JumpRelu")) else turned
    if active is gated:
        del tensors["encoder.bias"]
        tensors |= {"gate_bias": GATES["b_gate"], "mag_bias": GATES["b_mag"]}
        tensors["r_mag"] = GATES["r_mag"]
    if active is above_its_own:
        tensors["threshold"] = THRESHOLD
    elif active in (above_one, topk):  # some hold what is not used in encoding
        tensors |= {"k": torch.tensor(K, dtype=torch.int), "threshold": SHARED}
    if dict_class.startswith("Matryoshka"):
        tensors["group_sizes"] = torch.tensor([10, 38])
    torch.save(tensors, folder / "ae.pt")
    made = computed(active, subtracts)
    if dict_class == "AutoEncoder":  # it is loaded with decoder columns of unit norm
        return made._replace(latents=made.latents * w["W_dec"].double().norm(dim=1))
    return made


WRITERS: dict[str, Callable[[Path], Expected]] = {
    "saelens-standard": lambda f: saelens(f, "standard"),
    "saelens-standard-uncentred": lambda f: saelens(f, "standard", subtracts=False),
    "saelens-topk": lambda f: saelens(f, "topk"),
    "saelens-topk-rescaled": lambda f: saelens(f, "topk", by_norm=True),
    "saelens-jumprelu": lambda f: saelens(f, "jumprelu"),
    "saelens-jumprelu-uncentred": lambda f: saelens(f, "jumprelu", subtracts=False),
    "saelens-gated": lambda f: saelens(f, "gated"),
    "saelens-gated-uncentred": lambda f: saelens(f, "gated", subtracts=False),
    "saelens-checkpoint": lambda f: saelens(f, "batchtopk", by_norm=True),
    "saelens-old": saelens_old,
    "saelens-old-topk": lambda f: saelens_old(f, torch.ones(D_SAE), topk, **OLD_TOPK),
    "saelens-old-finetuned": lambda f: saelens_old(f, draw(11, D_SAE).abs() + 0.5, **FINETUNED),
    "sparsify": sparsify,
    "sparsify-by-expansion": lambda f: sparsify(f, num_latents=0, expansion_factor=D_SAE // D_IN),
    **{f"learning-{name}": lambda f, name=name: learning(f, name) for name in CLASSES},
}


def place(tmp_path: Path, layout: str) -> Path:
    """A folder with the name that the layout's own tool would give it."""
    return tmp_path / ("layers.3" if layout.startswith("sparsify") else layout)
