"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, version 6 and the versions before it.

Before version 6, ``cfg.json`` was flat and some keys had other names, TopK was an activation
function of the ``standard`` architecture, and a ``scaling_factor`` could multiply the latents
before the decoder. A training checkpoint is read like a dictionary: BatchTopK's running threshold
becomes the threshold of every latent, as in SAELens' own export.

Normalisation row by row (layer_norm, constant_norm_rescale) is no affine map and refused; so is
whitening, which SAELens folds itself when a training ends. One scale for all rows
(expected_average_only_in) is folded if a checkpoint's ``activation_scaler.json`` says how large.
"""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from llm_wsae.artifact.files import read_json
from llm_wsae.dictionary.folder import CFG, WEIGHTS, read_tensors
from llm_wsae.dictionary.formats.folding import fold, named, named_only, site_of, transcoded
from llm_wsae.dictionary.info import CENTRED, Facts
from llm_wsae.errors import LlmWsaeError, nearest, shown
from llm_wsae.outside import integer, mapping, number, text

OURS = "llm_wsae"  # key of the metadata under which this package's SAELens plugin writes rule and α
PREFIX = "wsae_"  # of the plugin's architectures, which are SAELens' own except for the loss
SCALER = "activation_scaler.json"
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")
_MATRICES = ("W_enc", "W_dec", "b_dec")
# The tensors of each architecture.
_KINDS = {
    "standard": (*_MATRICES, "b_enc"),
    "topk": (*_MATRICES, "b_enc"),
    "jumprelu": (*_MATRICES, "b_enc", "threshold"),
    "gated": (*_MATRICES, "b_gate", "b_mag", "r_mag"),
    "batchtopk": (*_MATRICES, "b_enc", "topk_threshold"),
    "matryoshka_batchtopk": (*_MATRICES, "b_enc", "topk_threshold"),
    "transcoder": (*_MATRICES, "b_enc"),
    "skip_transcoder": (*_MATRICES, "b_enc", "W_skip"),
    "jumprelu_transcoder": (*_MATRICES, "b_enc", "threshold"),
    "jumprelu_skip_transcoder": (*_MATRICES, "b_enc", "threshold", "W_skip"),
}


def announce(cfg: Mapping[str, Any], place: PurePath) -> Facts:
    """What ``cfg.json`` says."""
    about = mapping(cfg.get("metadata")) or cfg
    ours, bos = mapping(about.get(OURS)), about.get("prepend_bos")
    k = integer(cfg.get("k")) or mapping(cfg.get("activation_fn_kwargs")).get("k")
    return Facts.foreign(
        "SAELens",
        place,
        _site(cfg, about),
        _architecture(cfg),
        (cfg.get("d_in"), cfg.get("d_sae"), k),
        model=named_only(text(about.get("model_name"))) | _centred_stream(cfg),
        corpus=named_only(text(about.get("dataset_path"))),
        context_size=integer(about.get("context_size")),
        prepend_bos=bos if isinstance(bos, bool) else None,
        rule=text(ours.get("rule")) or "uniform",
        alpha=number(ours.get("alpha")) or 0.0,
    )


def read(folder: Path, cfg: Mapping[str, Any], said: Facts) -> dict[str, Tensor]:
    """The tensors of ``sae_weights.safetensors``, folded as ``cfg.json`` says they are used."""
    path, weights, kind = folder / CFG, folder / WEIGHTS, str(said.architecture)
    if kind not in _KINDS:
        raise LlmWsaeError(
            f"{path}: this package does not read SAELens' architecture {shown(kind)}; "
            f"{nearest(kind, _KINDS)}"
        )
    subtracts_bias = _flag(path, cfg, "apply_b_dec_to_input", not _is_transcoder(kind))
    by_norm = _flag(path, cfg, "rescale_acts_by_decoder_norm", False)
    _check_activation(path, cfg)
    scale = _scale(folder, cfg)
    tensors = read_tensors(weights)
    factors = [name for name in _FACTORS if name in tensors]
    w = named(weights, tensors, {name: name for name in (*_KINDS[kind], *factors)}, said)
    if (one := w.pop("topk_threshold", None)) is not None:  # in inference, of every latent
        w["threshold"] = one.expand(said.d_sae or 0) / (scale if by_norm else 1)
    return fold(
        w,
        subtracts_bias=subtracts_bias,
        scale=scale,
        selects_by_norm=by_norm and "topk" in kind,
        centred=CENTRED in said.info.model,
        factor=_factor(weights, cfg, w[factors[0]] if factors else None),
    )


def _site(cfg: Mapping[str, Any], about: Mapping[str, Any]) -> str | None:
    reads = text(about.get("hook_name")) or text(about.get("hook_point"))
    if _is_transcoder(_architecture(cfg)):
        return transcoded(reads, text(about.get("hook_name_out")))
    return site_of(reads)


def _is_transcoder(architecture: str | None) -> bool:
    return (architecture or "").endswith("transcoder")


def _centred_stream(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the stream was centred because the model's writing weights were."""
    about = mapping(cfg.get("metadata")) or cfg
    loaded = about.get("model_from_pretrained_kwargs")
    centred = mapping(loaded).get(CENTRED) is True
    # Such old ones do not say so, but SAELens then centred every model without RMSNorm (its #279).
    if loaded is None and "hook_point" in cfg:
        centred = (text(cfg.get("model_name")) or "").startswith("gpt2")
    return {CENTRED: True} if centred else {}


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
    found, settings = _activation(cfg), mapping(cfg.get("activation_fn_kwargs"))
    if found != "topk" and (found != "relu" or settings.get("k") is not None):
        raise LlmWsaeError(
            f"{path} has the activation function {shown(found)} with the settings "
            f"{shown(settings)}, but only relu without any and topk with a k can be read"
        )


def _scale(folder: Path, cfg: Mapping[str, Any]) -> float:
    """The factor of the rows before the encoder."""
    how, path = cfg.get("normalize_activations"), folder / SCALER
    scaler = mapping(read_json(path, "scale of the activations") if path.is_file() else {})
    found, whitened = scaler.get("scaling_factor"), scaler.get("has_whitening")
    if how in (None, False, "none") and found is None and not whitened:
        return 1.0
    scale = number(found)
    if how in (True, "expected_average_only_in") and scale and scale > 0 and not whitened:
        return scale
    raise LlmWsaeError(
        f"{folder / CFG} has normalize_activations = {shown(how)}, which this package cannot fold "
        f"into the weights, even with what {SCALER} holds; call "
        "fold_activation_norm_scaling_factor in SAELens, if it is one scale for all rows, and save "
        "it again"
    )


def _factor(path: Path, cfg: Mapping[str, Any], factor: Tensor | None) -> Tensor | None:
    """The factor of the latents before the decoder, if the configuration confirms it."""
    wanted = bool(cfg.get("finetuning_scaling_factor"))
    if factor is None and not wanted:
        return None
    if factor is not None and (wanted or torch.equal(factor, torch.ones_like(factor))):
        return factor
    raise LlmWsaeError(f"{path} and {CFG} beside it disagree about a scaling factor of the latents")
