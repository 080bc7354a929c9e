"""circuit-tracer: the transcoders of a whole model, in one folder.

    config.yaml             model, hooks, and the files in the order of the blocks, from 0
    layer_{i}.safetensors   W_enc and W_dec [d_sae, d_model], b_enc, b_dec, W_skip if there is one,
                            and activation_function.threshold for JumpReLU

It computes ReLU and JumpReLU. So it opens what BatchTopK, JumpReLU and ReLU train here, exactly;
TopK transcoders choose among the latents of a row, which no threshold does.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from torch import Tensor

from llm_wsae.artifact.artifact import Artifact
from llm_wsae.artifact.files import save_tensors, write_text
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import read_tensors
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, TopK
from llm_wsae.errors import LlmWsaeError, UsageError, shown
from llm_wsae.model.site import HOOKS, Site
from llm_wsae.outside import mapping, reason, text

CONFIG = "config.yaml"
_THRESHOLD = "activation_function.threshold"
_TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_READS = {HOOKS["mlp_in"]}
_WRITES = {HOOKS["mlp_out"], "mlp.hook_out"}  # the same, but in blocks with a norm behind the MLP


def transcoder_set_in(folder: Path) -> Artifact:
    """The set of transcoders that was written into a folder."""
    return Artifact(folder, "transcoders.json", "set of transcoders")


def save_transcoder_set(dictionaries: Sequence[Dictionary], folder: Path | str) -> Path:
    """Write the transcoders of a model, one of each block from the first on, as circuit-tracer
    reads them (``load_transcoder_set``). Returns the path of its configuration.

    Raises UsageError if they are no transcoders, of several models, widths or of the same block, if
    one lacks, or for TopK; LlmWsaeError if the folder holds anything else or cannot be written.
    """
    folder = Path(folder)
    blocks = sorted(dictionaries, key=lambda one: one.site)
    _check_set(blocks)
    names = [f"layer_{number}.safetensors" for number in range(len(blocks))]
    asked = {"transcoders": [one.decoder_digest() for one in blocks]}
    written = transcoder_set_in(folder)
    record = written.begin(asked, CONFIG, *names)
    if record.complete:
        return folder / CONFIG
    for name, one in zip(names, blocks, strict=True):
        tensors: dict[str, Tensor] = dict(one.named_parameters())
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
        if "threshold" in tensors:
            tensors[_THRESHOLD] = tensors.pop("threshold").clamp(min=0)
        save_tensors(folder / name, tensors)
    model = text(blocks[0].info.model.get("name"))
    config = {
        "model_kind": "transcoder_set",
        "model_name": model,
        "scan": model,
        "feature_input_hook": HOOKS["mlp_in"],
        "feature_output_hook": HOOKS["mlp_out"],
        "transcoders": names,
    }
    write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    written.finish(record, [CONFIG, *names])
    return folder / CONFIG


def load_transcoder_set(folder: Path | str) -> list[Dictionary]:
    """Read a set of transcoders from a folder, block by block. Raises LlmWsaeError if something is
    missing, cannot be read, or reads or writes elsewhere in the model."""
    folder = Path(folder)
    path = folder / CONFIG
    try:
        config = mapping(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise LlmWsaeError(
            f"{path} cannot be read: {reason(error)}; name the folder of a set of transcoders"
        ) from error
    hooks = [config.get("feature_input_hook"), config.get("feature_output_hook")]
    if hooks[0] not in _READS or hooks[1] not in _WRITES:
        raise LlmWsaeError(
            f"{path} has transcoders from {shown(hooks[0])} to {shown(hooks[1])}; only those from "
            f"{HOOKS['mlp_in']} to {HOOKS['mlp_out']} can be read"
        )
    names = config.get("transcoders")
    if names is None:  # then they have the usual names
        names = [f"layer_{n}.safetensors" for n, _ in enumerate(folder.glob("layer_*.safetensors"))]
    if not isinstance(names, list) or not names:
        raise LlmWsaeError(f"{path} names no transcoders, and there are none beside it")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise LlmWsaeError(
                f"{path} names {shown(name)}; only files beside it can be read, so download the "
                "whole set into its folder and name the files there"
            )
    model = text(config.get("model_name"))
    return [_read(folder / name, block, model) for block, name in enumerate(names)]


def _check_set(blocks: Sequence[Dictionary]) -> None:
    for one in blocks:
        if not one.site.is_mlp:
            raise UsageError(f"{one.info.name} at {one.site} is no transcoder")
        if isinstance(one.sparsity, TopK):
            raise UsageError(
                f"{one.info.name} at {one.site} is a TopK transcoder, which circuit-tracer cannot "
                "compute; train with --architecture batch-topk, which ends with a threshold"
            )
    found, wanted = [one.site.block for one in blocks], list(range(len(blocks)))
    if found != wanted or not blocks:
        missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
        twice = sorted({block for block in found if found.count(block) > 1})
        what = f"there is none of block {missing[0]}" if missing else "there is none"
        what = f"there are several of block {twice[0]}" if twice else what
        raise UsageError(
            f"circuit-tracer reads one transcoder for every block, from block 0 on, but {what}"
        )
    for what in ("weights_sha256", "name"):
        models = dict.fromkeys(text(one.info.model.get(what)) for one in blocks)
        if len(models) > 1:
            raise UsageError(
                f"these transcoders are of several models: {' and '.join(map(shown, models))}"
            )
    if len(widths := {one.W_enc.shape for one in blocks}) > 1:
        sizes = " and ".join(f"{d_in} → {d_sae}" for d_in, d_sae in sorted(widths))
        raise UsageError(f"the transcoders of a set have one size, but these have {sizes}")
    if len({one.W_skip is None for one in blocks}) > 1:
        raise UsageError("either all transcoders of a set have a skip or none has")


def _read(path: Path, block: int, model: str | None) -> Dictionary:
    tensors = read_tensors(path)
    threshold = tensors.pop(_THRESHOLD, None)
    skip = tensors.pop("W_skip", None)
    if tensors.keys() != _TENSORS:
        raise LlmWsaeError(f"{path} holds {sorted(tensors)} instead of {sorted(_TENSORS)}")
    try:
        return Dictionary(
            W_enc=tensors["W_enc"].T,
            W_dec=tensors["W_dec"],
            b_enc=tensors["b_enc"],
            b_dec=tensors["b_dec"],
            threshold=threshold,
            W_skip=skip,
            sparsity=ReLU() if threshold is None else JumpReLU(),
            info=DictionaryInfo(
                str(Site(block, "mlp")),
                name=path.stem,
                model={} if model is None else {"name": model},
                training={"trained with": "circuit-tracer"},
            ),
        )
    except (UsageError, ValueError) as error:
        raise LlmWsaeError(f"the transcoder in {path} cannot be used: {error}") from error
