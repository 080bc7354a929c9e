"""How faithfully dictionaries stand in for the activations they explain, on held-out text.

Sites are measured one after the other, each in two passes over its activations. The first takes
the mean of the rows. The second runs the rest of the model from the site on: with the activations
as they are, and with each variant in their place (zeros, the mean, every dictionary's
reconstruction). What depends on the text alone is kept for further dictionaries.

Only the rows that training sees are replaced. First positions, special tokens and massive rows
(``ActivationCache.massive_threshold``) keep the model's own activations.

Losses are summed over the contexts of each document, and intervals are over documents. A packed
context counts for the document that has most of it; one that names no document is its own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.corpus import TEXT_OF_PART, Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
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
from llm_wsae.evaluation.fidelity.report import Report
from llm_wsae.evaluation.fidelity.sums import (
    Losses,
    Measured,
    ReconstructionSums,
    SiteRows,
    exact,
    fidelity_of,
    from_plain,
)
from llm_wsae.evaluation.heldout import (
    ActivationCache,
    Context,
    on_device_of,
    stacked,
    take_contexts,
)
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.statistics.documents import TextSize, owners
from llm_wsae.statistics.uncertainty import Bootstrap

# A dictionary, or None for what is of the text alone; and one of the kinds of ``Losses``.
_Key = tuple[str | None, str]
_Variants = dict[_Key, Callable[[Tensor], Tensor]]  # what takes the place of a batch's rows


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
        ids, keep, document = stacked(take_contexts(contexts, config.tokens))
        self._num_contexts = len(ids)
        self._size = TextSize.of(document[keep].numpy())
        self._owner = owners([own[kept].numpy() for own, kept in zip(document, keep, strict=True)])
        num_documents = int(self._owner.max()) + 1
        self._bootstrap = Bootstrap(num_documents, config.bootstraps, config.seed)
        self._cache = ActivationCache(model, ids, keep, config.batch_tokens)
        scored = scored_positions(keep).sum(1).double().numpy()
        self._scored = np.bincount(self._owner, scored)  # of each document
        self._known: dict[tuple[Site, float], SiteRows] = {}

    @torch.no_grad()
    def evaluate(self, dictionaries: Mapping[str, Dictionary]) -> Report:
        """Measure every dictionary, by name. Raises as the function ``evaluate`` does."""
        check_fit(dictionaries, self._model, "evaluate")
        self._cache.read(list(dict.fromkeys(one.site for one in dictionaries.values())))
        return self._report(dictionaries)

    @torch.no_grad()
    def evaluate_sites(
        self, dictionaries: Mapping[Site, Mapping[str, Dictionary]]
    ) -> Iterator[tuple[Site, Report]]:
        """A report for each site, the same as of its dictionaries alone. Sites may use the same
        names. The first error of a site is raised once the others are measured."""
        for own in dictionaries.values():
            check_fit(own, self._model, "evaluate")
        self._cache.read(list(dictionaries))
        failure: LlmWsaeError | None = None
        for site, own in dictionaries.items():
            try:
                report = self._report(own)
            except LlmWsaeError as error:
                failure = failure or error
            else:
                yield site, report
        if failure is not None:
            raise failure

    def _report(self, dictionaries: Mapping[str, Dictionary]) -> Report:
        found: dict[str, Measured] = {}
        for site in dict.fromkeys(one.site for one in dictionaries.values()):
            own = {name: one for name, one in dictionaries.items() if one.site == site}
            found |= self._measure(site, own)
        return Report(
            model=self._model.identity(),
            config=asdict(self._config),
            num_contexts=self._num_contexts,
            num_scored=int(self._scored.sum()),
            scored_per_document=self._scored.tolist(),
            dictionaries={name: found[name].fidelity for name in dictionaries},
            from_plain={
                name: from_plain(found[name], found[plain], self._bootstrap)
                for name, plain in plain_beside(dictionaries).items()
            },
            notes=[*notes_on_weights(dictionaries, self._model), *self._size.warnings()],
        )

    def _measure(self, site: Site, dictionaries: Mapping[str, Dictionary]) -> dict[str, Measured]:
        """A site's dictionaries, by name: one pass over the text, and another where the mean of the
        rows is not known."""
        here = {name: on_device_of(self._model, one) for name, one in dictionaries.items()}
        threshold = self._cache.massive_threshold(site, here.values())
        rows = self._known.get((site, threshold)) or self._about_mean(site, threshold)
        sums = {name: ReconstructionSums(one) for name, one in here.items()}
        by_context = self._splice(site, rows, sums)
        by_document = {key: np.bincount(self._owner, own) for key, own in by_context.items()}

        def of(wanted: str | None) -> Losses:
            return {kind: own for (name, kind), own in by_document.items() if name == wanted}

        rows.losses |= {"scored": self._scored} | of(None)
        self._known[site, threshold] = rows
        return {
            name: fidelity_of(
                name, site, own, rows.losses | of(name), rows, self._bootstrap, self._size
            )
            for name, own in sums.items()
        }

    def _splice(
        self, site: Site, rows: SiteRows, sums: Mapping[str, ReconstructionSums]
    ) -> dict[_Key, np.ndarray]:
        """Adds the text to all sums. Returns cross-entropy and KL of every variant, for each
        context."""
        variants: _Variants = {(name, "spliced"): own.update for name, own in sums.items()}
        is_new = not rows.losses
        if is_new:
            variants[None, "zero"] = torch.zeros_like
            variants[None, "mean"] = lambda x: rows.mean.to(x).expand_as(x)
        columns: dict[_Key, list[Tensor]] = defaultdict(list)
        bar = tqdm(total=self._num_contexts, desc="evaluate", unit="ctx")
        with bar, self._model.prepacked():
            for number, (ids, keep) in enumerate(self._cache.batches):
                hidden = self._cache.at(number, [site])[site]
                keep = keep.to(hidden.device)
                massive = keep & (hidden.float().norm(dim=2) > rows.threshold)
                usual = keep & ~massive
                if is_new:
                    rows.usual.update(hidden[usual])
                    rows.massive.update(hidden[massive])
                for own in sums.values():
                    own.update_massive(hidden[massive])
                for key, numbers in self._losses(number, site, hidden, usual, variants).items():
                    columns[key].append(numbers)
                bar.update(len(ids))
        return {key: torch.cat(parts).numpy() for key, parts in columns.items()}

    def _losses(
        self, number: int, site: Site, hidden: Tensor, usual: Tensor, variants: _Variants
    ) -> dict[_Key, Tensor]:
        """Of each context of a batch, with its ``usual`` rows replaced by every variant."""
        model, end = self._model, Site(self._model.num_blocks - 1, "post")
        ids, keep = (part.to(model.device) for part in self._cache.batches[number])
        # resumed, as every variant is, so a perfect reconstruction gives the same numbers
        clean = self._cache.kept(number, end, lambda: model.resume_to_end(ids, site, hidden))
        ends = []  # what the last block puts out
        for replacement in variants.values():
            spliced = hidden.clone()
            spliced[usual] = replacement(hidden[usual]).to(hidden.dtype)
            ends.append(model.resume_to_end(ids, site, spliced))
        clean_ce, found = next_token_sums(model, clean, ends, ids, scored_positions(keep))
        columns: dict[_Key, Tensor] = {(None, "clean"): clean_ce}
        for (name, kind), (ce, kl) in zip(variants, found, strict=True):
            columns[name, kind], columns[name, f"kl {kind}"] = ce, kl
        return columns

    def _about_mean(self, site: Site, threshold: float) -> SiteRows:
        """Takes the mean of the rows. Raises LlmWsaeError if an activation is not finite, or the
        model cannot be resumed at the site."""
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
        first = self._cache.batches[0][0][:1]
        check_resumable(self._model, first, site, self._cache.at(0, [site])[site][:1])
        return SiteRows(threshold, total / max(count, 1))
