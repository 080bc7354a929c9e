"""What is measured of a dictionary: one list for tables, model cards, pages and studies.

To add a measure, compute it where its neighbours are computed and add it to the list here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llm_wsae.outside import mapping, number, pair

LETTER = "letter"
"""The family of concepts "the word begins with this letter"; their names begin with it."""


@dataclass(frozen=True)
class Measure:
    """One measure, and where and how it is shown."""

    key: str  # its name in JSON
    title: str  # one that ends in % is shown in per cent; JSON holds the share
    meaning: str
    source: Literal["fidelity", "dictionary", "latents", "concepts", "plants"] = "fidelity"
    """Whether it says how faithful a dictionary is, or something else of all of it; or is a mean
    over latents, concepts or planted features."""
    of: str = ""  # its name in the scores of latents, concepts or plants, if that is another
    lower_is_better: bool = False
    digits: int = 3
    interval: bool = False  # a table in a terminal, where there is little room, shows it
    tables: bool = True  # tables of ``evaluate`` show it
    card: bool = True  # model cards show it, if it is of fidelity
    scale: Literal["log", "lost"] | None = None
    """Of fidelity: reports as pages draw it, with this axis (``lost``: logarithm of 1 minus it)."""
    study: bool = False
    """Studies compare it; if it is of fidelity, document by document, and differences are shares of
    the plain dictionary's."""
    unscored: float | None = None
    """Value of a latent that fires too rarely to be scored; None leaves it out of the mean."""
    family: str | None = None
    """The only family of concepts that counts, concept by concept. None: the mean of all families'
    means."""

    @property
    def name(self) -> str:
        """In the scores of latents, concepts or plants."""
        return self.of or self.key

    def figure(self, value: float) -> str:
        """A number alone."""
        return f"{100 * value:.1f}" if self.title.endswith("%") else f"{value:.{self.digits}f}"

    def text(self, record: Mapping[str, Any], short: bool = False) -> str:
        """Its number in a record, with all that is known beside it; empty if there is none.
        ``short`` is for a table in a terminal.

        A record holds the number, with an interval under ``{key}_interval``, or an object with
        ``value`` and optionally ``interval``, ``control`` and ``share``.
        """
        alone = {"value": record.get(self.key), "interval": record.get(f"{self.key}_interval")}
        found = mapping(record.get(self.key)) or alone
        value, ends = number(found.get("value")), pair(found.get("interval"))
        control, share = number(found.get("control")), number(found.get("share"))
        if value is None:
            return ""
        shown = self.figure(value)
        if ends is not None and (self.interval or not short):
            shown += f" [{self.figure(ends[0])}, {self.figure(ends[1])}]"
        if control is not None and not short:
            shown += f" (control {self.figure(control)})"
        return shown if share is None else f"{shown} ({100 * share:.1f} %)"

    def cell(self, record: Mapping[str, Any]) -> str:
        """The short text, or a dash."""
        return self.text(record, short=True) or "–"

    def of_page(self) -> dict[str, Any]:
        """What ``pages/report.html`` is told of it."""
        told = {"title": self.title, "meaning": self.meaning, "scale": self.scale}
        return told | {"lower": self.lower_is_better}


_ALL = (
    Measure(
        "fvu",
        "FVU",
        "fraction of the activations' variance that the reconstruction misses (0: perfect)",
        lower_is_better=True,
        scale="log",
    ),
    Measure(
        "ce_recovered",
        "CE recovered",
        "share of the model's next-token prediction that survives when the reconstruction replaces "
        "the activations (1: all; 0: no better than zeros), with its 95 % interval",
        interval=True,
        scale="lost",
    ),
    Measure(
        "kl",
        "KL",
        "mean divergence between the model's predictions with and without that replacement, in "
        "nats (0: none)",
        lower_is_better=True,
        scale="log",
        study=True,
    ),
    Measure("l0", "L0", "mean number of active latents per token", digits=1, scale="log"),
    Measure(
        "dead_share",
        "dead %",
        "latents that never fire on this text",
        lower_is_better=True,
    ),
    Measure(
        "dense_share",
        "dense %",
        "latents that fire on more than 10 % of the tokens",
        lower_is_better=True,
    ),
    Measure(
        "cosine",
        "cosine",
        "mean cosine between activation and reconstruction (1: perfect)",
        card=False,
    ),
    Measure(
        "vanished",
        "vanished %",
        "firings that are gone when the reconstruction is encoded again",
        lower_is_better=True,
        card=False,
    ),
    Measure(
        "shrunk",
        "shrunk %",
        "strength that the other firings lose on that way (below 0: they grow)",
        lower_is_better=True,
        card=False,
    ),
    Measure(
        "false_latents",
        "false",
        "latents per token that appear on that way",
        lower_is_better=True,
        digits=2,
        card=False,
    ),
    Measure(
        "eligible_share",
        "eligible %",
        "latents that fire in enough contexts to be scored; the other scores of latents are means "
        "over them",
        "dictionary",
    ),
    Measure(
        "detection",
        "detection",
        "probability that a context where the latent fires is closer in meaning to its top "
        "contexts than one of the same genre where it is silent, both from other documents than "
        "those of the top contexts (0.5: chance; 1: perfect)",
        "latents",
        interval=True,
        study=True,
    ),
    Measure(
        "detection_all",
        "detection, all latents",
        "detection, counting dense latents and those that cannot be scored as chance (0.5), "
        "because weights change which can be scored",
        "latents",
        of="detection",
        tables=False,
        study=True,
        unscored=0.5,
    ),
    Measure(
        "detection_without_tokens",
        "detection, other tokens",
        "detection without contexts whose token is one of the top contexts' (share of all latents "
        "that have this score)",
        "latents",
    ),
    Measure(
        "spill",
        "spill",
        "drop in accuracy of the five other concepts' probes that are hit hardest, when removing "
        "latents has cost the concept's own probe 0.05; mean over families (lower is better)",
        "concepts",
        lower_is_better=True,
        interval=True,
        study=True,
    ),
    Measure(
        "selectivity",
        "selectivity",
        "drop in accuracy of a concept's dense probe when its best five latents are removed, minus "
        "the mean drop of the other concepts' probes; mean over families of concepts",
        "concepts",
        interval=True,
        study=True,
    ),
    Measure(
        "selectivity_letters",
        "letters",
        "selectivity of first letters of words alone, one of those families",
        "concepts",
    ),
    Measure(
        "absorbed",
        "absorbed",
        "share of words whose first letter the activations show, while its latents are silent and "
        "one other latent speaks for it; mean over letters (lower is better; by probes of our own, "
        "not SAEBench's number)",
        "concepts",
        lower_is_better=True,
        interval=True,
        study=True,
        family=LETTER,
    ),
    Measure(
        "purity",
        "purity",
        "share of the most frequent token among a latent's top contexts (1: one token; control: "
        "among random contexts)",
        "latents",
        study=True,
    ),
    Measure(
        "coherence",
        "coherence",
        "mean cosine between the sentence embeddings of a latent's top contexts, minus that of "
        "random contexts (0: nothing in common)",
        "latents",
    ),
    Measure(
        "probe_1",
        "probe 1",
        "area under the ROC curve when a concept is predicted from its best latent (control: from "
        "its best dimension); mean over families of concepts (0.5: chance; 1: perfect)",
        "concepts",
        of="best_1",
        study=True,
    ),
    Measure("probe_5", "probe 5", "the same from the best five", "concepts", of="best_5"),
    Measure(
        "planted_f1",
        "F1 of plants",
        "mean F1 of a planted feature's best latent, on rows that no dictionary was trained on",
        "plants",
        of="f1",
        study=True,
    ),
    Measure(
        "planted_recovered",
        "recovered plants",
        "share of the planted features with a latent whose firing matches theirs (F1 of at least "
        "0.8)",
        "plants",
        of="recovered",
        study=True,
    ),
)
MEASURES = {one.key: one for one in _ALL}
"""All measures by their keys, in the order in which they are shown."""
FIDELITY = [one for one in _ALL if one.source == "fidelity"]
MONOSEMANTICITY = [
    one for one in _ALL if one.source in ("dictionary", "latents", "concepts") and one.tables
]
STUDIED = {one.key: one for one in _ALL if one.study}
L0 = MEASURES["l0"]
DRAWN = [one for one in FIDELITY if one.scale is not None and one is not L0]
"""What reports as pages draw, against L0."""


def score_text(record: Mapping[str, Any], key: str) -> str:
    """``Measure.text`` of a measure that another tool may have given a name of its own."""
    own = MEASURES.get(key) or Measure(key, key, "", "latents")
    return own.text(record)


_HELP = {
    "lower": "the weights help here",
    "higher": "the weights do harm here",
    "level": "the weights make no difference that this text shows",
}


def side_of_zero(interval: tuple[float, float]) -> str:
    """What a difference is, by its interval: ``lower``, ``higher`` or ``level``."""
    low, high = interval
    return "higher" if low > 0 else "lower" if high < 0 else "level"


def did_weights_help(name: str, fidelity: Mapping[str, Any]) -> str:
    """A sentence on the KL of a dictionary beside that of the plain one it was measured with, from
    the summary of its fidelity; empty if that says nothing of a plain one."""
    beside = mapping(fidelity.get("from_plain"))
    ends = pair(beside.get("kl_interval"))
    own, change = number(fidelity.get("kl")), number(beside.get("kl"))
    if own is None or change is None or ends is None or own == change:
        return ""
    kl, low, high = (f"{100 * part / (own - change):+.1f}" for part in (change, *ends))
    side = _HELP[side_of_zero(ends)]
    return f"{name}: KL {kl} % [{low}, {high}] beside {beside.get('plain')}: {side}."
