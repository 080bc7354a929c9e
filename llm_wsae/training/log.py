"""The training log: one JSON object per line, in a file and for the trackers."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.artifact.files import refusals_to_write, write_atomic
from llm_wsae.errors import LlmWsaeError
from llm_wsae.outside import reason

LOG = "log.jsonl"
_Numbers = dict[str, float]


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
    ``step``.

    ``written`` is what the log held at that step; None at the beginning. Raises LlmWsaeError if
    that changed since, or when the tracker is not installed or does not start.
    """

    def __init__(
        self, folder: Path, step: int, tracker: str = "none", written: FileRecord | None = None
    ):
        self._path, kept = folder / LOG, b""
        if written is not None and self._path.exists():
            kept = check_beginning(self._path, written)
        write_atomic(self._path, lambda partial: partial.write_bytes(kept))
        self._send, self.close = _tracker(tracker, folder, step + 1)

    def synced(self) -> FileRecord:
        """What this log holds, and that is on the disk, as a checkpoint that goes with it will
        be."""
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
    """A function that sends a step's numbers, the first at step ``first`` or later, and one that
    ends the sending."""
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
