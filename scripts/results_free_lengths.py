"""Which weights pay beside plain dictionaries that are trained as well as we know how.

    bash scripts/reproduce.sh free-lengths

The dictionaries of ``results_recovery.py`` had decoder rows of length 1 in training, and one
million rows. With free lengths, which are the default since, plain ones recover more, and longer
trainings make the lead of whitened ones smaller. So the weights that mattered there are measured
once more, with free lengths and two million rows: at all five sites, on the same plants and texts,
by the same judges, with the controls.

``EXPECTED`` was written down before the first of these dictionaries was trained; blocks 9 had been
measured with free lengths before, plain and halfway whitened, after one million rows (three seeds)
and four (one seed).
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import results_recovery as recovery
import torch
import whitening_latents
from benchmarks import IMAGES, README, write_result
from results_archive import pack, unpack
from results_recovery import (
    LOSS,
    MIXED,
    PLACES,
    SEEDS,
    SPACE,
    Expectation,
    K,
    above,
    at_most,
    below,
    change,
)

from llm_wsae import TrainConfig, train
from llm_wsae.files import write_json
from llm_wsae.terminal import markdown
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import default_learning_rate
from llm_wsae.tuning import LEAST_GAIN, choose_alpha
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.rules import Rule

ROWS = 2_000_000
RUN = README.parent / "runs/free-lengths"
ARCHIVE = Path(__file__).parent / "results/free-lengths.jsonl.gz"
Weights = tuple[str, float, WeightConfig, int]
"""Rule, α, place and k."""
PLAIN: Weights = ("uniform", 1.0, LOSS, K)
HALFWAY: Weights = ("whitening", 0.5, MIXED, K)
HALFWAY_SPACE: Weights = ("whitening", 0.5, SPACE, K)
INVERSE: Weights = ("variance", -0.5, MIXED, K)
BLOCKS_9, OTHERS = ("smollm2", "gemma"), ("smollm2-20", "gemma-5", "gemma-14")


@dataclass(frozen=True)
class Part:
    """Dictionaries that are trained side by side, one of each seed at each place."""

    weights: tuple[Weights, ...]
    places: tuple[str, ...] = tuple(PLACES)
    seeds: tuple[int, ...] = tuple(SEEDS)
    setting: str = ""
    """How they differ from all others of the same weights, for people."""
    rate: float = 1.0
    """How many times the usual learning rate."""
    architecture: str = "topk"
    sensitivity: bool = False
    """Whether a rule needs the model's sensitivity."""


PARTS = {
    "everywhere": Part(
        (PLAIN, HALFWAY, HALFWAY_SPACE, ("rotated:whitening", 0.5, MIXED, K), INVERSE)
    ),
    "powers": Part((("whitening", 0.25, MIXED, K), ("whitening", 0.75, MIXED, K))),
    "last": Part((("uniform", 1.0, LOSS, 48), ("variance", 0.5, LOSS, K)), BLOCKS_9),
    "fully": Part((("whitening", 1.0, MIXED, K),), ("gemma-14",)),
    "controls": Part(
        (
            ("permuted:variance", -0.5, MIXED, K),
            ("permuted:whitening", 0.5, MIXED, K),
            ("random", 1.0, MIXED, K),
            ("sensitivity", 0.25, SPACE, K),
            ("variance", -0.5, LOSS, K),
            ("uniform", 1.0, LOSS, 24),
            ("uniform", 1.0, LOSS, 64),
        ),
        BLOCKS_9,
        sensitivity=True,
    ),
    "seeds-smollm2": Part((PLAIN, HALFWAY, INVERSE), ("smollm2",), (3, 4, 5)),
    "seeds-gemma": Part((PLAIN, HALFWAY, HALFWAY_SPACE, INVERSE), ("gemma",), (3, 4, 5)),
    "seeds-smollm2-20": Part((PLAIN, HALFWAY, INVERSE), ("smollm2-20",), (3, 4)),
    "seeds-gemma-others": Part(
        (PLAIN, HALFWAY, HALFWAY_SPACE, INVERSE), ("gemma-5", "gemma-14"), (3, 4)
    ),
    **{
        f"{name}-rate{more}": Part(weights, BLOCKS_9, seeds, f"rate × {factor:g}", factor)
        for name, factor in (("half", 0.5), ("twice", 2.0))
        for more, weights, seeds in (
            ("", (PLAIN, HALFWAY, HALFWAY_SPACE, INVERSE), (0,)),
            ("-seeds", (PLAIN, HALFWAY), (1, 2)),
        )
    },
    "batch-topk": Part((PLAIN, HALFWAY), BLOCKS_9, setting="batch-topk", architecture="batch-topk"),
}
"""``fully`` was added where short trainings turned out to choose it, so that their regret can be
told; what comes after it was added to the table of results that the first four had given. Blocks 9
have six seeds because the last three are also judged without a ground truth."""
JUDGED = (3, 4, 5)
"""Seeds at blocks 9 whose latents are judged without a ground truth."""
_MIXED = f"whitening-a0.5-mixed-k{K}"
_WEAKER, _STRONGER = f"whitening-a0.25-mixed-k{K}", f"whitening-a0.75-mixed-k{K}"
_SPACE = f"whitening-a0.5-space-k{K}"
_PLAIN, _ROTATED = f"uniform-k{K}", f"rotated-{_MIXED}"
_INVERSE = f"variance-a-0.5-mixed-k{K}"
_PERMUTED, _PERMUTED_INVERSE = f"permuted-{_MIXED}", f"permuted-{_INVERSE}"
_RANDOM, _SENSITIVITY = f"random-a1-mixed-k{K}", f"sensitivity-matrix-a0.25-space-k{K}"
_IN_LOSS = f"variance-a-0.5-k{K}"
_GEMMA = ("gemma", "gemma-5", "gemma-14")
_SMOLLM2 = ("smollm2", "smollm2-20")


def regret_at_most(key: str, bound: float) -> Callable[[recovery.Means], tuple[bool, str]]:
    """The dictionary that short trainings choose, mixed, has at most that much more KL than the
    best that was trained in full."""

    def found(means: recovery.Means) -> tuple[bool, str]:
        share = _regret(key, means)[1]
        return share <= bound, f"{100 * share:.0f} %"

    return found


def _range(low: float, high: float) -> str:
    words = f"at least {100 * low:+.0f} %" if low > -1 else ""
    return f"{words}{' and ' if words and high < 9 else ''}" + (
        f"at most {100 * high:+.0f} %" if high < 9 else ""
    )


def at_equal_kl(arm: str, low: float, high: float) -> Callable[[recovery.Means], tuple[bool, str]]:
    """It recovers so much more of the plants than plain dictionaries would at its KL."""

    def found(means: recovery.Means) -> tuple[bool, str]:
        curve = sorted((own["kl"], own["recovered"]) for name, own in means.items()
                       if name.startswith("uniform"))  # fmt: skip
        at, (kls, recovered) = means[arm]["kl"], zip(*curve, strict=True)
        if not kls[0] <= at <= kls[-1]:
            raise KeyError(arm)
        more = means[arm]["recovered"] - float(np.interp(np.log(at), np.log(kls), recovered))
        return low <= more <= high, f"{more:+.3f}"

    return found


EXPECTED = (
    *(
        Expectation(place, words, found)
        for place in _SMOLLM2
        for words, found in (
            (
                "halfway whitened, mixed: more of the plants recovered than plain, by 40 % at most",
                change(_MIXED, "recovered", 0, 0.4),
            ),
            ("the same: KL within 5 % of plain", change(_MIXED, "kl", -0.05, 0.05)),
            ("halfway whitened space: KL within 5 % of plain", change(_SPACE, "kl", -0.05, 0.05)),
            (
                "the same: no more plants recovered than plain (+5 % at most)",
                change(_SPACE, "recovered", -1, 0.05),
            ),
            (
                "inverse variance, mixed: at least 10 % more of the plants recovered",
                change(_INVERSE, "recovered", 0.1, 99),
            ),
            (
                "the same: KL at least 5 % above plain",
                change(_INVERSE, "kl", 0.05, 99),
            ),
            (
                "whitened, mixed, α = ¼: KL no higher than at α = ½",
                below(_WEAKER, "kl", _MIXED),
            ),
        )
    ),
    *(
        Expectation(place, words, found)
        for place in _GEMMA
        for words, found in (
            (
                "halfway whitened, mixed: at least 30 % more of the plants recovered than plain",
                change(_MIXED, "recovered", 0.3, 99),
            ),
            ("the same: KL 2 to 30 % below plain", change(_MIXED, "kl", -0.3, -0.02)),
            (
                "halfway whitened space: KL at least 15 % below plain",
                change(_SPACE, "kl", -1, -0.15),
            ),
            (
                "the same: at least 15 % more of the plants recovered",
                change(_SPACE, "recovered", 0.15, 99),
            ),
            (
                "inverse variance, mixed: at least 30 % more of the plants recovered",
                change(_INVERSE, "recovered", 0.3, 99),
            ),
            (
                "whitened, mixed, α = ¾: more of the plants recovered than at α = ½",
                above(_STRONGER, "recovered", _MIXED),
            ),
        )
    ),
    *(
        Expectation(place, words, found)
        for place in PLACES
        for words, found in (
            (
                "rotated control of mixed: at most 10 % more of the plants recovered than plain",
                change(_ROTATED, "recovered", -1, 0.1),
            ),
            ("the same: KL no lower than plain", change(_ROTATED, "kl", 0, 99)),
            (
                "the power that short trainings choose, mixed: KL at most 5 % above the best one's",
                regret_at_most(place, 0.05),
            ),
        )
    ),
    *(
        Expectation(place, words, found)
        for place, sensitivity_kl, sensitivity_plants in (
            ("smollm2", (-0.08, 0.02), (-0.15, 0.15)),
            ("gemma", (-1.0, -0.15), (0.2, 99.0)),
        )
        for words, found in (
            *(
                expectation
                for arm, name in (
                    (_PERMUTED_INVERSE, "permuted inverse variance, mixed"),
                    (_PERMUTED, "permuted whitening, mixed"),
                    (_RANDOM, "random weights, mixed"),
                )
                for expectation in (
                    (
                        f"{name}: at most 10 % more of the plants recovered than plain",
                        change(arm, "recovered", -1, 0.1),
                    ),
                    ("the same: KL no lower than plain (−2 %)", change(arm, "kl", -0.02, 99)),
                )
            ),
            (
                "the model's sensitivity as a space, α = ¼: KL relative to plain "
                + _range(*sensitivity_kl),
                change(_SENSITIVITY, "kl", *sensitivity_kl),
            ),
            (
                f"the same: recovered plants relative to plain {_range(*sensitivity_plants)}",
                change(_SENSITIVITY, "recovered", *sensitivity_plants),
            ),
            (
                "inverse variance, mixed: at least .02 more of the plants than plain of equal KL",
                at_equal_kl(_INVERSE, 0.02, 1),
            ),
        )
    ),
    *(
        Expectation(place, words, found)
        for place in ("gemma", "smollm2")
        for words, found in (
            (
                "the paper's variance, α = ½: recovers at most .03",
                at_most(f"variance-a0.5-k{K}", "recovered", 0.03),
            ),
            (
                "inverse variance in the loss: recovers less than mixed",
                below(_IN_LOSS, "recovered", _INVERSE),
            ),
        )
    ),
)


Settings = dict[str, recovery.Means]
"""Setting → means; the usual setting is the empty text."""
RATES = ("rate × 0.5", "", "rate × 2")


def best_rate(settings: Settings, arm: str) -> str:
    """The setting whose rate keeps most of the cross-entropy, of those that the arm was made at."""
    made = [rate for rate in RATES if arm in settings.get(rate, {})]
    return max(made, key=lambda rate: settings[rate][arm]["ce"])


def at_best_rates(
    arm: str, measure: str, low: float, high: float
) -> Callable[[Settings], tuple[bool, str]]:
    """Relative to plain, each at the rate that keeps most of its cross-entropy."""

    def found(settings: Settings) -> tuple[bool, str]:
        own, its = (settings[best_rate(settings, one)][one][measure] for one in (arm, _PLAIN))
        return low <= own / its - 1 <= high, f"{100 * (own / its - 1):+.0f} %"

    return found


def in_setting(
    setting: str, arm: str, measure: str, low: float, high: float
) -> Callable[[Settings], tuple[bool, str]]:
    """Relative to plain of the same setting."""

    def found(settings: Settings) -> tuple[bool, str]:
        return change(arm, measure, low, high)(settings[setting])

    return found


EXPECTED_OF_RATES = (
    (
        "smollm2",
        "halfway whitened, mixed, and plain, each at the rate with most CE recovered: "
        "recovered plants −10 to +25 %",
        at_best_rates(_MIXED, "recovered", -0.1, 0.25),
    ),
    ("smollm2", "the same: KL within 5 %", at_best_rates(_MIXED, "kl", -0.05, 0.05)),
    (
        "smollm2",
        "inverse variance, mixed, in the same way: at least 8 % more of the plants",
        at_best_rates(_INVERSE, "recovered", 0.08, 99),
    ),
    (
        "gemma",
        "halfway whitened, mixed, and plain, each at the rate with most CE recovered: "
        "at least 20 % more of the plants",
        at_best_rates(_MIXED, "recovered", 0.2, 99),
    ),
    ("gemma", "the same: KL 2 to 25 % lower", at_best_rates(_MIXED, "kl", -0.25, -0.02)),
    (
        "gemma",
        "inverse variance, mixed, in the same way: at least 40 % more of the plants",
        at_best_rates(_INVERSE, "recovered", 0.4, 99),
    ),
)
EXPECTED_OF_BATCH_TOPK = (
    (
        "smollm2",
        "halfway whitened, mixed, beside plain: recovered plants −10 to +30 %",
        in_setting("batch-topk", _MIXED, "recovered", -0.1, 0.3),
    ),
    ("smollm2", "the same: KL within 6 %", in_setting("batch-topk", _MIXED, "kl", -0.06, 0.06)),
    (
        "gemma",
        "halfway whitened, mixed, beside plain: at least 25 % more of the plants",
        in_setting("batch-topk", _MIXED, "recovered", 0.25, 99),
    ),
    ("gemma", "the same: KL 2 to 45 % lower", in_setting("batch-topk", _MIXED, "kl", -0.45, -0.02)),
)


def _expected_of_latents() -> Iterator[tuple[str, str, Any]]:
    for place, least in (("smollm2", -0.015), ("gemma", 0.0)):
        for arm, name in ((_MIXED, "halfway whitened, mixed"), (_INVERSE, "inverse variance")):
            yield (
                place,
                f"{name}: detection over all latents at least plain's {least:+g}".replace("-", "−"),
                whitening_latents.differs(arm, _PLAIN, "all", least, 1.0),
            )
            yield (
                place,
                f"{name}: seeds agree no less than plain (−.01 at most)",
                whitening_latents.differs(arm, _PLAIN, "agreement", -0.01, 1.0),
            )


EXPECTED_OF_LATENTS = tuple(_expected_of_latents())


def measure(key: str, path: str, seeds: Sequence[int] | None, parts: Sequence[str]) -> None:
    """Harvest, train and measure what has no result yet."""
    here = {part: PARTS[part] for part in parts if key in PARTS[part].places}
    opened = recovery.open_site(key, path, any(part.sensitivity for part in here.values()))
    for name, part in here.items():
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
                tokens=ROWS,
                learning_rate=part.rate * default_learning_rate(8 * opened.inputs.statistics.d_in),
                shuffle_seed=seed,
                checkpoint_seconds=600,
                lengths="free",
            )
            folder = RUN / "trained" / key / name / f"s{seed}-{len(missing)}"
            dictionaries = train(opened.source, missing, how, folder)
            for record in recovery.judge(opened, missing, dictionaries, seed):
                write_json(_result(key, record["name"], part.setting), record)
            print(f"{key}: {name}, seed {seed} measured", flush=True)
    if (folders := _judged(key)) and not _latents(key).exists():
        whitening_latents.judge(_latents(key), path, folders, _PLAIN)
    if not _choice(key).exists():  # of `--alpha auto`
        given, folder = (opened.inputs, opened.source, opened.judge), RUN / "trained" / key
        write_json(_choice(key), asdict(choose_alpha(*given, folder, k=K, config=MIXED)))


def arms_of(part: Part, inputs: RuleInputs, seed: int) -> list[ArmConfig]:
    """The dictionaries of a seed; what is drawn at random is drawn again for each."""
    arms = []
    for rule, alpha, place, k in part.weights:
        drawn = replace(place, draw=seed) if Rule.parse(rule).is_drawn else place
        weights = weights_from_rule(rule, alpha, inputs, drawn)
        arms.append(ArmConfig(weights, k=k, init_seed=seed, architecture=part.architecture))
    return arms


def _judged(key: str) -> dict[str, dict[int, Path]]:
    """Label → seed → folder of the dictionaries that are judged without a ground truth, if they
    were trained here."""
    if key not in BLOCKS_9:
        return {}
    found: dict[str, dict[int, Path]] = {}
    for label in (_PLAIN, _MIXED, _INVERSE):
        for seed in JUDGED:
            for path in (RUN / "trained" / key).glob(f"seeds-*/s{seed}-*/{label}-s{seed}"):
                found.setdefault(label, {})[seed] = path
    complete = len(found) == 3 and all(len(own) == len(JUDGED) for own in found.values())
    return found if complete else {}


def _latents(key: str) -> Path:
    return RUN / key / "latents.json"


def _results(setting: str = "") -> Path:
    return RUN / setting.replace(" × ", "-") / "results"


def _result(key: str, name: str, setting: str = "") -> Path:
    return _results(setting) / f"{key}.{name}.json"


def _choice(key: str) -> Path:
    return RUN / key / "auto-mixed.json"


def read(key: str, setting: str = "") -> list[dict[str, Any]]:
    """The measured dictionaries of a site, of the usual setting or another."""
    return [json.loads(path.read_text()) for path in sorted(_results(setting).glob(f"{key}.*"))]


def _regret(
    key: str, means: recovery.Means
) -> tuple[float, float, dict[float, float], dict[str, float]]:
    """The chosen power, 0 for none; by how much its KL is above that of the best one, as a share;
    the KL of every power that was trained in full; and of every trial."""
    if not _choice(key).exists():
        raise KeyError(key)
    trials: dict[str, float] = json.loads(_choice(key).read_text())["kl"]
    chosen = min(trials, key=lambda one: trials[one])
    if trials[chosen] > (1 - LEAST_GAIN) * trials["0"]:
        chosen = "0"
    labels = {float(a): f"whitening-a{a}-mixed-k{K}" for a in trials} | {0.0: f"uniform-k{K}"}
    full = {alpha: means[label]["kl"] for alpha, label in labels.items() if label in means}
    return float(chosen), full[float(chosen)] / min(full.values()) - 1, full, trials


_ROWS = (
    ("whitened halfway, mixed (the default)", _MIXED),
    ("whitened halfway, space", _SPACE),
    ("inverse variance, mixed, α = −½", _INVERSE),
    ("control: random directions, mixed", _ROTATED),
)


def plot(path: Path) -> None:
    """What each weighting changes at each site."""
    records_of = {key: found for key in recovery.MARKS if (found := read(key))}
    title = f"Weighted dictionaries beside plain ones of the same k = {K}, two million rows"
    recovery.plot_changes(path, _ROWS, records_of, title, 5.2)


def choices() -> str:
    """What ``--alpha auto`` chooses for the place mixed, and what that costs."""
    rows = [["site", "KL of the trials, by α", "chosen", "KL after two million rows, by α",
             "regret"]]  # fmt: skip
    for key, where in PLACES.items():
        try:
            chosen, share, full, trials = _regret(key, recovery.means_of(read(key)))
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


def section() -> str:
    """The part of docs/results."""
    parts = []
    for key, where in PLACES.items():
        records = read(key)
        if not records:
            continue
        seeds = sorted({record["seed"] for record in records})
        parts += [f"### {where.title}"]
        parts += [f"{len(records)} dictionaries, seeds {', '.join(map(str, seeds))}."]
        parts += recovery.tables(records)
        means = recovery.means_of(records)
        parts += recovery.expected((e.words, e.found, means) for e in EXPECTED if e.place == key)
    return "\n\n".join([*parts, "### What `--alpha auto` chooses, mixed", choices()])


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
    write_result("free-lengths", section())


if __name__ == "__main__":
    main()
