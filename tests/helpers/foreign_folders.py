"""Dictionaries laid into files as other tools do, with what those tools would compute from them.

Written from the published layouts; that the tools really do so is what tests/interop is for. The
expected latents and reconstructions are computed here in float64, step by step as each tool
describes itself, never by folding anything.
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
ROWS = 50


class Expected(NamedTuple):
    """What the tool makes of some rows, float64."""

    x: Tensor
    latents: Tensor
    reconstruction: Tensor


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def rows() -> Tensor:
    """Rows with a mean far from 0, as the residual stream has."""
    return draw(99, ROWS, D_IN) + draw(98, D_IN, scale=3)


def base(seed: int = 0) -> dict[str, Tensor]:
    """Tensors under SAELens' names; decoder rows of any norm."""
    return {
        "W_enc": draw(seed + 1, D_IN, D_SAE, scale=0.4),
        "W_dec": draw(seed + 2, D_SAE, D_IN, scale=0.5),
        "b_enc": draw(seed + 3, D_SAE, scale=0.3),
        "b_dec": draw(seed + 4, D_IN, scale=2),
    }


def topk(pre: Tensor, k: int = K) -> Tensor:
    """The k largest positive entries of each row, the rest 0."""
    best = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# SAELens


def saelens_cfg(architecture: str, **changes: Any) -> dict[str, Any]:
    """``cfg.json`` as version 6 writes it."""
    return {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "sae_lens_training_version": "6.54.12",
            "model_name": "tiny",
            "hook_name": SITE,
            "hook_head_index": None,
            "context_size": 64,
            "prepend_bos": True,
            "dataset_path": "words",
        },
        "architecture": architecture,
        **changes,
    }


def old_cfg(**changes: Any) -> dict[str, Any]:
    """``cfg.json`` as version 3 wrote it: no architecture, everything side by side."""
    return {
        "model_name": "tiny",
        "hook_point": SITE,
        "hook_point_layer": 3,
        "hook_point_head_index": None,
        "dataset_path": "words",
        "use_cached_activations": False,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "context_size": 64,
        "expansion_factor": 3,
        "dtype": "torch.float32",
        "device": "cpu",
        **changes,
    }


def _saelens(
    folder: Path,
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    active: Callable[[Tensor], Tensor],
    scale: float = 1.0,
) -> Expected:
    """Write it, and compute: scale, centre, encode, ``active``, decode, scale back."""
    write_json(folder / "cfg.json", cfg)
    save_file(tensors, folder / "sae_weights.safetensors")
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = rows()
    centre = w["b_dec"] if cfg.get("apply_b_dec_to_input", True) else 0
    pre = (x.double() * scale - centre) @ w["W_enc"]
    if "b_enc" in w:
        pre = pre + w["b_enc"]
    norms = w["W_dec"].norm(dim=1)
    rescale = cfg.get("rescale_acts_by_decoder_norm", False)
    latents = active(pre * norms if rescale else pre)
    written = latents / norms if rescale else latents
    if cfg.get("finetuning_scaling_factor"):
        written = written * w["scaling_factor"]
    # Folding the scale leaves decoder rows of norm/scale, and with them latents in those units.
    units = scale if rescale else 1.0
    return Expected(x, latents / units, (written @ w["W_dec"] + w["b_dec"]) / scale)


def saelens_standard(folder: Path, **changes: Any) -> Expected:
    return _saelens(folder, saelens_cfg("standard", **changes), base(), torch.relu)


def saelens_topk(folder: Path, **changes: Any) -> Expected:
    cfg = saelens_cfg("topk", k=K, rescale_acts_by_decoder_norm=False) | changes
    return _saelens(folder, cfg, base(), topk)


def saelens_jumprelu(folder: Path, **changes: Any) -> Expected:
    threshold = draw(7, D_SAE)
    return _saelens(
        folder,
        saelens_cfg("jumprelu", **changes),
        base() | {"threshold": threshold},
        lambda pre: pre.relu() * (pre > threshold),
    )


def saelens_gated(folder: Path, **changes: Any) -> Expected:
    tensors = base()
    del tensors["b_enc"]
    tensors |= {
        "b_gate": draw(8, D_SAE),
        "b_mag": draw(9, D_SAE),
        "r_mag": draw(10, D_SAE, scale=0.5),
    }

    def active(pre: Tensor) -> Tensor:
        gate = pre + tensors["b_gate"] > 0
        return gate * (pre * tensors["r_mag"].double().exp() + tensors["b_mag"]).relu()

    return _saelens(folder, saelens_cfg("gated", **changes), tensors, active)


def saelens_checkpoint(folder: Path) -> Expected:
    """BatchTopK in the middle of a training on rescaled activations."""
    scale, threshold = 0.25, torch.tensor(0.7, dtype=torch.float64)
    cfg = saelens_cfg(
        "batchtopk",
        k=5.5,
        rescale_acts_by_decoder_norm=True,
        normalize_activations="expected_average_only_in",
        aux_loss_coefficient=1.0,
    )
    write_json(folder / "activation_scaler.json", {"scaling_factor": scale})
    return _saelens(
        folder,
        cfg,
        base() | {"topk_threshold": threshold},
        lambda pre: pre * (pre > threshold),
        scale,
    )


def saelens_old(folder: Path, **changes: Any) -> Expected:
    return _saelens(folder, old_cfg(**changes), base(), torch.relu)


def saelens_old_topk(folder: Path) -> Expected:
    cfg = old_cfg(
        architecture="standard",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        apply_b_dec_to_input=False,
        normalize_activations=False,
        finetuning_scaling_factor=False,
    )
    return _saelens(folder, cfg, base() | {"scaling_factor": torch.ones(D_SAE)}, topk)


def saelens_old_finetuned(folder: Path) -> Expected:
    factor = draw(11, D_SAE).abs() + 0.5
    cfg = old_cfg(architecture="standard", finetuning_scaling_factor=True)
    return _saelens(folder, cfg, base() | {"scaling_factor": factor}, torch.relu)


# sparsify


def sparsify(folder: Path, **changes: Any) -> Expected:
    """``folder`` should have the name of a module."""
    w = base()
    write_json(
        folder / "cfg.json",
        {
            "activation": "topk",
            "expansion_factor": 32,
            "normalize_decoder": True,
            "num_latents": D_SAE,
            "k": K,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": D_IN,
            **changes,
        },
    )
    tensors = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    save_file(tensors, folder / "sae.safetensors")
    x, w = rows(), {name: tensor.double() for name, tensor in w.items()}
    latents = topk((x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    return Expected(x, latents, latents @ w["W_dec"] + w["b_dec"])


# dictionary_learning


def learning_config(dict_class: str, **changes: Any) -> dict[str, Any]:
    trainer = {
        "trainer_class": "Trainer",
        "dict_class": dict_class,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "k": K,
        "layer": 3,
        "lm_name": "owner/tiny",
        "submodule_name": "resid_post_layer_3",
        **changes,
    }
    return {"trainer": trainer, "buffer": {"d_submodule": D_IN, "io": "out", "ctx_len": 64}}


def learning(folder: Path, dict_class: str, **changes: Any) -> Expected:
    """One of its classes."""
    w = base()
    linear = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
    }
    one = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.6)}
    threshold = draw(7, D_SAE)
    r_mag, b_gate, b_mag = draw(10, D_SAE, scale=0.5), draw(8, D_SAE), draw(9, D_SAE)
    x, d = rows(), {name: tensor.double() for name, tensor in w.items()}
    product, centred = x.double() @ d["W_enc"], (x.double() - d["b_dec"]) @ d["W_enc"]
    pre, norms = centred + d["b_enc"], d["W_dec"].norm(dim=1)
    tensors, latents = {
        "AutoEncoder": (linear | {"bias": w["b_dec"]}, pre.relu()),
        "AutoEncoderNew": (linear | {"decoder.bias": w["b_dec"]}, (product + d["b_enc"]).relu()),
        "AutoEncoderTopK": (one | linear | {"b_dec": w["b_dec"]}, topk(pre)),
        "BatchTopKSAE": (one | linear | {"b_dec": w["b_dec"]}, pre * (pre > 0.6)),
        "MatryoshkaBatchTopKSAE": (
            w | one | {"group_sizes": torch.tensor([10, 38])},
            pre * (pre > 0.6),
        ),
        "JumpReluAutoEncoder": (
            w | {"threshold": threshold},
            (product + d["b_enc"]).relu() * (product + d["b_enc"] > threshold),
        ),
        "GatedAutoEncoder": (
            {
                "decoder_bias": w["b_dec"],
                "r_mag": r_mag,
                "gate_bias": b_gate,
                "mag_bias": b_mag,
                "encoder.weight": linear["encoder.weight"],
                "decoder.weight": linear["decoder.weight"],
            },
            (centred + b_gate > 0) * (centred * r_mag.double().exp() + b_mag).relu(),
        ),
    }[dict_class]
    write_json(folder / "config.json", learning_config(dict_class, **changes))
    torch.save(tensors, folder / "ae.pt")
    reconstruction = latents @ d["W_dec"] + d["b_dec"]
    if dict_class == "AutoEncoder":  # it is loaded with decoder columns of unit norm
        latents = latents * norms
    return Expected(x, latents, reconstruction)


CLASSES = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
           "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")  # fmt: skip
WRITERS: dict[str, Callable[[Path], Expected]] = {
    "saelens-standard": saelens_standard,
    "saelens-standard-uncentred": lambda f: saelens_standard(f, apply_b_dec_to_input=False),
    "saelens-topk": saelens_topk,
    "saelens-topk-rescaled": lambda f: saelens_topk(f, rescale_acts_by_decoder_norm=True),
    "saelens-jumprelu": saelens_jumprelu,
    "saelens-jumprelu-uncentred": lambda f: saelens_jumprelu(f, apply_b_dec_to_input=False),
    "saelens-gated": saelens_gated,
    "saelens-gated-uncentred": lambda f: saelens_gated(f, apply_b_dec_to_input=False),
    "saelens-checkpoint": saelens_checkpoint,
    "saelens-old": saelens_old,
    "saelens-old-topk": saelens_old_topk,
    "saelens-old-finetuned": saelens_old_finetuned,
    "sparsify": sparsify,
    "sparsify-by-expansion": lambda f: sparsify(f, num_latents=0, expansion_factor=D_SAE // D_IN),
    **{f"learning-{name}": lambda f, name=name: learning(f, name) for name in CLASSES},
}


def place(tmp_path: Path, layout: str) -> Path:
    """A folder with the name that the layout's own tool would give it."""
    return tmp_path / ("layers.3" if layout.startswith("sparsify") else layout)
