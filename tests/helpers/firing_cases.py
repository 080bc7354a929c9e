"""Random sparse codes on a held-out text, and the firings that are collected from them."""

import torch

from llm_wsae.evaluation.monosemanticity.latents.firings import FiringCollector
from llm_wsae.sparse.codes import Codes

D_SAE, K, TOP, SAMPLE = 17, 3, 4, 6


def random_codes(rows: int, d_sae: int = D_SAE, k: int = K, seed: int = 1) -> Codes:
    """k different latents in each row; every fifth slot is unused."""
    draw = torch.Generator().manual_seed(seed)
    indices = torch.rand(rows, d_sae, generator=draw).argsort(1)[:, :k]
    values = torch.rand(rows, k, generator=draw) + 0.1
    return Codes(indices, values * (torch.rand(rows, k, generator=draw) > 0.2))


def collected(text, codes, step, encoded=None, windows=None, top=TOP, sample=SAMPLE, d_sae=D_SAE):
    windows = text.windows(torch.tensor([0, 5, 30]), 2, 1) if windows is None else windows
    encoded = torch.ones(text.num_rows, dtype=torch.bool) if encoded is None else encoded
    collector = FiringCollector(text, windows, d_sae, top, sample, 0)
    for at in range(0, text.num_contexts, step):
        contexts = slice(at, min(at + step, text.num_contexts))
        rows = slice(*text.first_row[[contexts.start, contexts.stop]].tolist())
        collector.add(Codes(*(part[rows] for part in codes)), contexts, encoded[rows])
    return collector.firings()


def dense(codes, d_sae=D_SAE):
    return torch.zeros(len(codes.indices), d_sae).scatter_(1, codes.indices, codes.values)
