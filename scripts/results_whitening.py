"""How far the finding about whitening reaches, and what it rests on.

    bash scripts/reproduce.sh whitening

- ``rate``: do plain dictionaries only need another learning rate? ``every-rate`` asks the same of
  every other arm of ``results_recovery.py``, with one seed, at twice the rate: at half of it, all
  three arms of ``rate`` keep less of the cross-entropy, by .3 to 1 points, on either model.
- ``length``: does the gain outlive a short training?
- ``latents``: what do judges without a ground truth say of the dictionaries of two million rows?
- ``kind``: does it hold for BatchTopK and JumpReLU?
- ``saelens``: what does the whitening of SAELens do on the same rows? It whitens all the way
  (α = 1), in principal components.
- ``dose``: does a single loud dimension make plain dictionaries worse? The dimension of most
  variance of SmolLM2's stream is scaled up before a dictionary sees it, and scaled back behind it,
  so that the model itself is untouched.
- ``form``: weights in the loss find more features than the same weights as a space. A dictionary
  of either kind is trained with decoder rows of unit length as the other kind measures length. The
  space with lengths of the model became the place ``mixed``, and is among the dictionaries of
  ``results_recovery.py``.
- ``lengths``: are plain dictionaries trained well enough? SAELens' recover twice as many plants.
  Dictionaries are trained with decoder rows of free lengths, as it does, and at up to four times
  the rate. A pilot with seed 0 on SmolLM2 found that of what SAELens does otherwise the lengths
  matter, and not how long rows are at first (1, .1 or .03), how strong latents are at first (a
  tenth, a hundredth), nor other rates for the decoder or the encoder alone.

The sites, plants, texts and judges are those of ``results_recovery.py``, and so are the
dictionaries that these are compared with. ``whitening_expected.py`` was written before the first
dictionary of an experiment was trained.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import results_recovery as recovery
import torch
import whitening_latents
from benchmarks import IMAGES, README, write_result
from interop_checks import peer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from results_archive import pack, unpack
from results_baselines import half_random, raw_dimensions
from results_recovery import (
    LOSS,
    MIXED,
    PLACES,
    SEEDS,
    SPACE,
    K,
    Opened,
    label_of,
    text_of,
)
from whitening_expected import (
    EXPECTED,
    FREE_ONCE,
    FREE_TWICE,
    FULLY,
    INVERTED,
    INVERTED_SPACE,
    KINDS,
    MIXED_INVERSE,
    PLAIN,
    PLAIN_OF,
    STRETCHED,
    WHITENED,
    WHITENED_MIXED,
    Found,
)

from llm_wsae import Dictionary, TrainConfig, train
from llm_wsae.drawing import BLUE, INK, VERMILLION, save, tidy
from llm_wsae.files import write_json
from llm_wsae.planting.recovery import measure_recovery
from llm_wsae.provenance import plain
from llm_wsae.studies.curve import Value
from llm_wsae.studies.inference import Estimate, estimates
from llm_wsae.terminal import markdown
from llm_wsae.training import one_site
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.checkpoint import FINISHED
from llm_wsae.training.config import default_learning_rate
from llm_wsae.weights.choosing import own_weights, weights_from_rule
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import LossWeights, effective_dimensions
from llm_wsae.weights.matrix_rules import spectrum

RUN = README.parent / "runs/whitening"
ARCHIVE = Path(__file__).parent / "results/whitening.jsonl.gz"
UNIFORM = ("uniform", 1.0, LOSS)
HALF = ("whitening", 0.5, SPACE)
FULL = ("whitening", 1.0, SPACE)
MIXED_HALF = ("whitening", 0.5, MIXED)
INVERSE = ("variance", -0.5, LOSS)
DOSES = (0.45, 0.7)
"""Shares of the variance that the loudest dimension is scaled to."""
RATES = (0.5, 2.0, 4.0)
"""Four times the rate was added last, with one seed and the place mixed, after the plain dictionary
of SAELens had recovered twice as many plants as ours: there was no expectation."""
TWO_MILLION = 2_000_000
LENGTHS = (500_000, TWO_MILLION, 4_000_000)
"""At both blocks 9; elsewhere two million rows."""
EXPERIMENTS = {
    "form": ("smollm2",),
    "dose": ("smollm2",),
    "rate": ("gemma", "smollm2"),
    "every-rate": ("gemma", "smollm2"),
    "length": tuple(PLACES),
    "latents": tuple(PLACES),
    "kind": ("gemma", "smollm2"),
    "saelens": ("smollm2",),
    "lengths": ("smollm2", "gemma"),
    "lengths-long": ("smollm2", "gemma"),
}
"""Where each is made."""
FREE = "free lengths"
THEIRS = {
    "saelens-plain": "expected_average_only_in",
    "saelens-whitened": "covariance_whitening",
}
"""Dictionaries of SAELens: how it normalises the rows."""


@dataclass(frozen=True)
class Trial:
    """One dictionary of an experiment."""

    setting: str
    """What distinguishes it from dictionaries of the same label, for people."""
    label: str
    arm: ArmConfig | None = None
    """Of a dictionary of ours."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings of the training that are not the usual ones; others with the same, under the same
    setting, are trained beside it."""
    facts: dict[str, Any] = field(default_factory=dict)


Weights = tuple[str, float, WeightConfig]
"""Rule, exponent and settings."""


@dataclass(frozen=True)
class Seed:
    """What the trials of an experiment with one seed are made of."""

    place: str
    inputs: RuleInputs
    seed: int

    def trial(
        self, setting: str, weights: Weights, training: dict[str, Any] | None = None, **arm: Any
    ) -> Trial:
        """A dictionary with these weights; ``arm`` are settings that are not the usual ones."""
        rule, alpha, config = weights
        made = weights_from_rule(rule, alpha, self.inputs, config)
        own = ArmConfig(made, K, init_seed=self.seed, **arm)
        return Trial(setting, label_of(own), own, training or {})

    def rate(self, factor: float) -> dict[str, Any]:
        """The setting of the training for a multiple of the usual learning rate."""
        d_sae = TrainConfig.expansion * self.inputs.statistics.d_in
        return {"learning_rate": factor * default_learning_rate(d_sae)}

    @property
    def rotated(self) -> Weights:
        """The control of ``MIXED_HALF``."""
        rule, alpha, config = MIXED_HALF
        return f"rotated:{rule}", alpha, replace(config, draw=self.seed)


def _form(of: Seed) -> Iterator[Trial]:
    yield replace(of.trial("", INVERSE), label=STRETCHED)


def _dose(of: Seed) -> Iterator[Trial]:
    for share in DOSES:
        for label, weights in scaled(of.inputs, share):
            dimensions = effective_dimensions(weights, of.inputs.statistics)
            arm = ArmConfig(weights, K, init_seed=of.seed)
            facts = {"effective_dimensions": dimensions}
            yield Trial(f"{100 * share:.0f} %", label, arm, facts=facts)


def _rate(of: Seed) -> Iterator[Trial]:
    for factor in RATES:
        more = (MIXED_HALF,) if factor == RATES[-1] else ()
        for weights in (UNIFORM, HALF, INVERSE, *more):
            yield of.trial(f"rate × {factor:g}", weights, of.rate(factor))


def _every_rate(of: Seed) -> Iterator[Trial]:
    if of.seed == SEEDS[0]:
        wanted = partial(_has_other_rate, of.place)
        for arm in recovery.arms_of(of.inputs, of.seed, wanted):
            yield Trial("rate × 2", label_of(arm), arm, of.rate(2))


def _length(of: Seed) -> Iterator[Trial]:
    for rows in LENGTHS if PLACES[of.place].block == 9 else (TWO_MILLION,):
        for weights in (UNIFORM, HALF, MIXED_HALF):
            yield of.trial(f"{rows:,} rows", weights, {"tokens": rows})
    if of.place == "smollm2":  # a control of its latents
        yield of.trial(f"{TWO_MILLION:,} rows", of.rotated, {"tokens": TWO_MILLION})


def _kind(of: Seed) -> Iterator[Trial]:
    for kind, weights in product(KINDS, (UNIFORM, HALF)):
        yield of.trial(kind, weights, architecture=kind)


def _lengths(of: Seed) -> Iterator[Trial]:
    factors = (1, 2, 4) if of.seed == SEEDS[0] else (1, 2)
    for factor in factors:
        for weights in (UNIFORM, HALF, MIXED_HALF):
            trial = of.trial(f"rate × {factor}", weights, of.rate(factor))
            if factor > 1 and not _known_rate(of.place, trial, of.seed):
                yield trial
    for factor in factors:
        setting, training = f"{FREE}, rate × {factor}", of.rate(factor) | {"lengths": "free"}
        more = (of.rotated,) if setting == FREE_TWICE else ()
        for weights in (UNIFORM, HALF, MIXED_HALF, *more):
            yield of.trial(setting, weights, training)


def _lengths_long(of: Seed) -> Iterator[Trial]:
    for factor, weights in product((1, 2), (UNIFORM, MIXED_HALF)):
        training = of.rate(factor) | {"lengths": "free", "tokens": LENGTHS[-1]}
        yield of.trial(f"{FREE}, rate × {factor}", weights, training)


def _saelens(of: Seed) -> Iterator[Trial]:
    for factor in (1, 2):
        training = of.rate(factor) | {"lengths": "free"}
        yield of.trial(f"{FREE}, rate × {factor}", FULL, training)


TRIALS: dict[str, Callable[[Seed], Iterator[Trial]]] = {
    "form": _form,
    "dose": _dose,
    "rate": _rate,
    "every-rate": _every_rate,
    "length": _length,
    "kind": _kind,
    "saelens": _saelens,
    "lengths": _lengths,
    "lengths-long": _lengths_long,
}
"""What gives all dictionaries of ours, by experiment. Full whitening with free lengths came last,
so that it stands beside that of SAELens; plain ones with free lengths are those of ``lengths``."""


def _known_rate(place: str, trial: Trial, seed: int) -> bool:
    """Whether another experiment has it."""
    return any(_result(name, place, trial, seed).exists() for name in ("rate", "every-rate"))


def _has_other_rate(place: str, label: str) -> bool:
    """Whether it is made at a place, has the usual k, and is none of the arms of ``rate``."""
    of_rate = (PLAIN, WHITENED, INVERTED)
    made = recovery.is_made(place, label, SEEDS[0])
    return made and label not in of_rate and label.endswith(f"-k{K}")


def scaled(inputs: RuleInputs, share: float) -> Iterator[tuple[str, LossWeights]]:
    """Plain and halfway whitened dictionaries of a stream whose loudest dimension is scaled up to
    ``share`` of the variance: spaces D and (DΣD)^(−¼)·D of the stream as it is."""
    variance = inputs.statistics.robust_variance
    loudest = int(variance.argmax())
    others = float(variance.sum() - variance[loudest])
    factors = torch.ones(len(variance), dtype=torch.float64)
    factors[loudest] = (share / (1 - share) * others / float(variance[loudest])) ** 0.5
    values, vectors = spectrum(factors[:, None] * inputs.covariance * factors)
    whitened = (vectors * values ** (-1 / 4)) @ vectors.T * factors
    uniform = LossWeights(factors.float(), config=SPACE)
    half = replace(weights_from_rule(*HALF[:2], inputs, SPACE), gamma=whitened.float())
    yield PLAIN, own_weights(uniform, inputs)
    yield WHITENED, own_weights(half, inputs)


class Stretched(Arm):
    """An arm whose decoder rows d have ‖Γd‖ = 1, if its weights are in the loss. Γ is diagonal.

    The k largest latents are then chosen as an arm in the space chooses them; the error that is
    minimised, what the encoder sees and Adam's coordinates remain.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        if self.space is None:
            self._rescale()
            decoder = self.parameters.decoder
            self.parameters.encoder.copy_(decoder / decoder.square().sum(1, keepdim=True))

    def _rescale(self) -> None:
        decoder = self.parameters.decoder
        decoder /= (decoder * self.gamma).norm(dim=1, keepdim=True)

    def step(self, *given: Any, **named: Any) -> None:
        super().step(*given, **named)
        if self.space is None:
            self._rescale()


def measure(experiment: str, place: str, path: str, seeds: Sequence[int]) -> None:
    """Train and measure what has no result yet."""
    if experiment == "latents":
        return _judge_latents(place, path, seeds)
    opened = recovery.open_site(place, path, sensitivity=experiment == "every-rate")
    if experiment == "saelens":
        _measure_saelens(place, opened, seeds)
    for seed in seeds:
        groups: dict[str, list[Trial]] = {}
        for trial in TRIALS[experiment](Seed(place, opened.inputs, seed)):
            if not _result(experiment, place, trial, seed).exists():
                groups.setdefault(trial.setting, []).append(trial)
        for setting, own in groups.items():
            _train_and_judge(experiment, place, opened, own, seed)
            print(f"{experiment}, {place}: {setting} seed {seed} measured", flush=True)


def _train_and_judge(
    experiment: str, place: str, opened: Opened, own: Sequence[Trial], seed: int
) -> None:
    config = TrainConfig(
        **{"tokens": recovery.ROWS, "lengths": "unit", "shuffle_seed": seed}
        | {"checkpoint_seconds": 600}
        | own[0].training
    )
    folder = RUN / "trained" / f"{experiment}-{place}" / _name(own[0].setting) / f"s{seed}"
    if (folder / FINISHED).exists():  # others of that setting were trained before
        folder = folder.with_name(f"{folder.name}-more")
    with torch.no_grad():
        one_site.Arm = Stretched if experiment == "form" else Arm  # type: ignore[misc]
        dictionaries = train(opened.source, [trial.arm for trial in own], config, folder)
        one_site.Arm = Arm  # type: ignore[misc]
    judged = [(trial, dictionaries[trial.arm.name]) for trial in own]
    _judge(experiment, place, opened, judged, seed)


def _judge(
    experiment: str, place: str, opened: Opened, own: Sequence[tuple[Trial, Dictionary]], seed: int
) -> None:
    fidelity = opened.evaluator.evaluate({t.label: d for t, d in own}).dictionaries
    for trial, dictionary in own:
        planted = measure_recovery(dictionary, opened.source).to_dict()
        whole = {"fidelity": fidelity[trial.label].summary(), "planted": planted}
        record = {
            "experiment": experiment,
            "place": place,
            "setting": trial.setting,
            "label": trial.label,
            "seed": seed,
            "k": K,
            "facts": trial.facts,
            "numbers": {**recovery.numbers(whole), "l0": whole["fidelity"]["l0"]},
            "by_stratum": {s: one["f1"] for s, one in planted["by_stratum"].items()},
            "recovered": planted["plants"]["recovered"],
        }
        write_json(_result(experiment, place, trial, seed), plain(record))


def _judge_latents(place: str, path: str, seeds: Sequence[int]) -> None:
    """If the dictionaries of two million rows are still there, all of them; then baselines."""
    trained = RUN / "trained" / f"length-{place}" / _name(f"{TWO_MILLION:,} rows")
    labels = {r["label"] for r in read("length", place) if r["setting"] == f"{TWO_MILLION:,} rows"}
    folders = {
        label: {
            seed: config.parent
            for seed in seeds
            for config in trained.glob(f"s{seed}/{label.removesuffix(f'-k{K}')}*-k{K}*/wsae.json")
        }
        for label in labels
    }
    if _latents(place).exists() or {len(own) for own in folders.values()} != {len(seeds)}:
        print(f"latents, {place}: measured already, or without its dictionaries", flush=True)
    else:
        whitening_latents.judge(_latents(place), path, folders, PLAIN)
    known = whitening_latents.read(_latents(place)).get("scores", {})
    if known and not whitening_latents.BASELINES.keys() <= known.keys():
        whitening_latents.judge_baselines(_latents(place), path, _baselines(place, path))


def _baselines(place: str, path: str) -> dict[str, Dictionary]:
    """The dimensions, and what two million rows make of dictionaries of which one half stays
    random, by label; of the first seed."""
    opened = recovery.open_site(place, path)
    found = half_random(opened, TWO_MILLION, SEEDS[0], RUN / "trained" / f"latents-{place}")
    return found | {f"dimensions-k{K}": raw_dimensions(opened.inputs, opened.source.site, K)}


def _latents(place: str) -> Path:
    return RUN / "latents" / f"{place}.json"


def _measure_saelens(place: str, opened: Opened, seeds: Sequence[int]) -> None:
    """SAELens trains on the rows that our dictionaries are trained on, without massive ones, which
    it would not mask, by the learning rates of ours."""
    statistics, how = opened.inputs.statistics, TrainConfig(tokens=recovery.ROWS)
    d_in, d_sae = statistics.d_in, how.expansion * statistics.d_in
    for seed in seeds:
        trials = [Trial("SAELens", label) for label in THEIRS]
        if all(_result("saelens", place, trial, seed).exists() for trial in trials):
            continue
        with tempfile.TemporaryDirectory(dir=RUN) as made:
            out = Path(made).resolve()
            count = 0
            with (out / "rows.f32").open("wb") as file:
                for rows in opened.source.batches(how.batch_size, seed):
                    rows = rows[rows.norm(dim=1) <= statistics.massive_threshold]
                    file.write(rows.float().numpy().tobytes())
                    count += len(rows)
                    if count >= recovery.ROWS:
                        break
            job = {
                "rows": count,
                "d_in": d_in,
                "d_sae": d_sae,
                "k": K,
                "seed": seed,
                "batch_size": how.batch_size,
                "learning_rate": default_learning_rate(d_sae),
                "warmup": how.warmup,
                "decay": how.decay,
            }
            write_json(out / "job.json", job)
            version = peer("saelens", "in_saelens.py whiten", out)
            trained = []
            for trial in trials:
                folder = out / THEIRS[trial.label]
                dictionary = Dictionary.load(folder, site=str(opened.source.site))
                dictionary.info = replace(
                    dictionary.info,
                    massive_threshold=statistics.massive_threshold,
                )
                trained.append((replace(trial, facts={"version": version}), dictionary))
            _judge("saelens", place, opened, trained, seed)
        print(f"saelens, {place}: seed {seed} measured", flush=True)


def _name(setting: str) -> str:
    return setting.replace(" ", "").replace("%", "").replace(",", "") or "one"


def _result(experiment: str, place: str, trial: Trial, seed: int) -> Path:
    name = f"{experiment}.{place}.{_name(trial.setting)}.{trial.label}.s{seed}.json"
    return RUN / "results" / name


def read(experiment: str, place: str) -> list[dict[str, Any]]:
    """The measured dictionaries of an experiment, with those of the usual settings."""
    usual = {
        "form": "",
        "dose": "as it is",
        "rate": "rate × 1",
        "every-rate": "rate × 1",
        "length": "1,000,000 rows",
        "saelens": "length 1",
        "lengths": "rate × 1",
        "lengths-long": "",
    }
    found = RUN.glob(f"results/{experiment}.{place}.*.json")
    records = [json.loads(path.read_text()) for path in sorted(found)]
    if experiment == "every-rate" and records:
        records += [r for r in read("rate", place) if r["setting"] != usual["rate"]]
    if experiment == "lengths" and records:
        others = [*read("rate", place), *read("every-rate", place)]
        others = [r for r in others if r["setting"] in ("rate × 2", "rate × 4")]
        records += [r for r in _once(others) if r["label"] in (PLAIN, WHITENED, WHITENED_MIXED)]
    if experiment == "lengths-long" and records:
        seeds = {r["seed"] for r in records}
        long = [r for r in read("length", place) if r["setting"] == f"{LENGTHS[-1]:,} rows"]
        records += [{**r, "setting": "rate × 1"} for r in long if r["seed"] in seeds]
        return records
    labels = {record["label"] for record in records} | {PLAIN}
    if experiment == "form":
        labels |= {INVERTED, INVERTED_SPACE, MIXED_INVERSE}
    if experiment == "saelens":
        labels |= {FULLY, WHITENED, WHITENED_MIXED}
        others = [r for r in read("lengths", place) if r["label"] in (PLAIN, WHITENED)]
        records += [r for r in others if r["setting"] in (FREE_ONCE, FREE_TWICE)]
    for record in recovery.read(place):
        if record["label"] in labels and records and experiment != "kind":
            own = {name: record[name] for name in ("label", "seed", "k")}
            planted = record["planted"]
            own |= {"numbers": recovery.numbers(record), "setting": usual[experiment]}
            own["numbers"]["l0"] = record["fidelity"]["l0"]
            own["recovered"] = planted["plants"]["recovered"]
            own["by_stratum"] = {s: one["f1"] for s, one in planted["by_stratum"].items()}
            records.insert(0, own)
    if experiment == "every-rate":
        return [r for r in records if r["seed"] == SEEDS[0] and r["setting"] != "rate × 0.5"]
    if experiment == "lengths":
        records.sort(key=lambda r: (r["setting"].startswith(FREE), r["setting"], r["label"]))
    if experiment == "length":
        records.sort(key=lambda r: int(_name(r["setting"]).removesuffix("rows")))
    return records


def _once(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {(r["setting"], r["label"], r["seed"]): r for r in records}
    return list(known.values())


def changes(records: Sequence[dict[str, Any]], measure: str) -> dict[str, Estimate]:
    """``setting/label`` → difference from plain of the same setting, seed by seed."""
    found: dict[str, dict[int, Value]] = {}
    known = {(r["setting"], r["seed"], r["label"]): r for r in records}
    for record in records:
        label = PLAIN_OF.get(record["label"], PLAIN)
        beside = known.get((record["setting"], record["seed"], label))
        if beside is record or beside is None:
            continue
        terms = [(1.0, _value(record, measure)), (-1.0, _value(beside, measure))]
        name = f"{record['setting']}/{record['label']}"
        found.setdefault(name, {})[record["seed"]] = Value.mixture(terms)
    return estimates({name: own for name, own in found.items() if len(own) > 1})


def _value(record: dict[str, Any], measure: str) -> Value:
    if measure == "kl":
        return Value(np.log(record["numbers"]["kl"]))
    items = {str(n): value for n, value in enumerate(record["recovered"]) if value is not None}
    return Value(sum(items.values()) / len(items), 0.0, items)


def table(records: Sequence[dict[str, Any]], place: str) -> str:
    """Every dictionary of an experiment, means over seeds; below, the baselines of its site."""
    kl, recovered = changes(records, "kl"), changes(records, "recovered")
    names = list(dict.fromkeys((r["setting"], r["label"]) for r in records))
    of = Found(records)
    shown = ("kl", "ce", "fvu", "l0", "dead", "recovered", "f1")
    rows = [["setting", "dictionary", "KL", "CE recovered", "FVU", "L0", "dead %", "recovered",
             "F1", "KL beside plain", "recovered beside plain"]]  # fmt: skip
    for setting, label in names:
        own = {measure: of.mean(setting, label, measure) for measure in shown}
        name = f"{setting}/{label}"
        facts = next(r.get("facts") or {} for r in records if r["setting"] == setting)
        note = f", {facts['version']}" if "version" in facts else ""
        if "effective_dimensions" in facts:
            note = f", {facts['effective_dimensions']:.1f} effective dimensions"
        rows.append(
            [
                setting + note or "–",
                f"`{label}`",
                *(f"{own[measure]:.3f}" for measure in shown[:3]),
                f"{own['l0']:.1f}",
                f"{100 * own['dead']:.0f}",
                *(f"{own[measure]:.3f}" for measure in shown[5:]),
                text_of(kl.get(name), per_cent=True),
                text_of(recovered.get(name)),
            ]
        )
    for label, own in recovery.means_of_baselines(place, recovery.ROWS).items():
        rows.append(
            [
                "baseline",
                f"`{label}`",
                *(f"{own[measure]:.3f}" for measure in ("kl", "ce", "fvu")),
                "–",
                f"{100 * own['dead']:.0f}",
                *(f"{own[measure]:.3f}" for measure in ("recovered", "f1")),
                "–",
                "–",
            ]
        )
    return markdown(rows)


def rates_table(records: Sequence[dict[str, Any]], place: str) -> str:
    """Every set of weights at the rate that keeps most cross-entropy, beside plain at its own;
    below, the baselines of the site."""
    of = Found(records)
    settings = ("rate × 1", "rate × 2")
    rows = [["dictionary", *(f"CE recovered, {one}" for one in settings), "best", "KL there",
             "beside plain", "recovered there", "beside plain"]]  # fmt: skip
    for label in sorted({r["label"] for r in records}, key=lambda one: (one != PLAIN, one)):
        changes = (of.change_at_best(label, measure) for measure in ("kl", "recovered"))
        beside = ["–", "–"] if label == PLAIN else [f"{100 * share:+.0f} %" for share in changes]
        rows.append(
            [
                f"`{label}`",
                *(f"{of.mean(setting, label, 'ce'):.3f}" for setting in settings),
                of.best(label).removeprefix("rate "),
                f"{of.at_best(label, 'kl'):.3f}",
                beside[0],
                f"{of.at_best(label, 'recovered'):.3f}",
                beside[1],
            ]
        )
    for label, own in recovery.means_of_baselines(place, recovery.ROWS).items():
        ce, kl, recovered = (f"{own[measure]:.3f}" for measure in ("ce", "kl", "recovered"))
        rows.append([f"`{label}`", ce, "–", "–", kl, "–", recovered, "–"])
    return markdown(rows)


def seeds_of(records: Sequence[dict[str, Any]]) -> str:
    """How many seeds the dictionaries of an experiment have, in words."""
    names = [(r["setting"], r["label"]) for r in records]
    fewest, most = (number({names.count(name) for name in names}) for number in (min, max))
    if fewest < most:
        return f"{fewest}–{most} seeds."
    return "One seed." if most == 1 else f"{most} seeds."


def section() -> str:
    """The part of docs/results."""
    parts = []
    for experiment, places in EXPERIMENTS.items():
        for place in places:
            records = read(experiment, place)
            if not records:
                continue
            parts += [f"### {TITLES[experiment]}: {PLACES[place].title}", seeds_of(records)]
            shown = rates_table if experiment == "every-rate" else table
            parts += [shown(records, place)]
            parts += recovery.expected(
                (one.words, one.found, Found(records))
                for one in EXPECTED
                if (one.experiment, one.place) == (experiment, place)
            )
    return "\n\n".join([*parts, *latents_section()])


def latents_section() -> Iterator[str]:
    """The tables of the latents at each site."""
    for place, where in PLACES.items():
        latents = whitening_latents.read(_latents(place))
        if not latents:
            continue
        yield f"### {TITLES['latents']}: {where.title}"
        yield whitening_latents.table(latents, PLAIN)
        asked = whitening_latents.expected(WHITENED, WHITENED_MIXED, PLAIN)
        yield from recovery.expected((words, f, latents) for of, words, f in asked if of == place)


_LINES = {
    PLAIN: ("plain", INK, "o"),
    WHITENED: ("halfway whitened, space", BLUE, "s"),
    WHITENED_MIXED: ("halfway whitened, mixed", VERMILLION, "D"),
}


def plot_lengths(path: Path) -> None:
    """KL and recovered plants against the rows of the training, at both blocks 9."""
    rows = sorted((*LENGTHS, recovery.ROWS))
    with recovery.over_rows(path, rows, "length 1") as axes:
        for place, own in axes.items():
            of = Found(read("length", place))
            for measure, axis in own.items():
                for label, (name, colour, marker) in _LINES.items():
                    values = [of.mean(f"{count:,} rows", label, measure) for count in rows]
                    axis.plot(rows, values, color=colour, marker=marker, lw=1.8, label=name)


_THEIRS_SHOWN = {"saelens-plain": (INK, "plain"), "saelens-whitened": (BLUE, "whitened, α = 1")}


def plot_trade(path: Path) -> None:
    """Recovered plants against KL: what other rates and free lengths change, with and without
    weights."""
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    for axis, place in zip(figure.subplots(1, 2), EXPERIMENTS["lengths"], strict=True):
        of, records = Found(read("lengths", place)), read("saelens", place)
        for label, (_, colour, marker) in _LINES.items():
            for lengths, fill in (("", "none"), (f"{FREE}, ", colour)):
                settings = [f"{lengths}rate × {factor}" for factor in (1, 2, 4)]
                kl, recovered = (
                    [of.mean(setting, label, measure) for setting in settings]
                    for measure in ("kl", "recovered")
                )
                style: dict[str, Any] = {"color": colour, "marker": marker, "lw": 1.4}
                axis.plot(kl, recovered, "-" if lengths else "--", mfc=fill, **style)
                for factor, *at in zip((1, 2, 4), kl, recovered, strict=True):
                    near = {"textcoords": "offset points", "xytext": (5, 3)}
                    axis.annotate(f"×{factor}", at, color=colour, fontsize=8, **near)
        for label, (colour, name) in _THEIRS_SHOWN.items():
            own = [r["numbers"] for r in records if r["label"] == label]
            if own:
                at = [np.mean([one[measure] for one in own]) for measure in ("kl", "recovered")]
                axis.plot(*at, "*", color=colour, ms=13)
                near = {"textcoords": "offset points", "xytext": (-8, -3), "ha": "right"}
                axis.annotate(f"SAELens, {name}", at, color=colour, fontsize=9, **near)
        axis.set_title(PLACES[place].title, fontsize=11)
        axis.set_xlabel("KL, nats (left: more faithful)")
        axis.set_ylabel("share of plants recovered")
        axis.set_ylim(bottom=0)
        tidy(axis)
    handles = [
        Line2D([], [], color=colour, marker=marker, label=name)
        for name, colour, marker in _LINES.values()
    ]
    handles += [
        Line2D([], [], color=INK, ls=style, marker="o", mfc=fill, label=name)
        for style, fill, name in (
            ("--", "none", "rows of length 1"),
            ("-", INK, "rows of free lengths"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Faster training and free lengths, at 1, 2 and 4 times the usual rate")
    save(figure, path)


TITLES = {
    "form": "In the loss, in the space, and between",
    "dose": "One loud dimension",
    "rate": "Other learning rates",
    "every-rate": "Every set of weights at the better of two learning rates",
    "length": "Shorter and longer trainings",
    "latents": "The latents of two million rows, without a ground truth",
    "kind": "Other architectures",
    "saelens": "The whitening of SAELens",
    "lengths": "Is the plain dictionary trained well enough",
    "lengths-long": "The same after four million rows",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key in recovery.MODELS:
        parser.add_argument(f"--{key}", help="the model, if something is to be measured")
    every = list(EXPERIMENTS)
    parser.add_argument("--experiments", nargs="+", choices=every, default=every)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    if ARCHIVE.exists():
        unpack(ARCHIVE, RUN)
    if recovery.ARCHIVE.exists():
        unpack(recovery.ARCHIVE, recovery.RUN)
    for experiment in asked.experiments:
        for place in EXPERIMENTS[experiment]:
            path = getattr(asked, PLACES[place].model_key)
            if path and place in asked.places:
                measure(experiment, place, path, asked.seeds)
                pack(RUN, ARCHIVE)
    plot_lengths(IMAGES / "learning_curve.png")
    plot_trade(IMAGES / "free_lengths.png")
    write_result("whitening", section())


if __name__ == "__main__":
    main()
