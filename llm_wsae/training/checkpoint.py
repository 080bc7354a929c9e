"""A training on disk: the record of its folder, and its state, one safetensors file that is
replaced atomically and deleted in the end.

Where several processes hold latents, each writes its own rows into the one file: its format is a
header with every tensor's place, then their bytes. No process holds more than its part.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_wsae.artifact.artifact import Artifact, FileRecord
from llm_wsae.artifact.files import (
    digest_of_tensors,
    each_tensor,
    open_tensors,
    own_facts,
    refusals_to_write,
    save_own_tensors,
    tensor_header,
    write_atomic,
)
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import Processes
from llm_wsae.training.architecture import Architecture, Parameters
from llm_wsae.training.arm import Arm
from llm_wsae.training.strategy import Strategy

CHECKPOINT = "checkpoint.safetensors"
_DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32"}
_ALIGNED = 8  # bytes of the largest of them
_WHAT = "training checkpoint"
_WAY_OUT = "delete it to start that training again"


def training_in(folder: Path) -> Artifact:
    """The training in a folder."""
    return Artifact(folder, "training.json", "training")


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished training."""
    return training_in(folder).is_complete()


def recorded(folder: Path) -> dict[str, Any] | None:
    """The settings of the training in a folder, finished or not; None if there is none."""
    training = training_in(folder)
    return training.read().request if training.is_begun() else None


def check_same_rows(folder: Path, rows: dict[str, Any]) -> None:
    """Raise LlmWsaeError, before anything is measured, if the folder holds a training on other
    rows."""
    if (found := recorded(folder)) is not None:
        training_in(folder).check_request({"rows": found["rows"]}, {"rows": rows})


class Reached(NamedTuple):
    """How far a training has come."""

    step: int
    """Steps done."""
    numbers: dict[str, dict[str, float]]
    """The numbers last logged for each arm."""
    log: FileRecord | None = None
    """What the log held; None in processes that write none."""


def save_checkpoint(
    folder: Path, arms: Sequence[Arm], reached: Reached, strategy: Strategy
) -> None:
    """Replace the folder's checkpoint. Raises LlmWsaeError when it cannot be written.

    The file is the same however the training is distributed, so any number of processes can resume
    from it. Rank 0 writes it; where other processes hold latents, each writes its own part.
    """
    log = None if reached.log is None else asdict(reached.log)
    header = {**reached._asdict(), "log": log}
    tensors = {f"{arm.config.name}/{k}": v for arm in arms for k, v in arm.state().items()}
    if strategy.latent_parts > 1:
        own = {
            f"{arm.config.name}/{name}": Own(arm.own_latents.start, arm.d_sae)
            for arm in arms
            for name, value in arm.state().items()
            if _per_latent(name, value.shape)
        }
        save_together(folder / CHECKPOINT, tensors, own, header, strategy.processes)
    elif strategy.processes.leads:
        save_own_tensors(folder / CHECKPOINT, tensors, header)


def load_checkpoint(folder: Path, arms: Sequence[Arm], processes: Processes) -> Reached:
    """Restore the arms, or the latents that they hold, from the folder's checkpoint, if it has one.

    All processes call this together; rank 0 checks the bytes for all. Raises LlmWsaeError when the
    checkpoint is damaged.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return Reached(0, {})
    with open_tensors(path, _WHAT, _WAY_OUT) as file:
        header = processes.lead(lambda: own_facts(file, path, _WHAT, _WAY_OUT))
        if header is None:
            raise LlmWsaeError(f"{path} is damaged: it has no checksum; {_WAY_OUT}")
        for arm in arms:
            arm.load_state(_own_state(file, arm))
    log = None if header["log"] is None else FileRecord(**header["log"])
    return Reached(header["step"], header["numbers"], log)


def load_learnt(folder: Path, arm: Arm) -> tuple[Parameters, Architecture]:
    """What an arm learnt, with the latents of all processes, from the checkpoint that this run has
    just saved; without the optimiser's moments, since such dictionaries fill memory as it is."""
    config = arm.config
    architecture = config.kind(config.level, arm.d_sae)
    with open_tensors(folder / CHECKPOINT, _WHAT) as file:

        def read(name: str) -> Tensor:
            return file.get_tensor(f"{config.name}/{name}")

        architecture.load_state({name: read(name) for name in arm.architecture.state()})
        return Parameters(*map(read, Parameters._fields)), architecture


def _own_state(file: Any, arm: Arm) -> dict[str, Tensor]:
    own, found, prefix = arm.own_latents, {}, f"{arm.config.name}/"
    for key in file.keys():  # noqa: SIM118 - of a safetensors file
        name = key.removeprefix(prefix)
        if name == key:
            continue
        piece = file.get_slice(key)
        if len(own) < arm.d_sae and _per_latent(name, piece.get_shape()):
            found[name] = piece[own.start : own.stop]
        else:
            found[name] = file.get_tensor(key)
    return found


def _per_latent(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of an arm's state has one row for each latent."""
    return len(shape) > 0 and not name.startswith("decoder_bias")


class Own(NamedTuple):
    """Which rows of a tensor a process holds."""

    first: int
    """Number of the first one."""
    total: int
    """Number of rows over all processes."""


def save_together(
    path: Path,
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Own],
    facts: Mapping[str, Any],
    processes: Processes,
) -> None:
    """``save_own_tensors`` by all processes; rank 0 writes tensors that are not in ``own``, and its
    ``facts`` count. Raises LlmWsaeError, in all of them, if one cannot write."""
    header, starts = _layout(tensors, own, tensor_header(facts, "0" * 64))

    def write(partial: Path) -> None:
        if processes.leads:
            partial.write_bytes(header)
        common = Path(processes.lead(lambda: str(partial)))
        begin = processes.lead(lambda: len(header))  # of rank 0
        with open(common, "r+b") as file:
            for name, tensor in tensors.items():
                if name not in own and not processes.leads:
                    continue
                ready = tensor.detach().cpu().contiguous()
                before = own[name].first * ready[0].nbytes if name in own else 0
                file.seek(begin + starts[name] + before)
                file.write(ready.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        processes.meet()
        if processes.leads:
            with open_tensors(partial, _WHAT) as written:
                digest = digest_of_tensors(facts, each_tensor(written))
            with open(partial, "r+b") as file:
                file.write(_layout(tensors, own, tensor_header(facts, digest))[0])

    if processes.leads:
        write_atomic(path, write)
        return
    with refusals_to_write(path):
        write(path)


def _layout(
    tensors: Mapping[str, Tensor], own: Mapping[str, Own], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, and where each tensor begins after it."""
    entries, starts, at = {}, {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        tensor = tensors[name]
        shape = list(tensor.shape)
        if name in own:
            shape[0] = own[name].total
        end = at + math.prod(shape) * tensor.itemsize
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [at, end]}
        starts[name], at = at, end
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text, starts
