"""Does a finish through the model pay? At equal total time, for plain and weighted dictionaries.

    bash scripts/reproduce.sh finish

A finish (Karvonen, arXiv 2503.17272) takes the last 5 % of the rows with KL through the rest of the
model. That takes time in which more rows could be harvested and trained on, so the dictionary
beside it gets as many more. A stopped run goes on where it was; every pair is two lines of
``results/finish.jsonl``.

Written down before the first dictionary was trained:

*Design.* Three seeds of plain, whitening ½ and sensitivity ¼ as spaces; TopK, k = 32, 8 × width.
With a finish, one million rows. Without, as many as take the same time together with their harvest,
both measured in the same run.

*Outcome.* KL on 30,000 held-out tokens of at least 200 documents, relative to the dictionary
without a finish, with an interval over documents and seeds. A finish pays if the whole interval is
below 0.

*Guards* against latents that serve the loss alone: FVU, dead latents, and detection of all latents
(those that cannot be scored count as chance). It costs features if the whole interval of detection
is below 0.

*Expected*: KL falls by 1 to 5 %, FVU rises by less than .005, detection stays. Planted features
cannot guard here: a finish reads the model's own stream, in which none are planted.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks import README, write_section
from results_weights import (
    HARVESTED,
    HELDOUT,
    MINUS,
    PLAIN,
    SEEDS,
    SPACE,
    TEXT,
    Weighting,
    fidelity,
    weights,
)

from llm_wsae import (
    ActivationStore,
    Corpus,
    Dictionary,
    HarvestConfig,
    LanguageModel,
    MonosemanticConfig,
    Site,
    TrainConfig,
    harvest,
    measure_inputs,
    train,
)
from llm_wsae.data.config import PackConfig
from llm_wsae.data.packing import Packer
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.fidelity.report import Fidelity
from llm_wsae.evaluation.monosemanticity.evaluator import DictionaryScores, MonosemanticityEvaluator
from llm_wsae.lab.studies.differences import Value, compared
from llm_wsae.lab.studies.runner import over_latents
from llm_wsae.statistics.measures import MONOSEMANTICITY
from llm_wsae.terminal import markdown
from llm_wsae.training.arm import ArmConfig

ROWS, FINISH, TESTED, SCORED = 1_000_000, 0.05, 30_000, 50_000
RUN = README.parent / "runs/finish"
PAGE = README.parent / "docs/which-weights.md"
FOUND = Path(__file__).parent / "results/finish.jsonl"
ASKED = [
    PLAIN,
    Weighting("whitening ½, space", "whitening", 0.5, SPACE),
    Weighting("sensitivity ¼, space", "sensitivity", 0.25, SPACE),
]
(DETECTION,) = (one for one in MONOSEMANTICITY if one.name == "detection")


def measure(name: str, path: str, site: Site) -> None:
    """Train and measure every pair of a model that has no lines yet."""
    own = [line for line in lines() if (line["model"], line["site"]) == (name, str(site))]
    done = {(line["weighting"], line["seed"]) for line in own}
    pairs = [(seed, w) for seed, w in product(SEEDS, ASKED) if (w.name, seed) not in done]
    if not pairs:
        return
    model = LanguageModel.load(path)
    text, heldout = (Corpus.open(TEXT, part, HELDOUT) for part in ("train", "heldout"))
    store = harvest(model, text, [site], RUN / name / str(site), HarvestConfig(tokens=HARVESTED))
    contexts = Packer.for_model(model, PackConfig()).contexts(heldout)
    judge = FidelityEvaluator(model, contexts, EvaluateConfig(tokens=TESTED))
    config = MonosemanticConfig(tokens=SCORED)
    latents = MonosemanticityEvaluator(model, heldout, PackConfig(), config)
    per_row = harvest_time(model, text, site)
    for seed, weighting in pairs:
        _, usual = trained(model, store, site, weighting, seed, ROWS)
        finished, longer = trained(model, store, site, weighting, seed, ROWS, FINISH)
        rows = round(ROWS * (per_row * ROWS + longer) / (per_row * ROWS + usual))
        beside, its = trained(model, store, site, weighting, seed, rows)
        both = {"finish": finished, "none": beside}
        reports, scores = judge.evaluate(both), latents.score(both)
        where = {"model": name, "site": str(site), "weighting": weighting.name, "seed": seed}
        with open(FOUND, "a", encoding="utf-8") as file:
            for which, many, seconds in ("finish", ROWS, longer), ("none", rows, its):
                line = {**where, "finish": which == "finish", "rows": many}
                line["seconds"] = [round(per_row * many, 1), round(seconds, 1)]  # harvest, training
                line |= numbers(reports.dictionaries[which], scores.dictionaries[which])
                file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


def numbers(one: Fidelity, scored: DictionaryScores) -> dict[str, Any]:
    """What a line says of a dictionary."""
    column = scored.per_latent["detection"]
    detection = over_latents(DETECTION, column, len(column), scored.resampled)
    assert detection is not None and detection.resampled is not None
    return {
        "fvu": round(one.fvu, 5),
        "kl": round(one.kl, 5),
        "ce": [round(one.ce_clean, 5), round(one.ce_spliced, 5)],
        "dead": round(one.dead_share, 4),
        "detection": [round(detection.mean, 5), [r and round(r, 5) for r in detection.resampled]],
        "documents": [one.documents, round(one.effective_documents, 1)],
        "kl_per_document": [round(kl, 1) for kl in one.kl_per_document],
    }


def harvest_time(model: LanguageModel, text: Corpus, site: Site) -> float:
    """Seconds that the harvest of a row takes, in a short one."""
    folder, rows = RUN / "timed", HarvestConfig(tokens=50_000)
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    harvest(model, text, [site], folder, rows)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds / rows.tokens


def trained(
    model: LanguageModel,
    store: ActivationStore,
    site: Site,
    weighting: Weighting,
    seed: int,
    rows: int,
    finish: float = 0.0,
) -> tuple[Dictionary, float]:
    """A dictionary, and the seconds of its training."""
    source, folder = store.source(site), RUN / "training"
    inputs = measure_inputs([weighting.rule], source, model=model)
    arm = ArmConfig(weights(weighting, inputs, seed), weighting.k, init_seed=seed)
    config = TrainConfig(tokens=rows, shuffle_seed=seed, finish=finish)
    shutil.rmtree(folder, ignore_errors=True)  # a part of one would not be timed
    began = time.perf_counter()
    (dictionary,) = train(source, [arm], config, folder, model).values()
    return dictionary, time.perf_counter() - began


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in open(FOUND, encoding="utf-8")] if FOUND.exists() else []


# --- Showing


def show() -> Iterator[list[str]]:
    """A row for each weighting of a site that has all of its lines."""
    key = itemgetter("model", "site", "weighting")
    for what in dict.fromkeys(key(line) for line in lines()):
        found = [line for line in lines() if key(line) == what]
        own, beside = ([line for line in found if line["finish"] is f] for f in (True, False))
        if len(own) == len(SEEDS):
            yield [*what, *cells(own, beside)]


HEAD = [
    *("model", "site", "", "rows without", "minutes of training, with and without"),
    *("KL", "KL beside no finish [95 %]", "FVU", "dead %", "detection [95 %]"),
]


def cells(own: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]]) -> list[str]:
    def mean(lines: Sequence[dict[str, Any]], name: str) -> float:
        return sum(line[name] for line in lines) / len(lines)

    values = [
        {line["seed"]: Value(line["detection"][0], resampled=line["detection"][1]) for line in some}
        for some in (own, beside)
    ]
    found = compared(*values)
    assert found is not None
    low, high = found.interval
    detection = f"{found.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    minutes = (sum(line["seconds"][1] for line in some) / len(some) / 60 for some in (own, beside))
    _, kl, relative = fidelity(own, beside)
    return [
        f"{mean(beside, 'rows') / 1e6:.2f} M",
        "{:.1f}, {:.1f}".format(*minutes),
        kl,
        relative,
        f"{mean(own, 'fvu') - mean(beside, 'fvu'):+.4f}".replace("-", MINUS),
        f"{100 * mean(own, 'dead'):.1f}, {100 * mean(beside, 'dead'):.1f}",
        detection.replace("-", MINUS),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", help="of the model, in the lines and the table")
    parser.add_argument("--model", help="path of any causal language model; without it, only show")
    parser.add_argument("--site", default="blocks.9.hook_resid_post")
    asked = parser.parse_args()
    if asked.model:
        measure(asked.name, asked.model, Site.parse(asked.site))
    write_section("finish", markdown([HEAD, *show()], left=3), PAGE)
