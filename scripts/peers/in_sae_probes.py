"""sae-probes (Kantamneni et al. 2025, arXiv 2502.16681) on dictionaries of ours.

The folder comes first, then what to do:

- ``prompts``: the texts of its datasets with the shortest texts in total, as many as ``job.json``
  asks for, into ``prompts.json``: dataset → texts.
- ``probe``: its sparse probes. ``activations`` in the folder holds a file for each dataset, with
  the model's activations at the last token of every text, by site; ``job.json`` leads from the name
  of a dictionary to its folder and site. The area under the ROC curve of every probe goes into
  ``areas.json``: dictionary → dataset → number of latents, and of a probe on the activations
  themselves under the name of the site, with 0 for the number.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from sae_probes import run_baseline_evals, run_sae_evals
from sae_probes.constants import DATA_PATH
from sae_probes.utils_data import get_binary_df
from safetensors.torch import load_file
from written import OUT, done

JOB: dict[str, Any] = json.loads((OUT / "job.json").read_text())
MODEL, SETTING = "ours", "normal"
RESULTS, CACHE = OUT / "results", OUT / "cache"


def prompts() -> None:
    texts = {}
    for name in get_binary_df()["Dataset save name"]:
        table = pd.read_csv(DATA_PATH / f"{name}.zst", compression="zstd")
        texts[Path(name).stem] = table["prompt"].astype(str).tolist()
    shortest = sorted(texts, key=lambda name: sum(map(len, texts[name])))[: JOB["datasets"]]
    (OUT / "prompts.json").write_text(json.dumps({name: texts[name] for name in shortest}))


def probe() -> None:
    datasets = sorted(path.stem for path in (OUT / "activations").glob("*.safetensors"))
    cache = CACHE / f"model_activations_{MODEL}"
    cache.mkdir(parents=True, exist_ok=True)
    for name in datasets:
        for site, rows in load_file(OUT / f"activations/{name}.safetensors").items():
            torch.save(rows, cache / f"{name}_{site}.pt")
    common = {"setting": SETTING, "model_cache_path": CACHE, "datasets": datasets, "device": "cpu"}
    areas: dict[str, dict[str, dict[str, float]]] = {}
    for site in sorted({one["site"] for one in JOB["dictionaries"].values()}):
        run_baseline_evals(MODEL, site, results_path=RESULTS, **common)
        areas[site] = {name: {"0": area(RESULTS, f"{name}_{site}")[0]} for name in datasets}
    for label, one in JOB["dictionaries"].items():
        own = RESULTS / label.replace("/", "_")
        sae = SAE.load_from_disk(one["folder"])
        run_sae_evals(sae, MODEL, one["site"], "l1", ks=JOB["ks"], results_path=own, **common)
        areas[label] = {
            name: dict(zip(map(str, JOB["ks"]), area(own, f"{name}_{one['site']}"), strict=True))
            for name in datasets
        }
        print(f"probed {label}", flush=True)
    (OUT / "areas.json").write_text(json.dumps(areas))


def area(folder: Path, name: str) -> list[float]:
    """The area of each of a file's probes, in their order."""
    (path,) = folder.rglob(f"{name}_*.json")
    found = json.loads(path.read_text())
    return [one["test_auc"] for one in (found if isinstance(found, list) else [found])]


{"prompts": prompts, "probe": probe}[sys.argv[2]]()
done("sae-probes", "sae-lens")
