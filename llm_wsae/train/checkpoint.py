"""The state of a training on disk: one safetensors file, replaced whole.

It records which settings it belongs to, so that a run with others is told what differs instead of
going on from a state that is not its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import load_tensors, save_tensors
from llm_wsae.train.arm import Arm

CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(folder: Path, arms: list[Arm], step: int, identity: dict[str, Any]) -> None:
    """Replace the folder's checkpoint. Raises LlmWsaeError when it cannot be written."""
    tensors: dict[str, Tensor] = {}
    for arm in arms:
        tensors |= {f"{arm.config.name}/{name}": value for name, value in arm.state().items()}
    header = {"step": step, "identity": identity}
    save_tensors(folder / CHECKPOINT, tensors, {"llm_wsae": json.dumps(header)})


def load_checkpoint(folder: Path, arms: list[Arm], identity: dict[str, Any]) -> int:
    """Restore the arms from the folder's checkpoint; the number of steps done, 0 without one.

    Raises LlmWsaeError when the checkpoint belongs to other settings or is damaged.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    tensors, metadata = load_tensors(path, "training checkpoint")
    try:
        header = json.loads(metadata["llm_wsae"])
        check_identity(folder, header["identity"], identity)
        for arm in arms:
            prefix = f"{arm.config.name}/"
            arm.load_state(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        return int(header["step"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise LlmWsaeError(
            f"{path} is not a checkpoint of this version ({error}); delete it to start afresh"
        ) from error


def check_identity(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise LlmWsaeError, naming each difference, unless both settings are the same."""
    wanted = json.loads(json.dumps(wanted))  # as it looks after a round trip
    different = list(_differences(found, wanted))
    if different:
        raise LlmWsaeError(
            f"{folder} holds a training with other settings ({'; '.join(different)}); "
            "choose another folder, or delete that one"
        )


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
