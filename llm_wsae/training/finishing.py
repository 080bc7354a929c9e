"""The last steps of a training through the rest of the model: the error, and the KL divergence of
the model's predictions when it computes with the reconstructions (Karvonen 2025, arXiv 2503.17272).

A step of a finish takes whole contexts. The model runs once for the rows of all sites. Then, for
each dictionary, it runs on from its site, with its reconstructions in place of the rows that
training sees, and back again. KL counts as much as the dictionary's own error at that step, so
neither rules the other, in any units. What a reconstruction x̂ is pulled by, g = ∂KL/∂x̂, enters an
ordinary step as another target (``Arm.step``); so every architecture, weighting and kernel serves.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.data.rows import ActivationSource, SiteSource
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.language_model import LanguageModel, scored_positions
from llm_wsae.model.site import Site, points_of

STEP_ROWS = 512
"""Rows of a step of a finish, about. The model takes nearly all of the time, so that more and
smaller steps cost no more."""
_NUMBERS = 2**25  # of the logits that are held at once


class Text(NamedTuple):
    """Contexts of one step, and the model's own activations there."""

    ids: Int[Tensor, "contexts positions"]
    keep: Bool[Tensor, "contexts positions"]  # which positions give rows
    there: dict[Site, Float[Tensor, "contexts positions d_model"]]

    def rows(self, point: Site) -> Float[Tensor, "rows d_model"]:
        """The rows at a point of one of the sites."""
        return self.there[point][self.keep]


class Replaced(NamedTuple):
    """Reconstructions in the units of the model, which replace the rows that a site writes."""

    site: Site
    rows: Float[Tensor, "rows d_model"]
    usual: Bool[Tensor, " rows"]  # the others, massive ones, are not replaced


class Finish:
    """The text of a finish, and the model behind the sites."""

    def __init__(
        self,
        sources: Sequence[ActivationSource],
        model: LanguageModel | None,
        rows: int,
        batch_size: int,
        seed: int,
    ):
        """``rows``: how many the finish takes, of contexts spread over the text of the sources;
        ``batch_size``: how many ``batch`` gives, about. Raises UsageError if a source has no text,
        or no model is given and the source has none; LlmWsaeError if another model made it."""
        first = sources[0]
        if not isinstance(first, SiteSource):
            raise UsageError("a finish needs the text of a store or stream")
        model = model or first.rows.model
        if model is None:
            raise UsageError(
                "a finish runs the model: name that of the store with --model (in Python: model=)"
            )
        first.rows.check_model(model.identity())
        self._model = model
        sites = [source.site for source in sources]
        self._end = Site(model.num_blocks - 1, "post")
        entrances = [site.writes.entrance for site in sites]
        self._points = list(dict.fromkeys([*points_of(sites), *entrances, self._end]))
        parts = list(first.rows.some_text(rows))
        self._ids, self._keep = (torch.cat(own) for own in zip(*parts, strict=True))
        order = torch.randperm(len(self._ids), generator=torch.Generator().manual_seed(seed))
        self._ids, self._keep = self._ids[order], self._keep[order]
        per_context = max(1.0, float(self._keep.sum()) / len(order))
        self._contexts = max(1, round(STEP_ROWS / per_context))
        self._steps = max(1, round(batch_size / (self._contexts * per_context)))

    def batch(self, number: int) -> Iterator[Text]:
        """The steps of batch ``number`` of the finish; the text is read again when it ends."""
        for step in range(number * self._steps, (number + 1) * self._steps):
            first = step * self._contexts
            chosen = torch.arange(first, first + self._contexts) % len(self._ids)
            ids, keep = self._ids[chosen], self._keep[chosen]
            yield Text(ids, keep, self._model.activations(ids, self._points))

    @torch.no_grad()
    def pulls(
        self, text: Text, replaced: Sequence[Replaced]
    ) -> list[tuple[Float[Tensor, ""], Float[Tensor, "rows d_model"]]]:
        """The mean KL(p ‖ p̂) over the predictions of a step, in nats, with each of these; and its
        gradient by the reconstructions, 0 for rows that are not replaced. Raises LlmWsaeError if
        one is not finite."""
        scored = scored_positions(text.keep)
        vocab, length = self._model.W_U.shape[1], text.ids.shape[1]
        size = max(1, _NUMBERS // (vocab * length))
        sums = [text.there[self._end].new_zeros((), dtype=torch.float32) for _ in replaced]
        parts: list[list[Tensor]] = [[] for _ in replaced]
        first = 0
        for start in range(0, len(text.ids), size):
            some = slice(start, start + size)
            count = int(text.keep[some].sum())
            rows = slice(first, first + count)
            first += count
            clean = self._predictions(text, some, self._end, text.there[self._end][some], scored)
            for number, one in enumerate(replaced):
                hidden = text.there[one.site.writes][some].clone()
                own = hidden[text.keep[some]]
                chosen = one.usual[rows].to(own.device)
                own[chosen] = one.rows[rows].to(own)[chosen]
                hidden[text.keep[some]] = own
                with torch.enable_grad():
                    hidden.requires_grad_()
                    found = self._predictions(text, some, one.site.writes, hidden, scored)
                    kl = F.kl_div(found, clean, reduction="sum", log_target=True)
                    (gradient,) = torch.autograd.grad(kl, hidden)
                sums[number] = sums[number] + kl.detach()
                by_rows = gradient[text.keep[some]].float()
                parts[number].append(by_rows.masked_fill_(~chosen[:, None], 0))
        total = scored.sum().clamp(min=1)
        if not all(bool(one.isfinite()) for one in sums):
            raise LlmWsaeError(
                f"the predictions of {self._model.name} with reconstructions in place are not "
                "finite; load the model in float32 (--model-dtype float32)"
            )
        return [(own / total, torch.cat(p) / total) for own, p in zip(sums, parts, strict=True)]

    def _predictions(
        self, text: Text, some: slice, site: Site, hidden: Tensor, scored: Tensor
    ) -> Float[Tensor, "predictions vocab"]:
        """Log-probabilities of the next token, with ``hidden`` at a site."""
        entrance = None if site.is_of_stream else text.there[site.entrance][some]
        logits = self._model.resume(text.ids[some], site, hidden, entrance)
        return logits[:, :-1][scored[some].to(logits.device)].float().log_softmax(1)
