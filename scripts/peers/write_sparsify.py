"""Dictionaries that eai-sparsify writes: ``SparseCoder.save_to_disk``."""

import os

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would take it where there is no card, too

import torch
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
from written import D_IN, D_SAE, LAYER, OUT, K, done, expect, randomise, rows

CASES = {
    "num_latents": SparseCoderConfig(num_latents=D_SAE, k=K),
    "expansion_factor": SparseCoderConfig(expansion_factor=D_SAE // D_IN, k=K),
    "trained": SparseCoderConfig(num_latents=D_SAE, k=K, multi_topk=True),
    "groupmax": SparseCoderConfig(num_latents=D_SAE, k=K, activation="groupmax"),
    "transcoder": SparseCoderConfig(num_latents=D_SAE, k=K, transcode=True),
    "skip": SparseCoderConfig(num_latents=D_SAE, k=K, transcode=True, skip_connection=True),
    "mlp-transcoder": SparseCoderConfig(num_latents=D_SAE, k=K, transcode=True),
    "mlp-skip": SparseCoderConfig(num_latents=D_SAE, k=K, transcode=True, skip_connection=True),
}

for name, config in CASES.items():
    torch.manual_seed(0)
    coder = SparseCoder(D_IN, config)
    if name == "trained":
        optimiser = torch.optim.Adam(coder.parameters(), lr=1e-2)
        for step in range(30):
            coder.set_decoder_norm_to_unit_norm()
            coder(rows(seed=step)).fvu.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimiser.step()
            optimiser.zero_grad()
    else:
        randomise(coder)
    folder = OUT / name / f"layers.{LAYER}{'.mlp' if name.startswith('mlp') else ''}"
    coder.save_to_disk(folder)
    coder = SparseCoder.load_from_disk(folder)
    values, indices, _ = coder.encode(rows())
    latents = torch.zeros(len(values), D_SAE).scatter(1, indices, values)
    decoded = coder.decode(values, indices)
    through = 0 if coder.W_skip is None else rows() @ coder.W_skip.mT
    expect(folder, latents, decoded + through)
done("eai-sparsify")
