"""The training log: one JSON object per line, in a file and for the trackers."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import write_error, write_text
from llm_wsae.outside import reason

LOG = "log.jsonl"
_BEGINNING = b'{"step": '


class TrainingLog:
    """Appends to the folder's ``log.jsonl``, after removing lines of a lost run beyond ``step``.

    Raises LlmWsaeError when the tracker is not installed or does not start.
    """

    def __init__(self, folder: Path, step: int, tracker: str = "none"):
        self._path = folder / LOG
        old = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in old if _step_of(line) <= step]
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._send, self._end = _tracker(tracker, folder)

    def write(
        self, step: int, rows: int, arms: dict[str, dict[str, float]], **speed: float
    ) -> None:
        """One line: the step, the rows seen, each arm's numbers, the speed."""
        record = {"step": step, "rows": rows, **speed, "arms": arms}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise write_error(self._path, error) or error from error
        self._send(step, {f"{arm}/{k}": v for arm, ks in arms.items() for k, v in ks.items()})

    def close(self) -> None:
        """Let the tracker finish sending."""
        self._end()


def is_log(path: Path) -> bool:
    """Whether a file is a training log, or the beginning of one."""
    with open(path, "rb") as file:
        return _BEGINNING.startswith(file.read(len(_BEGINNING)))  # of a line perhaps half-written


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62  # a killed process left the line half-written


def _tracker(name: str, folder: Path) -> tuple[Callable[[int, dict[str, float]], Any], Callable]:
    """A function that sends a step's numbers, and one that ends the sending."""
    if name == "none":
        return (lambda step, numbers: None), (lambda: None)
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder))

            def write(step: int, numbers: dict[str, float]) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

            return write, writer.close
        import wandb

        # One folder is one run, also when it is resumed.
        number = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        run = wandb.init(
            project="llm-wsae", name=folder.name, dir=str(folder), id=number, resume="allow"
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
