"""Activations of the contexts that dictionaries are measured on, kept in memory up to a gigabyte.

Several passes over the same text, and every further dictionary, then cost no further forward pass.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

_CACHE_BYTES = 1 << 30


class ActivationCache:
    """Activations by site and batch of contexts, in the model's dtype and on its device."""

    def __init__(self, model: LanguageModel, batches: Sequence[tuple[Tensor, Tensor]]):
        """``batches`` are token ids and which positions give rows, both [contexts, positions]."""
        self.batches = batches
        self._model = model
        self._bytes_left = _CACHE_BYTES
        self._kept: dict[tuple[Site, int], Tensor] = {}
        self._medians: dict[Site, float] = {}

    def at(self, number: int, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Activations [contexts, positions, d_in] of batch ``number``; the model runs only for the
        sites that are not kept."""
        found = {site: self._kept[site, number] for site in sites if (site, number) in self._kept}
        missing = [site for site in sites if site not in found]
        if missing:
            for site, hidden in self._model.activations(self.batches[number][0], missing).items():
                found[site] = hidden
                self.keep(number, site, hidden)
        return found

    def kept(self, number: int, site: Site) -> Tensor | None:
        """The activations of a batch if they are in memory."""
        return self._kept.get((site, number))

    def keep(self, number: int, site: Site, hidden: Tensor) -> None:
        """Keep activations if there is room for them."""
        if hidden.nbytes <= self._bytes_left:
            self._bytes_left -= hidden.nbytes
            self._kept[site, number] = hidden

    def holds(self, sites: Iterable[Site]) -> bool:
        """Whether reading these sites again costs no forward pass."""
        return all((site, n) in self._kept for site in sites for n in range(len(self.batches)))

    def median_norms(self, sites: Sequence[Site]) -> dict[Site, float]:
        """Median Euclidean norm of the rows at each site, over the whole text."""
        norms: dict[Site, list[Tensor]] = {s: [] for s in sites if s not in self._medians}
        numbers = range(len(self.batches)) if norms else ()
        for number in tqdm(numbers, desc="norms", unit="batch", leave=False, disable=not norms):
            _, keep = self.batches[number]
            for site, hidden in self.at(number, list(norms)).items():
                norms[site].append(hidden[keep.to(hidden.device)].float().norm(dim=1).cpu())
        self._medians |= {site: float(torch.cat(parts).median()) for site, parts in norms.items()}
        return {site: self._medians[site] for site in sites}
