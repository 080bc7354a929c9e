"""Random tiny models of the architectures that sites are tested on."""

import torch
import transformers
from tiny import VOCAB

BLOCKS, WIDTH = 4, 32
FAMILIES = ("gpt2", "llama", "neox", "neox-sequential", "gemma2", "unknown")
KNOWN = FAMILIES[:-1]
WITH_MID = ("gpt2", "llama", "neox-sequential", "gemma2")


def tiny_hf_model(family: str, seed: int = 0):
    """A random model large enough in its weights that blocks do something to the stream."""
    torch.manual_seed(seed)
    t = transformers
    neox = dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    llama = dict(neox, num_key_value_heads=2)
    config, model_class = {
        "gpt2": lambda: (
            t.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=32),
            t.GPT2LMHeadModel,
        ),
        "llama": lambda: (t.LlamaConfig(**llama), t.LlamaForCausalLM),
        "neox": lambda: (t.GPTNeoXConfig(**neox), t.GPTNeoXForCausalLM),
        "neox-sequential": lambda: (
            t.GPTNeoXConfig(**neox, use_parallel_residual=False),
            t.GPTNeoXForCausalLM,
        ),
        "gemma2": lambda: (t.Gemma2Config(**llama, head_dim=8), t.Gemma2ForCausalLM),
        "unknown": lambda: (t.BioGptConfig(**neox), t.BioGptForCausalLM),
    }[family]()
    hf_model = model_class(config)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return hf_model
