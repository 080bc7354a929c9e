"""What was measured of a store for weight rules, kept in its folder ``evidence``."""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.files import load_own_tensors, save_own_tensors
from llm_wsae.data.store import ActivationStore
from llm_wsae.data.stores import StoresInTurn
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import leads
from llm_wsae.model.site import Site

MEASUREMENTS = "evidence"


class StoredMeasurement:
    """A measurement in the store's folder, valid only for the same rows and settings."""

    def __init__(
        self,
        store: ActivationStore,
        site: Site,
        need: str,
        settings: Mapping[str, Any] | None = None,
    ):
        self._need = need
        rows = store.identity(site)["sha256"]
        self._header = {"rows": rows, **(settings or {})}
        # of several stores, beside what was measured of the first alone
        several = f".{rows[:16]}" if isinstance(store, StoresInTurn) else ""
        self._path = store.folder / MEASUREMENTS / f"{site}.{need}{several}.safetensors"

    def read(self) -> Tensor | None:
        """What was measured; None if it was not, is damaged, or is of other rows or settings."""
        tensors = self.read_tensors()
        return None if tensors is None else tensors[self._need]

    def read_tensors(self) -> dict[str, Tensor] | None:
        """The same of a measurement that has several tensors, by name."""
        if not self._path.exists():
            return None
        try:
            tensors, header = load_own_tensors(self._path, self._need)
        except LlmWsaeError:  # which would say to delete the file
            self._say_anew("it is damaged")
            return None
        if header.get("rows") != self._header["rows"]:
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
        if not leads():  # rank 0 could not keep them either
            return
        try:
            save_own_tensors(self._path, tensors, self._header)
        except LlmWsaeError as error:  # a read-only store
            tqdm.write(f"the measurement is not kept: {error}", file=sys.stderr)
