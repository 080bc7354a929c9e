"""What was measured of rows for weight rules, kept in the folder ``evidence`` of a store, or in the
folder of the training that a stream goes into."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.files import load_own_tensors, save_own_tensors
from llm_wsae.artifact.provenance import plain
from llm_wsae.data.shuffling import SiteRows
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import leads
from llm_wsae.model.site import Site

MEASUREMENTS = "evidence"


class StoredMeasurement:
    """A measurement that is kept on disk, valid only for the same rows and settings."""

    def __init__(
        self,
        rows: SiteRows,
        site: Site,
        need: str,
        settings: Mapping[str, Any] | None = None,
    ):
        self._need = need
        self._path, self._rows = rows.evidence(site, need)
        self._header = plain({**self._rows, **(settings or {})})

    def read(self) -> Tensor | None:
        """What was measured; None if it was not, is damaged, or is of other rows or settings."""
        tensors = self.read_tensors()
        return None if tensors is None else tensors[self._need]

    def read_tensors(self) -> dict[str, Tensor] | None:
        """The same of a measurement that has several tensors, by name."""
        if self._path is None or not self._path.exists():
            return None
        try:
            tensors, header = load_own_tensors(self._path, self._need)
        except LlmWsaeError:  # which would say to delete the file
            self._say_anew("it is damaged")
            return None
        if any(header.get(name) != value for name, value in plain(self._rows).items()):
            self._say_anew("it is of other rows")
            return None
        return tensors if header == self._header else None

    def _say_anew(self, why: str) -> None:
        """Say why a measurement that is there is not used."""
        if leads():
            tqdm.write(f"what {self._path} holds is measured anew, since {why}", file=sys.stderr)

    def write(self, measured: Tensor) -> None:
        """Keep it; if the store cannot be written to, say so."""
        self.write_tensors({self._need: measured})

    def write_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The same of several tensors."""
        if self._path is None or not leads():
            return
        try:
            save_own_tensors(self._path, tensors, self._header)
        except LlmWsaeError as error:  # a read-only store
            tqdm.write(f"the measurement is not kept: {error}", file=sys.stderr)
