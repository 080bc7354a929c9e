"""For tests of scores: a model whose latents are known, and held-out text without a model.

The model: at its first site, a row is nothing but the token's direction. Words begin with ten
letters, one of the four words of each letter with a capital. Documents of the label ``early`` use
the words of the first six letters, the others those of the last six.

Without a model: random tokens, an encoder that knows what texts mean, random sparse codes, and the
firings that are collected from them.
"""

import json
from pathlib import Path

import torch
from small_dictionaries import of_matrices
from tiny import random_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.evaluation.heldout import HeldoutText, RowBatch
from llm_wsae.evaluation.monosemanticity.latents import Firings
from llm_wsae.model.language_model import LanguageModel

SITE = "blocks.0.hook_resid_pre"
LETTERS = "abcdefghij"
WORDS = [word for x in LETTERS for word in (f"{x}ed", f"{x}in", f"{x}ot", f"{x.upper()}um")]
NUM_WORDS, WIDTH = len(WORDS), 48
PACKING = {"context_size": 16}


def planted_model(massive: int | None = None) -> LanguageModel:
    """Word N is token N, and its embedding the unit vector N (100 times that if ``massive``)."""
    vocab = {word: i for i, word in enumerate([*WORDS, "a", "<s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf_model = random_llama(len(vocab), WIDTH, WIDTH, num_hidden_layers=1)
    hf_model.model.embed_tokens.weight.data = torch.eye(len(vocab), WIDTH)
    if massive is not None:
        hf_model.model.embed_tokens.weight.data[massive] *= 100
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    return LanguageModel.from_live(hf_model, fast, "planted")


def planted_text(path: Path, documents: int = 80, words: int = 75) -> Path:
    """A document per line, with its label ``era``."""
    draw, lines = torch.Generator().manual_seed(0), []
    for number in range(documents):
        era, first = ("late", NUM_WORDS - 24) if number % 2 else ("early", 0)
        chosen = first + torch.randint(24, (words,), generator=draw)
        text = " ".join(WORDS[i] for i in chosen.tolist())
        lines.append(json.dumps({"text": text, "era": era}) + "\n")
    path.write_text("".join(lines))
    return path


def one_latent_a_word(name: str = "words") -> Dictionary:
    """Latent N fires for word N alone; the last eight never do."""
    codes = torch.eye(WIDTH)
    codes[NUM_WORDS:] = 0
    return dictionary(codes, name)


def one_latent_for_four_words(name: str = "four") -> Dictionary:
    """Latent N of ten fires for four words of different letters."""
    codes = torch.zeros(len(LETTERS), WIDTH)
    for word in range(NUM_WORDS):
        codes[(word // 4 + 3 * (word % 4)) % len(LETTERS), word] = 1
    return dictionary(codes, name)


def dictionary(directions: torch.Tensor, name: str) -> Dictionary:
    """The strongest of some directions explains a row."""
    W_dec = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-6)
    about = {"site": SITE, "name": name, "seed": 0, "store": {"packing": PACKING}}
    return of_matrices(directions.T, W_dec, sparsity=TopK(1), **about)


class WordMeanings:
    """An encoder to which different words have nothing in common: it counts them."""

    width, number = NUM_WORDS, staticmethod(WORDS.index)

    def __init__(self):
        self.embedded = 0

    def embed(self, texts):
        self.embedded += len(texts)
        counts = torch.zeros(len(texts), self.width)
        for row, text in zip(counts, texts, strict=True):
            for word in text.split():
                row[self.number(word)] += 1
        return torch.nn.functional.normalize(counts, dim=1)


class WordCounts(WordMeanings):
    """The same of words wN."""

    width, number = 52, staticmethod(lambda word: int(word[1:]))


def make_text(
    contexts: int = 60, positions: int = 12, vocab: int = 30, seed: int = 0, documents: int = 20
) -> HeldoutText:
    """Random tokens; position 0 is a BOS that gives no row; documents of equal length, in order."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (contexts, positions), generator=draw)
    place = torch.arange(contexts * (positions - 1)).view(contexts, -1)
    length = -(-place.numel() // documents)
    document, offset = (
        torch.nn.functional.pad(own, (1, 0), value=-1) for own in (place // length, place % length)
    )
    keep = document >= 0
    headers = {n: {"name": str(n), "labels": {}} for n in range(documents)}
    return HeldoutText(ids, keep, document, offset, headers)


class Spelling:
    """A tokenizer that only decodes: token N is the word wN."""

    def batch_decode(self, sequences, skip_special_tokens=True):
        return [" ".join(f"w{i}" for i in ids) for ids in sequences]


D_SAE, K, TOP, SAMPLE = 17, 3, 4, 6


def random_codes(rows: int, d_sae: int = D_SAE, k: int = K, seed: int = 1) -> torch.Tensor:
    """k different latents in each row, dense; one of five of them is silent."""
    draw = torch.Generator().manual_seed(seed)
    indices = torch.rand(rows, d_sae, generator=draw).argsort(1)[:, :k]
    values = torch.rand(rows, k, generator=draw) + 0.1
    values *= torch.rand(rows, k, generator=draw) > 0.2
    return torch.zeros(rows, d_sae).scatter_(1, indices, values)


def collected(text, codes, step, windows=None, top=TOP, sample=SAMPLE, threshold=1e9):
    """The firings of a dictionary to which the codes are the rows, from so many contexts at once;
    rows longer than the threshold are massive."""
    windows = text.windows(torch.tensor([0, 5, 30]), 2, 1) if windows is None else windows
    eye = torch.eye(codes.shape[1])
    one = of_matrices(eye, eye, site=SITE)
    found = Firings(one, threshold, text, windows, (top, sample), 0)
    for at in range(0, text.num_contexts, step):
        contexts = slice(at, min(at + step, text.num_contexts))
        rows = slice(*(int(text.keep[:end].sum()) for end in (contexts.start, contexts.stop)))
        found.add(RowBatch(contexts, rows, {one.site: codes[rows]}))
    return found.finished()
