"""Dictionaries of ours, and Gemma Scope's files, as SAELens reads them.

``job.json`` in the folder that is given names them: ``disk`` and ``hub`` lead from a name to the
arguments of ``SAE.load_from_disk`` and ``SAE.from_pretrained``, ``scope`` to those of the latter
with SAELens' own reader of Gemma Scope's files.
"""

import json

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import gemma_2_sae_huggingface_loader
from safetensors.torch import load_file
from written import OUT, done, expect

job = json.loads((OUT / "job.json").read_text())
loaded = {f"disk-{name}": SAE.load_from_disk(where) for name, where in job["disk"].items()}
for name, (repo, sae_id) in job["hub"].items():
    loaded[f"hub-{name}"] = SAE.from_pretrained(repo, sae_id)
for name, (repo, sae_id) in job["scope"].items():
    loaded[f"scope-{name}"] = SAE.from_pretrained(
        repo, sae_id, converter=gemma_2_sae_huggingface_loader
    )
for name, sae in loaded.items():
    x = load_file(OUT / f"{name.split('-', 1)[1]}.rows.safetensors")["x"]
    with torch.no_grad():
        latents = sae.encode(x)
        expect(OUT / name, latents, sae.decode(latents), x)
done("sae-lens")
