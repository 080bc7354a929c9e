"""How faithfully dictionaries stand in for the activations they explain, on held-out text.

The text is read twice. The first pass runs the model up to the last site and takes the mean of the
rows: mean ablation puts it in their place, and the variance is taken about it. The second pass runs
the rest of the model from each site on: with the activations as they are, and with each variant in
their place (zeros, the mean, every dictionary's reconstruction). Activations are cached
(``ActivationCache``), so the part of the model before a site runs once, and further dictionaries
on the same text need neither the first pass nor the ablations again (``FidelityEvaluator``).

Only the rows that training sees are replaced. First positions, special tokens and massive rows
(``massive_thresholds``) keep the model's own activations. Massive rows are counted, and where there
are any, one more variant replaces them too.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.evaluation.activations import (
    ActivationCache,
    Context,
    batches_of,
    massive_thresholds,
    take_contexts,
)
from llm_wsae.evaluation.checks import (
    check_fit,
    common_packing,
    notes_on_text,
    notes_on_weights,
    plain_beside,
)
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.next_token import (
    clean_stream,
    next_token_sums,
    scored_positions,
)
from llm_wsae.evaluation.fidelity.reconstruction import ReconstructionSums
from llm_wsae.evaluation.fidelity.report import Report
from llm_wsae.evaluation.fidelity.summary import (
    Baselines,
    Key,
    fidelity_of,
    from_plain,
    read_baselines,
)
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.statistics.uncertainty import Bootstrap

_FEW_CONTEXTS = 30  # with fewer, bootstrap intervals are too narrow


@torch.no_grad()
def evaluate(
    dictionaries: Mapping[str, Dictionary],
    model: LanguageModel,
    text: Corpus | Iterable[Context],
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008 - frozen
) -> Report:
    """Measure every dictionary, by name, on the first ``config.tokens`` rows of ``text``.

    A corpus, best opened as ``Corpus.open(name, part="heldout")``, is packed into contexts as the
    dictionaries' training text was. Dictionaries may belong to several sites; all see the same
    text. Raises UsageError if there is no dictionary or one does not fit the model, LlmWsaeError if
    the text is too short or an activation is not finite.
    """
    check_fit(dictionaries, model, "evaluate")
    if not isinstance(text, Corpus):
        return FidelityEvaluator(model, text, config).evaluate(dictionaries)
    packing = common_packing(dictionaries, model.max_context)
    contexts = Packer.for_model(model, packing).contexts(text)
    report = FidelityEvaluator(model, contexts, config).evaluate(dictionaries)
    report.notes.extend(notes_on_text(dictionaries, text.identity()))
    return report


@dataclass
class _SiteState:
    """A site's dictionaries, their sums so far, and the site's baselines."""

    dictionaries: dict[str, Dictionary]
    sums: dict[str, ReconstructionSums]
    baselines: Baselines
    is_new: bool
    """Whether the ablation losses are measured in this pass."""


class FidelityEvaluator:
    """A text on which dictionaries are measured, together or one after the other.

    What depends on the text alone, a site's mean and its ablation losses, is measured once.
    """

    def __init__(self, model: LanguageModel, contexts: Iterable[Context], config: EvaluateConfig):
        """Raises LlmWsaeError if the text is too short."""
        self._model, self._config = model, config
        taken = take_contexts(contexts, config.tokens)
        self._num_contexts = len(taken)
        self._cache = ActivationCache(model, batches_of(taken, config.batch_tokens))
        self._baselines: dict[tuple[Site, float], Baselines] = {}

    @torch.no_grad()
    def evaluate(self, dictionaries: Mapping[str, Dictionary]) -> Report:
        """Measure every dictionary, by name. Raises as the function ``evaluate`` does."""
        check_fit(dictionaries, self._model, "evaluate")
        sites = self._sites(dictionaries)
        columns: dict[Key, list[Tensor]] = defaultdict(list)
        with tqdm(total=self._num_contexts, desc="evaluate", unit="ctx") as bar:
            for number, (ids, keep) in enumerate(self._cache.batches):
                activations = self._cache.at(number, list(sites))
                clean = clean_stream(self._model, self._cache, number, max(sites), activations)
                measured = _evaluate_batch(sites, self._model, ids, keep, activations, clean)
                for key, numbers in measured:
                    columns[key].append(numbers)
                bar.update(len(ids))
        for site, state in sites.items():
            self._baselines[site, state.baselines.threshold] = state.baselines
            columns |= state.baselines.columns
        losses = {key: torch.cat(parts).numpy() for key, parts in columns.items()}
        bootstrap = Bootstrap(self._num_contexts, self._config.bootstraps, self._config.seed)
        summaries = {
            name: fidelity_of(name, site, sums, state.baselines, losses, bootstrap)
            for site, state in sites.items()
            for name, sums in state.sums.items()
        }
        return Report(
            model=self._model.identity(),
            config=asdict(self._config),
            num_contexts=self._num_contexts,
            num_scored=int(losses["scored",].sum()),
            dictionaries={name: summaries[name] for name in dictionaries},
            from_plain={
                name: from_plain(
                    summaries[name], summaries[plain], dictionaries[name].site, losses, bootstrap
                )
                for name, plain in plain_beside(dictionaries).items()
            },
            notes=_notes(dictionaries, self._model, self._num_contexts),
        )

    def _sites(self, dictionaries: Mapping[str, Dictionary]) -> dict[Site, _SiteState]:
        """The dictionaries by site, on the model's device, with baselines whose mean is known."""
        by_site: dict[Site, dict[str, Dictionary]] = defaultdict(dict)
        for name, dictionary in dictionaries.items():
            if dictionary.W_enc.device != self._model.device:
                dictionary = copy.deepcopy(dictionary).to(self._model.device)
            by_site[dictionary.site][name] = dictionary
        thresholds = massive_thresholds(
            {site: own.values() for site, own in by_site.items()}, self._cache
        )
        unknown = {s: at for s, at in thresholds.items() if (s, at) not in self._baselines}
        new = read_baselines(unknown, self._cache)
        return {
            site: _SiteState(
                dictionaries=own,
                sums={name: ReconstructionSums(d.d_in, d.d_sae) for name, d in own.items()},
                baselines=new[site] if site in new else self._baselines[site, thresholds[site]],
                is_new=site in new,
            )
            for site, own in by_site.items()
        }


def _evaluate_batch(
    sites: dict[Site, _SiteState],
    model: LanguageModel,
    ids: Tensor,
    keep: Tensor,
    activations: Mapping[Site, Tensor],
    clean: Tensor,
) -> Iterator[tuple[Key, Tensor]]:
    """Add a batch to all sums; yields, by key, the numbers per context that are resampled."""
    ids, keep = ids.to(model.device), keep.to(model.device)
    scored = scored_positions(keep)
    variants: dict[tuple[str, str | Site], Tensor] = {}  # what the last block puts out
    with_massive: dict[str, tuple[Tensor, Tensor]] = {}  # which contexts, and the same of them
    for site, state in sites.items():
        hidden, baselines = activations[site], state.baselines
        rows, massive = baselines.split(hidden, keep)
        if state.is_new:
            baselines.rows.update(hidden[rows])
            baselines.massive.update(hidden[massive])
            for name, value in (
                ("zero", torch.zeros_like(baselines.mean)),
                ("mean", baselines.mean),
            ):
                spliced = hidden.clone()
                spliced[rows] = value.to(hidden)
                variants[name, site] = model.resume_to_end(ids, site, spliced)
        for name, dictionary in state.dictionaries.items():
            sums, spliced = state.sums[name], hidden.clone()
            spliced[rows] = sums.update(dictionary, hidden[rows]).to(hidden.dtype)
            variants["dictionary", name] = model.resume_to_end(ids, site, spliced)
            affected = massive.any(1).nonzero()[:, 0]
            if len(affected):
                spliced[massive] = sums.update_massive(dictionary, hidden[massive]).to(hidden.dtype)
                end = model.resume_to_end(ids[affected], site, spliced[affected])
                with_massive[name] = affected, end
    clean_ce, found = next_token_sums(model, clean, list(variants.values()), ids, scored)
    yield ("scored",), scored.sum(1).cpu().double()
    yield ("ce", "clean"), clean_ce
    for (kind, of), (ce, kl) in zip(variants, found, strict=True):
        if isinstance(of, Site):
            sites[of].baselines.columns["ce", kind, of].append(ce)
            sites[of].baselines.columns["kl", kind, of].append(kl)
            continue
        yield ("ce", kind, of), ce
        yield ("kl", kind, of), kl
        if of in with_massive:
            affected, end = with_massive[of]
            part = ids[affected], scored[affected]
            ((other, _),) = next_token_sums(model, clean[affected], [end], *part)[1]
            ce = ce.index_copy(0, affected.cpu(), other)
        yield ("ce", "massive", of), ce


def _notes(
    dictionaries: Mapping[str, Dictionary], model: LanguageModel, num_contexts: int
) -> list[str]:
    notes = notes_on_weights(dictionaries, model)
    if num_contexts < _FEW_CONTEXTS:
        notes.append(f"{num_contexts} contexts are few: the intervals are too narrow")
    return notes
