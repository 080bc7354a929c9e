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
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import results_recovery as recovery
import torch
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
from llm_wsae.tuning import LEAST_GAIN, choose_alpha
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.config import WeightConfig

ROWS = 2_000_000
RUN = README.parent / "runs/free-lengths"
ARCHIVE = Path(__file__).parent / "results/free-lengths.jsonl.gz"
Weights = tuple[str, float, WeightConfig, int]
"""Rule, α, place and k."""
EVERYWHERE: tuple[Weights, ...] = (
    ("uniform", 1.0, LOSS, K),
    ("whitening", 0.5, MIXED, K),
    ("whitening", 0.5, SPACE, K),
    ("rotated:whitening", 0.5, MIXED, K),
    ("variance", -0.5, MIXED, K),
)
POWERS: tuple[Weights, ...] = (
    ("whitening", 0.25, MIXED, K),
    ("whitening", 0.75, MIXED, K),
)
LAST: tuple[Weights, ...] = (
    ("uniform", 1.0, LOSS, 48),
    ("variance", 0.5, LOSS, K),
)
FULLY: tuple[Weights, ...] = (("whitening", 1.0, MIXED, K),)
PARTS = {"everywhere": EVERYWHERE, "powers": POWERS, "last": LAST, "fully": FULLY}
ONLY_AT = {"last": ("smollm2", "gemma"), "fully": ("gemma-14",)}
"""Where a part is not for every site. α = 1 was added where short trainings turned out to choose
it, so that their regret can be told."""
_MIXED = f"whitening-a0.5-mixed-k{K}"
_WEAKER, _STRONGER = f"whitening-a0.25-mixed-k{K}", f"whitening-a0.75-mixed-k{K}"
_SPACE = f"whitening-a0.5-space-k{K}"
_ROTATED = f"rotated-{_MIXED}"
_INVERSE = f"variance-a-0.5-mixed-k{K}"
_GEMMA = ("gemma", "gemma-5", "gemma-14")
_SMOLLM2 = ("smollm2", "smollm2-20")


def regret_at_most(key: str, bound: float) -> Callable[[recovery.Means], tuple[bool, str]]:
    """The dictionary that short trainings choose, mixed, has at most that much more KL than the
    best that was trained in full."""

    def found(means: recovery.Means) -> tuple[bool, str]:
        share = _regret(key, means)[1]
        return share <= bound, f"{100 * share:.0f} %"

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
        for place in ("gemma", "smollm2")
        for words, found in (
            (
                "the paper's variance, α = ½: recovers at most .03",
                at_most(f"variance-a0.5-k{K}", "recovered", 0.03),
            ),
            (
                "inverse variance in the loss: recovers less than mixed",
                below(f"variance-a-0.5-k{K}", "recovered", _INVERSE),
            ),
        )
    ),
)


def measure(key: str, path: str, seeds: Sequence[int], parts: Sequence[str]) -> None:
    """Harvest, train and measure what has no result yet."""
    here = [part for part in parts if key in ONLY_AT.get(part, PLACES)]
    asked = [one for part in here for one in PARTS[part]]
    opened = recovery.open_site(key, path)
    for seed in seeds:
        arms = []
        for rule, alpha, place, k in asked:
            drawn = replace(place, draw=seed) if rule.startswith("rotated") else place
            weights = weights_from_rule(rule, alpha, opened.inputs, drawn)
            arms.append(ArmConfig(weights, k=k, init_seed=seed))
        missing = [arm for arm in arms if not _result(key, arm.name).exists()]
        if not missing:
            continue
        how = TrainConfig(tokens=ROWS, shuffle_seed=seed, checkpoint_seconds=600, lengths="free")
        folder = RUN / "trained" / key / f"s{seed}-{'-'.join(here)}-{len(missing)}"
        dictionaries = train(opened.source, missing, how, folder)
        for record in recovery.judge(opened, missing, dictionaries, seed):
            write_json(_result(key, record["name"]), record)
        print(f"{key}: {', '.join(here)}, seed {seed} measured", flush=True)
    if not _choice(key).exists():  # of `--alpha auto`
        given, folder = (opened.inputs, opened.source, opened.judge), RUN / "trained" / key
        write_json(_choice(key), asdict(choose_alpha(*given, folder, k=K, config=MIXED)))


def _result(key: str, name: str) -> Path:
    return RUN / "results" / f"{key}.{name}.json"


def _choice(key: str) -> Path:
    return RUN / key / "auto-mixed.json"


def read(key: str) -> list[dict[str, Any]]:
    """The measured dictionaries of a site."""
    return [json.loads(path.read_text()) for path in sorted((RUN / "results").glob(f"{key}.*"))]


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
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
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
