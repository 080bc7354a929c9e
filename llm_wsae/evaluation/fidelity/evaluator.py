"""How faithfully dictionaries stand in for the activations they explain, on held-out text.

Sites are measured one after the other, each in two passes over its activations. The first takes
the mean of the rows. The second runs the rest of the model from the site on: with the activations
as they are, and with each variant in their place (zeros, the mean, every dictionary's
reconstruction). What depends on the text alone is kept for further dictionaries.

Only the rows that training sees are replaced. First positions, special tokens and massive rows keep
the model's own activations. Massive rows (``ActivationCache.massive_threshold``) are counted, and
where there are any, one more variant replaces them too.

Losses are summed over the contexts of each document, and intervals are over documents. A packed
context counts for the document that has most of it; one that names no document is its own.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
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
    documents_of,
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
from llm_wsae.evaluation.fidelity.next_token import (
    check_resumable,
    next_token_sums,
    scored_positions,
)
from llm_wsae.evaluation.fidelity.reconstruction import ReconstructionSums, SiteRows, exact
from llm_wsae.evaluation.fidelity.report import Fidelity, Losses, Report, fidelity_of, from_plain
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.statistics.documents import TextSize, owners
from llm_wsae.statistics.uncertainty import Bootstrap

_Key = tuple[str | None, str]
"""A dictionary, or None for what is of the text alone; and one of the kinds of ``Losses``."""


@torch.no_grad()
def evaluate(
    dictionaries: Mapping[str, Dictionary],
    model: LanguageModel,
    text: Corpus | Iterable[Context],
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008 - frozen
) -> Report:
    """Measure every dictionary, by name, on the first ``config.tokens`` rows of ``text``.

    A corpus, best opened as ``Corpus.open(name, part="heldout")``, gives them over its documents
    (``data.corpus``), packed into contexts as the dictionaries' training text was; contexts must
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
    """A text on which dictionaries are measured, together or one after the other."""

    def __init__(self, model: LanguageModel, contexts: Iterable[Context], config: EvaluateConfig):
        """Raises as ``take_contexts`` does."""
        self._model, self._config = model, config
        taken = take_contexts(contexts, config.tokens)
        self._num_contexts = len(taken)
        documents = documents_of(taken)
        self._size = TextSize.of(np.concatenate(documents))
        self._owner = owners(documents)
        num_documents = int(self._owner.max()) + 1
        self._bootstrap = Bootstrap(num_documents, config.bootstraps, config.seed)
        self._cache = ActivationCache(model, *stacked(taken), config.batch_tokens)
        self._known: dict[tuple[Site, float], SiteRows] = {}
        self._resumable: set[Site] = set()

    @torch.no_grad()
    def evaluate(self, dictionaries: Mapping[str, Dictionary]) -> Report:
        """Measure every dictionary, by name. Raises as the function ``evaluate`` does."""
        check_fit(dictionaries, self._model, "evaluate")
        sites = list(dict.fromkeys(one.site for one in dictionaries.values()))
        self._cache.read(sites)
        return self._report(dictionaries, sites)

    @torch.no_grad()
    def evaluate_sites(
        self, dictionaries: Mapping[Site, Mapping[str, Dictionary]]
    ) -> Iterator[tuple[Site, Report]]:
        """A report for each site, the same as of its dictionaries alone. Sites may use the same
        names. The first error of a site is raised once the others are measured."""
        for own in dictionaries.values() or [{}]:
            check_fit(own, self._model, "evaluate")
        self._cache.read(list(dictionaries))
        failure: LlmWsaeError | None = None
        for site, own in dictionaries.items():
            try:
                report = self._report(own, [site])
            except LlmWsaeError as error:
                failure = failure or error
            else:
                yield site, report
        if failure is not None:
            raise failure

    def _measure(
        self, site: Site, dictionaries: Mapping[str, Dictionary]
    ) -> tuple[dict[str, Fidelity], dict[str, Losses]]:
        """The fidelity and the losses of a site's dictionaries, by name: one pass over the text,
        and another where the mean of the rows is not known."""
        here = {name: on_device_of(self._model, one) for name, one in dictionaries.items()}
        threshold = self._cache.massive_threshold(site, here.values())
        rows = self._known.get((site, threshold)) or self._about_mean(site, threshold)
        sums = {name: ReconstructionSums(one.d_in, one.d_sae) for name, one in here.items()}
        columns: dict[_Key, list[Tensor]] = defaultdict(list)
        bar = tqdm(total=self._num_contexts, desc="evaluate", unit="ctx")
        with bar, self._model.prepacked():
            for number, (ids, _) in enumerate(self._cache.batches):
                for key, numbers in self._splice(number, site, here, sums, rows).items():
                    columns[key].append(numbers)
                bar.update(len(ids))
        of_text: Losses = {}
        losses: dict[str, Losses] = {name: {} for name in here}
        for (name, kind), parts in columns.items():
            own = of_text if name is None else losses[name]
            own[kind] = np.bincount(self._owner, torch.cat(parts).double().numpy())
        rows.losses |= of_text
        self._known[site, threshold] = rows
        losses = {name: rows.losses | own for name, own in losses.items()}
        given = rows, self._bootstrap, self._size
        fidelity = {n: fidelity_of(n, site, sums[n], own, *given) for n, own in losses.items()}
        return fidelity, losses

    def _splice(
        self,
        number: int,
        site: Site,
        dictionaries: Mapping[str, Dictionary],
        sums: Mapping[str, ReconstructionSums],
        rows: SiteRows,
    ) -> dict[_Key, Tensor]:
        """Adds a batch to all sums. Returns numbers of each context: scored predictions, and
        cross-entropy and KL of every variant."""
        model, hidden = self._model, self._cache.at(number, [site])[site]
        clean = self._clean(number, site, hidden)
        ids, keep = (part.to(model.device) for part in self._cache.batches[number])
        scored = scored_positions(keep)
        massive = keep & (hidden.float().norm(dim=2) > rows.threshold)
        usual, affected = keep & ~massive, massive.any(1).nonzero()[:, 0]
        ends: dict[_Key, Tensor] = {}  # what the last block puts out
        with_massive: dict[_Key, Tensor] = {}  # in the affected contexts, massive rows replaced too
        if not rows.losses:
            rows.usual.update(hidden[usual])
            rows.massive.update(hidden[massive])
            for kind, value in (("zero", torch.zeros_like(rows.mean)), ("mean", rows.mean)):
                spliced = hidden.clone()
                spliced[usual] = value.to(hidden)
                ends[None, kind] = model.resume_to_end(ids, site, spliced)
        for name, one in dictionaries.items():
            spliced = hidden.clone()
            spliced[usual] = sums[name].update(one, hidden[usual]).to(hidden.dtype)
            ends[name, "spliced"] = model.resume_to_end(ids, site, spliced)
            if len(affected):
                spliced[massive] = sums[name].update_massive(one, hidden[massive]).to(hidden.dtype)
                there = spliced[affected]
                with_massive[name, "massive"] = model.resume_to_end(ids[affected], site, there)
        clean_ce, found = next_token_sums(model, clean, list(ends.values()), ids, scored)
        columns: dict[_Key, Tensor] = {
            (None, "scored"): scored.sum(1).cpu().double(),
            (None, "clean"): clean_ce,
        }
        for (of, kind), (ce, kl) in zip(ends, found, strict=True):
            columns[of, kind], columns[of, f"kl {kind}"] = ce, kl
        columns |= {(name, "massive"): columns[name, "spliced"] for name in dictionaries}
        if len(affected):
            part = ids[affected], scored[affected]
            _, found = next_token_sums(model, clean[affected], list(with_massive.values()), *part)
            for key, (ce, _) in zip(with_massive, found, strict=True):
                columns[key] = columns[key].index_copy(0, affected.cpu(), ce)
        return columns

    def _about_mean(self, site: Site, threshold: float) -> SiteRows:
        """Takes the mean of the rows. Raises LlmWsaeError if an activation is not finite."""
        total, count = torch.zeros(()), 0
        batches = tqdm(self._cache.batches, desc="evaluate: means", unit="batch")
        for number, (_, keep) in enumerate(batches):
            hidden = self._cache.at(number, [site])[site]
            keep = keep.to(hidden.device)
            if bad := int((keep & ~torch.isfinite(hidden).all(2)).sum()):
                raise LlmWsaeError(
                    f"{bad} activations of the model at {site} are NaN or infinite; try the model "
                    "in float32 (--model-dtype float32)"
                )
            usual = keep & ~(hidden.float().norm(dim=2) > threshold)
            total = total + exact(hidden[usual]).sum(0)
            count += int(usual.sum())
        return SiteRows(threshold, total / max(count, 1))

    def _clean(self, number: int, site: Site, hidden: Tensor) -> Tensor:
        """The last block's output for a batch, which is kept. It is resumed, as every variant is,
        so a perfect reconstruction gives the same numbers."""
        ids = self._cache.batches[number][0]
        if site not in self._resumable:
            check_resumable(self._model, ids[:1], site, hidden[:1])
            self._resumable.add(site)
        end = Site(self._model.num_blocks - 1, "post")
        stream = self._cache.kept(number, end)
        if stream is None:
            stream = self._model.resume_to_end(ids, site, hidden)
            self._cache.keep(number, end, stream)
        return stream

    def _report(self, dictionaries: Mapping[str, Dictionary], sites: Iterable[Site]) -> Report:
        fidelity: dict[str, Fidelity] = {}
        losses: dict[str, Losses] = {}
        for site in sites:
            own = {name: one for name, one in dictionaries.items() if one.site == site}
            of_site = self._measure(site, own)
            fidelity |= of_site[0]
            losses |= of_site[1]
        scored = next(iter(losses.values()))["scored"]
        return Report(
            model=self._model.identity(),
            config=asdict(self._config),
            num_contexts=self._num_contexts,
            num_scored=int(scored.sum()),
            scored_per_document=scored.tolist(),
            dictionaries={name: fidelity[name] for name in dictionaries},
            from_plain={
                name: from_plain(
                    fidelity[name], fidelity[plain], losses[name], losses[plain], self._bootstrap
                )
                for name, plain in plain_beside(dictionaries).items()
            },
            notes=[*notes_on_weights(dictionaries, self._model), *self._size.warnings()],
        )
