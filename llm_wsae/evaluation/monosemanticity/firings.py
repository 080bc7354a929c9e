"""Where every latent fires: its top contexts, a uniform sample, and the windows where it does not.

One pass over the rows, for all latents at once. A batch's sparse codes are reduced to the best
firing of each latent in each context, and these are merged with the best so far, so memory is
latents × contexts kept, never latents × tokens. For the top contexts, "best" is the largest
activation. For the sample it is the smallest of random numbers drawn once per row. A latent's
sample is then uniform over its firings (one per context), does not depend on the cut into batches,
and uses the same rows for many latents and dictionaries, so few windows have to be embedded.

Only one firing per context counts, because neighbouring firings share their text: ten windows of
one paragraph would agree with each other whatever the latent stands for.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.evaluation.heldout import OUTSIDE, HeldoutText
from llm_wsae.sparse.codes import Codes

NO_ROW = -1


class Examples(NamedTuple):
    """Up to n rows per latent, each from another context."""

    rows: Int[Tensor, "d_sae n"]
    """Row numbers, -1 where there are no more."""
    values: Float[Tensor, "d_sae n"]
    """The latent's activation there, 0 where there is no row."""


class Firings(NamedTuple):
    """What one dictionary's latents do on a text. All on the CPU."""

    num_rows: int
    """Encoded rows; massive rows are not encoded."""
    counts: Int[Tensor, " d_sae"]
    """Number of rows on which each latent fires."""
    contexts: Int[Tensor, " d_sae"]
    """Number of contexts in which it fires."""
    top: Examples
    """Largest activations in descending order; the earlier context first where they tie."""
    sample: Examples
    """Uniformly drawn firings, in the order of the draw."""
    fired: Bool[Tensor, "windows d_sae"]
    """Whether the latent fires anywhere in each of the random windows."""

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of rows on which each latent fires."""
        return self.counts.double() / max(self.num_rows, 1)


class FiringCollector:
    """Collects the ``Firings`` of one dictionary, batch by batch, on the device of its codes."""

    def __init__(
        self,
        text: HeldoutText,
        windows: Int[Tensor, "windows width"],
        d_sae: int,
        top: int,
        sample: int,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        """``windows`` are the positions of the random windows, each within one context."""
        self._text = text
        self._windows = windows
        self._window_context = windows.amax(1) // text.ids.shape[1]
        self._d_sae = d_sae
        self._device = torch.device(device)
        order = torch.randperm(text.num_rows, generator=torch.Generator().manual_seed(seed))
        # as scores: the higher, the earlier in the draw
        self._drawn = -order.float().to(self._device)
        self._top = _Best(d_sae, top, self._device)
        self._sample = _Best(d_sae, sample, self._device)
        self._num_rows = 0
        self._counts = torch.zeros(d_sae, dtype=torch.int64, device=self._device)
        self._contexts = torch.zeros(d_sae, dtype=torch.int64, device=self._device)
        self._fired = torch.zeros(len(windows), d_sae, dtype=torch.bool, device=self._device)

    def add(self, codes: Codes, contexts: slice, encoded: Bool[Tensor, " rows"]) -> None:
        """Add the codes of all rows of the contexts; rows not marked in ``encoded`` are ignored."""
        first = int(self._text.first_row[contexts.start])
        active = (codes.values > 0) & encoded[:, None]
        local, slot = active.nonzero(as_tuple=True)
        latent, value = codes.indices[local, slot], codes.values[local, slot].float()
        row = local + first
        context = self._text.context.to(self._device)[row] - contexts.start
        width = contexts.stop - contexts.start
        group = latent * width + context
        self._num_rows += int(encoded.sum())
        self._counts += torch.bincount(latent, minlength=self._d_sae)
        score, event = _best(value, group, self._d_sae * width)
        self._contexts += (event != NO_ROW).view(self._d_sae, width).sum(1)
        self._top.merge(score, event, row, value)
        self._sample.merge(*_best(self._drawn[row], group, self._d_sae * width), row, value)
        self._mark_windows(codes.indices, active, contexts, first)

    def _mark_windows(self, indices: Tensor, active: Tensor, contexts: slice, first: int) -> None:
        here = (self._window_context >= contexts.start) & (self._window_context < contexts.stop)
        number = here.nonzero()[:, 0]
        cells = self._windows[number]
        row = self._text.row_at[cells].where(cells != OUTSIDE, OUTSIDE)
        member, at = (row != OUTSIDE).nonzero(as_tuple=True)
        local = (row[member, at] - first).to(self._device)
        event, slot = active[local].nonzero(as_tuple=True)
        self._fired[number[member].to(self._device)[event], indices[local[event], slot]] = True

    def firings(self) -> Firings:
        """The firings collected so far."""
        return Firings(
            self._num_rows,
            self._counts.cpu(),
            self._contexts.cpu(),
            self._top.examples(),
            self._sample.examples(),
            self._fired.cpu(),
        )


def quantile_sample(firings: Firings, text: HeldoutText, count: int) -> Examples:
    """``count`` of the sampled firings outside the top contexts, evenly spread over the ranks of
    their values; all of them if a latent has fewer."""
    top, rows = (_contexts_of(text, examples) for examples in (firings.top, firings.sample))
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
    top_contexts = _contexts_of(text, Examples(*(one[latents] for one in firings.top)))
    for top in top_contexts.T:  # one at a time, to save memory
        silent &= top[:, None] != context
    return silent


def _contexts_of(text: HeldoutText, examples: Examples) -> Tensor:
    return text.context[examples.rows].where(examples.rows != NO_ROW, NO_ROW)


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
