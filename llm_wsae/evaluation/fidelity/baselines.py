"""What is known about a site's rows without any dictionary: mean, variance, and ablation losses."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.activations import ActivationCache
from llm_wsae.evaluation.fidelity.reconstruction import Moments, exact
from llm_wsae.model.site import Site

# What a column of numbers, one per context, holds: ("scored",), ("ce", "clean"),
# ("kl", "zero", site), …
Key = tuple[str | Site, ...]


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
    batches = tqdm(activations.batches, desc="evaluate: means", unit="batch")
    for number, (_, keep) in enumerate(batches if thresholds else ()):
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
