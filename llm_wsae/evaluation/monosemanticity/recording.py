"""One pass over held-out text: what is kept of the activations and of each dictionary's latents.

Massive rows (``massive_thresholds``) are left out: latents that fire on them would otherwise list
nothing else among their top contexts.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.activations import ActivationCache, RowBatch
from llm_wsae.evaluation.monosemanticity.concepts import NO_UNIT, Units
from llm_wsae.evaluation.monosemanticity.firings import FiringCollector, Firings
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import Codes


def read_units(
    activations: ActivationCache, thresholds: Mapping[Site, float], kinds: Sequence[Units]
) -> dict[Site, list[Float[Tensor, "_ d_in"]]]:
    """For each site, the mean activations of each kind of units, float32 on the CPU.

    ``thresholds`` are the norms above which a row is massive; massive rows count as zeros.
    """
    found: dict[Site, list[Tensor]] = {}
    for batch in activations.rows(list(thresholds)):
        for site, rows in batch.activations.items():
            if site not in found:
                found[site] = [torch.zeros(len(units.size), rows.shape[1]) for units in kinds]
            usable = (rows.float().norm(dim=1) <= thresholds[site]).cpu()
            for units, x in zip(kinds, found[site], strict=True):
                unit = units.of_row[batch.rows]
                here = (unit != NO_UNIT) & usable
                x.index_add_(0, unit[here], rows[here.to(rows.device)].float().cpu())
    for of_site in found.values():
        for units, x in zip(kinds, of_site, strict=True):
            x /= units.size[:, None]
    return found


class Recorder:
    """Records what one dictionary's latents do on the text."""

    def __init__(
        self,
        dictionary: Dictionary,
        collector: FiringCollector,
        threshold: float,
        kinds: Sequence[Units] = (),
    ):
        """``dictionary`` and ``collector`` are on the model's device; ``threshold`` is the norm
        above which a row is massive; ``kinds`` are the units to make tables of."""
        self.dictionary, self._collector = dictionary, collector
        self._threshold, self._kinds = threshold, kinds
        self._entries: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in kinds]
        self._sums = [
            None if units.single else torch.zeros(len(units.size), dictionary.d_sae)
            for units in kinds
        ]

    def add(self, batch: RowBatch) -> None:
        """Encode a batch's rows and keep what is needed of the codes."""
        rows = batch.activations[self.dictionary.site]
        codes = self.dictionary.encode_sparse(rows)
        usable = rows.float().norm(dim=1) <= self._threshold
        self._collector.add(codes, batch.contexts, usable)
        codes, usable = Codes(codes.indices.cpu(), codes.values.cpu()), usable.cpu()
        for units, entries, sums in zip(self._kinds, self._entries, self._sums, strict=True):
            unit = units.of_row[batch.rows]
            here = ((unit != NO_UNIT) & usable).nonzero()[:, 0]
            member, slot = (codes.values[here] > 0).nonzero(as_tuple=True)
            latent, value = (part[here[member], slot] for part in codes)
            unit, value = unit[here[member]], value.float()
            if sums is None:
                entries.append((unit, latent, value))
            else:
                flat = unit * self.dictionary.d_sae + latent
                sums.view(-1).index_add_(0, flat, value)

    def firings(self) -> Firings:
        """Where its latents fire."""
        return self._collector.firings()

    def tables(self) -> list[Float[Tensor, "d_sae units"]]:
        """Its latents' activations for each kind of units: sparse where every unit is one row."""
        return [
            _sparse(entries, (self.dictionary.d_sae, len(units.size)))
            if sums is None
            else (sums / units.size[:, None]).T
            for units, entries, sums in zip(self._kinds, self._entries, self._sums, strict=True)
        ]


def _sparse(entries: list[tuple[Tensor, Tensor, Tensor]], shape: tuple[int, int]) -> Tensor:
    unit, latent, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
    at = torch.stack([latent, unit])
    return torch.sparse_coo_tensor(at, value, shape, check_invariants=False).coalesce()


def record(activations: ActivationCache, recorders: Sequence[Recorder]) -> None:
    """Pass the text to dictionaries of any of its sites, in one pass."""
    for batch in activations.rows(sorted({one.dictionary.site for one in recorders})):
        for recorder in recorders:
            recorder.add(batch)
