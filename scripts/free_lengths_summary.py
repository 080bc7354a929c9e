"""The two tables of docs/which-weights.md, what each set of weights brings and what lasts; and
along which directions whitening recovers more, at all sites.

``results_free_lengths.py`` measures it and hands over its archive.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import free_lengths_expected as expected
import results_recovery as recovery
from results_recovery import PLACES, K

from llm_wsae.terminal import markdown

Record = dict[str, Any]
Read = Callable[[str, str], list[Record]]
"""Site, setting → dictionaries; the usual setting is the empty text."""
PLAIN, DEFAULT = expected.PLAIN, expected.HALFWAY_IN_LOSS
_POWERS = {"⅛": 0.125, "¼": 0.25, "⅜": 0.375, "½": 0.5, "¾": 0.75, "1": 1.0}
_EACH = (
    ("plain", "", PLAIN),
    *(
        (f"**α = {name}, the default**" if name == "½" else f"α = {name}", "",
         f"whitening-a{alpha:g}-k{K}")
        for name, alpha in _POWERS.items()
    ),
    ("α = ½, mixed", "", expected.HALFWAY),
    *(
        (f"α = {name}, space, rate × 2", "twice-rate",
         f"whitening-a{_POWERS[name]:g}-space-k{K}")
        for name in "¼½¾"
    ),
    ("inverse variance, in the loss", "", expected.IN_LOSS),
    ("inverse variance, mixed", "", expected.INVERSE),
    ("the paper's variance, α = ½", "", f"variance-a0.5-k{K}"),
)  # fmt: skip
"""Words, setting and label of the dictionaries of every site."""
_BASELINES = {
    "random decoder": f"uniform-frozen-decoder-k{K}",
    "random encoder": f"uniform-frozen-encoder-k{K}",
    "raw dimensions": f"dimensions-k{K}",
}
_ROWS = {"½ M": (500_000, "half-million"), "1 M": (1_000_000, "million"), "2 M": (2_000_000, ""),
         "4 M": (4_000_000, "four-million")}  # fmt: skip
_BLOCKS_9 = ("smollm2", "gemma")
_MODELS = {"smollm2": "SmolLM2", "gemma": "Gemma"}
_SITES = sorted(
    PLACES, key=lambda key: (PLACES[key].model_key != "smollm2", PLACES[key].site.block)
)


def each(read: Read) -> str:
    """Share of the plants recovered, and KL relative to plain, at all sites after two million
    rows; over all seeds of a dictionary, KL over those that plain has, too."""
    rows = [["", *(_title(key) for key in _SITES)]]
    for words, setting, label in _EACH:
        rows.append([words])
        for key in _SITES:
            rows[-1].append(_cell(_of(read(key, setting), label), _of(read(key, ""), PLAIN)))
    for words, label in _BASELINES.items():
        rows.append([words])
        rows[-1] += [_of_baseline(key, 2_000_000, label, read(key, "")) for key in _SITES]
    return markdown(rows)


def _title(key: str) -> str:
    return f"{_MODELS[PLACES[key].model_key]}, block {PLACES[key].site.block}"


def lasting(read: Read) -> str:
    """The same of plain dictionaries and the default after half a million to four million rows."""
    rows = [["", *(f"{_MODELS[key]}, {number}" for key in _BLOCKS_9 for number in _ROWS)]]
    for words, label in (("plain", PLAIN), ("whitened halfway", DEFAULT)):
        rows.append([words])
        for key in _BLOCKS_9:
            for _, setting in _ROWS.values():
                records = read(key, setting)
                rows[-1].append(_cell(_of(records, label), _of(records, PLAIN)))
    for words, label in _BASELINES.items():
        rows.append([words])
        for key in _BLOCKS_9:
            for number, setting in _ROWS.values():
                rows[-1].append(_of_baseline(key, number, label, read(key, setting)))
    return markdown(rows)


_EQUAL = {"the same k": None, "equal KL": "kl", "equal FVU": "fvu"}


def by_stratum(read: Read) -> str:
    """Difference from plain of what whitening recovers of each kind of plants, with intervals."""
    strata = list(read(_SITES[0], "")[0]["planted"]["by_stratum"])
    rows = [["recovered beside plain", *strata]]

    def add(words: str, records: list[Record], label: str, equal: str | None) -> None:
        found = [recovery.differences(records, "recovered", equal, one) for one in strata]
        rows.append([words, *(recovery.text_of(one.get(label)) for one in found)])

    for words, equal in _EQUAL.items():
        for key in _SITES:
            add(f"{_title(key)}, {words}", read(key, ""), DEFAULT, equal)
    for key in _SITES:
        label = expected.HALFWAY_SPACE
        beside = [
            *_of(read(key, ""), PLAIN).values(),
            *_of(read(key, "twice-rate"), label).values(),
        ]
        add(f"{_title(key)}, space, rate × 2", beside, label, None)
    return markdown(rows)


def _of(records: list[Record], label: str) -> dict[int, Record]:
    return {record["seed"]: record for record in records if record["label"] == label}


def _cell(own: dict[int, Record], plain: dict[int, Record]) -> str:
    """Recovered, and unless it is the plain one itself, KL beside it."""
    if not own:
        return "–"
    recovered = _mean(recovery.numbers(record)["recovered"] for record in own.values())
    both = own.keys() & plain.keys()
    change = _mean(
        math.log(recovery.numbers(own[seed])["kl"] / recovery.numbers(plain[seed])["kl"])
        for seed in both
    )
    return _text(recovered, None if own == plain else change)


def _of_baseline(key: str, rows: int, label: str, records: list[Record]) -> str:
    own = recovery.means_of_baselines(key, rows)[label]
    plain = recovery.means_of(list(_of(records, PLAIN).values()))[PLAIN]
    return _text(own["recovered"], math.log(own["kl"] / plain["kl"]))


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _text(recovered: float, log_kl: float | None) -> str:
    share = f"{recovered:.3f}".removeprefix("0")
    if log_kl is None:
        return share
    change = f"{100 * math.expm1(log_kl):+,.0f}".replace("-", "−")
    return f"{share}, {'0' if change in ('+0', '−0') else change} %"
