"""Held-out text without a model, and an encoder that knows what texts mean, for tests of scores."""

import torch

from llm_wsae.evaluation.heldout import HeldoutText


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
