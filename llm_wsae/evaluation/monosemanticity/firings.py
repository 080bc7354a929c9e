"""Where every latent fires: its top contexts, a uniform sample, and the windows where it does not.

One pass over the rows, for all latents at once. A batch's sparse codes are reduced to the best
firing of each latent in each context, and these are merged with the best so far, so memory is
latents × contexts kept, never latents × tokens. For the top contexts, "best" is the largest
activation. For the sample it is the smallest of random numbers drawn once per row. A latent's
sample is then uniform over its firings (one per context), does not depend on the cut into batches,
and uses the same rows for many latents and dictionaries, so few windows have to be embedded.

Only one firing per context counts, because neighbouring firings share their text: ten windows of
one paragraph would agree with each other whatever the latent stands for. Massive rows are left out:
latents that fire on them would list nothing else among their top contexts.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.activations import ActivationCache, RowBatch
from llm_wsae.evaluation.heldout import OUTSIDE, HeldoutText
from llm_wsae.evaluation.monosemanticity.concepts import NO_UNIT, Units
from llm_wsae.model.site import Site

NO_ROW = -1


class Examples(NamedTuple):
    """Up to n rows per latent, each from another context."""

    rows: Int[Tensor, "d_sae n"]  # row numbers, -1 where there are no more
    values: Float[Tensor, "d_sae n"]  # the latent's activation there, 0 where there is no row


class Firings(NamedTuple):
    """What one dictionary's latents do on a text. All on the CPU."""

    num_rows: int  # encoded rows; massive rows are not encoded
    counts: Int[Tensor, " d_sae"]  # number of rows on which each latent fires
    contexts: Int[Tensor, " d_sae"]  # number of contexts in which it fires
    top: Examples
    """Largest activations in descending order; the earlier context first where they tie."""
    sample: Examples  # uniformly drawn firings, in the order of the draw
    fired: Bool[Tensor, "windows d_sae"]
    """Whether the latent fires anywhere in each of the random windows."""

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of rows on which each latent fires."""
        return self.counts.double() / max(self.num_rows, 1)


class Recorder:
    """Records what one dictionary's latents do on the text, batch by batch, on its device."""

    def __init__(
        self,
        dictionary: Dictionary,
        threshold: float,
        text: HeldoutText,
        windows: Int[Tensor, "windows width"],
        examples: tuple[int, int],
        seed: int,
        kinds: Sequence[Units] = (),
    ):
        """``threshold`` is the norm above which a row is massive; ``windows`` are the positions of
        the random windows, each within one context; ``examples`` the numbers of top contexts and of
        sampled ones; ``kinds`` the units to make tables of."""
        self.dictionary, self._threshold, self._kinds = dictionary, threshold, kinds
        d_sae, device = dictionary.d_sae, dictionary.W_enc.device
        self._text, self._windows = text, windows
        self._window_context = windows.amax(1) // text.ids.shape[1]
        order = torch.randperm(text.num_rows, generator=torch.Generator().manual_seed(seed))
        self._drawn = -order.float().to(device)  # as scores: the higher, the earlier in the draw
        self._top, self._sample = (_Best(d_sae, count, device) for count in examples)
        self._num_rows = 0
        self._counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._contexts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._fired = torch.zeros(len(windows), d_sae, dtype=torch.bool, device=device)
        self._entries: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in kinds]
        self._sums = [
            None if units.single else torch.zeros(len(units.size), d_sae) for units in kinds
        ]

    def add(self, batch: RowBatch) -> None:
        """Encode a batch's rows and keep what is needed of the codes."""
        rows = batch.activations[self.dictionary.site]
        indices, values = self.dictionary.encode_sparse(rows)
        usable = rows.float().norm(dim=1) <= self._threshold
        active = (values > 0) & usable[:, None]
        local, slot = active.nonzero(as_tuple=True)
        latent, value = indices[local, slot], values[local, slot].float()
        self._num_rows += int(usable.sum())
        self._counts += torch.bincount(latent, minlength=self.dictionary.d_sae)
        self._add_examples(batch, latent, value, local)
        self._mark_windows(batch, indices, active)
        self._add_to_tables(batch, latent.cpu(), value.cpu(), local.cpu())

    def _add_examples(self, batch: RowBatch, latent: Tensor, value: Tensor, local: Tensor) -> None:
        d_sae, width = self.dictionary.d_sae, batch.contexts.stop - batch.contexts.start
        row = local + batch.rows.start
        context = self._text.context.to(row.device)[row] - batch.contexts.start
        group = latent * width + context
        score, event = _best(value, group, d_sae * width)
        self._contexts += (event != NO_ROW).view(d_sae, width).sum(1)
        self._top.merge(score, event, row, value)
        self._sample.merge(*_best(self._drawn[row], group, d_sae * width), row, value)

    def _mark_windows(self, batch: RowBatch, indices: Tensor, active: Tensor) -> None:
        first, stop = batch.contexts.start, batch.contexts.stop
        number = ((self._window_context >= first) & (self._window_context < stop)).nonzero()[:, 0]
        cells = self._windows[number]
        row = self._text.row_at[cells].where(cells != OUTSIDE, OUTSIDE)
        member, at = (row != OUTSIDE).nonzero(as_tuple=True)
        local = (row[member, at] - batch.rows.start).to(active.device)
        event, slot = active[local].nonzero(as_tuple=True)
        self._fired[number[member].to(event.device)[event], indices[local[event], slot]] = True

    def _add_to_tables(self, batch: RowBatch, latent: Tensor, value: Tensor, row: Tensor) -> None:
        for units, entries, sums in zip(self._kinds, self._entries, self._sums, strict=True):
            unit = units.of_row[batch.rows][row]
            here = unit != NO_UNIT
            if sums is None:
                entries.append((latent[here], unit[here], value[here]))
            else:
                cell = unit[here] * self.dictionary.d_sae + latent[here]
                sums.view(-1).index_add_(0, cell, value[here])

    def firings(self) -> Firings:
        """Where its latents fire."""
        return Firings(
            self._num_rows,
            self._counts.cpu(),
            self._contexts.cpu(),
            self._top.examples(),
            self._sample.examples(),
            self._fired.cpu(),
        )

    def tables(self) -> list[Float[Tensor, "d_sae units"]]:
        """Its latents' activations for each kind of units: sparse where every unit is one row."""
        found = []
        for units, entries, sums in zip(self._kinds, self._entries, self._sums, strict=True):
            if sums is not None:
                found.append((sums / units.size[:, None]).T)
                continue
            latent, unit, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
            at, shape = torch.stack([latent, unit]), (self.dictionary.d_sae, len(units.size))
            table = torch.sparse_coo_tensor(at, value, shape, check_invariants=False)
            found.append(table.coalesce())
        return found


def record(activations: ActivationCache, recorders: Sequence[Recorder]) -> None:
    """Pass the text to dictionaries of any of its sites, in one pass."""
    for batch in activations.rows(sorted({one.dictionary.site for one in recorders})):
        for recorder in recorders:
            recorder.add(batch)


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


def quantile_sample(firings: Firings, text: HeldoutText, count: int) -> Examples:
    """``count`` of the sampled firings outside the top contexts, evenly spread over the ranks of
    their values; all of them if a latent has fewer."""
    top, rows = (_contexts_of(text, examples.rows) for examples in (firings.top, firings.sample))
    usable = (rows != NO_ROW) & ~(rows[:, :, None] == top[:, None, :]).any(2)
    value, order = firings.sample.values.where(usable, -1.0).sort(
        dim=1, descending=True, stable=True
    )
    available = usable.sum(1, keepdim=True)
    number = torch.arange(count)
    spread = ((2 * number + 1) * available).div(2 * count, rounding_mode="floor")
    rank = spread.where(available >= count, number).clamp(max=rows.shape[1] - 1)
    there = number < available
    return Examples(
        firings.sample.rows.gather(1, order.gather(1, rank)).where(there, NO_ROW),
        value.gather(1, rank).where(there, 0.0),
    )


def silent_windows(
    firings: Firings,
    text: HeldoutText,
    windows: Int[Tensor, "windows width"],
    latents: Int[Tensor, " latents"],
) -> Bool[Tensor, "latents windows"]:
    """The random windows, outside a latent's top contexts, where it never fires."""
    context = windows.amax(1) // text.ids.shape[1]
    silent = ~firings.fired[:, latents].T
    for top in _contexts_of(text, firings.top.rows[latents]).T:  # one at a time, to save memory
        silent &= top[:, None] != context
    return silent


def _contexts_of(text: HeldoutText, rows: Tensor) -> Tensor:
    return text.context[rows].where(rows != NO_ROW, NO_ROW)


class _Best:
    """The ``count`` best firings of every latent, each from another context."""

    def __init__(self, d_sae: int, count: int, device: torch.device):
        self._score = torch.full((d_sae, count), -torch.inf, device=device)
        self._row = torch.full((d_sae, count), NO_ROW, device=device)
        self._value = torch.zeros(d_sae, count, device=device)

    def merge(self, score: Tensor, event: Tensor, row: Tensor, value: Tensor) -> None:
        """Merge the best of a batch: ``score`` and ``event`` are [d_sae · contexts]; ``row`` and
        ``value`` belong to the events."""
        d_sae, count = self._score.shape
        # The index -1 picks the appended entry, which stands for "none".
        row = torch.cat([row, row.new_full((1,), NO_ROW)])[event].view(d_sae, -1)
        value = torch.cat([value, value.new_zeros(1)])[event].view(d_sae, -1)
        # A stable sort, with later contexts last: where scores tie, the earlier context stays.
        score, order = torch.cat([self._score, score.view(d_sae, -1)], 1).sort(
            dim=1, descending=True, stable=True
        )
        order = order[:, :count]
        self._score = score[:, :count].contiguous()
        self._row = torch.cat([self._row, row], 1).gather(1, order)
        self._value = torch.cat([self._value, value], 1).gather(1, order)

    def examples(self) -> Examples:
        return Examples(self._row.cpu(), self._value.cpu())


def _best(score: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The highest score in each group and the first event with it; -inf and -1 for an empty
    group."""
    best = score.new_full((num_groups,), -torch.inf).scatter_reduce_(0, group, score, "amax")
    winner = (score == best[group]).nonzero()[:, 0]
    event = group.new_full((num_groups,), len(score))
    event.scatter_reduce_(0, group[winner], winner, "amin")
    return best, event.where(event < len(score), NO_ROW)
