"""What was measured of a store for weight rules, kept in its folder ``evidence`` (its name on disk
since the first version)."""

import sys

from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.store import ActivationStore
from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import load_own_tensors, save_own_tensors
from llm_wsae.model.site import Site
from llm_wsae.processes import leads
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.reading import finite_tensor_of, tensor_of
from llm_wsae.statistics.second_moment import SecondMoment
from llm_wsae.weights.config import RuleInputConfig

MEASUREMENTS = "evidence"
SETTINGS = {"fisher": ("sensitivity_tokens", "seed")}
"""The settings on which a measurement depends."""


class StoredMeasurement:
    """A measurement in the store's folder, valid only for the same rows and settings."""

    def __init__(
        self,
        store: ActivationStore,
        site: Site,
        need: str,
        config: RuleInputConfig = RuleInputConfig(),  # noqa: B008 - frozen
    ):
        self._need, self._d_in = need, store.d_in
        self._path = store.folder / MEASUREMENTS / f"{site}.{need}.safetensors"
        settings = {name: getattr(config, name) for name in SETTINGS.get(need, ())}
        self._header = {"rows": store.identity(site)["sha256"], **settings}

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
            check_measurement(self._need, tensors, self._d_in)
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


def check_measurement(what: str, tensors: dict[str, Tensor], d_in: int) -> None:
    """Raise LlmWsaeError if tensors cannot be what is measured of rows of that width."""
    if what in ("statistics", "second_moment"):
        tensor_of(tensors, "mean", d_in)
        (Statistics if what == "statistics" else SecondMoment).from_tensors(tensors)
    else:
        finite_tensor_of(tensors, what, d_in, d_in)
