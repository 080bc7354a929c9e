"""The tables of a card, in Markdown, and the escaping of text that comes from files."""

import re
from collections.abc import Sequence
from dataclasses import replace

from llm_wsae.dictionary.folder import EXPLANATIONS
from llm_wsae.dictionary.hub.card_data import Facts
from llm_wsae.outside import integer, mapping, text
from llm_wsae.statistics.measures import FIDELITY, MEASURES, score_text
from llm_wsae.terminal import markdown

_LONGEST = 200  # characters of a foreign text
_MARKUP = re.compile(r"([\\`*_\[\]|~#!$])")
_NONE = "—"
_JUDGED = ("detection", "fuzzing", "intruder")  # by a language model
_BASELINES = ("raw dimensions", "frozen random", "frozen decoder", "frozen encoder")
_ENTROPIES = ("ce_clean", "ce_spliced", "ce_mean_ablated", "ce_zero_ablated", "ce_recovered_mean")
_NOT_LEARNT = "none"
_SHOWN = [measure for measure in FIDELITY if measure.card]


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
        for name in _BASELINES:
            if metrics := mapping(measured.get(name)):
                info = replace(d.info, rule=_NOT_LEARNT, metrics=dict(metrics))
                sae_id = f"{name}, {d.info.site}"
                one = replace(d, sae_id=sae_id, info=info, d_sae=None, sparsity="TopK", k=None)
                found.setdefault(sae_id, one)
    return [*dictionaries, *found.values()]


def dictionaries_table(dictionaries: Sequence[Facts]) -> str:
    """What each dictionary is and how faithful it is to the model."""
    header = ["dictionary", "dimensions → latents", "sparsity", "rule", "α"]
    rows = [
        [
            f"`{d.sae_id}`",
            f"{_count(d.d_in)} → {_count(d.d_sae)}",
            escape(d.sparsity),
            escape(rule_words(d)),
            _NONE if is_plain(d) or d.info.rule == _NOT_LEARNT else f"{d.info.alpha:g}",
            *(one.text(mapping(d.info.metrics.get("fidelity"))) or _NONE for one in _SHOWN),
        ]
        for d in dictionaries
    ]
    return markdown([[*header, *(one.title for one in _SHOWN)], *rows], left=4)


def fidelity_notes(dictionaries: Sequence[Facts]) -> list[str]:
    """What the columns mean, and the measured cross-entropies with their baselines."""
    measured = [d for d in dictionaries if d.metric("fvu") is not None]
    if not measured:
        return ["Their fidelity was not measured; `llm-wsae evaluate --keep` measures it."]
    notes = ["; ".join(f"{one.title}: {one.meaning}" for one in _SHOWN) + "."]
    if any(d.info.rule == _NOT_LEARNT for d in measured):
        notes.append(
            "Raw dimensions (two latents for each dimension of the activations) and frozen random "
            "(random directions) are untrained; of frozen decoder and frozen encoder one half is "
            "random, the other was trained. A number says little unless it is far from theirs."
        )
    header = ["cross-entropy in nats", "held-out tokens", "documents", "effective documents"]
    header += ["model", "with the reconstruction", "with the mean", "with zeros"]
    header += ["CE recovered against the mean"]
    rows = [
        [
            f"`{d.sae_id}`",
            *(_figure(d.metric(m), 0) for m in ("rows", "documents", "effective_documents")),
            *(_figure(d.metric(m), 3) for m in _ENTROPIES),
        ]
        for d in measured
    ]
    notes.append(markdown([header, *rows]))
    massive = [
        f"`{d.sae_id}` {count:,.0f}, with them its FVU is "
        f"{_figure(d.metric('fvu_with_massive'), 3)}"
        for d in measured
        if (count := d.metric("massive_rows"))
    ]
    if massive:
        notes.append(
            "Tokens with massive activations are excluded and keep the model's own activation: "
            f"{'; '.join(massive)}."
        )
    return notes


def monosemanticity_section(dictionaries: Sequence[Facts]) -> list[str]:
    """Every dictionary's monosemanticity: what the measures mean, and a table with a column for
    each, the control in brackets.

    Empty if no dictionary has one.
    """
    cells = {}
    for d in dictionaries:
        found = mapping(d.info.metrics.get("monosemanticity"))
        if scores := {name: cell for name in found if (cell := score_text(found, name))}:
            cells[d.sae_id] = scores
    names = list(dict.fromkeys(name for scores in cells.values() for name in scores))
    names = [name for name in MEASURES if name in names] + [n for n in names if n not in MEASURES]
    if not names:
        return []
    rows = [
        [f"`{sae_id}`", *(scores.get(name, _NONE) for name in names)]
        for sae_id, scores in cells.items()
    ]
    known = [MEASURES[name] for name in names if name in MEASURES]
    meanings = "; ".join(f"{one.title}: {one.meaning}" for one in known)
    titles = [one.title for one in known]
    titles += [escape(name.replace("_", " ")) for name in names if name not in MEASURES]
    intervals = "All on held-out text, without a language model as judge, with 95 % intervals. "
    notes = [f"{intervals}{meanings}."] if known else []
    return [*notes, markdown([["dictionary", *titles], *rows])]


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
                *(score_text(found, name) or _NONE for name in _JUDGED),
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


def _figure(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _count(value: int | None) -> str:
    return _NONE if value is None else f"{value:,}"
