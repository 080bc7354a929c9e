"""A batch of text with other activations at a site: zeros, the mean, or a reconstruction.

Each of these variants runs through the rest of the model. What the last block puts out is kept for
several of them, of all sites, before their predictions are measured: the logits of the model itself
are computed once for all that are kept.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.fidelity.next_token import next_token_sums, scored_positions
from llm_wsae.evaluation.fidelity.reconstruction import ReconstructionSums
from llm_wsae.evaluation.fidelity.summary import Baselines, Key
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

HELD_BYTES = 1 << 29
"""Of the last block's outputs that are in memory together, for the variants of a batch."""


@dataclass
class SiteState:
    """A site's dictionaries, their sums so far, and the site's baselines."""

    dictionaries: dict[str, Dictionary]
    sums: dict[str, ReconstructionSums]
    baselines: Baselines
    is_new: bool
    """Whether the ablation losses are measured in this pass."""


class _Variant(NamedTuple):
    """A batch with something in the place of a site's activations."""

    kind: Literal["zero", "mean", "dictionary"]
    site: Site
    end: Tensor
    """What the last block puts out."""
    name: str = ""
    """Of the dictionary."""
    with_massive: tuple[Tensor, Tensor] | None = None
    """Which contexts have massive rows, if there are any, and what the last block puts out for
    these if their massive rows are replaced too."""


def splice_batch(
    sites: dict[Site, SiteState],
    model: LanguageModel,
    ids: Tensor,
    keep: Tensor,
    activations: Mapping[Site, Tensor],
    clean: Tensor,
) -> Iterator[tuple[Key, Tensor]]:
    """Add a batch to all sums; yields, by key, the numbers per context that are resampled."""
    ids, keep = ids.to(model.device), keep.to(model.device)
    scored = scored_positions(keep)
    yield ("scored",), scored.sum(1).cpu().double()
    variants = _variants(sites, model, ids, keep, activations)
    # the logits of the model itself serve all variants that are in memory together
    for number, some in enumerate(_some_at_a_time(variants)):
        clean_ce, found = next_token_sums(model, clean, [one.end for one in some], ids, scored)
        if number == 0:
            yield ("ce", "clean"), clean_ce
        for variant, (ce, kl) in zip(some, found, strict=True):
            kind, site, name = variant.kind, variant.site, variant.name
            if kind != "dictionary":
                columns = sites[site].baselines.columns
                columns["ce", kind, site].append(ce)
                columns["kl", kind, site].append(kl)
                continue
            yield ("ce", kind, site, name), ce
            yield ("kl", kind, site, name), kl
            if variant.with_massive is not None:
                affected = variant.with_massive[0]
                part = ids[affected], scored[affected]
                _, ((other, _),) = next_token_sums(
                    model, clean[affected], [variant.with_massive[1]], *part
                )
                ce = ce.index_copy(0, affected.cpu(), other)
            yield ("ce", "massive", site, name), ce
        del variant  # so that the next ones take the place of these in memory


def _variants(
    sites: Mapping[Site, SiteState],
    model: LanguageModel,
    ids: Tensor,
    keep: Tensor,
    activations: Mapping[Site, Tensor],
) -> Iterator[_Variant]:
    """What the last block puts out for every variant of a batch; adds it to the sums."""
    for site, state in sites.items():
        hidden, baselines = activations[site], state.baselines
        rows, massive = baselines.split(hidden, keep)
        if state.is_new:
            baselines.rows.update(hidden[rows])
            baselines.massive.update(hidden[massive])
            ablations: dict[Literal["zero", "mean"], Tensor] = {
                "zero": torch.zeros_like(baselines.mean),
                "mean": baselines.mean,
            }
            for kind, value in ablations.items():
                spliced = hidden.clone()
                spliced[rows] = value.to(hidden)
                yield _Variant(kind, site, model.resume_to_end(ids, site, spliced))
        affected = massive.any(1).nonzero()[:, 0]
        for name, dictionary in state.dictionaries.items():
            sums, spliced = state.sums[name], hidden.clone()
            spliced[rows] = sums.update(dictionary, hidden[rows]).to(hidden.dtype)
            variant = _Variant("dictionary", site, model.resume_to_end(ids, site, spliced), name)
            if len(affected):
                spliced[massive] = sums.update_massive(dictionary, hidden[massive]).to(hidden.dtype)
                part = ids[affected], site, spliced[affected]
                variant = variant._replace(with_massive=(affected, model.resume_to_end(*part)))
            yield variant
            del variant


def _some_at_a_time(variants: Iterable[_Variant]) -> Iterator[list[_Variant]]:
    """The variants in lists of ``HELD_BYTES`` or little more, each at least one; a list is emptied
    when the next one is asked for."""
    held: list[_Variant] = []
    size = 0
    for variant in variants:
        held.append(variant)
        size += variant.end.nbytes
        size += 0 if variant.with_massive is None else variant.with_massive[1].nbytes
        del variant
        if size >= HELD_BYTES:
            yield held
            held.clear()
            size = 0
    if held:
        yield held
