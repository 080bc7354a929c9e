"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, version 6 and the versions before it.

Before version 6, ``cfg.json`` was flat and some keys had other names, TopK was an activation
function of the ``standard`` architecture, and a ``scaling_factor`` could multiply the latents
before the decoder. A training checkpoint is read like a dictionary: BatchTopK's running threshold
becomes the threshold of every latent, as in SAELens' own export.

Normalisation row by row (layer_norm, constant_norm_rescale) is not an affine map, so it cannot be
folded and is refused. So is whitening, which SAELens folds itself when a training ends. One scale
for all rows (expected_average_only_in) is folded if the folder says how large it is, in a
checkpoint's ``activation_scaler.json``, and refused otherwise.
"""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from llm_wsae.artifact.files import read_json
from llm_wsae.dictionary.folder import CFG, WEIGHTS, check_shapes, read_tensors
from llm_wsae.dictionary.formats.layout import (
    Layout,
    Weights,
    folded,
    foreign_info,
    gated_as_jumprelu,
    site_of,
    sizes,
    sparsity_of,
    with_decoder_norms,
    without_input_bias,
)
from llm_wsae.dictionary.info import CENTRED, Facts
from llm_wsae.errors import LlmWsaeError, nearest, shown
from llm_wsae.outside import integer, mapping, number, text

OURS = "llm_wsae"
"""Key of the metadata under which this package's SAELens plugin writes rule and α."""
PREFIX = "wsae_"
"""Prefix of the plugin's architectures, which are SAELens' own except for the loss."""
_NAME, _SCALER = "SAELens", "activation_scaler.json"
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")
_BATCH = ("batchtopk", "matryoshka_batchtopk")
_KINDS = ("standard", "topk", "jumprelu", "gated", *_BATCH)
_SCALED = "expected_average_only_in"


def _announce(cfg: Mapping[str, Any], place: PurePath) -> Facts:
    about = mapping(cfg.get("metadata")) or cfg
    ours, bos = mapping(about.get(OURS)), about.get("prepend_bos")
    info = foreign_info(
        _NAME,
        place,
        site_of(text(about.get("hook_name")) or text(about.get("hook_point"))),
        model=text(about.get("model_name")),
        corpus=text(about.get("dataset_path")),
        centred=_centred_stream(cfg),
        context_size=integer(about.get("context_size")),
        prepend_bos=bos if isinstance(bos, bool) else None,
        rule=text(ours.get("rule")) or "uniform",
        alpha=number(ours.get("alpha")) or 0.0,
    )
    k = integer(cfg.get("k")) or integer(mapping(cfg.get("activation_fn_kwargs")).get("k"))
    d_in, d_sae = integer(cfg.get("d_in")), integer(cfg.get("d_sae"))
    return Facts(place.name, _architecture(cfg), d_in, d_sae, k, info)


def _read(folder: Path, cfg: Mapping[str, Any], said: Facts) -> Weights:
    """The tensors with centring (also of the stream), scaling, decoder norms and gates folded."""
    path, kind = folder / CFG, said.architecture
    if kind not in _KINDS:
        raise LlmWsaeError(
            f"{path}: this package does not read SAELens' architecture {shown(kind)}; "
            f"{nearest(str(kind), _KINDS)}"
        )
    d_in, d_sae = sizes(path, said)
    centred = _flag(path, cfg, "apply_b_dec_to_input", True)
    rescaled = _flag(path, cfg, "rescale_acts_by_decoder_norm", False)
    _check_activation(path, cfg)
    scale = _scale(folder, cfg)
    # k belongs to TopK's selection; in inference BatchTopK selects by a threshold.
    sparsity = sparsity_of(path, said, kind if kind in ("standard", "topk") else "jumprelu")
    w = _tensors(folder / WEIGHTS, kind, d_in, d_sae)
    W_enc, W_dec, b_dec = w["W_enc"] * scale, w["W_dec"] / scale, w["b_dec"] / scale
    threshold = w.get("threshold")
    if kind == "gated":
        W_enc, b_enc, threshold = gated_as_jumprelu(W_enc, w["r_mag"], w["b_gate"], w["b_mag"])
    else:
        b_enc = w["b_enc"]
    if kind in _BATCH:
        threshold = w["topk_threshold"].expand(d_sae) / (scale if rescaled else 1)
    if rescaled and kind in ("topk", *_BATCH):
        W_enc, b_enc, W_dec = with_decoder_norms(W_enc, b_enc, W_dec)
    if centred:
        b_enc = without_input_bias(W_enc, b_enc, b_dec)
    if said.info.model.get(CENTRED):  # (x − mean x)·W = x·(W − its mean over dimensions)
        W_enc = W_enc - W_enc.mean(0)
    factor = _factor(folder, cfg, w)
    if factor is not None:
        W_dec = W_dec * factor[:, None]
    return folded(W_enc, W_dec, b_enc, b_dec, threshold), sparsity


def _centred_stream(cfg: Mapping[str, Any]) -> bool:
    """Whether the stream was centred because the model's writing weights were. (TransformerLens'
    other processing of weights leaves the stream unchanged.)

    Configurations with ``hook_point`` do not say so, but SAELens then processed every model that
    allows it: GPT-2, and not those with RMSNorm. (For its own GPT-2 dictionaries it adds this to
    the configuration: SAELens' pull request 279.)
    """
    about = mapping(cfg.get("metadata")) or cfg
    loaded = about.get("model_from_pretrained_kwargs")
    if loaded is None and "hook_point" in cfg:
        return (text(cfg.get("model_name")) or "").startswith("gpt2")
    return mapping(loaded).get(CENTRED) is True


def _architecture(cfg: Mapping[str, Any]) -> str | None:
    found = text(cfg.get("architecture"))
    if found is None and "metadata" not in cfg:
        found = "standard"
    if found == "standard" and _activation(cfg) == "topk":
        found = "topk"
    return found.removeprefix(PREFIX) if found else None


def _activation(cfg: Mapping[str, Any]) -> Any:
    found = cfg.get("activation_fn", cfg.get("activation_fn_str"))
    return "relu" if found is None else found


def _flag(path: Path, cfg: Mapping[str, Any], name: str, default: bool) -> bool:
    value = cfg.get(name, default)
    if not isinstance(value, bool):
        raise LlmWsaeError(f"{path} has {name} = {shown(value)}, which should be true or false")
    return value


def _check_activation(path: Path, cfg: Mapping[str, Any]) -> None:
    found = _activation(cfg)
    if found not in ("relu", "topk"):
        raise LlmWsaeError(
            f"{path} has the activation function {shown(found)}, but only relu and topk can be read"
        )
    if found == "relu" and mapping(cfg.get("activation_fn_kwargs")).get("k") is not None:
        raise LlmWsaeError(f"{path} has a k for its activation function, but does not name topk")
    if cfg.get("reshape_activations", "none") != "none":
        raise LlmWsaeError(
            f"{path} has reshape_activations = {shown(cfg['reshape_activations'])}, which belongs "
            "to attention heads; only dictionaries of the residual stream can be read"
        )


def _scale(folder: Path, cfg: Mapping[str, Any]) -> float:
    """The factor of the rows before the encoder."""
    how = cfg.get("normalize_activations")
    path = folder / _SCALER
    scaler = mapping(read_json(path, "scale of the activations") if path.is_file() else {})
    if how in (None, False, "none"):
        if scaler.get("scaling_factor") is not None or scaler.get("has_whitening"):
            raise LlmWsaeError(
                f"{path} holds a scale of the activations, but {CFG} says that there is none"
            )
        return 1.0
    if how not in (True, _SCALED):
        raise LlmWsaeError(
            f"{folder / CFG} has normalize_activations = {shown(how)}, which this package cannot "
            "fold into the weights; SAELens folds what can be folded when a training ends"
        )
    scale = number(scaler.get("scaling_factor"))
    if scale is None or scale <= 0 or scaler.get("has_whitening"):
        raise LlmWsaeError(
            f"{folder / CFG} has normalize_activations = {_SCALED!r}, but the folder does not say "
            "by which factor; call fold_activation_norm_scaling_factor in SAELens and save it "
            "again"
        )
    return scale


def _tensors(path: Path, kind: str, d_in: int, d_sae: int) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    factors = [name for name in _FACTORS if name in tensors]
    vectors = {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        **dict.fromkeys((*vectors.get(kind, ("b_enc",)), *factors), (d_sae,)),
        **({"topk_threshold": ()} if kind in _BATCH else {}),
    }
    check_shapes(path, tensors, shapes)
    return {name: tensor.float() for name, tensor in tensors.items()}


def _factor(folder: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The factor of the latents before the decoder, if the configuration confirms it."""
    factor = next((tensors[name] for name in _FACTORS if name in tensors), None)
    wanted = bool(cfg.get("finetuning_scaling_factor"))
    if wanted and factor is None:
        raise LlmWsaeError(
            f"{folder / WEIGHTS} lacks the scaling factor of the latents that {CFG} mentions"
        )
    if factor is None or wanted or torch.equal(factor, torch.ones_like(factor)):
        return factor
    raise LlmWsaeError(
        f"{folder / WEIGHTS} holds a scaling factor of the latents that {CFG} does not mention"
    )


LAYOUT = Layout(_NAME, CFG, WEIGHTS, _announce, _read, optional=(_SCALER,))
