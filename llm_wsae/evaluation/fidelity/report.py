"""What an evaluation found: from sums over a text to one JSON object, and one table for people."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_wsae.artifact.files import write_json
from llm_wsae.artifact.provenance import plain
from llm_wsae.evaluation.fidelity.reconstruction import ReconstructionSums, SiteRows, ratio
from llm_wsae.model.site import Site
from llm_wsae.statistics.documents import TextSize
from llm_wsae.statistics.measures import FIDELITY
from llm_wsae.statistics.uncertainty import Bootstrap, Interval
from llm_wsae.terminal import Table

# Sums of one document each: scored predictions; cross-entropy of the model ("clean") and of its
# variants ("spliced", "massive", "zero", "mean"); KL of these ("kl spliced", …).
Losses = dict[str, np.ndarray]
_Quantity = Callable[[Mapping[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Fidelity:
    """How faithfully one dictionary stands in for its site. Cross-entropies and KL are in nats.

    Massive rows (``ActivationCache.massive_threshold``) count in no number and are not replaced,
    except where the name says ``with_massive``.
    """

    name: str
    site: str
    rows: int
    """Rows measured: kept positions that are not massive."""
    documents: int
    """Documents that these rows and the massive ones are of; effective ones: as ``TextSize``."""
    effective_documents: float
    massive_rows: int
    """Kept positions whose norm exceeds ``massive_threshold``."""
    massive_threshold: float
    fvu: float
    """Σ (x − x̂)² / Σ (x − mean x)², over all rows and dimensions, mean over these rows."""
    explained_variance: float  # 1 − fvu
    fvu_with_massive: float
    cosine: float
    """Mean over rows of cos(x, x̂)."""
    l2_ratio: float
    """Mean over rows of ‖x̂‖ / ‖x‖."""
    l0: float
    dead_share: float
    dense_share: float
    """Share of latents that fire on more than 10 % of the rows."""
    vanished: float
    """Of all firings z, the share that is gone when the reconstruction is encoded again, r = 0
    (``reconstruction``)."""
    shrunk: float
    """Mean of (z − r)/z over the others."""
    false_latents: float
    """Latents per row with r > 0 and z = 0."""
    ce_clean: float
    """Cross-entropy of the model itself, per scored position (``next_token.scored_positions``)."""
    ce_spliced: float
    """The same with the rows replaced by their reconstructions; below by their mean, by zeros."""
    ce_mean_ablated: float
    ce_zero_ablated: float
    ce_recovered: float
    """(ce_zero_ablated − ce_spliced) / (ce_zero_ablated − ce_clean), as in SAELens and SAEBench."""
    ce_recovered_interval: Interval
    ce_recovered_mean: float
    """The same relative to ce_mean_ablated, a harder baseline."""
    ce_recovered_mean_interval: Interval
    ce_increase_interval: Interval
    """Of ce_spliced − ce_clean."""
    ce_spliced_with_massive: float
    """ce_spliced when massive rows are replaced too."""
    ce_recovered_with_massive: float
    kl: float
    """Mean KL(clean ‖ spliced) over scored positions."""
    kl_interval: Interval
    kl_mean_ablated: float
    kl_zero_ablated: float
    density_histogram: dict[str, list[float] | list[int]]
    """``log10_edges`` and ``counts`` over the latents that fired."""
    fvu_per_dimension: list[float] = field(repr=False)
    """[d_in]; NaN for a dimension that never changed."""
    latent_density: list[float] = field(repr=False)
    """[d_sae]: share of rows on which each latent fired."""
    kl_per_document: list[float] = field(repr=False)
    """Sum of KL over the scored positions of each document; then of ce_spliced − ce_clean."""
    ce_increase_per_document: list[float] = field(repr=False)

    @property
    def text_size(self) -> TextSize:
        """Of the text that it was measured on."""
        tokens = self.rows + self.massive_rows
        return TextSize(tokens, self.documents, self.effective_documents)

    def summary(self) -> dict[str, Any]:
        """Without the lists per dimension, latent and document, JSON-able."""
        lists = {one.name for one in fields(self) if not one.repr}
        return {k: v for k, v in plain(self).items() if k not in lists}


@dataclass(frozen=True)
class FromPlain:
    """A weighted dictionary's fidelity less that of the plain one trained beside it.

    Both are measured on the same documents, which are resampled together: the 95 % intervals cover
    the choice of text, not that of the seed.
    """

    plain: str
    """Name of the plain dictionary."""
    fvu: float
    ce_recovered: float
    ce_recovered_interval: Interval
    kl: float
    """In nats."""
    kl_interval: Interval


@dataclass(frozen=True)
class Report:
    """One evaluation of several dictionaries on the same text."""

    model: dict[str, Any]
    """The model's identity."""
    config: dict[str, Any]
    """The resolved ``EvaluateConfig``."""
    num_contexts: int
    num_scored: int
    """Positions whose next-token prediction was scored."""
    scored_per_document: list[float] = field(repr=False)
    dictionaries: dict[str, Fidelity]
    from_plain: dict[str, FromPlain] = field(default_factory=dict)
    """Of each weighted dictionary that has a plain one beside it."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know before relying on the numbers."""
    text: str = "held-out text"
    """What was read, in words."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a number that does not exist is null."""
        return plain(self)

    def summaries(self) -> dict[str, dict[str, Any]]:
        """The numbers of each dictionary without the long lists; JSON-able."""
        return {name: fidelity.summary() for name, fidelity in self.dictionaries.items()}

    def write(self, path: Path) -> None:
        """Write the JSON report. Raises LlmWsaeError if that is impossible."""
        write_json(path, self.to_dict())

    @property
    def measured(self) -> Table:
        """The numbers, what they mean, and the text that they were measured on."""
        found = list(self.dictionaries.values())
        named = ["dictionary", *(["site"] if len({f.site for f in found}) > 1 else [])]
        rows = [
            [f.name, f.site][: len(named)] + [one.cell(f.summary()) for one in FIDELITY]
            for f in found
        ]
        return Table(
            [[*named, *(one.title for one in FIDELITY)], *rows],
            left=len(named),
            meanings={one.title: one.meaning for one in FIDELITY},
            words=self._text_measured(found),
            title=f"Fidelity on {self.text}",
        )

    def table(self) -> str:
        """A table for people, with the meaning of each column below it."""
        return self.measured.text()

    def _text_measured(self, found: list[Fidelity]) -> list[str]:
        lines = [
            f"{found[0].text_size.text(self.text)}, in {self.num_contexts:,} contexts; "
            f"{self.num_scored:,} predictions scored. Intervals are over documents."
        ]
        for site in dict.fromkeys(f.site for f in found):
            one = next(f for f in found if f.site == site)
            lines.append(
                f"{site}: cross-entropy in nats {one.ce_clean:.3f} with the model's activations, "
                f"{one.ce_mean_ablated:.3f} with their mean and {one.ce_zero_ablated:.3f} with "
                f"zeros in their place; {one.massive_rows} massive activations left out."
            )
        return lines + [f"note: {note}" for note in self.notes]


def fidelity_of(
    name: str,
    site: Site,
    sums: ReconstructionSums,
    losses: Losses,
    rows: SiteRows,
    bootstrap: Bootstrap,
    size: TextSize,
) -> Fidelity:
    """The measurements of one dictionary."""
    total = {key: column.sum(keepdims=True) for key, column in losses.items()}

    def per_position(key: str) -> float:
        return float(total[key][0] / total["scored"][0])

    def recovered(baseline: str, spliced: str = "spliced") -> _Quantity:
        return lambda t: (t[baseline] - t[spliced]) / (t[baseline] - t["clean"])

    def share(*kinds: str) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(recovered(*kinds)(total)[0])

    def interval(quantity: _Quantity) -> Interval:
        return bootstrap.interval(quantity, losses)

    deviation = rows.usual.deviation()
    with_massive = rows.usual.deviation(rows.massive)
    fvu = ratio(sums.error, deviation)
    return Fidelity(
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
        ce_recovered=share("zero"),
        ce_recovered_interval=interval(recovered("zero")),
        ce_recovered_mean=share("mean"),
        ce_recovered_mean_interval=interval(recovered("mean")),
        ce_increase_interval=interval(lambda t: (t["spliced"] - t["clean"]) / t["scored"]),
        ce_spliced_with_massive=per_position("massive"),
        ce_recovered_with_massive=share("zero", "massive"),
        kl=per_position("kl spliced"),
        kl_interval=interval(lambda t: t["kl spliced"] / t["scored"]),
        kl_mean_ablated=per_position("kl mean"),
        kl_zero_ablated=per_position("kl zero"),
        density_histogram=sums.histogram(),
        fvu_per_dimension=(sums.error / deviation.where(deviation > 0, torch.nan)).tolist(),
        latent_density=sums.density.tolist(),
        kl_per_document=losses["kl spliced"].tolist(),
        ce_increase_per_document=(losses["spliced"] - losses["clean"]).tolist(),
    )


def from_plain(
    one: Fidelity, plain: Fidelity, own: Losses, of_plain: Losses, bootstrap: Bootstrap
) -> FromPlain:
    """The difference of two dictionaries of a site, with intervals of the difference itself."""
    used = {
        "scored": own["scored"],
        "range": own["zero"] - own["clean"],
        "ce": of_plain["spliced"] - own["spliced"],
        "kl": own["kl spliced"] - of_plain["kl spliced"],
    }
    return FromPlain(
        plain=plain.name,
        fvu=one.fvu - plain.fvu,
        ce_recovered=one.ce_recovered - plain.ce_recovered,
        ce_recovered_interval=bootstrap.interval(lambda t: t["ce"] / t["range"], used),
        kl=one.kl - plain.kl,
        kl_interval=bootstrap.interval(lambda t: t["kl"] / t["scored"], used),
    )
