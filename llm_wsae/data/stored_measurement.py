"""What was measured of rows for weight rules, kept in the folder ``evidence`` of a store, or in the
folder of the training that a stream goes into."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.files import load_own_tensors, save_own_tensors
from llm_wsae.artifact.provenance import plain
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import leads

MEASUREMENTS = "evidence"


@dataclass(frozen=True)
class StoredMeasurement:
    """A measurement that is kept on disk, valid only for the same rows and settings."""

    path: Path | None
    """Its file; None if it is not kept."""
    rows: dict[str, Any]
    """What identifies the rows; JSON."""
    settings: dict[str, Any]

    def read(self) -> dict[str, Tensor] | None:
        """The tensors by name; None if they are not there, damaged, or of other rows or
        settings."""
        if self.path is None or not self.path.exists():
            return None
        rows, why = plain(self.rows), "it is of other rows"
        try:
            tensors, header = load_own_tensors(self.path, "measurement")
            if header.items() >= rows.items():
                return tensors if header == {**rows, **self.settings} else None
        except LlmWsaeError:  # which would say to delete the file
            why = "it is damaged"
        if leads():
            tqdm.write(f"what {self.path} holds is measured anew, since {why}", file=sys.stderr)
        return None

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Keep what was measured; if the store cannot be written to, say so."""
        if self.path is None or not leads():
            return
        try:
            save_own_tensors(self.path, tensors, {**plain(self.rows), **self.settings})
        except LlmWsaeError as error:  # a read-only store
            tqdm.write(f"the measurement is not kept: {error}", file=sys.stderr)
