"""A tiny language model, its tokenizer and text for it: in process, random, always the same."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_wsae.model.language_model import LanguageModel

WORDS = [f"w{i}" for i in range(50)]
BOS, EOS = 50, 51
VOCAB = 52


def tiny_tokenizer(bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """Word wN is token N; ``<s>`` and ``</s>`` come behind them."""
    vocab = {word: i for i, word in enumerate(WORDS)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>"} if bos else {}
    special |= {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)


def tiny_model(seed: int = 0, width: int = 16, bos: bool = True) -> LanguageModel:
    """A Llama of 3 blocks that reads 64 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return LanguageModel.from_live(LlamaForCausalLM(config), tiny_tokenizer(bos), "tiny")


def words(seed: int, count: int) -> str:
    """A text of ``count`` words, that is tokens."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(0, 50, (count,), generator=generator).tolist())


def write_jsonl(path: Path, lengths: list[int]) -> Path:
    """One document per length, with its number as a label."""
    rows = [{"text": words(i, n), "number": i} for i, n in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
