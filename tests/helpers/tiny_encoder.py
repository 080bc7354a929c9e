"""A tiny sentence encoder: a random BERT that reads the words w0 to w49."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


def tiny_encoder() -> tuple[BertModel, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    vocab = {f"w{i}": i for i in range(50)} | {"<pad>": 50}
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=300,
    )
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    return BertModel(config).eval(), fast


def save_encoder(folder: Path) -> Path:
    for part in tiny_encoder():
        part.save_pretrained(folder)
    return folder
