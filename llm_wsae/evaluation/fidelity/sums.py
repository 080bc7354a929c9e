"""From the rows of a text and the losses of its documents to the numbers of ``Fidelity``.

Massive rows (``ActivationCache.massive_threshold``) are summed separately: a handful of them would
dominate every mean, and training leaves them out. FVU is reported both without and with them.

The *round trip* decodes real codes z and encodes them again, r = encode(decode(z)). It is theorem 1
of Cui et al. 2026 (arXiv 2506.15963) with a trained dictionary as W_p and its own codes as the true
features. A firing z > 0 *vanishes* where r = 0, and otherwise *shrinks* by (z − r)/z. A latent is
*false* where r > 0 and z = 0. Sums are float64.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.dictionary.sparsity import to_dense
from llm_wsae.evaluation.fidelity.report import Fidelity, FromPlain
from llm_wsae.model.site import Site
from llm_wsae.sparse.codes import Codes
from llm_wsae.statistics.documents import TextSize
from llm_wsae.statistics.uncertainty import Bootstrap

_ROWS_AT_ONCE = 256  # made dense to compare their codes
_TOGETHER = 512  # rows in float64 at a time, which stay in a CPU's cache
Losses = dict[str, np.ndarray]
"""Sums of one document each: ``scored`` predictions; cross-entropy of the model (``clean``) and of
its variants (``spliced``, ``zero``, ``mean``); KL of these (``kl spliced``, …)."""


class Moments:
    """Count, sum and squared sum of rows about a fixed centre, which avoids cancellation."""

    def __init__(self, centre: Float[Tensor, " d_in"]):
        self.centre, self.count = centre, 0
        self.sum, self.square = torch.zeros_like(centre), torch.zeros_like(centre)

    def update(self, rows: Float[Tensor, "rows d_in"]) -> None:
        """Add rows."""
        x = exact(rows) - self.centre
        self.count += len(x)
        self.sum += x.sum(0)
        self.square += x.square().sum(0)

    def deviation(self, other: "Moments | None" = None) -> Float[Tensor, " d_in"]:
        """Σ (x − mean)² of every dimension, over these rows or over these and ``other``'s."""
        count, total, square = self.count, self.sum, self.square
        if other is not None:
            count, total, square = count + other.count, total + other.sum, square + other.square
        return square - total.square() / max(count, 1)


class SiteRows:
    """The rows of a site, those above a massive threshold apart, and the losses of the model itself
    and with zeros or the mean in the place of the other rows."""

    def __init__(self, threshold: float, mean: Float[Tensor, " d_in"]):
        self.threshold, self.mean = threshold, mean
        self.usual, self.massive = Moments(mean), Moments(mean)
        self.losses: dict[str, np.ndarray] = {}
        """Sums per document; empty until a pass over the text has measured them."""


class ReconstructionSums:
    """Sums over a dictionary's reconstructions of the rows of its site."""

    def __init__(self, dictionary: Dictionary):
        self._dictionary, d_in, d_sae = dictionary, dictionary.d_in, dictionary.d_sae
        self.count = 0
        self.error = torch.zeros(d_in, dtype=torch.float64)
        self.massive_error = torch.zeros(d_in, dtype=torch.float64)
        self.cosine = self.l2_ratio = 0.0
        self.firings = torch.zeros(d_sae, dtype=torch.int64)
        """Rows on which each latent fires."""
        self._survivors = self._false = 0
        self._lost = torch.zeros(d_sae, dtype=torch.float64)  # Σ (z − r)/z of what does not vanish

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """Reconstruct rows, add them to every sum, and return the reconstruction."""
        codes = self._dictionary.encode_sparse(rows)
        reconstruction = self._dictionary.decode(codes)
        for x, y in zip(rows.split(_TOGETHER), reconstruction.split(_TOGETHER), strict=True):
            self._compare(exact(x), exact(y))
        again = self._dictionary.encode_sparse(reconstruction)
        parts = [part.split(_ROWS_AT_ONCE) for part in (*codes, *again)]
        for z_latents, z, r_latents, r in zip(*parts, strict=True):
            self._compare_codes(Codes(z_latents, z), Codes(r_latents, r))
        return reconstruction

    @torch.no_grad()
    def update_massive(self, rows: Float[Tensor, "rows d_in"]) -> None:
        """Add massive rows, which only count in ``massive_error``."""
        if len(rows):
            self.massive_error += (exact(rows) - exact(self._dictionary(rows))).square().sum(0)

    def _compare(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        self.error += (x - y).square().sum(0)
        norm_x, norm_y = x.norm(dim=1), y.norm(dim=1)
        # The bound only guards the quotient of an all-zero row.
        self.cosine += float(((x * y).sum(1) / (norm_x * norm_y).clamp(min=1e-300)).sum())
        self.l2_ratio += float((norm_y / norm_x.clamp(min=1e-300)).sum())

    def _compare_codes(self, z: Codes, r: Codes) -> None:
        d_sae, fires = len(self.firings), z.values > 0
        latent, before = z.indices[fires].cpu(), z.values[fires].cpu().double()
        after = to_dense(r, d_sae).gather(1, z.indices)[fires].cpu().double()
        survives = after > 0
        self.firings += torch.bincount(latent, minlength=d_sae)
        self._survivors += int(survives.sum())
        was_silent = to_dense(z, d_sae).gather(1, r.indices) == 0
        self._false += int(((r.values > 0) & was_silent).sum())
        self._lost.index_add_(0, latent[survives], 1 - after[survives] / before[survives])

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the rows on which each latent fires."""
        return self.firings.double() / max(self.count, 1)

    def shares(self) -> dict[str, float]:
        """The fields of ``Fidelity`` that are of the codes alone; NaN without firings."""
        firings = int(self.firings.sum())
        return {
            "l0": float(self.density.sum()),
            "dead_share": float((self.firings == 0).double().mean()),
            "dense_share": float((self.density > DENSE_DENSITY).double().mean()),
            "vanished": 1 - self._survivors / firings if firings else math.nan,
            "shrunk": float(self._lost.sum()) / self._survivors if self._survivors else math.nan,
            "false_latents": self._false / max(self.count, 1),
        }


class Measured(NamedTuple):
    """One dictionary."""

    fidelity: Fidelity
    losses: Losses


def fidelity_of(
    name: str,
    site: Site,
    sums: ReconstructionSums,
    losses: Losses,
    rows: SiteRows,
    bootstrap: Bootstrap,
    size: TextSize,
) -> Measured:
    """The measurements of one dictionary."""
    total = {key: column.sum(keepdims=True) for key, column in losses.items()}

    def per_position(key: str) -> float:
        return float(total[key][0] / total["scored"][0])

    def recovered(sums: Mapping[str, np.ndarray], baseline: str = "zero") -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (sums[baseline] - sums["spliced"]) / (sums[baseline] - sums["clean"])

    deviation = rows.usual.deviation()
    fvu = ratio(sums.error, deviation)
    with_massive = rows.usual.deviation(rows.massive)
    fidelity = Fidelity(
        name=name,
        site=str(site),
        rows=sums.count,
        documents=size.documents,
        effective_documents=size.effective,
        massive_rows=rows.massive.count,
        massive_threshold=rows.threshold,
        fvu=fvu,
        explained_variance=1 - fvu,
        fvu_with_massive=ratio(sums.error + sums.massive_error, with_massive),
        cosine=sums.cosine / max(sums.count, 1),
        l2_ratio=sums.l2_ratio / max(sums.count, 1),
        **sums.shares(),
        ce_clean=per_position("clean"),
        ce_spliced=per_position("spliced"),
        ce_mean_ablated=per_position("mean"),
        ce_zero_ablated=per_position("zero"),
        ce_recovered=float(recovered(total)[0]),
        ce_recovered_interval=bootstrap.interval(recovered, losses),
        ce_recovered_mean=float(recovered(total, "mean")[0]),
        kl=per_position("kl spliced"),
        kl_interval=bootstrap.interval(lambda t: t["kl spliced"] / t["scored"], losses),
        kl_mean_ablated=per_position("kl mean"),
        kl_zero_ablated=per_position("kl zero"),
        fvu_per_dimension=(sums.error / deviation.where(deviation > 0, torch.nan)).tolist(),
        latent_density=sums.density.tolist(),
        kl_per_document=losses["kl spliced"].tolist(),
    )
    return Measured(fidelity, losses)


def from_plain(one: Measured, plain: Measured, bootstrap: Bootstrap) -> FromPlain:
    """The difference of two dictionaries of a site, with intervals of the difference itself."""
    own, of_plain = one.losses, plain.losses
    used = {
        "scored": own["scored"],
        "range": own["zero"] - own["clean"],
        "ce": of_plain["spliced"] - own["spliced"],
        "kl": own["kl spliced"] - of_plain["kl spliced"],
    }
    return FromPlain(
        plain=plain.fidelity.name,
        fvu=one.fidelity.fvu - plain.fidelity.fvu,
        ce_recovered=one.fidelity.ce_recovered - plain.fidelity.ce_recovered,
        ce_recovered_interval=bootstrap.interval(lambda t: t["ce"] / t["range"], used),
        kl=one.fidelity.kl - plain.fidelity.kl,
        kl_interval=bootstrap.interval(lambda t: t["kl"] / t["scored"], used),
    )


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64 on the CPU (not every accelerator has float64)."""
    return tensor.detach().cpu().double()


def ratio(error: Tensor, deviation: Tensor) -> float:
    """Σ error / Σ deviation: the fraction of variance unexplained; NaN for constant rows."""
    total = float(deviation.sum())
    return float(error.sum()) / total if total > 0 else math.nan
