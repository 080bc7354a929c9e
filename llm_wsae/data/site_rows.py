"""The rows of one or several sites, and what was measured of them: one interface for those that are
stored and those that are streamed."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.files import load_own_tensors, save_own_tensors
from llm_wsae.artifact.provenance import plain
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import leads
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import SecondMoment, Statistics

if TYPE_CHECKING:  # it takes seconds to import, and a store needs none
    from llm_wsae.model.language_model import LanguageModel


@dataclass(frozen=True)
class StoredMeasurement:
    """A measurement that is kept on disk, valid only for the same rows and settings."""

    path: Path | None
    """Its file; None if it is not kept."""
    facts: dict[str, Any]
    """What identifies the rows, and the settings; JSON."""

    def read(self) -> dict[str, Tensor] | None:
        """The tensors by name; None if they are not there, damaged, or of something else: then they
        are measured anew."""
        if self.path is not None and self.path.exists():
            with suppress(LlmWsaeError):  # which would say to delete the file
                tensors, facts = load_own_tensors(self.path, "measurement")
                if facts == plain(self.facts):
                    return tensors
        return None

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Keep what was measured; if the store cannot be written to, say so."""
        if self.path is None or not leads():
            return
        try:
            save_own_tensors(self.path, tensors, plain(self.facts))
        except LlmWsaeError as error:  # a read-only store
            tqdm.write(f"the measurement is not kept: {error}", file=sys.stderr)


class SiteRows(ABC):
    """The rows of one or several sites: a store, or streams. Callers need not ask which."""

    sites: list[Site]
    d_in: int
    num_rows: int | None
    """At each site, in one epoch; None if unknown."""
    prepends_bos: bool
    """Whether their contexts begin with a beginning-of-sequence token."""
    in_step: bool
    """Whether the rows of all sites come from the same forward passes."""
    model: "LanguageModel | None"
    """What computes them; None for a store."""

    def source(self, site: Site) -> "SiteSource":
        """One site as a trainer reads it (an ActivationSource)."""
        return SiteSource(self, site)

    @abstractmethod
    def batches(
        self,
        sites: Sequence[Site],
        batch_size: int,
        seed: int,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Float[Tensor, "rows d_in"], ...]]:
        """Endless shuffled batches from number ``start`` on, of each site the same rows of the
        text; of a batch, only the rows of ``part`` (its number, of how many). Which rows are in a
        batch depends only on the text, the settings, the batch size and the seed."""

    @abstractmethod
    def statistics(self, site: Site) -> Statistics:
        """The statistics of a site's rows."""

    @abstractmethod
    def second_moment(self, site: Site) -> SecondMoment:
        """The covariance sums of the same rows without massive ones: kept, or else measured."""

    @abstractmethod
    def evidence(self, site: Site, need: str, **settings: Any) -> StoredMeasurement:
        """A measurement of these rows, and where it is kept."""

    @abstractmethod
    def some_text(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids [contexts, positions] of about ``tokens`` tokens, and which of them give a row, a few
        contexts at a time."""

    @abstractmethod
    def identity(self, site: Site) -> dict[str, Any]:
        """JSON values that identify a site's rows in this order."""

    @abstractmethod
    def check_model(self, identity: dict[str, Any]) -> None:
        """Raises LlmWsaeError if a model of that ``identity()`` did not compute these rows."""


class SiteSource:
    """The rows of one site, as an ActivationSource."""

    def __init__(self, rows: SiteRows, site: Site):
        """Raises UsageError if the site is not among those of the ``rows``."""
        self.rows, self.site = rows, site
        self.d_in, self.num_rows, self.prepends_bos = rows.d_in, rows.num_rows, rows.prepends_bos
        self._identity = rows.identity(site)

    def batches(
        self, batch_size: int, seed: int, start: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Endless shuffled batches; see ``SiteRows.batches``."""
        return (own for (own,) in self.rows.batches([self.site], batch_size, seed, start, part))

    def statistics(self) -> Statistics:
        """The statistics of these rows."""
        return self.rows.statistics(self.site)

    def identity(self) -> dict[str, Any]:
        """JSON values that identify these rows in this order."""
        return self._identity
