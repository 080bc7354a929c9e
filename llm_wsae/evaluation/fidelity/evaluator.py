"""How faithfully dictionaries stand in for the activations they explain, on held-out text.

Sites are measured one after the other, each in two passes over its activations. The first takes
the mean of the rows. The second runs the rest of the model from the site on: with the activations
as they are, and with each variant in their place (zeros, the mean, every dictionary's
reconstruction; a transcoder's takes the place of what its MLP writes). What depends on the text
alone is kept for further dictionaries.

Only the rows that training sees are replaced. First positions, special tokens and massive rows
(``ActivationCache.massive_threshold``) keep the model's own activations. A handful of massive rows
would dominate every mean, so they are summed apart.

Losses are summed over the contexts of each document, and intervals are over documents. A packed
context counts for the document that has most of it; one that names no document is its own.

The *round trip* decodes real codes z and encodes them again, r = encode(decode(z)). It is theorem 1
of Cui et al. 2026 (arXiv 2506.15963) with a trained dictionary as W_p and its own codes as the true
features. A firing z > 0 *vanishes* where r = 0, and otherwise *shrinks* by (z − r)/z. A latent is
*false* where r > 0 and z = 0. Transcoders, which do not read what they write, have none of it. Sums
are float64.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llm_wsae.attaching import attach
from llm_wsae.data.corpus import TEXT_OF_PART, Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.dictionary.sparsity import to_dense
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.checks import (
    check_fit,
    common_packing,
    notes_on_text,
    notes_on_weights,
    plain_beside,
)
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.next_token import check_resumable, next_token_sums
from llm_wsae.evaluation.fidelity.report import Fidelity, FromPlain, Report, Together
from llm_wsae.evaluation.heldout import (
    ActivationCache,
    Context,
    on_device_of,
    stacked,
    take_contexts,
)
from llm_wsae.model.language_model import LanguageModel, scored_positions
from llm_wsae.model.site import Site, points_of
from llm_wsae.sparse.codes import Codes
from llm_wsae.statistics.uncertainty import Bootstrap, TextSize, owners

_ROWS_AT_ONCE = 256  # made dense to compare their codes
_TOGETHER = 512  # rows in float64 at a time, which stay in a CPU's cache
# One sum for each document: ``scored`` predictions; cross-entropy of the model (``clean``) and of
# its variants (``spliced``, ``zero``, ``mean``); KL of these (``kl spliced``, …).
_Losses = dict[str, np.ndarray]
# A dictionary, or None for what is of the text alone; and one of the kinds of losses.
_Key = tuple[str | None, str]
# What takes the place of a batch's rows, from those that a dictionary reads and those themselves.
_Variants = dict[_Key, Callable[[Tensor, Tensor], Tensor]]


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
        self._known: dict[tuple[Site, float], _SiteRows] = {}

    @torch.no_grad()
    def evaluate(self, dictionaries: Mapping[str, Dictionary]) -> Report:
        """Measure every dictionary, by name. Raises as the function ``evaluate`` does."""
        check_fit(dictionaries, self._model, "evaluate")
        sites = list(dict.fromkeys(one.site for one in dictionaries.values()))
        if len(_needed(sites)) > 1:  # of one alone, the first pass runs the model
            self._cache.read(_needed(sites))
        found: dict[str, Fidelity] = {}
        losses: dict[str, _Losses] = {}
        for site in sites:
            own = {name: one for name, one in dictionaries.items() if one.site == site}
            rows, sums, of_site = self._measure(site, own)
            losses |= of_site
            for name, one in sums.items():
                found[name] = self._fidelity(name, site, rows, one, losses[name])
        return Report(
            model=self._model.identity(),
            config=asdict(self._config),
            num_contexts=self._num_contexts,
            num_scored=int(self._scored.sum()),
            scored_per_document=self._scored.tolist(),
            dictionaries={name: found[name] for name in dictionaries},
            from_plain={
                name: self._from_plain(found[name], found[plain], losses[name], losses[plain])
                for name, plain in plain_beside(dictionaries).items()
            },
            together=self.together(list(dictionaries.values())),
            notes=[*notes_on_weights(dictionaries, self._model), *self._size.warnings()],
        )

    @torch.no_grad()
    def evaluate_sites(
        self, dictionaries: Mapping[Site, Mapping[str, Dictionary]]
    ) -> Iterator[tuple[Site, Report]]:
        """A report for each site, the same as of its dictionaries alone. Sites may use the same
        names. The first error of a site is raised once the others are measured."""
        for own in dictionaries.values():
            check_fit(own, self._model, "evaluate")
        self._cache.read(_needed(list(dictionaries)))
        failure: LlmWsaeError | None = None
        for site, own in dictionaries.items():
            try:
                report = self.evaluate(own)
            except LlmWsaeError as error:
                failure = failure or error
            else:
                yield site, report
        if failure is not None:
            raise failure

    @torch.no_grad()
    def together(self, dictionaries: Iterable[Dictionary]) -> dict[str, Together]:
        """Of the transcoders of several blocks that share a name: the model with all of their MLPs
        replaced. Raises as ``attach`` does."""
        sets: dict[str, dict[Site, Dictionary]] = defaultdict(dict)
        for one in dictionaries:
            if one.site.is_mlp:
                sets[one.info.name].setdefault(one.site, one)
        several = {name: own for name, own in sets.items() if len(own) > 1}
        return {name: self._together(list(own.values())) for name, own in several.items()}

    def _together(self, transcoders: Sequence[Dictionary]) -> Together:
        model, end = self._model, Site(self._model.num_blocks - 1, "post")
        columns: list[Tensor] = []
        bar = tqdm(self._cache.batches, desc="evaluate: all blocks", unit="batch")
        for number, (ids, keep) in enumerate(bar):
            clean = self._cache.at(number, [end])[end]
            with attach(model, transcoders, error=False, keep=keep):
                spliced = model.activations(ids, [end])[end]
            ce, ((other, kl),) = next_token_sums(
                model, clean, [spliced], ids, scored_positions(keep)
            )
            columns.append(torch.stack([ce, other, kl]))
        rows = torch.cat(columns, 1).numpy()
        clean_sum, spliced_sum, kl_sum = (np.bincount(self._owner, own) for own in rows)
        sums, scored = {"kl": kl_sum, "scored": self._scored}, float(self._scored.sum())
        return Together(
            blocks=len(transcoders),
            ce_clean=float(clean_sum.sum()) / scored,
            ce_spliced=float(spliced_sum.sum()) / scored,
            kl=float(kl_sum.sum()) / scored,
            kl_interval=self._bootstrap.interval(lambda t: t["kl"] / t["scored"], sums),
        )

    def _measure(
        self, site: Site, dictionaries: Mapping[str, Dictionary]
    ) -> tuple["_SiteRows", dict[str, "ReconstructionSums"], dict[str, _Losses]]:
        """The rows of a site, and the sums and losses of its dictionaries: one pass over the text,
        and another where the mean of the rows is not known."""
        here = {name: on_device_of(self._model, one) for name, one in dictionaries.items()}
        threshold = self._cache.massive_threshold(site.writes, here.values())
        rows = self._known.get((site, threshold)) or self._about_mean(site, threshold)
        sums = {name: ReconstructionSums(one) for name, one in here.items()}
        by_context = self._splice(site, rows, sums)
        losses: dict[str | None, _Losses] = defaultdict(dict)
        for (name, kind), own in by_context.items():
            losses[name][kind] = np.bincount(self._owner, own)
        rows.losses |= {"scored": self._scored} | losses[None]
        self._known[site, threshold] = rows
        return rows, sums, {name: rows.losses | losses[name] for name in sums}

    def _splice(
        self, site: Site, rows: "_SiteRows", sums: Mapping[str, "ReconstructionSums"]
    ) -> dict[_Key, np.ndarray]:
        """Adds the text to all sums. Returns cross-entropy and KL of every variant, for each
        context."""
        variants: _Variants = {(name, "spliced"): own.update for name, own in sums.items()}
        is_new = not rows.losses
        if is_new:
            variants[None, "zero"] = lambda _, y: torch.zeros_like(y)
            variants[None, "mean"] = lambda _, y: rows.mean.to(y).expand_as(y)
        columns: dict[_Key, list[Tensor]] = defaultdict(list)
        bar = tqdm(total=self._num_contexts, desc="evaluate", unit="ctx")
        with bar, self._model.prepacked():
            for number, (ids, keep) in enumerate(self._cache.batches):
                there = self._cache.at(number, _needed([site]))
                read, hidden = there[site.reads], there[site.writes]
                keep = keep.to(hidden.device)
                usual = keep & self._usual(site, there, rows.threshold)
                massive = keep & ~usual
                if is_new:
                    rows.usual.update(hidden[usual])
                    rows.massive.update(hidden[massive])
                for own in sums.values():
                    own.update_massive(read[massive], hidden[massive])
                for key, numbers in self._losses(number, site, there, usual, variants).items():
                    columns[key].append(numbers)
                bar.update(len(ids))
        return {key: torch.cat(parts).numpy() for key, parts in columns.items()}

    def _losses(
        self,
        number: int,
        site: Site,
        there: Mapping[Site, Tensor],
        usual: Tensor,
        variants: _Variants,
    ) -> dict[_Key, Tensor]:
        """Of each context of a batch, with its ``usual`` rows replaced by every variant."""
        model, end = self._model, Site(self._model.num_blocks - 1, "post")
        ids, keep = (part.to(model.device) for part in self._cache.batches[number])
        # resumed, as every variant is, so a perfect reconstruction gives the same numbers
        place, hidden, entrance = site.writes, there[site.writes], there[site.writes.entrance]

        def resumed(hidden: Tensor) -> Tensor:
            return model.resume_to_end(ids, place, hidden, entrance)

        clean = self._cache.kept(number, end, lambda: resumed(hidden))
        ends = []  # what the last block puts out
        for replacement in variants.values():
            spliced = hidden.clone()
            new = replacement(there[site.reads][usual], hidden[usual])
            spliced[usual] = new.to(hidden.dtype)
            ends.append(resumed(spliced))
        clean_ce, found = next_token_sums(model, clean, ends, ids, scored_positions(keep))
        columns: dict[_Key, Tensor] = {(None, "clean"): clean_ce}
        for (name, kind), (ce, kl) in zip(variants, found, strict=True):
            columns[name, kind], columns[name, f"kl {kind}"] = ce, kl
        return columns

    def _about_mean(self, site: Site, threshold: float) -> "_SiteRows":
        """Takes the mean of the rows. Raises LlmWsaeError if an activation is not finite, the model
        cannot be resumed at the site, or no row is short enough."""
        total, count, whole, site = torch.zeros(()), 0, site, site.writes
        batches = tqdm(self._cache.batches, desc="evaluate: means", unit="batch")
        for number, (_, keep) in enumerate(batches):
            there = self._cache.at(number, points_of([whole]))
            hidden = there[site]
            keep = keep.to(hidden.device)
            if bad := int((keep & ~torch.isfinite(hidden).all(2)).sum()):
                raise LlmWsaeError(
                    f"{bad} activations of the model at {site} are NaN or infinite; try the model "
                    "in float32 (--model-dtype float32)"
                )
            usual = keep & self._usual(whole, there, threshold)
            total = total + _exact(hidden[usual]).sum(0)
            count += int(usual.sum())
        first = self._cache.batches[0][0][:1]
        check_resumable(self._model, first, site, self._cache.at(0, [site])[site][:1])
        if not count:  # its KL would be 0
            raise LlmWsaeError(
                f"every row at {site} is longer than {threshold:g}, the massive_threshold of its "
                "dictionaries, so nothing can be measured; a wsae.json is wrong, or one is for "
                "another model"
            )
        return _SiteRows(threshold, total / count)

    def _usual(self, site: Site, there: Mapping[Site, Tensor], threshold: float) -> Tensor:
        """Which rows are not massive, as in training: neither what is written nor what is read."""
        usual = there[site.writes].float().norm(dim=2) <= threshold
        if site.is_mlp:
            usual &= there[site.reads].float().norm(dim=2) <= self._cache.massive_threshold(
                site.reads, []
            )
        return usual

    def _fidelity(
        self, name: str, site: Site, rows: "_SiteRows", sums: "ReconstructionSums", losses: _Losses
    ) -> Fidelity:
        total = {key: column.sum(keepdims=True) for key, column in losses.items()}

        def per_position(key: str) -> float:
            return float(total[key][0] / total["scored"][0])

        def recovered(sums: Mapping[str, np.ndarray], baseline: str = "zero") -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return (sums[baseline] - sums["spliced"]) / (sums[baseline] - sums["clean"])

        deviation = rows.usual.deviation()
        fvu = _ratio(sums.error, deviation)
        with_massive = rows.usual.deviation(rows.massive)
        return Fidelity(
            name=name,
            site=str(site),
            documents=self._size.documents,
            effective_documents=self._size.effective,
            massive_rows=rows.massive.count,
            massive_threshold=rows.threshold,
            fvu=fvu,
            explained_variance=1 - fvu,
            fvu_with_massive=_ratio(sums.error + sums.massive_error, with_massive),
            **sums.means(),
            ce_clean=per_position("clean"),
            ce_spliced=per_position("spliced"),
            ce_mean_ablated=per_position("mean"),
            ce_zero_ablated=per_position("zero"),
            ce_recovered=float(recovered(total)[0]),
            ce_recovered_interval=self._bootstrap.interval(recovered, losses),
            ce_recovered_mean=float(recovered(total, "mean")[0]),
            kl=per_position("kl spliced"),
            kl_interval=self._bootstrap.interval(lambda t: t["kl spliced"] / t["scored"], losses),
            kl_mean_ablated=per_position("kl mean"),
            kl_zero_ablated=per_position("kl zero"),
            fvu_per_dimension=(sums.error / deviation.where(deviation > 0, torch.nan)).tolist(),
            latent_density=sums.density.tolist(),
            kl_per_document=losses["kl spliced"].tolist(),
        )

    def _from_plain(
        self, one: Fidelity, plain: Fidelity, losses: _Losses, of_plain: _Losses
    ) -> FromPlain:
        """The difference of two dictionaries of a site, with intervals of the difference itself."""
        used = {
            "scored": losses["scored"],
            "range": losses["zero"] - losses["clean"],
            "ce": of_plain["spliced"] - losses["spliced"],
            "kl": losses["kl spliced"] - of_plain["kl spliced"],
        }
        return FromPlain(
            plain=plain.name,
            fvu=one.fvu - plain.fvu,
            ce_recovered=one.ce_recovered - plain.ce_recovered,
            ce_recovered_interval=self._bootstrap.interval(lambda t: t["ce"] / t["range"], used),
            kl=one.kl - plain.kl,
            kl_interval=self._bootstrap.interval(lambda t: t["kl"] / t["scored"], used),
        )


class Moments:
    """Count, sum and squared sum of rows about a fixed centre, which avoids cancellation."""

    def __init__(self, centre: Float[Tensor, " d_in"]):
        self.centre, self.count = centre, 0
        self.sum, self.square = torch.zeros_like(centre), torch.zeros_like(centre)

    def update(self, rows: Float[Tensor, "rows d_in"]) -> None:
        """Add rows."""
        x = _exact(rows) - self.centre
        self.count += len(x)
        self.sum += x.sum(0)
        self.square += x.square().sum(0)

    def deviation(self, other: "Moments | None" = None) -> Float[Tensor, " d_in"]:
        """Σ (x − mean)² of every dimension, over these rows or over these and ``other``'s."""
        count, total, square = self.count, self.sum, self.square
        if other is not None:
            count, total, square = count + other.count, total + other.sum, square + other.square
        return square - total.square() / max(count, 1)


class _SiteRows:
    """The rows of a site, massive ones apart, and the losses of the text alone, which are empty
    until a pass over it has measured them."""

    def __init__(self, threshold: float, mean: Float[Tensor, " d_in"]):
        self.threshold, self.mean = threshold, mean
        self.usual, self.massive = Moments(mean), Moments(mean)
        self.losses: _Losses = {}


class ReconstructionSums:
    """Sums over a dictionary's reconstructions of the rows of its site."""

    def __init__(self, dictionary: Dictionary):
        self._dictionary, d_in, d_sae = dictionary, dictionary.d_in, dictionary.d_sae
        self._count = 0
        self.error = torch.zeros(d_in, dtype=torch.float64)
        self.massive_error = torch.zeros(d_in, dtype=torch.float64)
        self._cosine = self._l2_ratio = 0.0
        self._firings = torch.zeros(d_sae, dtype=torch.int64)  # rows on which each latent fires
        self._survivors = self._false = 0
        self._lost = torch.zeros(d_sae, dtype=torch.float64)  # Σ (z − r)/z of what does not vanish

    @torch.no_grad()
    def update(
        self, x: Float[Tensor, "rows d_in"], y: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows d_in"]:
        """Reconstruct rows y from rows x, which are the same for an autoencoder; add them to every
        sum, and return the reconstruction."""
        codes = self._dictionary.encode_sparse(x)
        reconstruction = self._dictionary.decode(codes, x)
        for one, other in zip(y.split(_TOGETHER), reconstruction.split(_TOGETHER), strict=True):
            self._compare(_exact(one), _exact(other))
        if self._dictionary.site.is_mlp:
            fires = codes.indices[codes.values > 0].cpu()
            self._firings += torch.bincount(fires, minlength=len(self._firings))
            return reconstruction
        again = self._dictionary.encode_sparse(reconstruction)
        parts = [part.split(_ROWS_AT_ONCE) for part in (*codes, *again)]
        for z_latents, z, r_latents, r in zip(*parts, strict=True):
            self._compare_codes(Codes(z_latents, z), Codes(r_latents, r))
        return reconstruction

    @torch.no_grad()
    def update_massive(self, x: Float[Tensor, "rows d_in"], y: Float[Tensor, "rows d_in"]) -> None:
        """Add massive rows, which only count in ``massive_error``."""
        if len(x):
            self.massive_error += (_exact(y) - _exact(self._dictionary(x))).square().sum(0)

    def _compare(self, x: Tensor, y: Tensor) -> None:
        self._count += len(x)
        self.error += (x - y).square().sum(0)
        norm_x, norm_y = x.norm(dim=1), y.norm(dim=1)
        # The bound only guards the quotient of an all-zero row.
        self._cosine += float(((x * y).sum(1) / (norm_x * norm_y).clamp(min=1e-300)).sum())
        self._l2_ratio += float((norm_y / norm_x.clamp(min=1e-300)).sum())

    def _compare_codes(self, z: Codes, r: Codes) -> None:
        d_sae, fires = len(self._firings), z.values > 0
        latent, before = z.indices[fires].cpu(), z.values[fires].cpu().double()
        after = to_dense(r, d_sae).gather(1, z.indices)[fires].cpu().double()
        survives = after > 0
        self._firings += torch.bincount(latent, minlength=d_sae)
        self._survivors += int(survives.sum())
        was_silent = to_dense(z, d_sae).gather(1, r.indices) == 0
        self._false += int(((r.values > 0) & was_silent).sum())
        self._lost.index_add_(0, latent[survives], 1 - after[survives] / before[survives])

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the rows on which each latent fires."""
        return self._firings.double() / max(self._count, 1)

    def means(self) -> dict[str, Any]:
        """The fields of ``Fidelity`` that are of the reconstructions alone; NaN where the round
        trip has no firings."""
        rows, firings, survivors = max(self._count, 1), int(self._firings.sum()), self._survivors
        is_mlp = self._dictionary.site.is_mlp
        return {
            "rows": self._count,
            "cosine": self._cosine / rows,
            "l2_ratio": self._l2_ratio / rows,
            "l0": float(self.density.sum()),
            "dead_share": float((self._firings == 0).double().mean()),
            "dense_share": float((self.density > DENSE_DENSITY).double().mean()),
            "vanished": 1 - survivors / firings if firings and not is_mlp else math.nan,
            "shrunk": float(self._lost.sum()) / survivors if survivors else math.nan,
            "false_latents": math.nan if is_mlp else self._false / rows,
        }


def _needed(sites: Sequence[Site]) -> list[Site]:
    """Where activations are needed to measure dictionaries of these sites."""
    points = points_of(sites)
    return list(dict.fromkeys([*(site.writes.entrance for site in sites), *points]))


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in float64 on the CPU (not every accelerator has float64)."""
    return tensor.detach().cpu().double()


def _ratio(error: Tensor, deviation: Tensor) -> float:
    """The fraction of variance unexplained; NaN for constant rows."""
    total = float(deviation.sum())
    return float(error.sum()) / total if total > 0 else math.nan
