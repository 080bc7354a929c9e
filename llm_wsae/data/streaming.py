"""Rows of one or several sites directly from a model into training; no row goes to disk.

A corpus is read from its beginning, again and again. ``buffer_tokens`` of it at a time go through
the model once, and the rows of such a buffer are shuffled. Which rows are in batch number b depends
only on the text, the settings and a seed, so a training resumes by tokenising up to its batch,
without forward passes. Processes that share the rows of each batch each run the model on every W-th
forward pass of a buffer.
"""

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.config import StreamConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import NO_ROWS, kept_rows, too_small
from llm_wsae.data.packing import Contexts, Packer
from llm_wsae.data.rows import Share, SiteRows, SiteSource, StoredMeasurement, cut, shuffled
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.processes import leads, progress
from llm_wsae.machine.threads import prefetch
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site, points_of
from llm_wsae.statistics.moments import SecondMoment, Statistics

_PACKED_AHEAD = 4


class ActivationStreams(SiteRows):
    """The rows of several sites, from the same forward passes. While a buffer is trained on, a GPU
    computes the next one in the background: do not use the model for anything else meanwhile."""

    in_step = True
    num_rows = None

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        sites: Sequence[Site],
        config: StreamConfig = StreamConfig(),  # noqa: B008 - frozen
        folder: Path | None = None,
    ):
        """``folder``: where measurements are kept, so that a training that is resumed has the same.
        Raises UsageError for a site or context size that the model does not have."""
        for site in sites:
            model.check_site(site)
        self.sites = points_of(sites)
        self.d_in, self.num_blocks = model.d_model, model.num_blocks
        self.prepends_bos = config.prepend_bos and model.bos_token_id is not None
        self.model: LanguageModel = model
        self.corpus, self.config = corpus, config
        # a CPU's cores have enough to do: the two would only take turns, at a cost
        self._computes_ahead = model.device.type != "cpu"
        self._packer = Packer.for_model(model, config)
        self._folder = folder

    def batches(
        self,
        sites: Sequence[Site],
        batch_size: int,
        seed: int,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Generator[tuple[Float[Tensor, "rows d_in"], ...], None, None]:
        """As ``SiteRows.batches``, in the model's dtype; forward passes stop behind the last site.
        Raises LlmWsaeError, with the batch concerned, if the corpus fills no context or cannot be
        read, or an activation is not finite."""
        assert batch_size > 0 and start >= 0
        skip = start * batch_size
        with ExitStack() as threads:
            blocks = threads.enter_context(closing(prefetch(self._endless_blocks(), _PACKED_AHEAD)))
            size = self.config.batches_per_buffer
            buffers = enumerate(iter(lambda: list(islice(blocks, size)), []))
            first = next(buffers)
            while skip >= (rows := sum(int(contexts.keep.sum()) for contexts in first[1])):
                skip, first = skip - rows, next(buffers)
            shares: Iterator[Share] = (
                self._shuffled(sites, buffer, (seed, number), part)
                for number, buffer in chain([first], buffers)
            )
            if self._computes_ahead:
                # closed before the blocks that it reads
                shares = threads.enter_context(closing(prefetch(shares, depth=1)))
            for batch in cut(shares, batch_size, skip):
                yield tuple(own.contiguous() for own in batch.split(self.d_in, dim=1))

    def statistics(self, site: Site) -> Statistics:
        """Statistics of the rows of the first ``statistics_tokens`` tokens. Raises LlmWsaeError if
        the corpus fills no context."""
        return self._statistics[site]

    def second_moment(self, site: Site) -> SecondMoment:
        """The covariance sums of the same rows without massive ones, from a second pass."""
        return self._second_moments[site]

    def check_model(self, identity: dict[str, Any]) -> None:
        """They are always those of their own model."""

    def evidence(self, site: Site, need: str, **settings: Any) -> StoredMeasurement:
        path = None if self._folder is None else self._folder / f"{site}.{need}.safetensors"
        return StoredMeasurement(path, {**self.identity(site), **settings})

    def some_text(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the first ``tokens`` tokens."""
        for contexts in self._first_contexts(tokens):
            yield torch.from_numpy(contexts.ids).long(), torch.from_numpy(contexts.keep)

    def identity(self, site: Site) -> dict[str, Any]:
        return {
            "kind": "stream",
            "site": str(site),
            "model": self.model.identity(),
            "corpus": self.corpus.identity(),
            "packing": self.config.packing(),
            "contexts_per_batch": self.config.contexts_per_batch,
            "batches_per_buffer": self.config.batches_per_buffer,
            "statistics_tokens": self.config.statistics_tokens,
        }

    def _shuffled(
        self,
        sites: Sequence[Site],
        buffer: Sequence[Contexts],
        seeds: tuple[int, int],
        part: tuple[int, int],
    ) -> Share:
        """A part of a buffer's rows, the sites side by side, in random order. Each row is written
        to its place at once, so that a buffer is in memory only once."""
        number, parts = part
        sizes = [int(contexts.keep.sum()) for contexts in buffer]
        owner = np.repeat(np.arange(len(buffer)) % parts, sizes)
        mine, which = shuffled(np.flatnonzero(owner == number), len(owner), seeds)
        goes = torch.empty(len(which), dtype=torch.long)
        goes[torch.from_numpy(which)] = torch.arange(len(which))
        rows = torch.empty(len(which), len(sites) * self.d_in, dtype=self.model.dtype)
        done = 0
        for contexts in buffer[number::parts]:
            found = torch.cat([*self._rows(contexts, sites).values()], dim=1)
            rows[goes[done : done + len(found)]] = found
            done += len(found)
        return Share(len(owner), mine, rows)

    def _endless_blocks(self) -> Iterator[Contexts]:
        is_first = True
        while True:
            rows = seen = 0
            for contexts in self._packer.blocks(self.corpus, self.config.contexts_per_batch):
                seen += len(contexts.keep)
                rows += int(contexts.keep.sum())
                yield contexts
            if rows == 0:
                raise self._without_rows(seen)
            if is_first and leads():
                again = f"{self.corpus.name} ends after {rows:,} rows; it is read again"
                tqdm.write(again, file=sys.stderr)
            is_first = False

    def _without_rows(self, contexts: int) -> LlmWsaeError:
        """The error for a text without rows."""
        if contexts:
            return LlmWsaeError(NO_ROWS)
        return too_small(self.corpus, 0, 1, self.config.context_size)

    def _first_contexts(self, tokens: int) -> Iterator[Contexts]:
        limit = max(1, tokens // self.config.context_size)
        return self._packer.blocks(self.corpus, self.config.contexts_per_batch, limit=limit)

    def _first_rows(self, what: str) -> Iterator[tuple[Contexts, dict[Site, Tensor]]]:
        """The first ``statistics_tokens`` tokens, with their rows."""
        with progress(what, self.config.statistics_tokens, "tok") as bar:
            for contexts in self._first_contexts(self.config.statistics_tokens):
                yield contexts, self._rows(contexts, self.sites)
                bar.update(contexts.ids.size)

    def _rows(self, contexts: Contexts, sites: Sequence[Site]) -> dict[Site, Tensor]:
        rows = kept_rows(self.model, contexts, sites)
        for site, own in rows.items():
            if not bool(torch.isfinite(own.sum(dtype=torch.float64))):
                bad = int((~torch.isfinite(own)).any(1).sum())
                raise LlmWsaeError(
                    f"{bad} of {len(own)} rows of {site} from section "
                    f"{contexts.first.section} of {self.corpus.name} on are NaN or infinite; "
                    "load the model in float32"
                )
        return rows

    def _measured(self, need: str, kind: Any, measure: Callable[[], dict[Site, Any]]) -> Any:
        """A measurement of every site: the one that is kept, or a new one."""
        files = {site: self.evidence(site, need) for site in self.sites}
        kept = {site: file.read() for site, file in files.items()}
        if None not in kept.values():
            return {site: kind.from_tensors(tensors) for site, tensors in kept.items()}
        measured = measure()
        for site, found in measured.items():
            files[site].write(found.to_tensors())
        return measured

    @cached_property
    def _statistics(self) -> dict[Site, Statistics]:
        return self._measured("statistics", Statistics, self._new_statistics)

    @cached_property
    def _second_moments(self) -> dict[Site, SecondMoment]:
        return self._measured("second_moment", SecondMoment, self._new_second_moments)

    def _new_statistics(self) -> dict[Site, Statistics]:
        new = {site: Statistics(self.d_in, self.config.context_size) for site in self.sites}
        seen = 0
        for contexts, rows in self._first_rows("statistics, before training"):
            seen += len(contexts.keep)
            positions = torch.from_numpy(contexts.keep).nonzero()[:, 1]
            for site, own in rows.items():
                new[site].update(own, positions)
        if not any(found.count for found in new.values()):
            raise self._without_rows(seen)
        return new

    def _new_second_moments(self) -> dict[Site, SecondMoment]:
        threshold = {site: self.statistics(site).massive_threshold for site in self.sites}
        new = {site: SecondMoment(self.d_in) for site in self.sites}
        for _, rows in self._first_rows("covariance, before training"):
            for site, own in rows.items():
                new[site].update(own[own.float().norm(dim=1) <= threshold[site]])
        return new


class ActivationStream(SiteSource):
    """A stream of one site, as an ActivationSource."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        site: Site,
        config: StreamConfig = StreamConfig(),  # noqa: B008 - frozen
    ):
        """Raises UsageError for a site or context size that the model does not have."""
        super().__init__(ActivationStreams(model, corpus, [site], config), site)
