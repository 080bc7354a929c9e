"""The tables of a card, in Markdown, and the escaping of text that comes from files."""

import re
from collections.abc import Sequence
from dataclasses import replace

from llm_wsae.dictionary.folder import EXPLANATIONS
from llm_wsae.dictionary.hub.card_data import Facts
from llm_wsae.outside import integer, mapping, number, pair, text
from llm_wsae.terminal import markdown

_LONGEST = 200  # characters of a foreign text
_MARKUP = re.compile(r"([\\`*_\[\]|~#!$])")
_NONE = "—"
_JUDGED = ("detection", "fuzzing", "intruder")  # by a language model
_UNTRAINED = ("raw dimensions", "frozen random")
_HALF_RANDOM = ("frozen decoder", "frozen encoder")
_NOT_LEARNT = "none"
MEASURES = {
    "eligible_share": "share of the latents that fire in enough contexts to be scored",
    "purity": "share of the most frequent token among the contexts that excite a latent most "
    "(control: among random contexts)",
    "coherence": "mean cosine of their meanings minus that of random contexts",
    "detection": "probability that another context in which the latent fires resembles them more "
    "than one in which it is silent (0.5: they have nothing in common)",
    "detection_without_tokens": "the same without contexts that share a token with them",
    "probe_1": "area under the ROC curve of known concepts from the best latent (control: from the "
    "best dimension)",
    "probe_5": "from the best five",
    "selectivity": "how much more a concept's own probe loses than those of others when its best "
    "five latents are removed; mean over families of concepts",
    "spill": "what the five other concepts that are hit hardest lose where the own probe has lost "
    "0.05 (lower is better)",
    "absorbed": "share of words whose first letter one other latent speaks for, while its own are "
    "silent; mean over letters (lower is better; by probes of our own, not SAEBench's number)",
    "selectivity_letters": "selectivity of first letters of words alone, one of those families",
}


def escape(value: str) -> str:
    """The text escaped: one line, no Markdown, no HTML, of limited length."""
    line = " ".join(value.split())
    line = "".join(c for c in line if c.isprintable())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", line)


def is_plain(d: Facts) -> bool:
    """Whether it was trained without weights, so that α has no meaning."""
    return d.info.rule == "uniform"


def rule_words(d: Facts) -> str:
    """The rule that made the weights, with the space where these are one."""
    place = d.info.weights.get("place")
    return d.info.rule + (f", {place}" if place == "space" else "")


def with_baselines(dictionaries: Sequence[Facts]) -> list[Facts]:
    """The dictionaries, and the untrained and half-trained baselines measured beside them: for each
    site the dimensions of the activations, a random dictionary and two half-random ones."""
    found: dict[str, Facts] = {}
    for d in dictionaries:
        measured = mapping(d.info.metrics.get("baselines"))
        for name in (*_UNTRAINED, *_HALF_RANDOM):
            if metrics := mapping(measured.get(name)):
                info = replace(d.info, rule=_NOT_LEARNT, metrics=dict(metrics))
                one = replace(d, sae_id=f"{name}, {d.info.site}", info=info)
                found.setdefault(one.sae_id, replace(one, d_sae=None, sparsity="TopK", k=None))
    return [*dictionaries, *found.values()]


def dictionaries_table(dictionaries: Sequence[Facts]) -> str:
    """What each dictionary is and how faithful it is to the model."""
    header = ["dictionary", "dimensions → latents", "sparsity", "rule", "α"]
    header += ["FVU", "CE recovered", "KL", "L0", "dead %", "dense %"]
    return markdown([header, *map(_row, dictionaries)], left=4)


def _row(d: Facts) -> list[str]:
    return [
        f"`{d.sae_id}`",
        f"{_count(d.d_in)} → {_count(d.d_sae)}",
        escape(d.sparsity),
        escape(rule_words(d)),
        _NONE if is_plain(d) or d.info.rule == _NOT_LEARNT else f"{d.info.alpha:g}",
        with_interval(d.metric("fvu"), d.interval("fvu")),
        with_interval(d.metric("ce_recovered"), d.interval("ce_recovered")),
        with_interval(d.metric("kl"), d.interval("kl")),
        _figure(d.metric("l0"), 1),
        _figure(d.metric("dead_share"), 1, 100.0),
        _figure(d.metric("dense_share"), 1, 100.0),
    ]


def fidelity_notes(dictionaries: Sequence[Facts]) -> list[str]:
    """What the columns mean, and the measured cross-entropies with their baselines."""
    measured = [d for d in dictionaries if d.metric("fvu") is not None]
    if not measured:
        return ["Their fidelity was not measured; `llm-wsae evaluate --keep` measures it."]
    notes = [
        "FVU: fraction of the activations' variance that the reconstruction misses. CE recovered: "
        "share of the model's next-token ability that remains when it continues from the "
        "reconstruction (1: all of it; 0: no better than zeros in its place), with its 95 % "
        "interval over documents. KL: how far that moves the predictions, in nats. L0: active "
        "latents per token. "
        "Dead: latents that never fired on this text; dense: on more than a tenth of the tokens."
    ]
    beside = [d.sae_id.partition(", ")[0] for d in measured if d.info.rule == _NOT_LEARNT]
    if any(name in _UNTRAINED for name in beside):
        notes[0] += (
            " Raw dimensions (two latents for each dimension of the activations) and frozen random "
            "(random directions) are untrained."
        )
    if any(name in _HALF_RANDOM for name in beside):
        notes[0] += (
            " Of frozen decoder and frozen encoder one half is random, the other was trained."
        )
    if beside:
        notes[0] += " A number says little unless it is far from theirs."
    rows = []
    for d in measured:
        values = [d.metric(f"ce_{name}") for name in ("clean", "spliced", "mean_ablated")]
        values += [d.metric("ce_zero_ablated"), d.metric("ce_recovered_mean")]
        size = [d.metric(name) for name in ("rows", "documents", "effective_documents")]
        counted = [_NONE if number is None else f"{number:,.0f}" for number in size]
        rows.append([f"`{d.sae_id}`", *counted, *(_figure(value, 3) for value in values)])
    header = ["cross-entropy in nats", "held-out tokens", "documents", "effective documents"]
    header += ["model", "with the reconstruction"]
    header += ["with the mean", "with zeros", "CE recovered against the mean"]
    return [*notes, markdown([header, *rows]), *_massive_notes(measured)]


def _massive_notes(measured: Sequence[Facts]) -> list[str]:
    """What was excluded from the measurements, if anything was."""
    told = [
        f"`{d.sae_id}` {d.metric('massive_rows'):,.0f}, with them its FVU is "
        f"{_figure(d.metric('fvu_with_massive'), 3)}"
        for d in measured
        if d.metric("massive_rows")
    ]
    if not told:
        return []
    return [
        "Tokens with massive activations are excluded and keep the model's own activation: "
        + "; ".join(told)
        + "."
    ]


def monosemanticity_section(dictionaries: Sequence[Facts]) -> list[str]:
    """Every dictionary's monosemanticity: what the measures mean, and a table with a column for
    each, the control in brackets.

    A measure is a number, or an object with ``value`` and optionally ``interval`` and ``control``.
    Empty if no dictionary has one.
    """
    scores = {d.sae_id: mapping(d.info.metrics.get("monosemanticity")) for d in dictionaries}
    cells = {
        sae_id: {name: cell for name, value in found.items() if (cell := score(value))}
        for sae_id, found in scores.items()
    }
    names = list(dict.fromkeys(name for found in cells.values() for name in found))
    if not names:
        return []
    rows = [
        [f"`{sae_id}`", *(found.get(name, _NONE) for name in names)]
        for sae_id, found in cells.items()
        if found
    ]
    spelt = {name: escape(name.replace("_", " ")) for name in names}
    known = [f"{spelt[name]}: {MEASURES[name]}" for name in names if name in MEASURES]
    intervals = "All on held-out text, without a language model as judge, with 95 % intervals. "
    notes = [intervals + "; ".join(known) + "."] if known else []
    return [*notes, markdown([["dictionary", *spelt.values()], *rows])]


def explanations_section(dictionaries: Sequence[Facts]) -> list[str]:
    """How well a language model explained every dictionary's latents; empty if it was not asked."""
    rows = []
    for d in dictionaries:
        found = mapping(d.info.metrics.get("explanations"))
        latents = integer(found.get("latents"))
        if latents is None:
            continue
        unread, questions = (integer(found.get(key)) for key in ("unread", "questions"))
        rows.append(
            [
                f"`{d.sae_id}`",
                escape(text(found.get("explainer")) or _NONE),
                f"{latents:,}",
                *(score(found.get(name)) or _NONE for name in _JUDGED),
                _count(unread) + (f" of {questions:,}" if questions else ""),
            ]
        )
    if not rows:
        return []
    header = ["dictionary", "explained and judged by", "latents", *_JUDGED, "answers not readable"]
    return [
        "Detection: does a text excite the latent, by its explanation? Fuzzing: are the marked "
        "tokens those that excite it? Both are balanced accuracies (chance: 0.5) on documents that "
        "the explainer did not see. Intruder: which of five texts does not excite it (accuracy "
        "without an explanation; chance: 0.2). Means over a sample of latents, with 95 % intervals "
        f"over them. The explanations are in `{EXPLANATIONS}`.",
        markdown([header, *rows], left=2),
    ]


def with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    """``0.986 [0.984, 0.987]``."""
    if value is None or interval is None:
        return _figure(value, 3)
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def score(value: object) -> str:
    """A measure as text, with its interval and its control; empty if it is none."""
    found = mapping(value)
    number_here = number(found.get("value") if found else value)
    if number_here is None:
        return ""
    control = number(found.get("control"))
    bracket = "" if control is None else f" (control {control:.3f})"
    return with_interval(number_here, pair(found.get("interval"))) + bracket


def _figure(value: float | None, digits: int, factor: float = 1.0) -> str:
    return _NONE if value is None else f"{factor * value:.{digits}f}"


def _count(value: int | None) -> str:
    return _NONE if value is None else f"{value:,}"
