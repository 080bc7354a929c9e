"""The training log: one JSON object a line, for the reader of the file and for the trackers."""

import json
from pathlib import Path
from typing import Any

from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import write_text

LOG = "log.jsonl"


class TrainingLog:
    """Appends to the folder's ``log.jsonl``; lines after ``step`` are those of a lost run, cut off.

    Raises LlmWsaeError when the tracker's package is not installed.
    """

    def __init__(self, folder: Path, step: int, tracker: str = "none"):
        path = folder / LOG
        old = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in old if _step_of(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._send = _tracker(tracker, folder)

    def write(
        self, step: int, rows: int, arms: dict[str, dict[str, float]], **speed: float
    ) -> None:
        """One line: the step, the rows seen, each arm's numbers, the speed."""
        record = {"step": step, "rows": rows, **speed, "arms": arms}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._send(step, {f"{arm}/{k}": v for arm, ks in arms.items() for k, v in ks.items()})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62  # a line that a killed process left half-written


def _tracker(name: str, folder: Path) -> Any:
    if name == "none":
        return lambda step, numbers: None
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder))
            return lambda step, numbers: [writer.add_scalar(k, v, step) for k, v in numbers.items()]
        import wandb

        wandb.init(project="llm-wsae", name=folder.name, dir=str(folder), resume="allow")
        return lambda step, numbers: wandb.log(numbers, step=step)
    except ImportError:
        raise LlmWsaeError(
            f"the {name} tracker is not installed; run: pip install 'llm-wsae[{name}]'"
        ) from None
