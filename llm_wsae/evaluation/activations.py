"""What dictionaries are measured on: contexts, their activations, and which of those are massive.

A row is massive when its norm exceeds ten median norms. A few such rows would dominate every mean
and every list of top contexts, so training omits them and records the threshold
(``Statistics.massive_threshold``). Measurements use that record, to omit what training omitted. For
dictionaries without one (made by other tools) the median norm of the evaluated text takes its
place. (``inspecting`` and ``attaching`` see a few rows at a time: where there is no record, no row
counts as massive there.)
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import MASSIVE_RATIO

CACHE_BYTES = 1 << 30


@runtime_checkable
class Context(Protocol):
    """What is read of a context: token ids and which positions are kept, both [positions]."""

    @property
    def ids(self) -> np.ndarray | Tensor: ...

    @property
    def keep(self) -> np.ndarray | Tensor: ...


def take_contexts(contexts: Iterable[Context], tokens: int) -> list[Context]:
    """The first contexts, at least two, that hold ``tokens`` rows.

    Raises LlmWsaeError if there are too few, UsageError if they have different lengths or none has
    a second row, whose prediction could be scored (``next_token.scored_positions``).
    """
    taken: list[Context] = []
    rows: list[int] = []
    for context in contexts:
        taken.append(context)
        rows.append(int(context.keep.sum()))
        if len(context.ids) != len(taken[0].ids):
            raise UsageError(
                f"the text to evaluate on has contexts of {len(taken[0].ids):,} and of "
                f"{len(context.ids):,} tokens; pack or pad them to one length"
            )
        if sum(rows) >= tokens and len(taken) >= 2:
            break
    if sum(rows) < tokens or len(taken) < 2:
        raise LlmWsaeError(
            f"the text to evaluate on holds {sum(rows):,} tokens in {len(taken)} contexts, but "
            f"{tokens:,} tokens in at least 2 contexts are needed; ask for fewer tokens or "
            "provide more text"
        )
    if max(rows) < 2:
        raise UsageError(
            "no context of the text to evaluate on has two rows, so no prediction can be scored; "
            "train on rows with a larger context-size or a smaller drop-positions"
        )
    return taken


def documents_of(contexts: Sequence[Context]) -> list[np.ndarray]:
    """For each context, the number of each kept position's document; of contexts that name no
    documents (``packing.Context`` does), each is one of its own."""
    found = []
    for number, context in enumerate(contexts):
        keep = np.asarray(torch.as_tensor(context.keep))
        document = getattr(context, "document", np.full(len(keep), number))
        found.append(np.asarray(document)[keep])
    return found


def stacked(contexts: Sequence[Context]) -> tuple[Tensor, Tensor]:
    """Their ids and which positions are kept, both [contexts, positions]."""
    ids = [torch.as_tensor(context.ids).long() for context in contexts]
    keep = [torch.as_tensor(context.keep).bool() for context in contexts]
    return torch.stack(ids), torch.stack(keep)


class RowBatch(NamedTuple):
    """The rows of consecutive contexts."""

    contexts: slice
    rows: slice
    activations: dict[Site, Float[Tensor, "rows d_in"]]
    """Of every site, in the model's dtype and on its device."""


class ActivationCache:
    """Activations of a text at any site, in the model's dtype and on its device.

    A part of them stays in memory, so that another pass over the text, or another dictionary,
    costs no further forward pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: Int[Tensor, "contexts positions"],
        keep: Bool[Tensor, "contexts positions"],
        batch_tokens: int,
        room: int = CACHE_BYTES,
    ):
        """``keep`` marks the positions that give rows. ``batch_tokens`` tokens go through the model
        at once, at least one context; ``room`` is the size of what stays in memory."""
        size = max(1, batch_tokens // ids.shape[1])
        self.batches = list(zip(ids.split(size), keep.split(size), strict=True))
        """Token ids and which positions are kept, both [contexts, positions]."""
        self._model = model
        self._bytes_left = room
        self._kept: dict[tuple[Site, int], Tensor] = {}
        self._medians: dict[Site, float] = {}

    def rows(self, sites: Sequence[Site]) -> Iterator[RowBatch]:
        """All rows at the sites, in the order of the text."""
        contexts = rows = 0
        for number, (_, keep) in enumerate(
            tqdm(self.batches, desc="held-out text", unit="batch", leave=False)
        ):
            first, start = contexts, rows
            contexts, rows = first + len(keep), start + int(keep.sum())
            found = {
                site: hidden[keep.to(hidden.device)]
                for site, hidden in self.at(number, sites).items()
            }
            yield RowBatch(slice(first, contexts), slice(start, rows), found)

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

    def read(self, sites: Sequence[Site]) -> None:
        """Run the model once for all sites, as far as there is room for what it gives."""
        for number in range(len(self.batches)):
            if any((site, number) not in self._kept for site in self.at(number, sites)):
                break

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

    def massive_threshold(self, site: Site, dictionaries: Iterable[Dictionary]) -> float:
        """Norm above which a row at the site is massive: the smallest that one of its dictionaries
        records, so that all are measured on the same rows."""
        recorded = [one.info.massive_threshold for one in dictionaries]
        known = [threshold for threshold in recorded if threshold is not None]
        if known:
            return min(known)
        if site not in self._medians:
            norms = [b.activations[site].float().norm(dim=1).cpu() for b in self.rows([site])]
            self._medians[site] = float(torch.cat(norms).median())
        return MASSIVE_RATIO * self._medians[site]


def on_device_of(model: LanguageModel, dictionary: Dictionary) -> Dictionary:
    """The dictionary, or a copy of it, on the model's device."""
    if dictionary.W_enc.device == model.device:
        return dictionary
    return copy.deepcopy(dictionary).to(model.device)
