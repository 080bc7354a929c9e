"""Which weights pay beside plain dictionaries that are trained as well as we know how.

    bash scripts/reproduce.sh free-lengths

The dictionaries of ``results_recovery.py`` had decoder rows of length 1 in training, and one
million rows. With free lengths, which are the default since, plain ones recover more, and longer
trainings make the lead of whitened ones smaller. So the weights that mattered there are measured
once more, with free lengths and two million rows: at all five sites, on the same plants and texts,
by the same judges, with the controls.

What was expected was written down before the first of these dictionaries was trained. Plain and
halfway whitened ones with free lengths had then been measured after blocks 9, with one million rows
(three seeds) and four (one seed).
"""

import argparse
import json
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import free_lengths_expected as expected
import free_lengths_space
import free_lengths_summary
import numpy as np
import results_recovery as recovery
import torch
from benchmarks import IMAGES, README, write_result
from results_archive import pack, unpack
from results_recovery import LOSS, MIXED, PLACES, SEEDS, SPACE, Expectation, K

from llm_wsae import TrainConfig, train
from llm_wsae.drawing import BLUE, INK
from llm_wsae.files import write_json
from llm_wsae.statistics import moments
from llm_wsae.statistics.uncertainty import holm
from llm_wsae.studies.curve import Value
from llm_wsae.studies.inference import Estimate, estimates
from llm_wsae.studies.stopping import spent
from llm_wsae.terminal import markdown
from llm_wsae.training import one_site
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.config import ArchitectureName, default_learning_rate
from llm_wsae.training.normaliser import inverse
from llm_wsae.tuning import LEAST_GAIN, choose_alpha
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.rules import Rule

ROWS = 2_000_000
RUN = README.parent / "runs/free-lengths"
ARCHIVE = Path(__file__).parent / "results/free-lengths.jsonl.gz"
CHECKPOINTS = README.parent / "checkpoints/smollm2-135m"
Weights = tuple[str, float, WeightConfig, int]
"""Rule, α, place and k."""
PLAIN: Weights = ("uniform", 1.0, LOSS, K)
HALFWAY: Weights = ("whitening", 0.5, MIXED, K)
HALFWAY_SPACE: Weights = ("whitening", 0.5, SPACE, K)
INVERSE: Weights = ("variance", -0.5, MIXED, K)
HALFWAY_IN_LOSS: Weights = ("whitening", 0.5, LOSS, K)
IN_LOSS: Weights = ("variance", -0.5, LOSS, K)
BLOCKS_9, OTHERS = ("smollm2", "gemma"), ("smollm2-20", "gemma-5", "gemma-14")
PAIR = (PLAIN, HALFWAY_IN_LOSS)
"""What is compared in other settings."""
RANDOM: Weights = ("random", 1.0, MIXED, K)
RANDOM_IN_LOSS: Weights = ("random", 1.0, LOSS, K)
ADDED: tuple[Weights, ...] = (
    *(("uniform", 1.0, LOSS, k) for k in (24, 48, 64)),
    ("variance", 0.5, LOSS, K),
    ("sensitivity", 0.25, SPACE, K),
)
"""What was added at the sites beside blocks 9, last of all."""
RATED: tuple[Weights, ...] = (
    HALFWAY_SPACE,
    IN_LOSS,
    ("whitening", 1.0, LOSS, K),
    ("rotated:whitening", 0.5, LOSS, K),
    ("permuted:whitening", 0.5, LOSS, K),
    ("variance", 0.5, LOSS, K),
)
"""What is compared at other learning rates beside the pair."""
LAST_RATED: tuple[Weights, ...] = (
    *(("uniform", 1.0, LOSS, k) for k in (24, 48, 64)),
    *(("whitening", alpha, LOSS, K) for alpha in (0.25, 0.75)),
    HALFWAY,
    INVERSE,
    ("sensitivity", 0.25, SPACE, K),
)
"""All others that both blocks 9 have."""
EIGHTHS: tuple[Weights, ...] = tuple(("whitening", alpha, LOSS, K) for alpha in (0.125, 0.375))
SHARES: tuple[Weights, ...] = (("shares:whitening", 0.5, LOSS, K),)
SPACE_POWERS: tuple[Weights, ...] = tuple(
    ("whitening", alpha, SPACE, K) for alpha in (0.25, 0.75, 1.0)
)
SPACE_CONTROLS: tuple[Weights, ...] = tuple(
    (f"{control}:whitening", 0.5, SPACE, K) for control in ("rotated", "permuted")
)
IN_SPACE = (*SPACE_POWERS, *SPACE_CONTROLS)
"""What as a space was trained at twice the usual rate alone, which is its default."""
CONTROLS: tuple[Weights, ...] = (
    *SHARES,
    ("whitening", 2.0, LOSS, K),
    ("permuted:variance", -0.5, LOSS, K),
    ("rotated:whitening", 0.5, MIXED, K),
    ("permuted:whitening", 0.5, MIXED, K),
    ("permuted:variance", -0.5, MIXED, K),
)
"""What had one learning rate to the last; after blocks 9."""
MIXED_POWERS: tuple[Weights, ...] = tuple(("whitening", alpha, MIXED, K) for alpha in (0.25, 0.75))
FULLY: Weights = ("whitening", 1.0, MIXED, K)
CONTROLS_OTHERS: tuple[Weights, ...] = (
    *SHARES,
    ("whitening", 2.0, LOSS, K),
    ("rotated:whitening", 0.5, MIXED, K),
)
"""Those of the controls that the other sites have."""


@dataclass(frozen=True)
class Part:
    """Dictionaries that are trained side by side, one of each seed at each place."""

    weights: tuple[Weights, ...]
    places: tuple[str, ...] = tuple(PLACES)
    seeds: tuple[int, ...] = tuple(SEEDS)
    setting: str = ""
    """Not empty for what is kept apart, in a folder of that name."""
    rows: int = ROWS
    rate: float = 1.0
    """How many times the usual learning rate."""
    architecture: ArchitectureName = "topk"
    sensitivity: bool = False
    """Whether a rule needs the model's sensitivity."""
    decoder_rows: bool = False
    """Whether features along decoder rows of the site's plain dictionary in ``checkpoints/`` are
    planted, too; it was trained with seed 0 on rows without plants."""
    begun: bool = False
    """Whether dictionaries in the loss begin as those in the space do, and the other way round."""
    massive_ratio: float = moments.MASSIVE_RATIO
    """Rows of so many median norms count as massive, in the covariance, in training and in what
    dictionaries are judged by."""


PARTS = {
    "everywhere": Part(
        (PLAIN, HALFWAY, HALFWAY_SPACE, ("rotated:whitening", 0.5, MIXED, K), INVERSE)
    ),
    "powers": Part(MIXED_POWERS),
    "last": Part((("uniform", 1.0, LOSS, 48), ("variance", 0.5, LOSS, K)), BLOCKS_9),
    "fully": Part((FULLY,), ("gemma-14",)),
    "controls": Part(
        (
            ("permuted:variance", -0.5, MIXED, K),
            ("permuted:whitening", 0.5, MIXED, K),
            ("sensitivity", 0.25, SPACE, K),
            IN_LOSS,
            ("uniform", 1.0, LOSS, 24),
            ("uniform", 1.0, LOSS, 64),
        ),
        BLOCKS_9,
        sensitivity=True,
    ),
    "random": Part((RANDOM,), BLOCKS_9, setting="random"),
    "loss": Part((HALFWAY_IN_LOSS, ("permuted:variance", -0.5, LOSS, K)), BLOCKS_9),
    "loss-rotated": Part((("rotated:whitening", 0.5, LOSS, K),), BLOCKS_9),
    "loss-others": Part((IN_LOSS, HALFWAY_IN_LOSS), OTHERS),
    "loss-controls": Part(
        (("rotated:whitening", 0.5, LOSS, K), ("permuted:whitening", 0.5, LOSS, K))
    ),
    "seeds": Part((PLAIN, HALFWAY, INVERSE, IN_LOSS), ("smollm2",), (3, 4, 5)),
    "loss-powers": Part(tuple(("whitening", alpha, LOSS, K) for alpha in (0.25, 0.75, 1.0))),
    "half-rate": Part(PAIR, BLOCKS_9, setting="half-rate", rate=0.5),
    "twice-rate": Part(PAIR, BLOCKS_9, setting="twice-rate", rate=2.0),
    "batch-topk": Part(PAIR, BLOCKS_9, setting="batch-topk", architecture="batch-topk"),
    "jumprelu": Part(PAIR, BLOCKS_9, setting="jumprelu", architecture="jumprelu"),
    "four-million": Part(PAIR, BLOCKS_9, setting="four-million", rows=4_000_000),
    "million": Part(PAIR, BLOCKS_9, setting="million", rows=1_000_000),
    "half-million": Part(PAIR, BLOCKS_9, setting="half-million", rows=500_000),
    "fresh": Part(PAIR, seeds=expected.FRESH),
    "fresh-inverse": Part((IN_LOSS,), ("gemma", "gemma-14"), expected.FRESH),
    "others": Part(ADDED, ("smollm2-20",), sensitivity=True),
    "others-gemma": Part(ADDED, ("gemma-5", "gemma-14"), sensitivity=True),
    "random-others": Part((RANDOM,), OTHERS, setting="random"),
    "half-rates": Part(RATED, BLOCKS_9, (0,), "half-rate", rate=0.5),
    "twice-rates": Part(RATED, BLOCKS_9, (0,), "twice-rate", rate=2.0),
    "start": Part((HALFWAY_IN_LOSS, HALFWAY_SPACE), BLOCKS_9, setting="start", begun=True),
    "space-twice": Part((HALFWAY_SPACE,), setting="twice-rate", rate=2.0),
    "pair-twice": Part(PAIR, OTHERS, (0,), "twice-rate", rate=2.0),
    "four-times": Part((*PAIR, HALFWAY_SPACE), BLOCKS_9, (0,), "four-times", rate=4.0),
    "fully-twice": Part((("whitening", 2.0, LOSS, K),), BLOCKS_9),
    "space-fresh": Part((HALFWAY_SPACE,), seeds=expected.FRESH, setting="twice-rate", rate=2.0),
    "space-controls": Part(SPACE_CONTROLS, BLOCKS_9, setting="twice-rate", rate=2.0),
    "space-controls-others": Part(SPACE_CONTROLS, OTHERS, (0,), "twice-rate", rate=2.0),
    "four-million-twice": Part(
        (HALFWAY_SPACE,), BLOCKS_9, setting="four-million-twice", rows=4_000_000, rate=2.0
    ),
    "million-twice": Part(
        (HALFWAY_SPACE,), ("smollm2",), setting="million-twice", rows=1_000_000, rate=2.0
    ),
    "half-million-twice": Part(
        (HALFWAY_SPACE,), ("smollm2",), setting="half-million-twice", rows=500_000, rate=2.0
    ),
    "shares": Part(SHARES, BLOCKS_9),
    "shares-others": Part(SHARES, OTHERS, (0,)),
    "half-rates-last": Part(LAST_RATED, BLOCKS_9, (0,), "half-rate", rate=0.5, sensitivity=True),
    "twice-rates-last": Part(LAST_RATED, BLOCKS_9, (0,), "twice-rate", rate=2.0, sensitivity=True),
    "pair-half": Part(PAIR, OTHERS, (0,), "half-rate", rate=0.5),
    "batch-topk-twice": Part(
        (HALFWAY_SPACE,),
        BLOCKS_9,
        setting="batch-topk-twice",
        architecture="batch-topk",
        rate=2.0,
    ),
    "jumprelu-twice": Part(
        (HALFWAY_SPACE,), BLOCKS_9, setting="jumprelu-twice", architecture="jumprelu", rate=2.0
    ),
    "decoder-rows": Part(PAIR, ("smollm2",), (1, 2, 3), setting="decoder-rows", decoder_rows=True),
    "plain-batch-topk-twice": Part(
        (PLAIN,), BLOCKS_9, setting="batch-topk-twice", architecture="batch-topk", rate=2.0
    ),
    "plain-jumprelu-twice": Part(
        (PLAIN,), BLOCKS_9, setting="jumprelu-twice", architecture="jumprelu", rate=2.0
    ),
    "random-loss": Part((RANDOM_IN_LOSS,), BLOCKS_9, setting="random"),
    "random-loss-others": Part((RANDOM_IN_LOSS,), OTHERS, (0,), "random"),
    "fully-twice-others": Part((("whitening", 2.0, LOSS, K),), OTHERS, (0,)),
    "space-powers": Part(SPACE_POWERS, tuple(PLACES), (0,), "twice-rate", rate=2.0),
    "random-half": Part((RANDOM_IN_LOSS,), tuple(PLACES), (0,), "half-rate", rate=0.5),
    "random-twice": Part((RANDOM_IN_LOSS,), tuple(PLACES), (0,), "twice-rate", rate=2.0),
    "half-rates-others": Part(RATED, OTHERS, (0,), "half-rate", rate=0.5),
    "twice-rates-others": Part(RATED, OTHERS, (0,), "twice-rate", rate=2.0),
    "half-rates-rest": Part(LAST_RATED, OTHERS, (0,), "half-rate", rate=0.5, sensitivity=True),
    "twice-rates-rest": Part(LAST_RATED, OTHERS, (0,), "twice-rate", rate=2.0, sensitivity=True),
    "eighths": Part(EIGHTHS, tuple(PLACES), (0,)),
    "half-rates-eighths": Part(EIGHTHS, BLOCKS_9, (0,), "half-rate", rate=0.5),
    "twice-rates-eighths": Part(EIGHTHS, BLOCKS_9, (0,), "twice-rate", rate=2.0),
    "eighths-seeds": Part(EIGHTHS, seeds=expected.POWERS),
    "half-rates-eighths-others": Part(EIGHTHS, OTHERS, (0,), "half-rate", rate=0.5),
    "twice-rates-eighths-others": Part(EIGHTHS, OTHERS, (0,), "twice-rate", rate=2.0),
    "half-rates-controls": Part(CONTROLS, BLOCKS_9, (0,), "half-rate", rate=0.5),
    "twice-rates-controls": Part(CONTROLS, BLOCKS_9, (0,), "twice-rate", rate=2.0),
    "half-rates-mixed": Part(MIXED_POWERS, BLOCKS_9, (0,), "half-rate", rate=0.5),
    "twice-rates-mixed": Part(MIXED_POWERS, BLOCKS_9, (0,), "twice-rate", rate=2.0),
    "half-rates-end": Part((*MIXED_POWERS, *CONTROLS_OTHERS), OTHERS, (0,), "half-rate", rate=0.5),
    "twice-rates-end": Part(
        (*MIXED_POWERS, *CONTROLS_OTHERS), OTHERS, (0,), "twice-rate", rate=2.0
    ),
    "loss-seeds": Part((*SHARES, ("whitening", 2.0, LOSS, K)), OTHERS, expected.POWERS),
    "random-loss-seeds": Part((RANDOM_IN_LOSS,), OTHERS, expected.POWERS, "random"),
    "space-controls-seeds": Part(
        (PLAIN, *SPACE_CONTROLS), OTHERS, expected.POWERS, "twice-rate", rate=2.0
    ),
    "space-powers-seeds": Part(
        SPACE_POWERS, tuple(PLACES), expected.POWERS, "twice-rate", rate=2.0
    ),
    "space-chosen-fresh": Part(
        (("whitening", 0.75, SPACE, K),),
        ("gemma-5", "gemma", "gemma-14"),
        expected.FRESH,
        "twice-rate",
        rate=2.0,
    ),
    "half-rates-space": Part(IN_SPACE, tuple(PLACES), (0,), "half-rate", rate=0.5),
    "usual-rates-space": Part(IN_SPACE, tuple(PLACES), (0,), "usual-rate"),
    "half-rates-random": Part((RANDOM,), tuple(PLACES), (0,), "half-rate", rate=0.5),
    "twice-rates-random": Part((RANDOM,), tuple(PLACES), (0,), "twice-rate", rate=2.0),
    "half-rates-fully": Part((FULLY,), ("gemma-14",), (0,), "half-rate", rate=0.5),
    "inverse-space": Part(
        (("variance", -0.5, SPACE, K),), BLOCKS_9, setting="twice-rate", rate=2.0
    ),
    "twice-rates-fully": Part((FULLY,), ("gemma-14",), (0,), "twice-rate", rate=2.0),
    "usual-rows": Part(PAIR, ("gemma", "gemma-5"), setting="usual-rows", massive_ratio=5.0),
    "usual-rows-space": Part(
        (HALFWAY_SPACE,), ("gemma", "gemma-5"), setting="usual-rows", rate=2.0, massive_ratio=5.0
    ),
}
"""``fully`` was added where short trainings turned out to choose it, so that their regret can be
told; what comes after it, once the first four parts were known, and ``loss`` and what follows when
inverse variance in the loss had turned out, after block 9 of SmolLM2, to recover more than mixed.
``random`` is apart because two of its six dictionaries diverged, and the spread over seeds is taken
to be that of all dictionaries of a site. What comes after ``loss-powers`` was decided on when
whitening in the loss had become the default; ``fresh`` so that five seeds stand behind what is
called better, and ``fresh-inverse`` where inverse variance is called better still. Half the rate,
twice the rate and BatchTopK had one seed at first, as had Gemma after four million rows and the
powers in the loss. ``loss-controls`` came later, for the sites at which the default had no control
of its own; and last ``others`` and what follows, at the sites that had not had them, learning rates
of six more weightings, and shorter trainings; what begins otherwise or is whitened as a space at
higher rates, once one seed had shown what twice the rate does there; then ``shares`` and what
follows, which are controls with as many effective dimensions, learning rates of the other
weightings and sites, random weights in the loss, the space with other architectures and
powers; other rates at the sites beside blocks 9; and last of all the powers ⅛ and ⅜, of seed 0 at
first, with other rates after blocks 9 alone; and other rates of the controls that had one, of
`mixed` at further powers, and of what else had one rate; inverse variance as a space, of which a
first pilot had made a claim; and two more seeds of what had one: the controls in the loss, then
powers and controls as a space, of which the power that ``--alpha auto`` chooses on Gemma has five
seeds. Other rates have one seed. ``usual-rows`` came after all others, when it was seen that one
token of Gemma's, .04 % of the rows, carries 16 % of the variance after block 5 and 34 % after
block 9, and just misses being massive."""
SETTINGS = {
    "": "the usual: TopK, two million rows",
    "half-million": "half a million rows",
    "million": "one million rows",
    "four-million": "four million rows",
    "half-rate": "learning rate × ½",
    "twice-rate": "learning rate × 2",
    "batch-topk": "BatchTopK",
    "jumprelu": "JumpReLU (rows of length 1)",
}
"""In which plain dictionaries and the default were compared, in words."""


def regret_at_most(
    key: str, place: str, bound: float
) -> Callable[[recovery.Means], tuple[bool, str]]:
    """The dictionary that short trainings choose for a place has at most that much more KL than
    the best that was trained in full."""

    def found(means: recovery.Means) -> tuple[bool, str]:
        share = _regret(key, place, means)[1]
        return share <= bound, f"{100 * share:.0f} %"

    return found


REGRET = tuple(
    Expectation(
        key,
        f"the power that short trainings choose, {words}: KL at most 5 % above the best one's",
        regret_at_most(key, place, 0.05),
    )
    for place, words in (("mixed", "mixed"), ("loss", "in the loss"))
    for key in PLACES
)


class BegunOtherwise(Arm):
    """An arm that begins as the dictionary of the same weights at the other place would, in the
    loss or in the space: what is minimised and Adam's coordinates are its own."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        encoder, decoder, *_ = self.parameters
        to_rows = self.gamma if self.space is None else inverse(self.space.gamma).float()
        # with x = Γ⁻¹x′ or Γx, what is decoded moves by the inverse, and encoders by the transpose
        encoder.copy_(encoder @ to_rows)
        decoder.copy_(decoder @ inverse(to_rows).float().T)
        lengths = decoder.norm(dim=1, keepdim=True)
        decoder.div_(lengths)
        encoder.mul_(lengths)


def measure(key: str, path: str, seeds: Sequence[int] | None, parts: Sequence[str]) -> None:
    """Harvest, train and measure what has no result yet."""
    here = {part: PARTS[part] for part in parts if key in PARTS[part].places}
    sites: dict[tuple[bool, float], recovery.Opened] = {}

    def opened_for(decoder_rows: bool, massive_ratio: float) -> recovery.Opened:
        moments.MASSIVE_RATIO = massive_ratio
        if (decoder_rows, massive_ratio) not in sites:
            first = first_dictionary(key) if decoder_rows else None
            sensitive = any(part.sensitivity for part in here.values())
            sites[decoder_rows, massive_ratio] = recovery.open_site(key, path, sensitive, first)
        return sites[decoder_rows, massive_ratio]

    for name, part in here.items():
        opened = opened_for(part.decoder_rows, part.massive_ratio)
        for seed in part.seeds:
            if seeds is not None and seed not in seeds:
                continue
            missing = [
                arm
                for arm in arms_of(part, opened.inputs, seed)
                if not _result(key, arm.name, part.setting).exists()
            ]
            if not missing:
                continue
            how = TrainConfig(
                tokens=part.rows,
                learning_rate=part.rate * default_learning_rate(8 * opened.inputs.statistics.d_in),
                shuffle_seed=seed,
                checkpoint_seconds=600,
                lengths="auto",  # free, but of JumpReLU
            )
            folder = RUN / "trained" / key / name / f"s{seed}-{len(missing)}"
            one_site.Arm = BegunOtherwise if part.begun else Arm  # type: ignore[misc]
            dictionaries = train(opened.source, missing, how, folder)
            one_site.Arm = Arm  # type: ignore[misc]
            # All at once: the folder is found again as long as nothing of the seed has a result.
            for record in list(recovery.judge(opened, missing, dictionaries, seed)):
                write_json(_result(key, record["name"], part.setting), record)
            print(f"{key}: {name}, seed {seed} measured", flush=True)
    for config in (MIXED, LOSS, SPACE):  # of `--alpha auto`
        if not _choice(key, config.place).exists():
            opened, folder = opened_for(False, Part.massive_ratio), RUN / "trained" / key
            given = (opened.inputs, opened.source, opened.judge)
            chosen = choose_alpha(*given, folder / config.place, k=K, config=config)
            write_json(_choice(key, config.place), asdict(chosen))


def first_dictionary(key: str) -> Path:
    """The plain dictionary of ``checkpoints/`` along whose decoder rows features are planted."""
    return CHECKPOINTS / str(PLACES[key].site) / f"uniform-k{K}"


def arms_of(part: Part, inputs: RuleInputs, seed: int) -> list[ArmConfig]:
    """The dictionaries of a seed; what is drawn at random is drawn again for each."""
    arms = []
    for rule, alpha, place, k in part.weights:
        drawn = replace(place, draw=seed) if Rule.parse(rule).is_drawn else place
        weights = weights_from_rule(rule, alpha, inputs, drawn)
        arms.append(ArmConfig(weights, k=k, init_seed=seed, architecture=part.architecture))
    return arms


def _results(setting: str = "") -> Path:
    return RUN / setting / "results"


def _result(key: str, name: str, setting: str = "") -> Path:
    return _results(setting) / f"{key}.{name}.json"


def _choice(key: str, place: str) -> Path:
    return RUN / key / f"auto-{place}.json"


def read(key: str, setting: str = "") -> list[dict[str, Any]]:
    """The measured dictionaries of a site, of the usual setting or another."""
    return [json.loads(path.read_text()) for path in sorted(_results(setting).glob(f"{key}.*"))]


def with_space(key: str) -> list[dict[str, Any]]:
    """Dictionaries of a site at the rates that they are trained at by default: whitened ones that
    are trained as a space, at twice the usual."""
    usual, twice = read(key), read(key, "twice-rate")
    of_space = [r for r in twice if r["label"].startswith("whitening") and "space" in r["label"]]
    return [record for record in usual if "space" not in record["label"]] + of_space


def _regret(
    key: str, place: str, means: recovery.Means
) -> tuple[float, float, dict[float, float], dict[str, float]]:
    """The chosen power, 0 for none; by how much its KL is above that of the best one, as a share;
    the KL of every power that was trained in full; and of every trial."""
    if not _choice(key, place).exists():
        raise KeyError(key)
    trials: dict[str, float] = json.loads(_choice(key, place).read_text())["kl"]
    chosen = min(trials, key=lambda one: trials[one])
    if trials[chosen] > (1 - LEAST_GAIN) * trials["0"]:
        chosen = "0"
    where = "" if place == "loss" else f"-{place}"
    labels = {float(a): f"whitening-a{a}{where}-k{K}" for a in trials} | {0.0: f"uniform-k{K}"}
    full = {alpha: means[label]["kl"] for alpha, label in labels.items() if label in means}
    return float(chosen), full[float(chosen)] / min(full.values()) - 1, full, trials


_ROWS = (
    ("whitened halfway, in the loss (the default)", expected.HALFWAY_IN_LOSS),
    ("whitened halfway, mixed", expected.HALFWAY),
    ("whitened halfway, space, rate × 2", expected.HALFWAY_SPACE),
    ("inverse variance in the loss, α = −½", expected.IN_LOSS),
    ("inverse variance, mixed, α = −½", expected.INVERSE),
    ("the model's sensitivity, space, α = ¼", expected.SENSITIVITY),
    ("control: random directions, in the loss", f"rotated-{expected.HALFWAY_IN_LOSS}"),
    ("control: random directions, mixed", expected.ROTATED),
)


def plot(path: Path) -> None:
    """What each weighting changes at each site."""
    records_of = {
        key: [record for record in found if record["label"] != expected.HALFWAY_SPACE]
        + [r for r in read(key, "twice-rate") if r["label"] == expected.HALFWAY_SPACE]
        for key in recovery.MARKS
        if (found := read(key))
    }
    title = f"Weighted dictionaries beside plain ones of the same k = {K}, two million rows"
    recovery.plot_changes(path, _ROWS, records_of, title, 8)


_CURVE = {500_000: "half-million", 1_000_000: "million", ROWS: "", 4_000_000: "four-million"}
_DRAWN = {
    expected.PLAIN: ("plain", INK, "o"),
    expected.HALFWAY_IN_LOSS: ("whitened halfway, in the loss", BLUE, "s"),
}


def plot_rows(path: Path) -> None:
    """Recovered plants and KL against the rows of the training: means, and every seed as a dot."""
    with recovery.over_rows(path, list(_CURVE), "free lengths") as axes:
        for key, own in axes.items():
            for label, (name, colour, marker) in _DRAWN.items():
                found = [
                    [
                        recovery.numbers(record)
                        for record in read(key, setting)
                        if record["label"] == label and record["seed"] in SEEDS
                    ]
                    for setting in _CURVE.values()
                ]
                for measure, axis in own.items():
                    means = []
                    for rows, seeds in zip(_CURVE, found, strict=True):
                        values = [one[measure] for one in seeds]
                        axis.plot([rows] * len(values), values, ".", color=colour, alpha=0.5)
                        means.append(np.mean(values))
                    axis.plot(list(_CURVE), means, color=colour, marker=marker, lw=1.8, label=name)


def choices(place: str) -> str:
    """What ``--alpha auto`` chooses for a place, and what that costs, by three seeds."""
    rows = [["site", "KL of the trials, by α", "chosen", "KL after two million rows, by α",
             "regret"]]  # fmt: skip
    for key, where in PLACES.items():
        records = read(key) if place != "space" else with_space(key)
        means = recovery.means_of([record for record in records if record["seed"] in SEEDS])
        try:
            chosen, share, full, trials = _regret(key, place, means)
        except KeyError:  # it was not trained in full
            continue
        rows.append(
            [
                where.title,
                ", ".join(f"{alpha}: {kl:.3f}" for alpha, kl in trials.items()),
                f"{chosen:g}" if chosen else "none",
                ", ".join(f"{alpha:g}: {kl:.3f}" for alpha, kl in sorted(full.items())),
                f"{100 * share:.0f} %",
            ]
        )
    return markdown(rows)


def _outcome(asked: Sequence[tuple[str, str, Any]], key: str, of: Any) -> list[str]:
    return recovery.expected((words, found, of) for place, words, found in asked if place == key)


def at_twice_the_rate(key: str) -> list[dict[str, Any]]:
    """Those that are whitened halfway as a space, labelled so."""
    return [
        record | {"label": f"{record['label']}, rate × 2"}
        for record in read(key, "twice-rate")
        if record["label"] == expected.HALFWAY_SPACE
    ]


def of_random_weights(key: str) -> str:
    """What came of random weights, seed by seed: too far apart for a mean."""
    found: dict[str, list[str]] = {place: [] for place in ("mixed", "in the loss")}
    for record in read(key, "random"):
        own = recovery.numbers(record)
        pair = f"{own['kl']:.3f} and {own['recovered']:.3f}"
        found["mixed" if "mixed" in record["label"] else "in the loss"].append(pair)
    of_places = [f"{place} {', '.join(pairs)}" for place, pairs in found.items() if pairs]
    return f"Random weights, KL and recovered by seed: {'; '.join(of_places)}." if of_places else ""


def at_site(key: str) -> Iterator[str]:
    """The tables of a site."""
    records = read(key)
    if not records:
        return
    shown = [*records, *at_twice_the_rate(key)]
    seeds = sorted({record["seed"] for record in shown})
    yield f"### {PLACES[key].title}"
    yield f"{len(shown)} dictionaries, seeds {', '.join(map(str, seeds))}."
    yield from recovery.tables(shown, key, ROWS)
    if found := of_random_weights(key):
        yield found
    # Expectations are of three seeds, which nearly all arms have.
    records += read(key, "random")
    means = recovery.means_of([record for record in records if record["seed"] in SEEDS])
    asked = [(one.place, one.words, one.found) for one in (*expected.EXPECTED, *REGRET)]
    yield from _outcome([*asked, *expected.OF_LOSS_AGAIN], key, means)
    for added, ones in (
        (expected.POWERS, (*expected.OF_POWERS, *expected.OF_AGAIN)),
        (expected.FRESH, expected.OF_FRESH),
    ):
        means = recovery.means_of([record for record in records if record["seed"] in added])
        yield from _outcome([(one.place, one.words, one.found) for one in ones], key, means)
    means = recovery.means_of([record for record in records if record["seed"] == 0])
    yield from _outcome(expected.EIGHTHS, key, means)


_CONTROLS = ("rotated", "permuted", "shares", "random")
_SPACE_TWICE = f"{expected.HALFWAY_SPACE}, rate × 2"
_CORRECTED = {
    "whitened halfway, in the loss (the default)": expected.HALFWAY_IN_LOSS,
    "whitened halfway, in the space, rate × 2": _SPACE_TWICE,
    "inverse variance, in the loss": expected.IN_LOSS,
    "inverse variance, mixed": expected.INVERSE,
    "the paper's variance, α = ½": f"variance-a0.5-k{K}",
}


def corrected() -> str:
    """p of a difference from plain, corrected for looks at three and at five seeds, and for all
    weightings at all sites, recovered plants and KL (Holm)."""
    looked: dict[tuple[str, str, str], float] = {}
    for key in PLACES:
        records = [*read(key), *at_twice_the_rate(key)]
        for measure in ("recovered", "kl"):
            for label, found in recovery.differences(records, measure).items():
                if not label.startswith(_CONTROLS):
                    looked[key, label, measure] = spent(found.p, len(found.by_seed))
    adjusted = dict(zip(looked, holm(list(looked.values())), strict=True))
    rows = [["p, plants and KL", *(where.title for where in PLACES.values())]]
    for words, label in _CORRECTED.items():
        pairs = [[adjusted.get((key, label, m)) for m in ("recovered", "kl")] for key in PLACES]
        rows.append([words, *(" and ".join(map(_p_text, pair)) for pair in pairs)])
    return f"{len(looked)} differences:\n\n{markdown(rows)}"


def _p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def in_settings(key: str) -> Iterator[str]:
    """Plain dictionaries beside the default, trained otherwise."""
    records = {
        setting: [
            record
            for record in read(key, setting)
            if record["label"] in (expected.PLAIN, expected.HALFWAY_IN_LOSS)
        ]
        for setting in SETTINGS
    }
    if not any(own for setting, own in records.items() if setting):
        return
    pairs = {
        measure: {
            setting: recovery.at_same_k(own, measure).get(expected.HALFWAY_IN_LOSS, {})
            for setting, own in records.items()
        }
        for measure in ("kl", "recovered")
    }
    beside = {
        measure: estimates({s: own for s, own in of.items() if len(own) >= len(SEEDS)})
        for measure, of in pairs.items()
    }
    rows = [["setting", "seeds", "KL, plain", "whitened", "change", "recovered, plain", "whitened",
             "difference", "dead %, plain", "whitened", "FVU, plain", "whitened", "L0, plain",
             "whitened"]]  # fmt: skip
    settings: expected.Settings = {}
    for setting, words in SETTINGS.items():
        if not records[setting]:
            continue
        both = pairs["kl"][setting].keys()
        means = recovery.means_of([r for r in records[setting] if r["seed"] in both])
        settings[setting] = means
        if not setting:  # of the seeds that the other rates have
            same = [r for r in records[setting] if r["seed"] in SEEDS]
            settings[expected.USUAL_RATE] = recovery.means_of(same)
        cells = []
        for measure in ("kl", "recovered"):
            cells += [f"{means[label][measure]:.3f}" for label in means]
            cells.append(
                _difference(beside[measure].get(setting), pairs[measure][setting], measure)
            )
        cells += [f"{100 * means[label]['dead']:.1f}" for label in means]
        cells += [f"{means[label]['fvu']:.3f}" for label in means]
        cells += [f"{_mean_l0(records[setting], label, both):.1f}" for label in means]
        rows.append([words, str(len(both)), *cells])
    for words, seeds, own in recovery.baselines_by_rows(key):
        kl, recovered = (f"{own[measure]:.3f}" for measure in ("kl", "recovered"))
        last = (f"{100 * own['dead']:.1f}", "–", f"{own['fvu']:.3f}", "–", "–", "–")
        rows.append([words, str(seeds), kl, "–", "–", recovered, "–", "–", *last])
    yield f"### Trained otherwise: {PLACES[key].title}"
    yield markdown(rows)
    yield from _outcome(expected.OF_SETTINGS, key, settings)


def _mean_l0(records: Sequence[dict[str, Any]], label: str, seeds: Container[int]) -> float:
    own = [r["fidelity"]["l0"] for r in records if r["label"] == label and r["seed"] in seeds]
    return float(np.mean(own))


def at_rates(key: str) -> Iterator[str]:
    """What was trained at three learning rates, of seed 0."""
    records = {
        rate: read(key, "" if rate == expected.USUAL_RATE else rate) for rate in expected.RATES
    }
    records[expected.USUAL_RATE] += [*read(key, "random"), *read(key, "usual-rate")]
    settings = {
        rate: recovery.means_of([record for record in own if record["seed"] == 0])
        for rate, own in records.items()
    }
    rated = set.intersection(*(set(means) for means in settings.values()))
    if not rated:
        return
    rows = [["dictionary", *(f"{what}, rate {times}" for what in ("KL", "recovered")
             for times in ("× ½", "× 1", "× 2")), "most CE recovered at"]]  # fmt: skip
    for label in sorted(rated, key=lambda name: (not name.startswith("uniform"), name)):
        rows.append(
            [
                f"`{label}`",
                *(
                    f"{settings[rate][label][measure]:.3f}"
                    for measure in ("kl", "recovered")
                    for rate in expected.RATES
                ),
                expected.best_rate(settings, label).replace("-", " "),
            ]
        )
    for label, own in recovery.means_of_baselines(key, ROWS).items():
        kl, recovered = (f"{own[measure]:.3f}" for measure in ("kl", "recovered"))
        rows.append([f"`{label}`", "–", kl, "–", "–", recovered, "–", "–"])
    yield f"### At three learning rates: {PLACES[key].title}"
    yield markdown(rows)
    asked = (*expected.OF_RATES, *expected.LAST_RATED, *expected.RATED_ELSEWHERE)
    asked += (*expected.RANDOM_RATED, *expected.EIGHTHS_RATED, *expected.CONTROLS_RATED)
    asked += (*expected.MIXED_RATED, *expected.SPACE_RATED)
    yield from _outcome(asked, key, settings)


def along_decoder_rows(key: str) -> Iterator[str]:
    """Plain dictionaries beside the default where decoder rows are planted, too."""
    records = read(key, "decoder-rows")
    if not records:
        return
    pair = (expected.PLAIN, expected.HALFWAY_IN_LOSS)
    strata: list[str | None] = [*records[0]["planted"]["by_stratum"], None]

    def mean(label: str, measure: str, stratum: str | None) -> float:
        own = [record["planted"] for record in records if record["label"] == label]
        own = own if stratum is None else [planted["by_stratum"][stratum] for planted in own]
        return float(np.mean([one[measure] for one in own]))

    yield f"### Planted along decoder rows, too: {PLACES[key].title}"
    for measure, words in (("recovered", "recovered"), ("f1", "mean F1")):
        rows = [[f"planted along: {words}", *(one or "all" for one in strata)]]
        rows += [
            [f"`{label}`", *(f"{mean(label, measure, one):.3f}" for one in strata)]
            for label in pair
        ]
        if measure == "recovered":
            found = [recovery.differences(records, measure, stratum=one) for one in strata]
            cells = [recovery.text_of(one.get(expected.HALFWAY_IN_LOSS)) for one in found]
            rows.append(["difference", *cells])
        for one in recovery.read_baselines(key, "decoder-rows", "decoder-rows"):
            by_stratum = one["recovered" if measure == "recovered" else "by_stratum"]
            by_stratum = by_stratum | {None: one["numbers"][measure]}
            cells = [f"{by_stratum[stratum]:.3f}" for stratum in strata]
            rows.append([f"`{one['label']}`", *cells])
        yield markdown(rows)
    of_rows = {label: {"f1": mean(label, "f1", "decoder row")} for label in pair}
    means = {"": recovery.means_of(records), "rows": of_rows}
    yield from _outcome(expected.OF_DECODER_ROWS, key, means)


def without_strong_rows(key: str) -> Iterator[str]:
    """The same dictionaries with and without rows of five to ten median norms."""
    records = {"all": with_space(key), "those up to 5 medians": read(key, expected.USUAL_ROWS)}
    if not records["those up to 5 medians"]:
        return
    yield f"### Without strong rows: {PLACES[key].title}"
    rows = [["rows", "dictionary", "KL", "beside plain", "FVU", "dead %", "recovered",
             "beside plain"]]  # fmt: skip
    labels = (expected.PLAIN, expected.HALFWAY_IN_LOSS, expected.HALFWAY_SPACE)
    settings = {}
    for words, found in records.items():
        own = [r for r in found if r["label"] in labels and r["seed"] in SEEDS]
        means = recovery.means_of(own)
        kl, recovered = (recovery.differences(own, one) for one in ("kl", "recovered"))
        for label in labels:
            rows.append(
                [
                    words,
                    f"`{label}`" + (", rate × 2" if "space" in label else ""),
                    f"{means[label]['kl']:.3f}",
                    recovery.text_of(kl.get(label), per_cent=True),
                    f"{means[label]['fvu']:.3f}",
                    f"{100 * means[label]['dead']:.1f}",
                    f"{means[label]['recovered']:.3f}",
                    recovery.text_of(recovered.get(label)),
                ]
            )
        settings["" if words == "all" else expected.USUAL_ROWS] = means
    yield markdown(rows)
    yield from _outcome(expected.OF_USUAL_ROWS, key, settings)


def _difference(estimate: Estimate | None, of_seeds: dict[int, Value], measure: str) -> str:
    """With its interval if there are seeds enough."""
    if estimate is not None:
        return recovery.text_of(estimate, per_cent=measure == "kl")
    mean = sum(value.mean for value in of_seeds.values()) / len(of_seeds)
    return f"{100 * math.expm1(mean):+.0f} %" if measure == "kl" else f"{mean:+.3f}"


def section_of_settings() -> str:
    """The part of docs/results on other settings."""
    parts = [part for key in BLOCKS_9 for part in in_settings(key)]
    parts += [part for key in PLACES for part in along_decoder_rows(key)]
    return "\n\n".join([*parts, *(part for key in PLACES for part in without_strong_rows(key))])


def section_of_rates(model: str) -> str:
    """The part of docs/results on learning rates, of one of the models."""
    places = [key for key, where in PLACES.items() if where.model_key == model]
    return "\n\n".join(part for key in places for part in at_rates(key))


def section() -> str:
    """The part of docs/results on blocks 9, and on what is chosen at all sites."""
    parts = [part for key in BLOCKS_9 for part in at_site(key)]
    parts += ["### What `--alpha auto` chooses in the loss", choices("loss")]
    parts += ["### What it chooses with `--place mixed`", choices("mixed")]
    return "\n\n".join(parts)


def section_of_others() -> str:
    """The part of docs/results on the other sites, and on corrections at all of them."""
    parts = [part for key in OTHERS for part in at_site(key)]
    parts += ["### Corrected for looks and for all weightings", corrected()]
    return "\n\n".join(parts)


def section_of_space() -> str:
    """The part of docs/results on the space, and on what is chosen there."""
    parts = [free_lengths_space.section(read)]
    parts += ["### What `--alpha auto` chooses with `--place space`", choices("space")]
    asked = []
    for key, where in PLACES.items():
        for prefix, seeds in (("", (0,)), ("seeds 1, 2: ", expected.POWERS)):
            records = [record for record in with_space(key) if record["seed"] in seeds]
            words = f"{prefix}{where.title}: KL of the chosen power at most 5 % above "
            words += "the best one's"
            found = regret_at_most(key, "space", 0.05)
            asked.append((words, found, recovery.means_of(records)))
    parts += recovery.expected(asked)
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key in recovery.MODELS:
        parser.add_argument(f"--{key}", help="the model, if it is to be measured")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", help="the default is all")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    if ARCHIVE.exists():
        unpack(ARCHIVE, RUN)
    for key in asked.places:
        if path := getattr(asked, PLACES[key].model_key):
            measure(key, path, asked.seeds, asked.parts)
            pack(RUN, ARCHIVE)
    plot(IMAGES / "which_weights.png")
    plot_rows(IMAGES / "learning_curve_free_lengths.png")
    write_result("free-lengths", section())
    write_result("free-lengths-strata", free_lengths_summary.by_stratum(read))
    write_result("free-lengths-others", section_of_others())
    write_result("free-lengths-rates", section_of_rates("smollm2"))
    write_result("free-lengths-rates-gemma", section_of_rates("gemma"))
    write_result("free-lengths-settings", section_of_settings())
    write_result("free-lengths-space", section_of_space())
    write_result("what each brings", free_lengths_summary.each(read))
    write_result("what lasts", free_lengths_summary.lasting(read))


if __name__ == "__main__":
    main()
