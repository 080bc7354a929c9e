"""What an evaluation of fidelity found: one JSON object, and one table for people."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import write_json
from llm_wsae.artifact.provenance import plain
from llm_wsae.statistics.measures import FIDELITY, did_weights_help, side_of_zero
from llm_wsae.statistics.uncertainty import Interval, TextSize
from llm_wsae.terminal import Table


@dataclass(frozen=True)
class Fidelity:
    """How faithfully one dictionary stands in for its site. Cross-entropies and KL are in nats.
    Massive rows (``ActivationCache.massive_threshold``) count in ``fvu_with_massive`` alone, and
    are not replaced."""

    name: str
    site: str
    rows: int  # kept positions that are not massive
    documents: int  # documents that these rows and the massive ones are of
    effective_documents: float  # as in ``TextSize``
    massive_rows: int  # kept positions whose norm exceeds ``massive_threshold``
    massive_threshold: float
    fvu: float  # Σ (x − x̂)² / Σ (x − mean x)², over all rows and dimensions, mean over these rows
    explained_variance: float  # 1 − fvu
    fvu_with_massive: float
    cosine: float  # mean over rows of cos(x, x̂)
    l2_ratio: float  # mean over rows of ‖x̂‖ / ‖x‖
    l0: float
    dead_share: float
    dense_share: float  # share of latents that fire on more than 10 % of the rows
    vanished: float
    """Of all firings z, the share that is gone when the reconstruction is encoded again, r = 0
    (``fidelity.evaluator``)."""
    shrunk: float  # mean of (z − r)/z over the others
    false_latents: float  # latents per row with r > 0 and z = 0
    ce_clean: float
    """Cross-entropy of the model itself, per scored position (``next_token.scored_positions``)."""
    ce_spliced: float
    """The same with the rows replaced by their reconstructions; below by their mean, by zeros."""
    ce_mean_ablated: float
    ce_zero_ablated: float
    ce_recovered: float
    """(ce_zero_ablated − ce_spliced) / (ce_zero_ablated − ce_clean), as in SAELens and SAEBench."""
    ce_recovered_interval: Interval
    ce_recovered_mean: float  # the same relative to ce_mean_ablated, a harder baseline
    kl: float  # mean KL(clean ‖ spliced) over scored positions
    kl_interval: Interval
    kl_mean_ablated: float
    kl_zero_ablated: float
    fvu_per_dimension: list[float] = field(repr=False)
    """[d_in]; NaN for a dimension that never changed."""
    latent_density: list[float] = field(repr=False)
    """[d_sae]: share of rows on which each latent fired."""
    kl_per_document: list[float] = field(repr=False)
    """Sum of KL over the scored positions of each document."""

    @property
    def text(self) -> TextSize:
        """What it was measured on."""
        return TextSize(self.rows + self.massive_rows, self.documents, self.effective_documents)

    def summary(self) -> dict[str, Any]:
        """JSON-able, without the lists per dimension, latent and document."""
        lists = {one.name for one in fields(self) if not one.repr}
        return {k: v for k, v in plain(self).items() if k not in lists}


@dataclass(frozen=True)
class FromPlain:
    """A weighted dictionary's fidelity less that of the plain one trained beside it. Both are
    measured on the same documents, which are resampled together: the 95 % intervals cover the
    choice of text, not that of the seed."""

    plain: str  # name of the plain dictionary
    fvu: float
    ce_recovered: float
    ce_recovered_interval: Interval
    kl: float  # in nats
    kl_interval: Interval

    @property
    def word(self) -> str:
        """What its KL is, beside the plain one's: ``lower``, ``higher`` or ``level``."""
        return side_of_zero(self.kl_interval)


@dataclass(frozen=True)
class Together:
    """The model with the MLPs of several blocks replaced at once by transcoders of one name: the
    replacement model, whose predictions say how far a graph of its latents can be trusted. Nats."""

    blocks: int
    ce_clean: float
    ce_spliced: float
    kl: float
    kl_interval: Interval

    def sentence(self, name: str) -> str:
        """What it is, for people."""
        low, high = self.kl_interval
        return (
            f"{name} in place of {self.blocks} MLPs at once: cross-entropy {self.ce_spliced:.3f} "
            f"nats instead of {self.ce_clean:.3f}, KL {self.kl:.3f} [{low:.3f}, {high:.3f}]."
        )


@dataclass(frozen=True)
class Report:
    """One evaluation of several dictionaries on the same text."""

    model: dict[str, Any]  # the model's identity
    config: dict[str, Any]  # the resolved ``EvaluateConfig``
    num_contexts: int
    num_scored: int  # positions whose next-token prediction was scored
    scored_per_document: list[float] = field(repr=False)
    dictionaries: dict[str, Fidelity]
    from_plain: dict[str, FromPlain] = field(default_factory=dict)
    """Of each weighted dictionary that has a plain one beside it."""
    together: dict[str, Together] = field(default_factory=dict)
    """Of transcoders of several blocks, by the name that they share."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know before relying on the numbers."""
    text: str = "held-out text"  # what was read, in words

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a number that does not exist is null."""
        return plain(self)

    def summaries(self) -> dict[str, dict[str, Any]]:
        """``Fidelity.summary`` of each dictionary, and under ``from_plain`` how it differs."""
        beside = {name: {"from_plain": plain(one)} for name, one in self.from_plain.items()}
        return {n: one.summary() | beside.get(n, {}) for n, one in self.dictionaries.items()}

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
            words=self._words(found),
            title=f"Fidelity on {self.text}",
        )

    def table(self) -> str:
        """A table for people, with the meaning of each column below it."""
        return self.measured.text()

    def _words(self, found: list[Fidelity]) -> list[str]:
        lines = [
            f"{found[0].text.text(self.text)}, in {self.num_contexts:,} contexts; "
            f"{self.num_scored:,} predictions scored. Intervals are over documents."
        ]
        for site in dict.fromkeys(f.site for f in found):
            one = next(f for f in found if f.site == site)
            lines.append(
                f"{site}: cross-entropy in nats {one.ce_clean:.3f} with the model's activations, "
                f"{one.ce_mean_ablated:.3f} with their mean and {one.ce_zero_ablated:.3f} with "
                f"zeros in their place; {one.massive_rows} massive activations left out."
            )
        lines += [one.sentence(name) for name, one in self.together.items()]
        return [*lines, *self.answers, *(f"note: {note}" for note in self.notes)]

    @property
    def answers(self) -> list[str]:
        """Do weights help? A sentence for each dictionary that has a plain one beside it."""
        return [text for n, own in self.summaries().items() if (text := did_weights_help(n, own))]
