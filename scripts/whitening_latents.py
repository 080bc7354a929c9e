"""The dictionaries of two million rows of results_whitening.py, judged without a ground truth.

Do two seeds find the same latents, and can it be told from their contexts when they fire?
Agreement is the mean cosine of decoder rows that are matched one to one (PW-MCC), over pairs of
seeds. Detection is that of ``llm-wsae evaluate --monosemantic``, without dense latents: over those
that fire often enough to be scored, and over all, where the others count as chance, because weights
change which can be scored. A latent is *new* if its decoder row has a cosine below .7 with every
row of two plain dictionaries of other seeds, and it is detected at least as well as the median
latent of theirs: does a further, weighted dictionary show what a further plain one would not?

What ``expected`` gives was written down before the first of these dictionaries was trained. Of
baselines, which came last, it says what had come true of those of dictionaries with free lengths.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_recovery import PLACES, SEEDS, TEXT, K, text_of
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae import Corpus, Dictionary, HarvestConfig, LanguageModel
from llm_wsae.dictionary.dictionary import DENSE_DENSITY
from llm_wsae.evaluation.config import MonosemanticConfig
from llm_wsae.evaluation.monosemanticity.evaluator import MonosemanticityEvaluator, matched_cosine
from llm_wsae.evaluation.monosemanticity.report import DictionaryScores
from llm_wsae.files import read_own_json, write_json
from llm_wsae.provenance import plain
from llm_wsae.studies.curve import Value
from llm_wsae.studies.inference import estimates
from llm_wsae.terminal import markdown

TOKENS = 50_000
CHANCE = 0.5
NEW = 0.7
"""A largest cosine below it is that of another latent."""
BASELINES = {
    f"uniform-frozen-decoder-k{K}": "frozen decoder",
    f"uniform-frozen-encoder-k{K}": "frozen encoder",
    f"dimensions-k{K}": "dimensions of the stream",
}
MEASURES = {"scored": "detection", "all": "detection, all latents"}
Latents = dict[str, Any]
"""``scores``: label → seed → measure → its parts; ``agreement``: label → pair of seeds → cosine."""


def judge(
    path: Path, model_path: str, folders: Mapping[str, Mapping[int, Path]], plain_label: str
) -> None:
    """Score the dictionaries in ``folders``, by label and seed, and write it to ``path``."""
    evaluator = _evaluator(model_path)
    scores: dict[str, dict[str, Any]] = {}
    agreement: dict[str, dict[str, float]] = {}
    beside: dict[int, tuple[Tensor, Tensor]] = {}
    for label in sorted(folders, key=lambda one: one != plain_label):
        dictionaries = {seed: Dictionary.load(folder) for seed, folder in folders[label].items()}
        rows = {seed: normalize(one.W_dec.detach(), dim=1) for seed, one in dictionaries.items()}
        found = evaluator.score({str(seed): one for seed, one in dictionaries.items()})
        detection = {int(s): _detection(one) for s, one in found.dictionaries.items()}
        beside = beside or {seed: (own, detection[seed]) for seed, own in rows.items()}
        scores[label] = {
            str(seed): _parts(found.dictionaries[str(seed)])
            | {"new": _new(own, detection[seed], [b for s, b in beside.items() if s != seed])}
            for seed, own in rows.items()
        }
        agreement[label] = _agreement(rows)
    write_json(path, plain({"scores": scores, "agreement": agreement}))


def judge_baselines(path: Path, model_path: str, dictionaries: Mapping[str, Dictionary]) -> None:
    """Add to ``path`` the scores of what learnt nothing, of one seed, by label. New latents are not
    counted: the plain dictionaries beside which they would be new may be gone."""
    latents, found = read(path), _evaluator(model_path).score(dictionaries)
    for label, own in found.dictionaries.items():
        latents["scores"][label] = {str(SEEDS[0]): _parts(own)}
        latents["agreement"][label] = {}
    write_json(path, plain({name: latents[name] for name in ("scores", "agreement")}))


def add_agreement(path: Path, rows: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Add to ``path`` whether seeds of a label have the same decoder ``rows``."""
    latents = {"scores": {}, "agreement": {}} | read(path)
    for label, of_seeds in rows.items():
        own = {seed: normalize(one, dim=1) for seed, one in of_seeds.items()}
        latents["agreement"][label] = _agreement(own)
    write_json(path, plain({name: latents[name] for name in ("scores", "agreement")}))


def _agreement(rows: Mapping[int, Tensor]) -> dict[str, float]:
    """Of every pair of seeds."""
    return {
        f"{one} and {other}": matched_cosine(rows[one], rows[other])
        for one, other in combinations(rows, 2)
    }


def _evaluator(model_path: str) -> MonosemanticityEvaluator:
    text, config = Corpus.open(TEXT, "heldout"), MonosemanticConfig(tokens=TOKENS)
    model = LanguageModel.load(model_path)
    return MonosemanticityEvaluator(model, text, HarvestConfig(), config)


def _detection(scores: DictionaryScores) -> Tensor:
    """Of every latent; NaN for those that are dense or fire too seldom."""
    usual = scores.per_latent["density"] <= DENSE_DENSITY
    return scores.per_latent["detection"].where(usual, torch.nan)


def _new(rows: Tensor, detection: Tensor, beside: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Share of latents that are unlike all those ``beside`` and detected as well as their median.
    Each of these is given as its rows, of length 1, and their detection."""
    nearest = torch.stack([(rows @ others.T).amax(1) for others, _ in beside]).amax(0)
    median = torch.cat([scores for _, scores in beside]).nanmedian()
    return float(((nearest < NEW) & (detection >= median)).double().mean())


def _parts(scores: DictionaryScores) -> dict[str, Any]:
    """What an interval needs of a dictionary's detection: mean, variance, documents resampled."""
    usual = scores.per_latent["density"] <= DENSE_DENSITY
    values, resampled = _detection(scores)[usual], scores.resampled[usual]
    known = ~values.isnan()
    cases = {
        "scored": (values[known], resampled[known]),
        "all": (values.nan_to_num(CHANCE), resampled.nan_to_num(CHANCE)),
    }
    return {
        name: {
            "mean": float(own.double().mean()),
            "variance": float(own.double().var() / len(own)),
            "resampled": drawn.double().nanmean(0).tolist(),
        }
        for name, (own, drawn) in cases.items()
    } | {"share": float(known.double().mean()), "dense": float(1 - usual.double().mean())}


def read(path: Path) -> Latents:
    """What ``judge`` wrote; nothing if it was not called."""
    return read_own_json(path, "scores of latents") if path.exists() else {}


def means_of(latents: Latents, label: str) -> dict[str, float]:
    """Means over the seeds, or over their pairs."""
    own = latents["scores"][label].values()
    return {
        **{name: float(np.mean([one[name]["mean"] for one in own])) for name in MEASURES},
        **{name: float(np.mean([one[name] for one in own])) for name in ("share", "dense")},
        "new": float(np.mean([one.get("new", np.nan) for one in own])),
        # of the dimensions of the stream there is one dictionary, and so no pair
        "agreement": float(np.mean(list(latents["agreement"][label].values()) or [np.nan])),
    }


def table(latents: Latents, plain_label: str) -> str:
    """A row for each label, plain first."""
    found = {}
    for measure in MEASURES:
        values = {
            label: {
                int(seed): Value(
                    one[measure]["mean"],
                    one[measure]["variance"],
                    resampled=tuple(one[measure]["resampled"]),
                )
                for seed, one in own.items()
            }
            for label, own in latents["scores"].items()
        }
        found[measure] = estimates(
            {
                label: {
                    seed: Value.mixture([(1.0, one), (-1.0, values[plain_label][seed])])
                    for seed, one in own.items()
                }
                for label, own in values.items()
                if label != plain_label and len(own) == len(values[plain_label])
            }
        )
    rows = [["dictionary", "agreement of seeds", "its range", "new %", "scored %", "dense %"]]
    rows[0] += [cell for title in MEASURES.values() for cell in (title, "beside plain")]
    for label in sorted(latents["scores"], key=lambda one: (one != plain_label, one)):
        means, pairs = means_of(latents, label), latents["agreement"][label].values()
        rows.append(
            [
                f"`{label}`",
                f"{means['agreement']:.3f}" if pairs else "–",
                f"{min(pairs):.3f} to {max(pairs):.3f}" if pairs else "–",
                "–" if np.isnan(means["new"]) else f"{100 * means['new']:.1f}",
                f"{100 * means['share']:.0f}",
                f"{100 * means['dense']:.1f}",
            ]
        )
        for measure in MEASURES:
            rows[-1] += [f"{means[measure]:.3f}", text_of(found[measure].get(label))]
    return markdown(rows)


def differs(
    label: str, plain_label: str, measure: str, low: float, high: float
) -> Callable[[Latents], tuple[bool, str]]:
    """The mean differs from that of plain dictionaries by something between low and high."""

    def found(latents: Latents) -> tuple[bool, str]:
        own, its = (means_of(latents, one)[measure] for one in (label, plain_label))
        return low <= own - its <= high, f"{own - its:+.3f}"

    return found


def more(
    label: str, plain_label: str, measure: str, low: float, high: float
) -> Callable[[Latents], tuple[bool, str]]:
    """The mean is something between low and high times that of plain dictionaries."""

    def found(latents: Latents) -> tuple[bool, str]:
        own, its = (means_of(latents, one)[measure] for one in (label, plain_label))
        return low <= own / its <= high, f"{own / its:.2f} times"

    return found


def expected(space: str, mixed: str, plain_label: str) -> Iterator[tuple[str, str, Any]]:
    """Site, words, and what says whether it came out."""
    for place in PLACES:
        gemma = PLACES[place].model_key == "gemma"
        least, words = (0.0, "no lower than plain") if gemma else (-0.01, "within .01 of plain")
        yield (
            place,
            f"halfway whitened: detection over all latents {words}",
            differs(space, plain_label, "all", least, 1.0 if gemma else 0.01),
        )
        yield (
            place,
            "halfway whitened, mixed: seeds agree no less than plain (−.01 at most)",
            differs(mixed, plain_label, "agreement", -0.01, 1.0),
        )
        yield (
            place,
            "halfway whitened, mixed: at least 1.5 times as many new latents as a plain one has",
            more(mixed, plain_label, "new", 1.5, 99),
        )
        if place == "smollm2":
            yield (
                place,
                "rotated whitening, mixed: at most 1.2 times as many new latents as plain",
                more(f"rotated-{mixed}", plain_label, "new", 0, 1.2),
            )
        for label, name in BASELINES.items():
            yield (
                place,
                f"{name}: detection over all latents at least .01 below plain",
                differs(label, plain_label, "all", -1.0, -0.01),
            )
