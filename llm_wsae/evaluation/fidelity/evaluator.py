"""How faithfully dictionaries stand in for the activations they explain, on held-out text.

Two readings of the same contexts. The first runs the model up to the last site and takes the mean
of the rows: the constant that mean ablation puts in their place and about which variance is taken.
The second runs only the part behind a site: with the activations as they are, and with every
variant in their place (zeros, the mean, every dictionary). Activations are kept where there is
room, so that the part before the site runs once. More dictionaries on the same contexts need
neither the first reading nor zeros, the mean and the clean blocks again (``FidelityEvaluator``).

What is replaced is what training saw: kept positions that are not massive activations. First
positions, special tokens and massive rows keep the clean activation. Massive rows are judged by
the threshold that training used (where a dictionary does not know it, ten times the rows' median
norm, for which the contexts are read once more), are counted, and are put in, in one variant more,
wherever there are any.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.activation_cache import Streams
from llm_wsae.evaluation.bootstrap import Bootstrap
from llm_wsae.evaluation.checks import check_fit, notes_on_weights
from llm_wsae.evaluation.fidelity.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.next_token import next_token_sums, scored_positions
from llm_wsae.evaluation.fidelity.reconstruction import Moments, ReconstructionSums, exact, ratio
from llm_wsae.evaluation.fidelity.report import Fidelity, Report
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import MASSIVE_RATIO

# What a number per context counts: ("scored",), ("ce", "clean"), ("kl", "zero", site), …
Key = tuple[str | Site, ...]


@runtime_checkable
class Context(Protocol):
    """What is read of a context: token ids and which positions are kept, both [positions]."""

    ids: np.ndarray | Tensor
    keep: np.ndarray | Tensor


@torch.no_grad()
def evaluate(
    dictionaries: Mapping[str, Dictionary],
    model: LanguageModel,
    contexts: Iterable[Context],
    config: EvaluateConfig,
) -> Report:
    """Measure every dictionary, by name, on the first ``config.tokens`` rows of ``contexts``.

    Dictionaries may belong to several sites; all see the same text. Raises UsageError if there is
    no dictionary or one does not fit the model, LlmWsaeError if the text is too short or an
    activation is not finite.
    """
    check_fit(dictionaries, model, "evaluate")
    return FidelityEvaluator(model, contexts, config).evaluate(dictionaries)


@dataclass
class _Baselines:
    """What is known of a site's rows without any dictionary."""

    threshold: float
    """Norm above which a row is massive."""
    total: Tensor
    """Σ of the rows [d_in], float64."""
    count: int = 0
    rows: Moments | None = None
    massive: Moments | None = None
    columns: dict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """What zeros, and the mean, in place of the rows cost."""

    @property
    def mean(self) -> Tensor:
        """Mean of the rows [d_in], float64."""
        return self.total / max(self.count, 1)

    def split(self, hidden: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Masks [contexts, positions] of the rows to measure and of the massive ones."""
        massive = keep & (hidden.float().norm(dim=2) > self.threshold)
        return keep & ~massive, massive


@dataclass
class _SiteState:
    """A site's dictionaries, what they made of its rows, and its baselines."""

    dictionaries: dict[str, Dictionary]
    made: dict[str, ReconstructionSums]
    baselines: _Baselines
    is_new: bool
    """Whether the baselines are measured in this pass."""


class FidelityEvaluator:
    """Contexts to measure dictionaries on, some after others.

    What hangs on the text alone, a site's mean and its ablations, is measured once.
    """

    def __init__(self, model: LanguageModel, contexts: Iterable[Context], config: EvaluateConfig):
        """Raises LlmWsaeError if the text is too short."""
        self._model, self._config = model, config
        taken = take_contexts(contexts, config.tokens)
        self._num_contexts = len(taken)
        self._batches = _batches(taken, config)
        self._streams = Streams(model, [ids for ids, _ in self._batches])
        self._medians: dict[Site, float] = {}
        self._known: dict[tuple[Site, float], _Baselines] = {}

    @torch.no_grad()
    def evaluate(self, dictionaries: Mapping[str, Dictionary]) -> Report:
        """Measure every dictionary, by name. Raises as the function ``evaluate`` does."""
        check_fit(dictionaries, self._model, "evaluate")
        sites = self._sites(dictionaries)
        columns: dict[Key, list[Tensor]] = defaultdict(list)
        with tqdm(total=self._num_contexts, desc="evaluate", unit="ctx") as bar:
            for number, (ids, keep) in enumerate(self._batches):
                activations = self._streams.at(number, list(sites))
                clean = self._streams.clean_logits(number, max(sites), activations)
                found = _evaluate_batch(sites, self._model, ids, keep, activations, clean)
                for key, numbers in found:
                    columns[key].append(numbers)
                bar.update(len(ids))
        for site, state in sites.items():
            self._known[site, state.baselines.threshold] = state.baselines
            columns |= state.baselines.columns
        sums = {key: torch.cat(parts).numpy() for key, parts in columns.items()}
        bootstrap = Bootstrap(self._num_contexts, self._config.bootstraps, self._config.seed)
        measured = {
            name: _fidelity(name, site, state, sums, bootstrap)
            for site, state in sites.items()
            for name in state.dictionaries
        }
        return Report(
            model=self._model.identity(),
            config=asdict(self._config),
            num_contexts=self._num_contexts,
            num_scored=int(sums["scored",].sum()),
            dictionaries={name: measured[name] for name in dictionaries},
            notes=_notes(dictionaries, self._model, self._num_contexts),
        )

    def _sites(self, dictionaries: Mapping[str, Dictionary]) -> dict[Site, _SiteState]:
        """The dictionaries by site, on the model's device, with baselines whose mean is known."""
        by_site: dict[Site, dict[str, Dictionary]] = defaultdict(dict)
        for name, dictionary in dictionaries.items():
            if dictionary.W_enc.device != self._model.device:
                dictionary = copy.deepcopy(dictionary).to(self._model.device)
            by_site[dictionary.site][name] = dictionary
        self._read_medians(by_site)
        sites = {}
        for site, own in by_site.items():
            # one mask for all dictionaries of a site, so that they compare
            thresholds = [d.info.massive_threshold for d in own.values()]
            known = [threshold for threshold in thresholds if threshold is not None]
            threshold = min(known) if known else MASSIVE_RATIO * self._medians[site]
            found = self._known.get((site, threshold))
            made = {name: ReconstructionSums(d.d_in, d.d_sae) for name, d in own.items()}
            empty = torch.zeros(self._model.d_model, dtype=torch.float64)
            baselines = found or _Baselines(threshold, empty)
            sites[site] = _SiteState(own, made, baselines, is_new=found is None)
        self._read_means({site: s.baselines for site, s in sites.items() if s.is_new})
        return sites

    def _read_medians(self, by_site: Mapping[Site, Mapping[str, Dictionary]]) -> None:
        """Median norms of the sites whose dictionaries know no threshold."""
        norms: dict[Site, list[Tensor]] = {
            site: []
            for site, own in by_site.items()
            if site not in self._medians
            and all(d.info.massive_threshold is None for d in own.values())
        }
        if not norms:
            return
        for number, (_, keep) in enumerate(
            tqdm(self._batches, desc="evaluate: norms", unit="batch")
        ):
            for site, hidden in self._streams.at(number, list(norms)).items():
                norms[site].append(hidden[keep.to(hidden.device)].float().norm(dim=1).cpu())
        for site, parts in norms.items():
            self._medians[site] = float(torch.cat(parts).median())

    def _read_means(self, sites: Mapping[Site, _Baselines]) -> None:
        """Take the mean of every site's rows, and set up the sums about it."""
        if not sites:
            return
        for number, (_, keep) in enumerate(
            tqdm(self._batches, desc="evaluate: means", unit="batch")
        ):
            for site, hidden in self._streams.at(number, list(sites)).items():
                _check_finite(hidden, keep, site)
                rows, _ = sites[site].split(hidden, keep.to(hidden.device))
                sites[site].total += exact(hidden[rows]).sum(0)
                sites[site].count += int(rows.sum())
        for baselines in sites.values():
            baselines.rows, baselines.massive = Moments(baselines.mean), Moments(baselines.mean)


def take_contexts(contexts: Iterable[Context], tokens: int) -> list[Context]:
    """The first contexts, two at least, that hold ``tokens`` rows.

    Raises LlmWsaeError if there are too few.
    """
    taken, rows = [], 0
    for context in contexts:
        taken.append(context)
        rows += int(context.keep.sum())
        if rows >= tokens and len(taken) >= 2:
            break
    if rows < tokens or len(taken) < 2:
        raise LlmWsaeError(
            f"the text to evaluate on holds {rows:,} tokens in {len(taken)} contexts, but "
            f"{tokens:,} tokens in at least 2 contexts are needed; ask for fewer tokens or "
            "give more text"
        )
    return taken


def _batches(contexts: list[Context], config: EvaluateConfig) -> list[tuple[Tensor, Tensor]]:
    """The contexts as (ids, keep) batches."""
    ids = [torch.as_tensor(context.ids).long() for context in contexts]
    keep = [torch.as_tensor(context.keep).bool() for context in contexts]
    size = max(1, config.batch_tokens // len(ids[0]))
    return [
        (torch.stack(ids[at : at + size]), torch.stack(keep[at : at + size]))
        for at in range(0, len(ids), size)
    ]


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
    yield ("scored",), scored.sum(1).cpu().double()
    yield ("ce", "clean"), next_token_sums(clean, clean, ids, scored)[0]
    for site, state in sites.items():
        hidden = activations[site]
        rows, massive = state.baselines.split(hidden, keep)
        if state.is_new:
            state.baselines.rows.update(hidden[rows])
            state.baselines.massive.update(hidden[massive])
            for baseline, value in (
                ("zero", torch.zeros_like(state.baselines.total)),
                ("mean", state.baselines.mean),
            ):
                spliced = hidden.clone()
                spliced[rows] = value.to(hidden)
                ce, kl = next_token_sums(model.resume(ids, site, spliced), clean, ids, scored)
                state.baselines.columns["ce", baseline, site].append(ce)
                state.baselines.columns["kl", baseline, site].append(kl)
        for name, dictionary in state.dictionaries.items():
            made, spliced = state.made[name], hidden.clone()
            spliced[rows] = made.update(dictionary, hidden[rows]).to(hidden.dtype)
            ce, kl = next_token_sums(model.resume(ids, site, spliced), clean, ids, scored)
            yield ("ce", "dictionary", name), ce
            yield ("kl", "dictionary", name), kl
            some = massive.any(1).nonzero()[:, 0]
            if len(some):
                spliced[massive] = made.update_massive(dictionary, hidden[massive]).to(hidden.dtype)
                ce = ce.clone()
                ce[some.cpu()], _ = next_token_sums(
                    model.resume(ids[some], site, spliced[some]),
                    clean[some],
                    ids[some],
                    scored[some],
                )
            yield ("ce", "massive", name), ce


def _fidelity(
    name: str,
    site: Site,
    state: _SiteState,
    sums: dict[Key, np.ndarray],
    bootstrap: Bootstrap,
) -> Fidelity:
    made, baselines = state.made[name], state.baselines
    used = {
        "scored": sums["scored",],
        "clean": sums["ce", "clean"],
        "spliced": sums["ce", "dictionary", name],
        "massive": sums["ce", "massive", name],
        "zero": sums["ce", "zero", site],
        "mean": sums["ce", "mean", site],
        "kl": sums["kl", "dictionary", name],
        "kl zero": sums["kl", "zero", site],
        "kl mean": sums["kl", "mean", site],
    }
    total = {key: column.sum(keepdims=True) for key, column in used.items()}

    def per_position(key: str) -> float:
        return float(total[key][0] / total["scored"][0])

    def recovered(baseline: str, spliced: str = "spliced"):
        return lambda t: (t[baseline] - t[spliced]) / (t[baseline] - t["clean"])

    with np.errstate(divide="ignore", invalid="ignore"):
        shares = {
            "zero": float(recovered("zero")(total)[0]),
            "mean": float(recovered("mean")(total)[0]),
            "massive": float(recovered("zero", "massive")(total)[0]),
        }
    deviation = baselines.rows.deviation()
    fvu = ratio(made.error, deviation)
    edges, counts = made.histogram()
    return Fidelity(
        name=name,
        site=str(site),
        rows=made.count,
        massive_rows=baselines.massive.count,
        massive_threshold=baselines.threshold,
        fvu=fvu,
        explained_variance=1 - fvu,
        fvu_with_massive=ratio(
            made.error + made.massive_error, baselines.rows.deviation(baselines.massive)
        ),
        cosine=made.cosine / max(made.count, 1),
        l2_ratio=made.l2_ratio / max(made.count, 1),
        l0=made.l0,
        dead_share=made.dead_share,
        dense_share=made.dense_share,
        ce_clean=per_position("clean"),
        ce_spliced=per_position("spliced"),
        ce_mean_ablated=per_position("mean"),
        ce_zero_ablated=per_position("zero"),
        ce_recovered=shares["zero"],
        ce_recovered_interval=bootstrap.interval(recovered("zero"), used),
        ce_recovered_mean=shares["mean"],
        ce_recovered_mean_interval=bootstrap.interval(recovered("mean"), used),
        ce_increase_interval=bootstrap.interval(
            lambda t: (t["spliced"] - t["clean"]) / t["scored"], used
        ),
        ce_spliced_with_massive=per_position("massive"),
        ce_recovered_with_massive=shares["massive"],
        kl=per_position("kl"),
        kl_interval=bootstrap.interval(lambda t: t["kl"] / t["scored"], used),
        kl_mean_ablated=per_position("kl mean"),
        kl_zero_ablated=per_position("kl zero"),
        density_histogram={"log10_edges": edges, "counts": counts},
        fvu_per_dimension=(made.error / deviation.where(deviation > 0, torch.nan)).tolist(),
        latent_density=made.density.tolist(),
    )


def _notes(
    dictionaries: Mapping[str, Dictionary], model: LanguageModel, num_contexts: int
) -> list[str]:
    notes = notes_on_weights(dictionaries, model)
    if num_contexts < 30:
        notes.append(f"{num_contexts} contexts are few: the intervals are too narrow")
    return notes


def _check_finite(hidden: Tensor, keep: Tensor, site: Site) -> None:
    bad = keep.to(hidden.device) & ~torch.isfinite(hidden).all(2)
    if bool(bad.any()):
        raise LlmWsaeError(
            f"{int(bad.sum())} activations of the model at {site} are NaN or infinite; "
            "try the model in float32 (--model-dtype float32)"
        )
