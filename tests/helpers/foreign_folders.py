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

# Each architecture: its own settings and tensors beside those of ``base``, and which latents are
# active.
THRESHOLD, SHARED, SCALE = draw(7, D_SAE), torch.tensor(0.7, dtype=torch.float64), 0.25
GATES = {
    "b_gate": draw(8, D_SAE),
    "b_mag": draw(9, D_SAE),
    "r_mag": draw(10, D_SAE, scale=0.5),
}


def gated(pre: Tensor) -> Tensor:
    opens = pre + GATES["b_gate"] > 0
    return opens * (pre * GATES["r_mag"].double().exp() + GATES["b_mag"]).relu()


KINDS: dict[str, tuple[dict[str, Any], dict[str, Tensor], Callable[[Tensor], Tensor]]] = {
    "standard": ({}, {}, torch.relu),
    "topk": ({"k": K, "rescale_acts_by_decoder_norm": False}, {}, topk),
    "jumprelu": ({}, {"threshold": THRESHOLD}, lambda pre: pre.relu() * (pre > THRESHOLD)),
    "gated": ({}, GATES, gated),
    "batchtopk": (
        {"k": 5.5, "rescale_acts_by_decoder_norm": True},
        {"topk_threshold": SHARED},
        lambda pre: pre * (pre > SHARED),
    ),
}


def saelens(folder: Path, kind: str, **changes: Any) -> Expected:
    """As version 6 writes it."""
    settings, own, active = KINDS[kind]
    tensors = base() | own
    if kind == "gated":
        del tensors["b_enc"]
    cfg = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": "tiny",
            "hook_name": SITE,
            "context_size": 64,
            "prepend_bos": True,
            "dataset_path": "words",
        },
        "architecture": kind,
        **settings,
        **changes,
    }
    return _saelens(folder, cfg, tensors, active)


def saelens_checkpoint(folder: Path) -> Expected:
    """BatchTopK in the middle of a training on rescaled activations."""
    write_json(folder / "activation_scaler.json", {"scaling_factor": SCALE})
    return saelens(folder, "batchtopk", normalize_activations="expected_average_only_in")


def saelens_old(
    folder: Path,
    factor: Tensor | None = None,
    active: Callable[[Tensor], Tensor] = torch.relu,
    **changes: Any,
) -> Expected:
    """As version 3 wrote it: everything side by side, perhaps without an architecture."""
    cfg = {
        "model_name": "tiny",
        "hook_point": SITE,
        "dataset_path": "words",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "context_size": 64,
        "dtype": "torch.float32",
        **changes,
    }
    own = {} if factor is None else {"scaling_factor": factor}
    return _saelens(folder, cfg, base() | own, active)


def saelens_old_topk(folder: Path) -> Expected:
    return saelens_old(
        folder,
        torch.ones(D_SAE),
        topk,
        architecture="standard",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        apply_b_dec_to_input=False,
        normalize_activations=False,
        finetuning_scaling_factor=False,
    )


def saelens_old_finetuned(folder: Path) -> Expected:
    factor = draw(11, D_SAE).abs() + 0.5
    return saelens_old(folder, factor, architecture="standard", finetuning_scaling_factor=True)


def _saelens(
    folder: Path,
    cfg: dict[str, Any],
    tensors: dict[str, Tensor],
    active: Callable[[Tensor], Tensor],
) -> Expected:
    """Write it, and compute: scale, centre, encode, ``active``, decode, scale back."""
    write_json(folder / "cfg.json", cfg)
    save_file(tensors, folder / "sae_weights.safetensors")
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x, scaled = rows(), cfg.get("normalize_activations") == "expected_average_only_in"
    scale = SCALE if scaled else 1
    centre = w["b_dec"] if cfg.get("apply_b_dec_to_input", True) else 0
    pre = (x.double() * scale - centre) @ w["W_enc"] + w.get("b_enc", 0)
    rescale, norms = cfg.get("rescale_acts_by_decoder_norm", False), w["W_dec"].norm(dim=1)
    latents = active(pre * norms if rescale else pre)
    written = latents / norms if rescale else latents
    if cfg.get("finetuning_scaling_factor"):
        written = written * w["scaling_factor"]
    # Folding the scale leaves decoder rows of norm/scale, and with them latents in those units.
    units = scale if rescale else 1.0
    return Expected(x, latents / units, (written @ w["W_dec"] + w["b_dec"]) / scale)


# sparsify


def sparsify(folder: Path, **changes: Any) -> Expected:
    """``folder`` should have the name of a module."""
    w = base()
    cfg = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": K,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_IN,
        **changes,
    }
    write_json(folder / "cfg.json", cfg)
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


def learning(folder: Path, dict_class: str, **changes: Any) -> Expected:
    """One of its classes."""
    trainer = {
        "dict_class": dict_class,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "k": K,
        "layer": 3,
        "lm_name": "owner/tiny",
        "submodule_name": "resid_post_layer_3",
        **changes,
    }
    buffer = {"d_submodule": D_IN, "io": "out", "ctx_len": 64}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": buffer})
    w, x = base(), rows()
    d = {name: tensor.double() for name, tensor in w.items()}
    matrices = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
    }
    linear = {**matrices, "encoder.bias": w["b_enc"]}
    one = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.6)}
    gates = {"r_mag": GATES["r_mag"], "gate_bias": GATES["b_gate"], "mag_bias": GATES["b_mag"]}
    plain = x.double() @ d["W_enc"] + d["b_enc"]
    centred = (x.double() - d["b_dec"]) @ d["W_enc"]
    pre = centred + d["b_enc"]
    tensors, latents = {
        "AutoEncoder": (linear | {"bias": w["b_dec"]}, pre.relu()),
        "AutoEncoderNew": (linear | {"decoder.bias": w["b_dec"]}, plain.relu()),
        "AutoEncoderTopK": (one | linear | {"b_dec": w["b_dec"]}, topk(pre)),
        "BatchTopKSAE": (one | linear | {"b_dec": w["b_dec"]}, pre * (pre > 0.6)),
        "MatryoshkaBatchTopKSAE": (
            w | one | {"group_sizes": torch.tensor([10, 38])},
            pre * (pre > 0.6),
        ),
        "JumpReluAutoEncoder": (
            w | {"threshold": THRESHOLD},
            plain.relu() * (plain > THRESHOLD),
        ),
        "GatedAutoEncoder": (matrices | gates | {"decoder_bias": w["b_dec"]}, gated(centred)),
    }[dict_class]
    torch.save(tensors, folder / "ae.pt")
    reconstruction = latents @ d["W_dec"] + d["b_dec"]
    if dict_class == "AutoEncoder":  # it is loaded with decoder columns of unit norm
        latents = latents * d["W_dec"].norm(dim=1)
    return Expected(x, latents, reconstruction)


CLASSES = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
           "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")  # fmt: skip
WRITERS: dict[str, Callable[[Path], Expected]] = {
    **{
        f"saelens-{kind}": lambda f, kind=kind: saelens(f, kind)
        for kind in ("standard", "topk", "jumprelu", "gated")
    },
    **{
        f"saelens-{kind}-uncentred": lambda f, kind=kind: saelens(
            f, kind, apply_b_dec_to_input=False
        )
        for kind in ("standard", "jumprelu", "gated")
    },
    "saelens-topk-rescaled": lambda f: saelens(f, "topk", rescale_acts_by_decoder_norm=True),
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
