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

Losses are summed over the contexts of each document, and intervals are over documents. A packed
context counts for the document that has most of it; one that names no document is its own.
"""

import sys
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.corpus import TEXT_OF_PART, Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.activations import (
    ActivationCache,
    Context,
    check_scored,
    documents_of,
    massive_thresholds,
    on_device_of,
    stacked,
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
from llm_wsae.evaluation.fidelity.next_token import check_resumable, clean_stream
from llm_wsae.evaluation.fidelity.reconstruction import ReconstructionSums
from llm_wsae.evaluation.fidelity.report import Report
from llm_wsae.evaluation.fidelity.splicing import SiteState, splice_batch
from llm_wsae.evaluation.fidelity.summary import (
    Baselines,
    Key,
    fidelity_of,
    from_plain,
    read_baselines,
)
from llm_wsae.machine.hardware import free_memory, memory_of
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.statistics.documents import TextSize, owners, per_document
from llm_wsae.statistics.uncertainty import Bootstrap


@torch.no_grad()
def evaluate(
    dictionaries: Mapping[str, Dictionary],
    model: LanguageModel,
    text: Corpus | Iterable[Context],
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008 - frozen
) -> Report:
    """Measure every dictionary, by name, on the first ``config.tokens`` rows of ``text``.

    A corpus, best opened as ``Corpus.open(name, part="heldout")``, gives them over its documents
    (``data.sections``), packed into contexts as the dictionaries' training text was; contexts must
    all have one length. Dictionaries may belong to several sites; all see the same text.

    Raises UsageError if there is no dictionary, one does not fit the model, contexts differ in
    length, or none has two rows; LlmWsaeError if the text is too short or an activation is not
    finite.
    """
    check_fit(dictionaries, model, "evaluate")
    if not isinstance(text, Corpus):
        return FidelityEvaluator(model, text, config).evaluate(dictionaries)
    packing = common_packing(dictionaries, model.max_context)
    contexts = Packer.for_model(model, packing).contexts(text)
    report = FidelityEvaluator(model, contexts, config).evaluate(dictionaries)
    report.notes.extend(notes_on_text(dictionaries, text.identity()))
    return replace(report, text=TEXT_OF_PART[text.part])


class FidelityEvaluator:
    """A text on which dictionaries are measured, together or one after the other.

    What depends on the text alone, a site's mean and its ablation losses, is measured once.
    """

    def __init__(self, model: LanguageModel, contexts: Iterable[Context], config: EvaluateConfig):
        """Raises as ``take_contexts`` and ``check_scored`` do."""
        self._model, self._config = model, config
        taken = take_contexts(contexts, config.tokens)
        check_scored(taken)
        self._num_contexts = len(taken)
        documents = documents_of(taken)
        self._size = TextSize.of(np.concatenate(documents))
        self._owner = owners(documents)
        self._cache = ActivationCache(model, *stacked(taken), config.batch_tokens)
        self._baselines: dict[tuple[Site, float], Baselines] = {}
        self._resumable: set[Site] = set()

    @torch.no_grad()
    def evaluate(self, dictionaries: Mapping[str, Dictionary]) -> Report:
        """Measure every dictionary, by name. Raises as the function ``evaluate`` does."""
        check_fit(dictionaries, self._model, "evaluate")
        by_site: dict[Site, dict[str, Dictionary]] = defaultdict(dict)
        for name, dictionary in dictionaries.items():
            by_site[dictionary.site][name] = dictionary
        return self._report(dictionaries, *self._read_text(by_site))

    @torch.no_grad()
    def evaluate_sites(
        self, dictionaries: Mapping[Site, Mapping[str, Dictionary]]
    ) -> Iterator[tuple[Site, Report]]:
        """A report for each site, the same as of its dictionaries alone, from one pass over the
        text for all sites. Sites may use the same names.

        Of dictionaries that must be copied to an accelerator, as many sites share a pass as have
        room there (``sites_together``). Where a pass fails, its sites are measured one after the
        other, and what is raised in the end is the first error of these.
        """
        for own in dictionaries.values() or [{}]:
            check_fit(own, self._model, "evaluate")
        copied = [sum(map(self._copied_bytes, own.values())) for own in dictionaries.values()]
        device = self._model.device
        passes, sites = deque[list[Site]](), list(dictionaries)
        for count in sites_together(copied, memory_of(device), free_memory(device)):
            passes.append(sites[:count])
            del sites[:count]
        failure: LlmWsaeError | None = None
        while passes:
            now = passes.popleft()
            try:
                measured = self._read_text({site: dictionaries[site] for site in now})
                yield from [(site, self._report(dictionaries[site], *measured)) for site in now]
                del measured  # and with it the copies of the dictionaries
            except LlmWsaeError as error:
                failure = failure or (error if len(now) == 1 else None)
                if len(now) > 1:
                    tqdm.write(f"{error}; the sites are evaluated one by one", file=sys.stderr)
                    passes.extendleft([site] for site in reversed(now))
        if failure is not None:
            raise failure

    def _copied_bytes(self, dictionary: Dictionary) -> int:
        is_there = dictionary.W_enc.device == self._model.device
        return 0 if is_there else dictionary.W_enc.nbytes + dictionary.W_dec.nbytes

    def _read_text(
        self, dictionaries: Mapping[Site, Mapping[str, Dictionary]]
    ) -> tuple[dict[Site, SiteState], dict[Key, np.ndarray]]:
        """All sums, and columns of one number per document."""
        sites = self._sites(dictionaries)
        columns: dict[Key, list[Tensor]] = defaultdict(list)
        bar = tqdm(total=self._num_contexts, desc="evaluate", unit="ctx")
        with bar, self._model.prepacked():
            for number, (ids, keep) in enumerate(self._cache.batches):
                activations = self._cache.at(number, list(sites))
                # at each site: the last, where the text is resumed, says nothing of the others
                if number == 0 and (new := sites.keys() - self._resumable):
                    own = {site: activations[site][:1] for site in new}
                    check_resumable(self._model, ids[:1], own)
                    self._resumable |= new
                clean = clean_stream(self._model, self._cache, number, max(sites), activations)
                measured = splice_batch(sites, self._model, ids, keep, activations, clean)
                for key, numbers in measured:
                    columns[key].append(numbers)
                bar.update(len(ids))
        for site, state in sites.items():
            self._baselines[site, state.baselines.threshold] = state.baselines
            columns |= state.baselines.columns
        return sites, {
            key: per_document(torch.cat(parts).numpy(), self._owner)
            for key, parts in columns.items()
        }

    def _report(
        self,
        dictionaries: Mapping[str, Dictionary],
        sites: Mapping[Site, SiteState],
        losses: Mapping[Key, np.ndarray],
    ) -> Report:
        num_documents = int(self._owner.max()) + 1
        bootstrap = Bootstrap(num_documents, self._config.bootstraps, self._config.seed)
        summaries = {
            name: fidelity_of(
                name,
                one.site,
                sites[one.site].sums[name],
                sites[one.site].baselines,
                losses,
                bootstrap,
                self._size,
            )
            for name, one in dictionaries.items()
        }
        return Report(
            model=self._model.identity(),
            config=asdict(self._config),
            num_contexts=self._num_contexts,
            num_scored=int(losses["scored",].sum()),
            scored_per_document=losses["scored",].tolist(),
            dictionaries=summaries,
            from_plain={
                name: from_plain(
                    summaries[name], summaries[plain], dictionaries[name].site, losses, bootstrap
                )
                for name, plain in plain_beside(dictionaries).items()
            },
            notes=[*notes_on_weights(dictionaries, self._model), *self._size.warnings()],
        )

    def _sites(
        self, dictionaries: Mapping[Site, Mapping[str, Dictionary]]
    ) -> dict[Site, SiteState]:
        """The dictionaries by site, on the model's device, with baselines whose mean is known."""
        by_site = {
            site: {name: on_device_of(self._model, one) for name, one in own.items()}
            for site, own in dictionaries.items()
        }
        thresholds = massive_thresholds(
            {site: own.values() for site, own in by_site.items()}, self._cache
        )
        unknown = {s: at for s, at in thresholds.items() if (s, at) not in self._baselines}
        new = read_baselines(unknown, self._cache)
        return {
            site: SiteState(
                dictionaries=own,
                sums={name: ReconstructionSums(d.d_in, d.d_sae) for name, d in own.items()},
                baselines=new[site] if site in new else self._baselines[site, thresholds[site]],
                is_new=site in new,
            )
            for site, own in by_site.items()
        }


def sites_together(copied: Sequence[int], memory: int, free: int) -> list[int]:
    """How many sites, in their order, are measured in each pass over a text: as many as have their
    dictionaries, of ``copied`` bytes at each site, in a quarter of the device's memory and in half
    of what is free of it, and at least one."""
    room = min(memory // 4, free // 2)
    counts, left = [0], room
    for size in copied:
        if counts[-1] and size > left:
            counts.append(0)
            left = room
        counts[-1] += 1
        left -= size
    return counts
