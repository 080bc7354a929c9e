"""What free lengths, and halfway whitening, cost in fidelity where nothing is planted.

    bash scripts/reproduce.sh clean-rows

Everything that ``results_free_lengths.py`` says is of dictionaries that were trained on rows with
planted features. Here plain dictionaries and those that are whitened halfway in the loss see the
rows as they are, one million and four, with free lengths and with length 1 (not of Gemma after four
million), three seeds each; at three further sites one million, with free lengths. Nothing is known
of their features, so they are judged by KL and FVU; and those of one million rows and free lengths
by whether seeds agree, and whether latents are detected (``whitening_latents``; after block 9 of
SmolLM2, ``results_study.py`` does it). Dictionaries of which one half stays random, and the
dimensions of the stream, stand beside them; and where latents are judged, random weights in the
loss.

``EXPECTED`` was written down, of SmolLM2, after one pair of plain dictionaries (four million rows):
there free lengths had cost 5 % of KL, and whitening 7 %; of Gemma and of the latents when SmolLM2
was known; of baselines later; then of random weights, and of all other latents than those of plain
and of default dictionaries. What was expected of the further sites was written down before their
first dictionary, when blocks 9 were known. Whether seeds of half-random dictionaries agree came
last, when it was known after block 9 of Gemma (.140 with a random decoder, .343 with a random
encoder).
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results_recovery as recovery
import torch
import whitening_latents as latents
from benchmarks import README, write_result
from results_archive import pack, unpack
from results_baselines import FROZEN, raw_dimensions
from results_recovery import PLACES, SEEDS, TEXT, K

from llm_wsae import (
    ArmConfig,
    Corpus,
    Dictionary,
    EvaluateConfig,
    HarvestConfig,
    LanguageModel,
    TrainConfig,
    choose_weights,
    harvest,
    make_arms,
    measure_inputs,
    train,
)
from llm_wsae.data.packing import Packer
from llm_wsae.evaluation.activations import take_contexts
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.files import write_json
from llm_wsae.provenance import plain
from llm_wsae.studies.curve import Value
from llm_wsae.studies.inference import Estimate, estimates
from llm_wsae.terminal import markdown
from llm_wsae.training.config import Lengths, default_learning_rate
from llm_wsae.weights.config import WeightConfig

RUN = README.parent / "runs/clean-rows"
ARCHIVE = Path(__file__).parent / "results/clean-rows.jsonl.gz"
WHERE = {
    "smollm2": 20_000,
    "gemma": 10_000,
    "smollm2-20": 20_000,
    "gemma-5": 10_000,
    "gemma-14": 10_000,
}
"""Sites, and the held-out tokens of their evaluation."""
ROWS = {1_000_000: "1 M", 4_000_000: "4 M"}
TRAINED: dict[str, dict[tuple[int, Lengths], Sequence[int]]] = {
    "smollm2": {(rows, lengths): SEEDS for rows in ROWS for lengths in ("free", "unit")},
    "gemma": {(1_000_000, "free"): SEEDS, (1_000_000, "unit"): SEEDS, (4_000_000, "free"): SEEDS},
    **{key: {(1_000_000, "free"): SEEDS} for key in ("smollm2-20", "gemma-5", "gemma-14")},
}
"""Seeds of the pairs of dictionaries of a site, by rows and lengths."""
IN_SPACE = "-space"
"""Of the results of dictionaries that are whitened as a space and trained at twice the rate, with
free lengths, at all sites: after blocks 9 they were added last."""
RANDOM_WEIGHTS = "-random"
"""Of the results of dictionaries with random weights in the loss, of the same rows as those whose
latents are judged."""
HALF_RANDOM = "-baselines"
"""Of the results of dictionaries of which one half stays random, and of the dimensions."""
_ROWS_OF_BASELINES = 1_000_000
JUDGED: dict[str, tuple[int, Lengths]] = {
    key: (1_000_000, "free") for key in WHERE if key != "smollm2"
}
"""Rows and lengths of the dictionaries of a site whose latents are judged; baselines have rows of
length 1."""
PLAIN, WHITENED = f"uniform-k{K}", f"whitening-a0.5-k{K}"
WHITENED_SPACE, RANDOM = f"whitening-a0.5-space-k{K}", f"random-a1-k{K}"
FROZEN_DECODER, FROZEN_ENCODER = (f"uniform-{kind}-k{K}" for kind in FROZEN)
DIMENSIONS = f"dimensions-k{K}"
_OF_LATENTS = {PLAIN, WHITENED, WHITENED_SPACE, RANDOM, FROZEN_DECODER, FROZEN_ENCODER, DIMENSIONS}
_BASELINES = {FROZEN_DECODER, FROZEN_ENCODER, DIMENSIONS}
Key = tuple[int, str, str]
"""Rows, lengths, dictionary."""


def _lengths_of_plain(key: str) -> str:
    """Of the plain dictionary beside which half-random ones, of length 1, stand at a site."""
    return "unit" if (1_000_000, "unit") in TRAINED[key] else "free"


EXPECTED = (
    ("smollm2", (4_000_000, "free", PLAIN), (4_000_000, "unit", PLAIN), 2, 8),
    ("smollm2", (1_000_000, "free", PLAIN), (1_000_000, "unit", PLAIN), -10, 0),
    ("smollm2", (4_000_000, "free", WHITENED), (4_000_000, "free", PLAIN), 3, 10),
    ("smollm2", (1_000_000, "free", WHITENED), (1_000_000, "free", PLAIN), -2, 5),
    ("gemma", (4_000_000, "free", PLAIN), (4_000_000, "unit", PLAIN), -5, 6),
    ("gemma", (1_000_000, "free", PLAIN), (1_000_000, "unit", PLAIN), -15, 0),
    ("gemma", (4_000_000, "free", WHITENED), (4_000_000, "free", PLAIN), -10, 5),
    ("gemma", (1_000_000, "free", WHITENED), (1_000_000, "free", PLAIN), -20, 3),
    ("smollm2", (1_000_000, "free", WHITENED_SPACE), (1_000_000, "free", PLAIN), -8, 2),
    ("smollm2", (4_000_000, "free", WHITENED_SPACE), (4_000_000, "free", PLAIN), -5, 4),
    ("gemma", (1_000_000, "free", WHITENED_SPACE), (1_000_000, "free", PLAIN), -45, -15),
    ("gemma", (4_000_000, "free", WHITENED_SPACE), (4_000_000, "free", PLAIN), -25, -3),
    ("gemma", (1_000_000, "free", RANDOM), (1_000_000, "free", PLAIN), 3, 40),
    *(
        (key, (1_000_000, "free", label), (1_000_000, "free", PLAIN), low, high)
        for key, label, low, high in (
            ("smollm2-20", WHITENED, 0, 8),
            ("smollm2-20", WHITENED_SPACE, -4, 8),
            ("smollm2-20", RANDOM, -2, 10),
            ("gemma-5", WHITENED, -25, 3),
            ("gemma-5", WHITENED_SPACE, -45, -10),
            ("gemma-5", RANDOM, -2, 40),
            ("gemma-14", WHITENED, -20, 3),
            ("gemma-14", WHITENED_SPACE, -45, -5),
            ("gemma-14", RANDOM, -2, 40),
        )
    ),
    *(
        (key, (1_000_000, "unit", label), (1_000_000, _lengths_of_plain(key), PLAIN), least, 1e6)
        for key in WHERE
        for label, least in ((FROZEN_DECODER, 50), (FROZEN_ENCODER, 100), (DIMENSIONS, 100))
    ),
)
"""Site, what, beside what, and between which per cent of KL the difference was expected."""
_OF_WHOM = {
    WHITENED: "whitened",
    WHITENED_SPACE: "whitened in the space at twice the rate",
    RANDOM: "random weights",
    FROZEN_DECODER: "frozen decoder",
    FROZEN_ENCODER: "frozen encoder",
    DIMENSIONS: "dimensions of the stream",
}
_NO_LOWER = ("all", "detection over all latents no lower than plain", 0.0, 1.0)
_NO_HIGHER = ("all", "detection over all latents no higher than plain (+.005 at most)", -1.0, 0.005)
_AGREE_LESS = ("agreement", "seeds agree less than plain (.05 at least)", -1.0, -0.05)
_BELOW = ("all", "detection over all latents at least .01 below plain", -1.0, -0.01)
_CLOSE = ("all", "detection over all latents within .01 of plain", -0.01, 0.01)
_AGREE = ("agreement", "seeds agree no less than plain (−.01 at most)", -0.01, 1.0)
_AGREE_MORE = ("agreement", "seeds agree more than plain (+.05 at least)", 0.05, 1.0)


def _new(low: float, high: float) -> tuple[str, str, float, float]:
    """How many times the new latents that a plain dictionary has."""
    bounds = f"{low:.1f} to {high:.1f}".removeprefix("0")
    return "new", f"{bounds} times as many new latents as a plain one has", low, high


_OF_CONTROLS = (
    (RANDOM, (_new(0.8, 1.2), _NO_HIGHER)),
    *((baseline, (_BELOW, _AGREE_LESS)) for baseline in (FROZEN_DECODER, FROZEN_ENCODER)),
    (DIMENSIONS, (_BELOW,)),
)
_OF_FURTHER = ((WHITENED, (_CLOSE, _AGREE, _new(0.7, 1.3))), *_OF_CONTROLS)
_OF_LATENTS_EXPECTED = {
    "gemma": (
        (WHITENED, (_NO_LOWER, _AGREE, _new(0.8, 1.3))),
        (WHITENED_SPACE, (_NO_LOWER, _AGREE, _new(0.8, 1.5))),
        *_OF_CONTROLS,
    ),
    "smollm2-20": ((WHITENED_SPACE, (_CLOSE, _AGREE, _new(0.7, 1.5))), *_OF_FURTHER),
    **{
        key: ((WHITENED_SPACE, (_CLOSE, _AGREE_MORE, _new(0.7, 1.5))), *_OF_FURTHER)
        for key in ("gemma-5", "gemma-14")
    },
}


def expected_of_latents(key: str) -> Iterator[tuple[str, Any]]:
    """What was expected of a site in ``JUDGED``: words, and what says whether it came out."""
    for label, asked in _OF_LATENTS_EXPECTED[key]:
        for measure, words, low, high in asked:
            found = latents.more if measure == "new" else latents.differs
            yield f"{_OF_WHOM[label]}: {words}", found(label, PLAIN, measure, low, high)


def measure(key: str, path: str) -> None:
    """Harvest, train and measure what has no result yet."""
    where = PLACES[key]
    wanted = [
        (rows, lengths, seed, "")
        for (rows, lengths), seeds in TRAINED[key].items()
        for seed in seeds
    ]
    wanted += [
        (rows, "free", seed, IN_SPACE)
        for rows in ROWS
        for seed in TRAINED[key].get((rows, "free"), ())
    ]
    wanted += [(_ROWS_OF_BASELINES, "unit", seed, HALF_RANDOM) for seed in SEEDS]
    if key in JUDGED:
        wanted += [(*JUDGED[key], seed, RANDOM_WEIGHTS) for seed in SEEDS]
    missing = [one for one in wanted if not _result(key, *one).exists()]
    # what was trained elsewhere is trained again before its latents are judged
    known = latents.read(_latents(key)).get("scores", {})
    again = key in JUDGED and known.keys() != _OF_LATENTS
    # whether seeds of half-random ones agree is asked at all sites
    agreement = latents.read(_latents(key)).get("agreement", {})
    alone = [label for label in (FROZEN_DECODER, FROZEN_ENCODER) if not agreement.get(label)]
    if not missing and not again and not alone:
        return
    model = LanguageModel.load(path)
    sites = [one.site for one in PLACES.values() if one.model_key == where.model_key]
    how = HarvestConfig(tokens=where.model.harvested)
    folder = recovery.RUN / "stores" / where.model_key
    store = harvest(model, Corpus.open(TEXT, "train"), sites, folder, how)
    inputs = measure_inputs(["whitening"], store, where.site)
    weights = {
        "": choose_weights(inputs, ["uniform", "whitening"], [0.5]),
        IN_SPACE: choose_weights(inputs, ["whitening"], [0.5], config=WeightConfig(place="space")),
    }
    contexts = Packer.for_model(model, how).contexts(Corpus.open(TEXT, "heldout"))
    config = EvaluateConfig(tokens=WHERE[key], bootstraps=100)
    evaluator = FidelityEvaluator(model, take_contexts(contexts, WHERE[key]), config)

    def made(
        rows: int, lengths: Lengths, seed: int, kind: str = ""
    ) -> tuple[Path, dict[str, Dictionary]]:
        rate = default_learning_rate(8 * inputs.statistics.d_in)
        training = TrainConfig(
            tokens=rows,
            lengths=lengths,
            shuffle_seed=seed,
            checkpoint_seconds=600,
            learning_rate=2 * rate if kind == IN_SPACE else rate,
        )
        if kind == HALF_RANDOM:
            uniform = weights[""][0]
            arms = [ArmConfig(uniform, K, init_seed=seed, architecture=kind) for kind in FROZEN]
        elif kind == RANDOM_WEIGHTS:
            drawn = choose_weights(inputs, ["random"], [1.0], config=WeightConfig(draw=seed))
            arms = make_arms(drawn, [K], init_seeds=(seed,))
        else:
            arms = make_arms(weights[kind], [K], init_seeds=(seed,))
        out = RUN / "trained" / f"{key}-{rows}-{lengths}-s{seed}{kind}"
        return out, train(store.source(where.site), arms, training, out)

    for one in missing:
        rows, lengths, seed, kind = one
        trained = made(*one)[1]
        if kind == HALF_RANDOM and seed == SEEDS[0]:
            trained |= {DIMENSIONS: raw_dimensions(inputs, where.site, K)}
        found = evaluator.evaluate(trained).summaries()
        named = {_label(name, seed): plain(own) for name, own in found.items()}
        write_json(_result(key, *one), named)
        print(f"{key}: {rows:,} rows, lengths {lengths}{kind}, seed {seed} measured", flush=True)
    if again:
        rows, lengths = JUDGED[key]
        folders: dict[str, dict[int, Path]] = {}
        for kind in ("", IN_SPACE, RANDOM_WEIGHTS, HALF_RANDOM):
            for seed in SEEDS:
                out, trained = made(rows, "unit" if kind == HALF_RANDOM else lengths, seed, kind)
                for name in trained:
                    folders.setdefault(_label(name, seed), {})[seed] = out / name
        dimensions = RUN / "trained" / f"{key}-{DIMENSIONS}"
        raw_dimensions(inputs, where.site, K).save(dimensions)
        folders[DIMENSIONS] = {SEEDS[0]: dimensions}
        latents.judge(_latents(key), path, folders, PLAIN)
    elif alone:
        made_of = {seed: made(_ROWS_OF_BASELINES, "unit", seed, HALF_RANDOM)[1] for seed in SEEDS}
        rows_of: dict[str, dict[int, torch.Tensor]] = {label: {} for label in alone}
        for seed, trained in made_of.items():
            for name, dictionary in trained.items():
                rows_of[_label(name, seed)][seed] = dictionary.W_dec.detach()
        latents.add_agreement(_latents(key), rows_of)


def _label(name: str, seed: int) -> str:
    """The name of a dictionary without the number of its seed, which is also that of its draw."""
    return name.removesuffix(f"-s{seed}").replace(f"-d{seed}-", "-")


def _latents(key: str) -> Path:
    return RUN / f"{key}-latents.json"


def _result(key: str, rows: int, lengths: str, seed: int, kind: str = "") -> Path:
    return RUN / "results" / f"{key}.{rows}-{lengths}-s{seed}{kind}.json"


def read(key: str) -> dict[Key, dict[int, dict[str, Any]]]:
    """What was measured of a site, by dictionary and seed."""
    found: dict[Key, dict[int, dict[str, Any]]] = {}
    for path in sorted((RUN / "results").glob(f"{key}.*.json")):
        rows, lengths, seed, *_ = path.stem.partition(".")[2].split("-")
        for name, own in json.loads(path.read_text()).items():
            if name != "sha256":
                of_seed = found.setdefault((int(rows), lengths, name), {})
                of_seed[int(seed.removeprefix("s"))] = own
    return found


def beside(
    found: dict[Key, dict[int, dict[str, Any]]], pairs: dict[Key, Key]
) -> dict[Key, Estimate]:
    """The difference of log KL of each from another, seed by seed."""
    differences = {
        one: {
            seed: Value(_log_kl(found[one][seed]) - _log_kl(found[other][seed]))
            for seed in found[one].keys() & found[other].keys()
        }
        for one, other in pairs.items()
        if one in found and other in found
    }
    return estimates({one: own for one, own in differences.items() if len(own) >= len(SEEDS)})


def _log_kl(fidelity: dict[str, Any]) -> float:
    return float(torch.tensor(fidelity["kl"], dtype=torch.float64).log())


def at_site(key: str) -> Iterator[str]:
    """The table of a site, and what was expected of it."""
    found = read(key)
    if not found:
        return
    of_lengths = beside(found, {k: (k[0], "unit", k[2]) for k in found if k[1] == "free"})
    plain_lengths = {"free": "free", "unit": _lengths_of_plain(key)}
    pairs = {k: (k[0], plain_lengths[k[1]], PLAIN) for k in found if k[2] != PLAIN}
    of_weights: dict[Key, Estimate] = {}
    for baselines in (False, True):  # whose spread over seeds is their own
        own = {k: other for k, other in pairs.items() if (k[2] in _BASELINES) == baselines}
        of_weights |= beside(found, own)
    rows = [["rows", "lengths", "dictionary", "seeds", "KL", "CE recovered", "FVU", "dead %",
             "KL, free beside length 1", "KL, beside plain"]]  # fmt: skip
    for one in sorted(found, key=lambda k: (k[0], k[1] != "unit", k[2])):
        own = list(found[one].values())

        def mean(measure: str, own: list[dict[str, Any]] = own) -> float:
            return sum(fidelity[measure] for fidelity in own) / len(own)

        rows.append(
            [
                ROWS[one[0]],
                "1" if one[1] == "unit" else "free",
                f"`{one[2]}`",
                str(len(own)),
                *(f"{mean(measure):.3f}" for measure in ("kl", "ce_recovered", "fvu")),
                f"{100 * mean('dead_share'):.1f}",
                *(recovery.text_of(e.get(one), per_cent=True) for e in (of_lengths, of_weights)),
            ]
        )
    yield f"### As they are: {PLACES[key].title}"
    yield markdown(rows)
    yield from recovery.expected(
        (_words(one, other, low, high), _between(one, other, low, high), found)
        for place, one, other, low, high in EXPECTED
        if place == key
    )
    if key in JUDGED and (judged := latents.read(_latents(key))):
        yield f"Latents of {ROWS[JUDGED[key][0]]} rows and free lengths:"
        yield latents.table(judged, PLAIN)
        asked = expected_of_latents(key)
        yield from recovery.expected((words, found, judged) for words, found in asked)


def _words(one: Key, other: Key, low: float, high: float) -> str:
    what = {
        PLAIN: "plain, free beside length 1",
        WHITENED: "whitened beside plain",
        WHITENED_SPACE: "whitened in the space at twice the rate, beside plain",
        FROZEN_DECODER: "frozen decoder, beside plain",
        FROZEN_ENCODER: "frozen encoder, beside plain",
        DIMENSIONS: "dimensions of the stream, beside plain",
        RANDOM: "random weights in the loss, beside plain",
    }[one[2]]
    bounds = f"{low:+g} to {high:+g} %" if high < 1e6 else f"at least {low:+g} %"
    return f"{ROWS[one[0]]} rows, {what}: KL {bounds}".replace("-", "−")


def _between(one: Key, other: Key, low: float, high: float) -> Any:
    def result(found: dict[Key, dict[int, dict[str, Any]]]) -> tuple[bool, str]:
        kls = [[own["kl"] for own in found[key].values()] for key in (one, other)]
        means = [sum(own) / len(own) for own in kls]
        change = 100 * (means[0] / means[1] - 1)
        return low <= change <= high, f"{change:+.1f} %"

    return result


_IN_SHORT = {
    PLAIN: "plain",
    WHITENED: "whitened, in the loss",
    WHITENED_SPACE: "whitened, as a space",
    RANDOM: "random weights",
    FROZEN_DECODER: "random decoder",
    FROZEN_ENCODER: "random encoder",
    DIMENSIONS: "dimensions of the stream",
}


def agreement_of_half_random(site: str) -> dict[str, float]:
    """Of the seeds of half-random dictionaries of SmolLM2, by label, from the archive."""
    key = next(k for k, one in PLACES.items() if str(one.site) == site and k.startswith("smollm2"))
    found = recovery.archived(ARCHIVE).get(_latents(key).name, {}).get("agreement", {})
    return {
        label: sum(pairs.values()) / len(pairs)
        for label in (FROZEN_DECODER, FROZEN_ENCODER)
        if (pairs := found.get(label))
    }


def in_short() -> str:
    """Do seeds agree, and are latents detected, at all sites that are judged."""
    judged = {key: latents.read(_latents(key)) for key in JUDGED}
    where = [f"{PLACES[key].title.partition(',')[0]}, block {PLACES[key].site.block}"
             for key in JUDGED]  # fmt: skip
    rows = [["", *(f"{what}: {site}" for what in ("agreement of seeds", "detection, all latents")
                   for site in where)]]  # fmt: skip
    for label, words in _IN_SHORT.items():
        means = [latents.means_of(own, label) for own in judged.values()]
        rows.append([words])
        for measure in ("agreement", "all"):
            values = [one[measure] for one in means]
            # there is one dictionary of the dimensions, so no pair
            rows[-1] += ["–" if math.isnan(value) else f"{value:.3f}" for value in values]
    return markdown(rows)


def section() -> str:
    """The part of docs/results."""
    return "\n\n".join(part for key in WHERE for part in at_site(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for model in dict.fromkeys(PLACES[key].model_key for key in WHERE):
        parser.add_argument(f"--{model}", help="the model, if it is to be measured")
    parser.add_argument("--places", nargs="*", default=WHERE, choices=WHERE)
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    if ARCHIVE.exists():
        unpack(ARCHIVE, RUN)
    for key in asked.places:
        if path := getattr(asked, PLACES[key].model_key):
            measure(key, path)
            pack(RUN, ARCHIVE)
    write_result("clean-rows", section())
    write_result("clean-rows-latents", in_short())


if __name__ == "__main__":
    main()
