"""The state of a training on disk: one safetensors file, replaced atomically.

It records the settings it belongs to, so that a run with others is told what differs instead of
resuming from a state that is not its own.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import open_tensors, save_tensors
from llm_wsae.training.arm import Arm
from llm_wsae.training.parallel.group import ProcessGroup
from llm_wsae.training.parallel.sharded_checkpoint import Rows, save_rows

CHECKPOINT = "checkpoint.safetensors"


class Reached(NamedTuple):
    """How far a training has come."""

    step: int
    """Steps done."""
    numbers: dict[str, dict[str, float]]
    """The numbers last logged for each arm."""


def save_checkpoint(
    folder: Path,
    arms: Sequence[Arm],
    reached: Reached,
    identity: dict[str, Any],
    group: ProcessGroup,
) -> None:
    """Replace the folder's checkpoint. Raises LlmWsaeError when it cannot be written.

    The file is the same however the training is distributed, so any number of processes can resume
    from it. Rank 0 writes it; where other processes hold latents, each writes its own part.
    """
    header = {**reached._asdict(), "identity": identity}
    metadata = {"llm_wsae": json.dumps(header)}
    parts: dict[str, Tensor | Rows] = {}
    for arm in arms:
        for name, value in arm.state().items():
            part: Tensor | Rows = value
            if group.strategy.latent_parts > 1 and _per_latent(name, value.shape):
                part = Rows(value, arm.own_latents.start, arm.d_sae)
            parts[f"{arm.config.name}/{name}"] = part
    if group.strategy.latent_parts > 1:
        save_rows(folder / CHECKPOINT, parts, metadata, group.processes)
    elif group.processes.leads:
        save_tensors(folder / CHECKPOINT, parts, metadata)


def load_checkpoint(folder: Path, arms: Sequence[Arm], identity: dict[str, Any]) -> Reached:
    """Restore the arms, or the latents that they hold, from the folder's checkpoint, if it has one.

    Raises LlmWsaeError when the checkpoint belongs to other settings or is damaged.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return Reached(0, {})
    with open_tensors(path, "training checkpoint") as file:
        try:
            header = json.loads((file.metadata() or {})["llm_wsae"])
            check_identity(folder, header["identity"], identity)
            for arm in arms:
                arm.load_state(_own_state(file, arm))
            return Reached(int(header["step"]), header.get("numbers", {}))
        except (KeyError, ValueError, RuntimeError) as error:
            raise LlmWsaeError(
                f"{path} is not a checkpoint of this version ({error}); delete it to start over"
            ) from error


def _own_state(file: Any, arm: Arm) -> dict[str, Tensor]:
    prefix, own, found = f"{arm.config.name}/", arm.own_latents, {}
    for name in file.keys():  # noqa: SIM118 - not a dict
        if name.startswith(prefix):
            short = name.removeprefix(prefix)
            piece = file.get_slice(name)
            if len(own) < arm.d_sae and _per_latent(short, piece.get_shape()):
                found[short] = piece[own.start : own.stop]
            else:
                found[short] = file.get_tensor(name)
    return found


def _per_latent(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of an arm's state has one row for each latent."""
    return len(shape) > 0 and not name.startswith("decoder_bias")


def check_identity(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise LlmWsaeError, naming each difference, unless both settings are the same."""
    if clauses := differences(found, wanted):
        raise LlmWsaeError(
            f"{folder} holds a training with other settings ({clauses}); "
            "choose another folder, or delete that one"
        )


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How two settings differ, in words; empty if they are the same."""
    wanted = json.loads(json.dumps(wanted))  # as it looks after a round trip
    return "; ".join(_differences(found, wanted))


def _differences(found: dict[str, Any], wanted: dict[str, Any], under: str = "") -> Iterator[str]:
    for name in sorted(found.keys() | wanted.keys()):
        there, asked = found.get(name), wanted.get(name)
        if there == asked:
            continue
        if isinstance(there, dict) and isinstance(asked, dict):
            yield from _differences(there, asked, f"{under}{name} ")
        elif isinstance(there, dict):
            yield f"{under}{name} is there, but not asked for"
        elif isinstance(asked, dict):
            yield f"{under}{name} is asked for, but not there"
        else:
            yield f"{under}{name}: {_short(there)} there, {_short(asked)} asked for"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
