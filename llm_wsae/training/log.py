"""The training log: one JSON object per line, in a file and for the trackers."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llm_wsae.artifact.files import write_atomic, write_error
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.outside import reason

LOG = "log.jsonl"
_BEGINNING = b'{"step": '


class Written(NamedTuple):
    """What a log holds, for the checkpoint that belongs to it."""

    length: int
    """Bytes."""
    sha256: str
    """SHA-256 of them, in hex."""

    @classmethod
    def of(cls, data: bytes) -> "Written":
        """What a log of that content holds."""
        return cls(len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def from_json(cls, value: Any) -> "Written":
        """From a file. Raises ValueError."""
        if not isinstance(value, dict) or value.keys() != set(cls._fields):
            raise ValueError(f"its log is {shown(value)}")
        if type(value["length"]) is not int or not isinstance(value["sha256"], str):
            raise ValueError(f"its log is {shown(value)}")
        return cls(**value)

    def problem(self, path: Path, whole: bool = False) -> str | None:
        """What is wrong with the beginning of the log at that path, or with the ``whole`` log; None
        if nothing is."""
        data = path.read_bytes()
        if Written.of(data if whole else data[: self.length]) == self:
            return None
        return f"{path} is damaged: its checksum does not match; delete it to resume without it"


class TrainingLog:
    """Appends to the folder's ``log.jsonl``, after removing lines of a lost run beyond ``step``.

    ``written`` is what the log held at that step; without it, as in checkpoints of the first
    version, lines are believed. Raises LlmWsaeError if they changed since, or when the tracker is
    not installed or does not start.
    """

    def __init__(
        self, folder: Path, step: int, tracker: str = "none", written: Written | None = None
    ):
        self._path = folder / LOG
        kept = b""
        if self._path.exists():
            kept = self._path.read_bytes()
            if written is None:
                kept = b"".join(line for line in kept.splitlines(True) if _step_of(line) <= step)
            elif problem := written.problem(self._path):
                raise LlmWsaeError(problem)
            else:
                kept = kept[: written.length]
        write_atomic(self._path, lambda partial: partial.write_bytes(kept))
        self._digest, self._length = hashlib.sha256(kept), len(kept)
        self._send, self._end = _tracker(tracker, folder, step + 1)

    def sync(self) -> None:
        """Have it on the disk, as a checkpoint that goes with it will be."""
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())

    @property
    def written(self) -> Written:
        """What this log holds now."""
        return Written(self._length, self._digest.hexdigest())

    def write(
        self, step: int, rows: int, arms: dict[str, dict[str, float]], **speed: float
    ) -> None:
        """One line: the step, the rows seen, each arm's numbers, the speed."""
        record = {"step": step, "rows": rows, **speed, "arms": arms}
        line = f"{json.dumps(record)}\n".encode()
        try:
            with open(self._path, "ab") as file:
                file.write(line)
        except OSError as error:
            raise write_error(self._path, error) or error from error
        self._digest.update(line)
        self._length += len(line)
        self._send(step, {f"{arm}/{k}": v for arm, ks in arms.items() for k, v in ks.items()})

    def close(self) -> None:
        """Let the tracker finish sending."""
        self._end()


def is_log(path: Path) -> bool:
    """Whether a file is a training log, or the beginning of one."""
    with open(path, "rb") as file:
        return _BEGINNING.startswith(file.read(len(_BEGINNING)))  # of a line perhaps half-written


def _step_of(line: bytes) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        step = None  # a killed process left the line half-written
    return step if type(step) is int and line.endswith(b"\n") else 2**62


def _tracker(
    name: str, folder: Path, first: int
) -> tuple[Callable[[int, dict[str, float]], Any], Callable]:
    """A function that sends a step's numbers, the first at step ``first`` or later, and one that
    ends the sending."""
    if name == "none":
        return (lambda step, numbers: None), (lambda: None)
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder), purge_step=first)  # hides those of a lost run

            def write(step: int, numbers: dict[str, float]) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

            return write, writer.close
        import wandb

        # One folder is one run, also when it is resumed, and beside those of other sites.
        number = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        run = wandb.init(
            project="llm-wsae",
            name=folder.name,
            dir=str(folder),
            id=number,
            resume="allow",
            reinit="create_new",
        )
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
