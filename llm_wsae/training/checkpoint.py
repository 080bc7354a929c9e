"""A training on disk: the record of its folder; its state, one safetensors file that is replaced
atomically and deleted in the end; its log, one JSON object per line, also for trackers."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llm_wsae.artifact.artifact import Artifact, FileRecord
from llm_wsae.artifact.files import (
    open_tensors,
    own_facts,
    refusals_to_write,
    save_own_tensors,
    write_atomic,
)
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import Processes
from llm_wsae.outside import reason
from llm_wsae.training.arm import Arm
from llm_wsae.training.strategy import Strategy

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
_WHAT = "training checkpoint"
_WAY_OUT = "delete it to start that training again"
_Numbers = dict[str, float]


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

    step: int  # steps done
    numbers: dict[str, _Numbers]  # those last logged for each arm
    log: FileRecord | None = None  # what the log held; None in processes that write none


def save_checkpoint(
    folder: Path, arms: Sequence[Arm], reached: Reached, strategy: Strategy
) -> None:
    """Replace the folder's checkpoint; rank 0 does it. Raises LlmWsaeError when that is impossible.

    It is the same however the training is distributed, so any number of processes can resume from
    it; where they share the latents, rank 0 holds the state of all in its memory.
    """
    tensors = {}
    for arm in arms:
        for name, tensor in arm.state().items():
            if strategy.shares_latents and _is_per_latent(name, tensor.shape):
                tensor = strategy.all_latents(tensor.cpu())
            if strategy.processes.leads:
                tensors[f"{arm.config.name}/{name}"] = tensor
    if strategy.processes.leads:
        log = None if reached.log is None else asdict(reached.log)
        save_own_tensors(folder / CHECKPOINT, tensors, {**reached._asdict(), "log": log})


def load_checkpoint(folder: Path, arms: Sequence[Arm], processes: Processes) -> Reached:
    """Restore the arms, or the latents that they hold, from the folder's checkpoint, if it has one.
    All processes call this together; rank 0 checks the bytes for all. Raises LlmWsaeError when they
    are damaged."""
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


def _own_state(file: Any, arm: Arm) -> dict[str, Tensor]:
    own, found, prefix = arm.own_latents, {}, f"{arm.config.name}/"
    for key in file.keys():  # noqa: SIM118 - of a safetensors file
        name = key.removeprefix(prefix)
        if name != key:
            piece = file.get_slice(key)
            is_part = len(own) < arm.d_sae and _is_per_latent(name, piece.get_shape())
            found[name] = piece[own.start : own.stop] if is_part else file.get_tensor(key)
    return found


def _is_per_latent(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of an arm's state has one row for each latent."""
    return len(shape) > 0 and not name.startswith(("decoder_bias", "skip"))


def check_beginning(path: Path, written: FileRecord) -> bytes:
    """The beginning of a log, which a checkpoint belongs to. Raises LlmWsaeError if it is not what
    was written."""
    kept = path.read_bytes()[: written.bytes]
    if (len(kept), hashlib.sha256(kept).hexdigest()) != (written.bytes, written.sha256):
        raise LlmWsaeError(
            f"{path} is damaged: its checksum does not match; delete it to resume without it"
        )
    return kept


class TrainingLog:
    """Appends to the folder's ``log.jsonl``, after removing the lines that a lost run wrote beyond
    ``step``, where the log was ``written`` (None at the beginning). Raises LlmWsaeError if that
    changed since, or when the tracker is not installed or does not start."""

    def __init__(
        self, folder: Path, step: int, tracker: str = "none", written: FileRecord | None = None
    ):
        self._path, kept = folder / LOG, b""
        if written is not None and self._path.exists():
            kept = check_beginning(self._path, written)
        write_atomic(self._path, lambda partial: partial.write_bytes(kept))
        self._send, self.close = _tracker(tracker, folder, step + 1)

    def synced(self) -> FileRecord:
        """What this log holds, once it is on the disk."""
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
        return FileRecord.of(self._path)

    def write(self, step: int, rows: int, arms: dict[str, _Numbers], **speed: float) -> None:
        """One line: the step, the rows seen, each arm's numbers, the speed."""
        record = {"step": step, "rows": rows, **speed, "arms": arms}
        with refusals_to_write(self._path), open(self._path, "a") as file:
            file.write(f"{json.dumps(record)}\n")
        self._send(step, {f"{arm}/{k}": v for arm, ks in arms.items() for k, v in ks.items()})


def _tracker(
    name: str, folder: Path, first: int
) -> tuple[Callable[[int, _Numbers], Any], Callable[[], Any]]:
    """Functions that send a step's numbers, from step ``first`` on, and that end the sending."""
    if name == "none":
        return (lambda step, numbers: None), (lambda: None)
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder), purge_step=first)  # hides those of a lost run

            def write(step: int, numbers: _Numbers) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

            return write, writer.close
        import wandb

        # One folder is one run, also when it is resumed, and beside those of other sites.
        number = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        named: Any = dict(project="llm-wsae", name=folder.name, dir=str(folder), id=number)
        run = wandb.init(**named, resume="allow", reinit="create_new")
        return (lambda step, numbers: run.log(numbers, step=step)), run.finish
    except ImportError:
        raise LlmWsaeError(
            f"the {name} tracker is not installed; run: pip install 'llm-wsae[{name}]'"
        ) from None
    except Exception as error:  # of wandb's own classes, e.g. without a key
        raise LlmWsaeError(
            f"the {name} tracker cannot be started ({reason(error)}); log in (wandb login, or the "
            "variable WANDB_API_KEY), set WANDB_MODE=offline, or train without a tracker"
        ) from error
