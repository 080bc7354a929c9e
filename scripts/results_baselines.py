"""What is recovered without learning it: rows for the tables of planted features.

    bash scripts/reproduce.sh baselines

At all five sites: dictionaries of which one half stays random (Korznikov et al. 2026, arXiv
2602.14111), trained as plain ones are, on one million rows as in ``results_recovery.py`` and on two
million as in ``results_free_lengths.py``; after blocks 9 also on half a million and four; and the
dimensions of the stream and its principal components, which need no training. The plants, texts and
judges are theirs, too. Where features along decoder rows are planted, the same stand beside them.

What was expected was written down before the first of them was trained; after blocks 9, on one
million rows, they had been measured before. Half a million rows, four, and decoder rows came last,
with the same expectations.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results_free_lengths as free_lengths
import results_recovery as recovery
import torch
from benchmarks import README, write_result
from results_archive import pack, unpack
from results_recovery import BASELINES_ARCHIVE, PLACES, SEEDS, K, change

from llm_wsae import Dictionary, Site, TrainConfig, train
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.evaluation.baselines import raw_dimensions as of_statistics
from llm_wsae.evaluation.baselines import signed_axes
from llm_wsae.files import write_json
from llm_wsae.planting.recovery import measure_recovery
from llm_wsae.provenance import plain
from llm_wsae.terminal import markdown
from llm_wsae.training.arm import ArmConfig
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.matrix_rules import spectrum

BASELINES = README.parent / "runs/baselines"
DECODER_ROWS = "decoder-rows"


def raw_dimensions(inputs: RuleInputs, site: Site, k: int) -> Dictionary:
    """The dimensions of the activations."""
    return of_statistics(_info(inputs, site), inputs.statistics, float(k))


def principal_components(inputs: RuleInputs, site: Site, k: int) -> Dictionary:
    """The eigenvectors of their covariance."""
    values, vectors = spectrum(inputs.covariance)
    mean = inputs.statistics.usual_sample.mean(0)
    return signed_axes(_info(inputs, site), vectors.T, values.sqrt(), mean, float(k))


def _info(inputs: RuleInputs, site: Site) -> DictionaryInfo:
    threshold = inputs.statistics.massive_threshold
    return DictionaryInfo(str(site), "baseline", massive_threshold=threshold)


FROZEN = ("frozen-decoder", "frozen-encoder")
RAW = {"dimensions": raw_dimensions, "principal-components": principal_components}
LABELS = (*(f"{name}-k{K}" for name in RAW), *(f"uniform-{kind}-k{K}" for kind in FROZEN))


def half_random(
    opened: recovery.Opened, rows: int, seed: int, folder: Path
) -> dict[str, Dictionary]:
    """Dictionaries of which one half stays random, trained on so many rows, by label."""
    uniform = weights_from_rule("uniform", 1.0, opened.inputs)
    arms = [ArmConfig(uniform, K, init_seed=seed, architecture=kind) for kind in FROZEN]
    how = TrainConfig(tokens=rows, shuffle_seed=seed, lengths="unit", checkpoint_seconds=600)
    made = train(opened.source, arms, how, folder)
    return {label: made[arm.name] for label, arm in zip(LABELS[len(RAW) :], arms, strict=True)}


@dataclass(frozen=True)
class Setting:
    """Beside which plain dictionaries baselines stand."""

    words: str
    rows: int
    setting: str | None = None
    """Of ``results_free_lengths.py``; if there is none, ``results_recovery.py``."""
    places: tuple[str, ...] = tuple(PLACES)
    decoder_rows: bool = False
    """Whether features along decoder rows are planted, too: then raw dimensions are other ones."""

    @property
    def folder(self) -> str:
        return DECODER_ROWS if self.decoder_rows else str(self.rows)

    @property
    def raw_folder(self) -> str:
        return DECODER_ROWS if self.decoder_rows else "raw"

    def read(self, key: str) -> list[dict[str, Any]]:
        if self.setting is None:
            return recovery.read(key)
        return free_lengths.read(key, self.setting)

    def seeds(self, key: str) -> Sequence[int]:
        return SEEDS if self.setting is None and key in free_lengths.BLOCKS_9 else SEEDS[:1]


_BLOCKS_9 = free_lengths.BLOCKS_9
SETTINGS = (
    Setting("one million rows, length 1", recovery.ROWS),
    Setting("two million rows, plain with free lengths", free_lengths.ROWS, ""),
    Setting("half a million rows", 500_000, "half-million", _BLOCKS_9),
    Setting("four million rows", 4_000_000, "four-million", _BLOCKS_9),
    Setting("decoder rows, too", free_lengths.ROWS, DECODER_ROWS, ("smollm2",), decoder_rows=True),
)


def measure(key: str, path: str, setting: Setting) -> None:
    """Train and measure what has no result yet."""
    raw = {f"{name}-k{K}": make for name, make in RAW.items()}
    wanted = [_result(setting.raw_folder, key, label, SEEDS[0]) for label in raw]
    for seed in setting.seeds(key):
        wanted += [_result(setting.folder, key, label, seed) for label in LABELS[len(RAW) :]]
    if all(one.exists() for one in wanted):
        return
    first = free_lengths.first_dictionary(key) if setting.decoder_rows else None
    opened = recovery.open_site(key, path, decoder_rows_of=first)

    def judge(named: dict[str, Dictionary], seed: int, folder: str) -> None:
        fidelity = opened.evaluator.evaluate(named).dictionaries
        for label, dictionary in named.items():
            planted = measure_recovery(dictionary, opened.source).to_dict()
            whole = {"fidelity": fidelity[label].summary(), "planted": planted}
            record = {
                "label": label,
                "seed": seed,
                "k": K,
                "numbers": recovery.numbers(whole),
                "by_stratum": {s: one["f1"] for s, one in planted["by_stratum"].items()},
                "recovered": {s: one["recovered"] for s, one in planted["by_stratum"].items()},
            }
            write_json(_result(folder, key, label, seed), plain(record))

    if not all(one.exists() for one in wanted[: len(raw)]):
        site, inputs = opened.source.site, opened.inputs
        made = {label: make(inputs, site, K) for label, make in raw.items()}
        judge(made, SEEDS[0], setting.raw_folder)
    for seed in setting.seeds(key):
        labels = LABELS[len(RAW) :]
        if all(_result(setting.folder, key, label, seed).exists() for label in labels):
            continue
        folder = BASELINES / f"trained/{key}-{setting.folder}/s{seed}"
        judge(half_random(opened, setting.rows, seed, folder), seed, setting.folder)
        print(f"{key}: {setting.words}, seed {seed} measured", flush=True)


def _result(folder: str, key: str, label: str, seed: int) -> Path:
    return BASELINES / folder / "results" / f"{key}.{label}.s{seed}.json"


EXPECTED = (
    ("frozen decoder: at most a quarter of what plain recovers",
     change(LABELS[2], "recovered", -1, -0.75)),
    ("the same: KL at least 50 % above plain's", change(LABELS[2], "kl", 0.5, math.inf)),
    ("frozen encoder: at most a tenth of what plain recovers",
     change(LABELS[3], "recovered", -1, -0.9)),
    ("the same: KL at least twice plain's", change(LABELS[3], "kl", 1, math.inf)),
    ("dimensions of the stream: at most a quarter of what plain recovers",
     change(LABELS[0], "recovered", -1, -0.75)),
    ("principal components: at most a tenth of what plain recovers",
     change(LABELS[1], "recovered", -1, -0.9)),
)  # fmt: skip
"""For every site and every setting."""


def section() -> str:
    """The part of docs/results: what was expected, and how often it came out."""
    parts = []
    for setting in SETTINGS:
        table = [["expected beforehand", *(PLACES[key].title for key in setting.places)]]
        means = {}
        for key in setting.places:
            plain_ones = [r for r in setting.read(key) if r["label"] == f"uniform-k{K}"]
            baselines = recovery.means_of_baselines(key, setting.folder, setting.raw_folder)
            means[key] = recovery.means_of(plain_ones) | baselines
        for claim, found in EXPECTED:
            outcomes = [found(means[key]) if _has_all(means[key]) else None for key in means]
            table.append([claim, *("–" if one is None else _cell(*one) for one in outcomes)])
        parts += [f"### Nothing is recovered without learning it: {setting.words}", markdown(table)]
    return "\n\n".join(parts)


def _has_all(means: recovery.Means) -> bool:
    return all(label in means for label in LABELS)


def _cell(holds: bool, measured: str) -> str:
    return measured if holds else f"**no**: {measured}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key in recovery.MODELS:
        parser.add_argument(f"--{key}", help="the model, if something is to be measured")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    for archive, folder in (
        (BASELINES_ARCHIVE, BASELINES),
        (recovery.ARCHIVE, recovery.RUN),
        (free_lengths.ARCHIVE, free_lengths.RUN),
    ):
        if archive.exists():
            unpack(archive, folder)
    for setting in SETTINGS:
        for key in setting.places:
            path = getattr(asked, PLACES[key].model_key)
            if path and key in asked.places:
                measure(key, path, setting)
                pack(BASELINES, BASELINES_ARCHIVE)
    write_result("baselines", section())


if __name__ == "__main__":
    main()
