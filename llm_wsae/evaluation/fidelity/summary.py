"""From sums over a text to measurements: what is known about a site's rows without any dictionary
(mean, variance, ablation losses), and of one dictionary, with 95 % intervals.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.activations import ActivationCache
from llm_wsae.evaluation.fidelity.reconstruction import Moments, ReconstructionSums, exact, ratio
from llm_wsae.evaluation.fidelity.report import Fidelity, FromPlain
from llm_wsae.model.site import Site
from llm_wsae.statistics.documents import TextSize
from llm_wsae.statistics.uncertainty import Bootstrap

# What a column of numbers, one per document, holds: ("scored",), ("ce", "clean"),
# ("kl", "zero", site), ("ce", "dictionary", site, name), …
Key = tuple[str | Site, ...]
Quantity = Callable[[Mapping[str, np.ndarray]], np.ndarray]


class Baselines:
    """The rows of one site, on one side of a massive threshold and on the other."""

    def __init__(self, threshold: float, mean: Tensor):
        """``threshold`` is the norm above which a row is massive; ``mean`` [d_in] of the other
        rows, float64."""
        self.threshold = threshold
        self.mean = mean
        self.rows = Moments(mean)
        self.massive = Moments(mean)
        self.columns: dict[Key, list[Tensor]] = defaultdict(list)
        """Losses per context with zeros, and with the mean, in place of the rows."""

    def split(self, hidden: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Masks [contexts, positions] of the rows to measure and of the massive ones."""
        return _split(hidden, keep, self.threshold)


def read_baselines(
    thresholds: Mapping[Site, float], activations: ActivationCache
) -> dict[Site, Baselines]:
    """Baselines of every site, about the mean of its rows. Reads the text once.

    Raises LlmWsaeError if an activation is not finite.
    """
    totals = dict.fromkeys(thresholds, torch.zeros(()))
    counts = dict.fromkeys(thresholds, 0)
    if not thresholds:
        return {}
    batches = tqdm(activations.batches, desc="evaluate: means", unit="batch")
    for number, (_, keep) in enumerate(batches):
        for site, hidden in activations.at(number, list(thresholds)).items():
            _check_finite(hidden, keep, site)
            rows, _ = _split(hidden, keep.to(hidden.device), thresholds[site])
            totals[site] = totals[site] + exact(hidden[rows]).sum(0)
            counts[site] += int(rows.sum())
    return {
        site: Baselines(threshold, totals[site] / max(counts[site], 1))
        for site, threshold in thresholds.items()
    }


def _split(hidden: Tensor, keep: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    massive = keep & (hidden.float().norm(dim=2) > threshold)
    return keep & ~massive, massive


def _check_finite(hidden: Tensor, keep: Tensor, site: Site) -> None:
    bad = keep.to(hidden.device) & ~torch.isfinite(hidden).all(2)
    if bool(bad.any()):
        raise LlmWsaeError(
            f"{int(bad.sum())} activations of the model at {site} are NaN or infinite; "
            "try the model in float32 (--model-dtype float32)"
        )


def fidelity_of(
    name: str,
    site: Site,
    sums: ReconstructionSums,
    baselines: Baselines,
    losses: Mapping[Key, np.ndarray],
    bootstrap: Bootstrap,
    size: TextSize,
) -> Fidelity:
    """The measurements of one dictionary. ``losses`` holds columns of one number per document."""
    used = {
        "scored": losses["scored",],
        "clean": losses["ce", "clean"],
        "spliced": losses["ce", "dictionary", site, name],
        "massive": losses["ce", "massive", site, name],
        "zero": losses["ce", "zero", site],
        "mean": losses["ce", "mean", site],
        "kl": losses["kl", "dictionary", site, name],
        "kl zero": losses["kl", "zero", site],
        "kl mean": losses["kl", "mean", site],
    }
    total = {key: column.sum(keepdims=True) for key, column in used.items()}

    def per_position(key: str) -> float:
        return float(total[key][0] / total["scored"][0])

    def recovered(baseline: str, spliced: str = "spliced") -> Quantity:
        return lambda t: (t[baseline] - t[spliced]) / (t[baseline] - t["clean"])

    with np.errstate(divide="ignore", invalid="ignore"):
        shares = {
            "zero": float(recovered("zero")(total)[0]),
            "mean": float(recovered("mean")(total)[0]),
            "massive": float(recovered("zero", "massive")(total)[0]),
        }
    deviation = baselines.rows.deviation()
    fvu = ratio(sums.error, deviation)
    edges, counts = sums.histogram()
    return Fidelity(
        name=name,
        site=str(site),
        rows=sums.count,
        documents=size.documents,
        effective_documents=size.effective,
        massive_rows=baselines.massive.count,
        massive_threshold=baselines.threshold,
        fvu=fvu,
        explained_variance=1 - fvu,
        fvu_with_massive=ratio(
            sums.error + sums.massive_error, baselines.rows.deviation(baselines.massive)
        ),
        cosine=sums.cosine / max(sums.count, 1),
        l2_ratio=sums.l2_ratio / max(sums.count, 1),
        **sums.shares(),
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
        fvu_per_dimension=(sums.error / deviation.where(deviation > 0, torch.nan)).tolist(),
        latent_density=sums.density.tolist(),
        kl_per_document=used["kl"].tolist(),
        ce_increase_per_document=(used["spliced"] - used["clean"]).tolist(),
    )


def from_plain(
    one: Fidelity,
    plain: Fidelity,
    site: Site,
    losses: Mapping[Key, np.ndarray],
    bootstrap: Bootstrap,
) -> FromPlain:
    """The difference of two dictionaries of a site, with intervals of the difference itself."""
    own, of_plain = (
        {kind: losses[kind, "dictionary", site, it.name] for kind in ("ce", "kl")}
        for it in (one, plain)
    )
    used = {
        "scored": losses["scored",],
        "range": losses["ce", "zero", site] - losses["ce", "clean"],
        "ce": of_plain["ce"] - own["ce"],
        "kl": own["kl"] - of_plain["kl"],
    }
    return FromPlain(
        plain=plain.name,
        fvu=one.fvu - plain.fvu,
        ce_recovered=one.ce_recovered - plain.ce_recovered,
        ce_recovered_interval=bootstrap.interval(lambda t: t["ce"] / t["range"], used),
        kl=one.kl - plain.kl,
        kl_interval=bootstrap.interval(lambda t: t["kl"] / t["scored"], used),
    )
