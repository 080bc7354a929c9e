"""What docs/results says of whitening as a space at other learning rates, beside the loss.

``results_free_lengths.py`` measures it and hands over its archive.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import free_lengths_expected as expected
import results_recovery as recovery
from results_recovery import PLACES, SEEDS, K

from llm_wsae.studies.curve import Value
from llm_wsae.studies.inference import estimates
from llm_wsae.terminal import markdown

Record = dict[str, Any]
Read = Callable[[str, str], list[Record]]
"""Site, setting → dictionaries; the usual setting is the empty text."""
PLAIN, LOSS, SPACE = expected.PLAIN, expected.HALFWAY_IN_LOSS, expected.HALFWAY_SPACE
_ROWS = (
    ("plain", "", PLAIN),
    ("plain, rate × 2", "twice-rate", PLAIN),
    ("plain, rate × 4", "four-times", PLAIN),
    ("in the loss", "", LOSS),
    ("in the loss, begun as in the space", "start", LOSS),
    ("in the loss, rate × 2", "twice-rate", LOSS),
    ("in the loss, rate × 4", "four-times", LOSS),
    ("in the space", "", SPACE),
    ("in the space, begun as in the loss", "start", SPACE),
    ("**in the space, rate × 2**", "twice-rate", SPACE),
    ("in the space, rate × 4", "four-times", SPACE),
    ("control: random directions, in the space, rate × 2", "twice-rate", f"rotated-{SPACE}"),
    ("control: permuted, in the space, rate × 2", "twice-rate", f"permuted-{SPACE}"),
    ("in the space, rate × 2, α = ¼", "twice-rate", f"whitening-a0.25-space-k{K}"),
    ("in the space, rate × 2, α = ¾", "twice-rate", f"whitening-a0.75-space-k{K}"),
    ("in the space, rate × 2, α = 1", "twice-rate", f"whitening-a1-space-k{K}"),
    ("inverse variance, in the space, rate × 2", "twice-rate", expected.INVERSE_SPACE),
)
_SETTINGS = {
    "half a million rows": "half-million",
    "one million rows": "million",
    "two million rows": "",
    "four million rows": "four-million",
    "BatchTopK, two million rows": "batch-topk",
    "JumpReLU, two million rows": "jumprelu",
}
_MEASURES = ("kl", "recovered")
_OTHER_SEEDS = {"fresh": expected.FRESH, "again": expected.POWERS, "first": (0,)}
_ROWS_OF_TRAINING = 2_000_000


def section(read: Read) -> str:
    """The part of docs/results."""
    parts = []
    for key, where in PLACES.items():
        rows = [(words, _of(read(key, setting), label)) for words, setting, label in _ROWS]
        parts += [f"### In the space, at twice the rate: {where.title}", _beside(rows, key)]
        parts += _in_settings(key, read)
        means = _means(key, read)
        parts += recovery.expected(
            (words, found, means) for place, words, found in expected.OF_SPACE if place == key
        )
    return "\n\n".join(parts)


def _of(records: Sequence[Record], label: str) -> dict[int, Record]:
    return {record["seed"]: record for record in records if record["label"] == label}


def _paired(own: dict[int, Record], base: dict[int, Record], measure: str) -> dict[int, Value]:
    """Seed → difference."""
    both = sorted(own.keys() & base.keys())
    return {seed: recovery.difference(own[seed], base[seed], measure) for seed in both}


def _beside(found: list[tuple[str, dict[int, Record]]], key: str) -> str:
    """Rows beside the first of them; below, what learnt nothing, of as many rows."""
    base = found[0][1]
    changes = {
        measure: estimates({words: _paired(own, base, measure) for words, own in found[1:]})
        for measure in _MEASURES
    }
    shown = ("kl", "ce", "fvu", "recovered")
    rows = [["dictionary", "seeds", "KL", "CE recovered", "FVU", "recovered", "dead %",
             "KL, beside plain", "recovered, beside plain"]]  # fmt: skip
    for words, own in found:
        if not own:
            continue
        (means,) = recovery.means_of(list(own.values())).values()
        rows.append(
            [
                words,
                str(len(own)),
                *(f"{means[measure]:.3f}" for measure in shown),
                f"{100 * means['dead']:.1f}",
                recovery.text_of(changes["kl"].get(words), per_cent=True),
                recovery.text_of(changes["recovered"].get(words)),
            ]
        )
    for label, means in recovery.means_of_baselines(key, _ROWS_OF_TRAINING).items():
        values = (*(f"{means[measure]:.3f}" for measure in shown), f"{100 * means['dead']:.1f}")
        rows.append([f"`{label}`", "1", *values, "–", "–"])
    return markdown(rows)


def _in_settings(key: str, read: Read) -> Iterator[str]:
    """Other numbers of rows and architectures, if there are any."""
    found = {}
    for words, setting in _SETTINGS.items():
        usual, twice = (
            read(key, setting),
            read(key, f"{setting}-twice" if setting else "twice-rate"),
        )
        own = (_of(usual, PLAIN), _of(twice, PLAIN), _of(usual, LOSS), _of(twice, SPACE))
        if own[-1]:
            found[words] = own
    if len(found) < 2:
        return
    changes = {
        measure: estimates(
            {words: _paired(own[-1], own[0], measure) for words, own in found.items()}
        )
        for measure in _MEASURES
    }
    kinds = ("plain", "plain, rate × 2", "in the loss", "in the space, rate × 2", "beside plain")
    head = [f"{measure}, {kind}" for measure in ("KL", "recovered") for kind in kinds]
    rows = [["trained with", *head]]
    for words, groups in found.items():
        shared = set.intersection(*(set(own) for own in groups if own))
        cells = []
        for measure in _MEASURES:
            cells += [_mean([own[seed] for seed in shared if own], measure) for own in groups]
            cells.append(recovery.text_of(changes[measure].get(words), per_cent=measure == "kl"))
        rows.append([words, *cells])
    for words, _, means in recovery.baselines_by_rows(key):
        values = (f"{means[measure]:.3f}" for measure in _MEASURES)
        rows.append([words, *(cell for value in values for cell in (value, *"––––"))])
    yield markdown(rows)


def _mean(records: list[Record], measure: str) -> str:
    if not records:
        return "–"
    (means,) = recovery.means_of(records).values()
    return f"{means[measure]:.3f}"


def _means(key: str, read: Read) -> expected.Settings:
    """By setting, over three seeds; ``fresh`` and ``first`` are the usual rate, over other
    seeds, and with ``-twice`` twice the rate."""
    names = {setting for _, setting, _ in _ROWS} | {s for s in _SETTINGS.values() if s}
    names |= {f"{setting}-twice" for setting in _SETTINGS.values() if setting}
    found: expected.Settings = {}
    for setting in sorted(names):
        records = read(key, setting)
        first = [record for record in records if record["seed"] in SEEDS]
        found[setting or expected.USUAL_RATE] = recovery.means_of(first)
        if setting in ("", "twice-rate"):
            twice = "-twice" if setting else ""
            for name, seeds in _OTHER_SEEDS.items():
                own = [record for record in records if record["seed"] in seeds]
                found[name + twice] = recovery.means_of(own)
    return found
