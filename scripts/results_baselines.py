"""What is recovered without learning it: rows for the tables of planted features.

    bash scripts/reproduce.sh baselines

At all five sites: dictionaries of which one half stays random (Korznikov et al. 2026, arXiv
2602.14111), trained as plain ones are, on one million rows as in ``results_recovery.py`` and on two
million as in ``results_free_lengths.py``; and the dimensions of the stream and its principal
components, which need no training. The plants, texts and judges are theirs, too.

What was expected was written down before the first of them was trained; after blocks 9, on one
million rows, they had been measured before.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

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


def measure(key: str, path: str, rows: int, seeds: Sequence[int]) -> None:
    """Train and measure what has no result yet."""
    opened = recovery.open_site(key, path)

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
            }
            write_json(_result(folder, key, label, seed), plain(record))

    first = SEEDS[0]
    raw = {f"{name}-k{K}": make for name, make in RAW.items()}
    if not all(_result("raw", key, label, first).exists() for label in raw):
        site, inputs = opened.source.site, opened.inputs
        judge({label: make(inputs, site, K) for label, make in raw.items()}, first, "raw")
    for seed in seeds:
        if all(_result(str(rows), key, label, seed).exists() for label in LABELS[len(RAW) :]):
            continue
        folder = BASELINES / f"trained/{key}-{rows}/s{seed}"
        judge(half_random(opened, rows, seed, folder), seed, str(rows))
        print(f"{key}: {rows:,} rows, seed {seed} measured", flush=True)


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
"""For every site, and for one and two million rows."""


def section() -> str:
    """The part of docs/results: what was expected, and how often it came out."""
    studies = {
        "one million rows, length 1": (recovery.ROWS, recovery.read),
        "two million rows, plain with free lengths": (free_lengths.ROWS, free_lengths.read),
    }
    parts = []
    for words, (rows, read) in studies.items():
        table = [["expected beforehand", *(where.title for where in PLACES.values())]]
        means = {}
        for key in PLACES:
            plain_ones = [r for r in read(key) if r["label"] == f"uniform-k{K}"]
            means[key] = recovery.means_of(plain_ones) | recovery.means_of_baselines(key, rows)
        for claim, found in EXPECTED:
            outcomes = [found(means[key]) if _has_all(means[key]) else None for key in PLACES]
            table.append([claim, *("–" if one is None else _cell(*one) for one in outcomes)])
        parts += [f"### Nothing is recovered without learning it: {words}", markdown(table)]
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
    every = [recovery.ROWS, free_lengths.ROWS]
    parser.add_argument("--rows", nargs="+", type=int, choices=every, default=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    for archive, folder in (
        (BASELINES_ARCHIVE, BASELINES),
        (recovery.ARCHIVE, recovery.RUN),
        (free_lengths.ARCHIVE, free_lengths.RUN),
    ):
        if archive.exists():
            unpack(archive, folder)
    for rows in asked.rows:
        for key in asked.places:
            if path := getattr(asked, PLACES[key].model_key):
                measure(key, path, rows, asked.seeds)
                pack(BASELINES, BASELINES_ARCHIVE)
    write_result("baselines", section())


if __name__ == "__main__":
    main()
