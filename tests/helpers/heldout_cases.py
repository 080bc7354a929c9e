"""For tests of scores: held-out text without a model, an encoder that knows what texts mean, random
sparse codes, and the firings that are collected from them."""

import torch

from llm_wsae.evaluation.heldout import HeldoutText
from llm_wsae.evaluation.monosemanticity.latents.firings import FiringCollector
from llm_wsae.sparse.codes import Codes


def make_text(
    contexts: int = 60, positions: int = 12, vocab: int = 30, seed: int = 0, documents: int = 20
) -> HeldoutText:
    """Random tokens; position 0 is a BOS that gives no row; documents of equal length, in order."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (contexts, positions), generator=draw)
    keep = torch.ones(contexts, positions, dtype=torch.bool)
    keep[:, 0] = False
    content = contexts * (positions - 1)
    place = torch.arange(content)
    length = -(-content // documents)
    document = torch.full((contexts, positions), -1)
    offset = torch.full((contexts, positions), -1)
    document[:, 1:] = (place // length).view(contexts, -1)
    offset[:, 1:] = (place % length).view(contexts, -1)
    headers = {n: {"name": str(n), "labels": {}} for n in range(documents)}
    return HeldoutText(ids, keep, document, offset, headers)


class WordCounts:
    """An encoder whose vectors are the counts of words wN, scaled to norm 1."""

    def __init__(self, width: int = 52):
        self.width = width
        self.embedded = 0

    def embed(self, texts):
        self.embedded += len(texts)
        counts = torch.zeros(len(texts), self.width)
        for row, text in zip(counts, texts, strict=True):
            for word in text.split():
                row[int(word[1:])] += 1
        return torch.nn.functional.normalize(counts, dim=1)


class Spelling:
    """A tokenizer that only decodes: token N is the word wN."""

    def batch_decode(self, sequences, skip_special_tokens=True):
        return [" ".join(f"w{i}" for i in ids) for ids in sequences]


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
