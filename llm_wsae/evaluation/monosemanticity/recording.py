"""One pass over held-out text: what is kept of the activations and of each dictionary's latents.

Massive rows are left out: whatever fires on them would otherwise head every list. They are those
beyond ten times the median norm of the first batch of this text, so that it is one for all
dictionaries of a site; training's is that of its own rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.heldout import Activations, ContextBatch
from llm_wsae.evaluation.monosemanticity.probe_tables import (
    NO_UNIT,
    DenseTable,
    SparseTable,
    Table,
    Units,
)
from llm_wsae.evaluation.monosemanticity.top_contexts import Collector, Firings
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import Codes
from llm_wsae.statistics.moments import MASSIVE_RATIO


@dataclass(frozen=True)
class SiteRows:
    """What is kept of a site's activations."""

    threshold: float
    """Norm above which a row is massive: ten times the median norm of the first batch."""
    x: list[Float[Tensor, "_ d_in"]]
    """The activations of each kind of units, float32 on the CPU."""


def read_sites(
    activations: Activations, sites: Sequence[Site], kinds: Sequence[Units]
) -> dict[Site, SiteRows]:
    """Read the activations of units at the sites. Massive rows count as zeros."""
    found: dict[Site, SiteRows] = {}
    for batch in activations.batches(sites):
        for site, rows in batch.activations.items():
            norms = rows.float().norm(dim=1)
            if site not in found:
                threshold = MASSIVE_RATIO * float(norms.median())
                empty = [torch.zeros(len(units.size), rows.shape[1]) for units in kinds]
                found[site] = SiteRows(threshold, empty)
            usable = (norms <= found[site].threshold).cpu()
            for units, x in zip(kinds, found[site].x, strict=True):
                unit = units.of_row[batch.rows]
                here = (unit != NO_UNIT) & usable
                x.index_add_(0, unit[here], rows[here.to(rows.device)].float().cpu())
    for rows in found.values():
        for units, x in zip(kinds, rows.x, strict=True):
            x /= units.size[:, None]
    return found


class Recorder:
    """What one dictionary makes of the text."""

    def __init__(
        self,
        dictionary: Dictionary,
        collector: Collector,
        threshold: float,
        kinds: Sequence[Units] = (),
    ):
        """``dictionary`` and ``collector`` are on the model's device; ``threshold`` is the norm
        above which a row is massive, ``kinds`` are the units to make tables of."""
        self.dictionary = dictionary
        self._collector = collector
        self._threshold = threshold
        self._kinds = kinds
        self._entries: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in kinds]
        self._sums = [
            None if units.single else torch.zeros(len(units.size), dictionary.d_sae)
            for units in kinds
        ]

    def add(self, batch: ContextBatch) -> None:
        """Encode a batch's rows and keep what is needed of the codes."""
        rows = batch.activations[self.dictionary.site]
        codes = self.dictionary.encode_sparse(rows)
        usable = rows.float().norm(dim=1) <= self._threshold
        self._collector.add(codes, batch.contexts, usable)
        codes, usable = Codes(codes.indices.cpu(), codes.values.cpu()), usable.cpu()
        for number, units in enumerate(self._kinds):
            unit = units.of_row[batch.rows]
            here = ((unit != NO_UNIT) & usable).nonzero()[:, 0]
            member, slot = (codes.values[here] > 0).nonzero(as_tuple=True)
            latent, value = (part[here[member], slot] for part in codes)
            entry = (unit[here[member]], latent, value.float())
            if self._sums[number] is None:
                self._entries[number].append(entry)
            else:
                flat = entry[0] * self.dictionary.d_sae + latent
                self._sums[number].view(-1).index_add_(0, flat, entry[2])

    def firings(self) -> Firings:
        """Where its latents fire."""
        return self._collector.firings()

    def tables(self) -> list[Table]:
        """Its latents' activations for each kind of units."""
        return [
            _sparse(entries, len(units.size), self.dictionary.d_sae)
            if sums is None
            else DenseTable(sums / units.size[:, None])
            for units, entries, sums in zip(self._kinds, self._entries, self._sums, strict=True)
        ]


def record(activations: Activations, recorders: Sequence[Recorder]) -> None:
    """Show a text to dictionaries of any of its sites, all in one pass."""
    for batch in activations.batches(sorted({one.dictionary.site for one in recorders})):
        for recorder in recorders:
            recorder.add(batch)


def _sparse(entries: list[tuple[Tensor, Tensor, Tensor]], units: int, d_sae: int) -> SparseTable:
    unit, latent, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
    return SparseTable(unit, latent, value, (units, d_sae))
