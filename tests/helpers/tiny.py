"""Random tiny models, always the same, and their words.

A language model with its tokenizer and text, one of each architecture that sites are tested on, and
a sentence encoder.
"""

import copy
import functools
import json
import warnings
from pathlib import Path

import torch
import transformers
from looping import looped
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llm_wsae.model.language_model import LanguageModel, share_weights
from llm_wsae.model.site import POINTS, Site

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


def random_llama(vocab: int, width: int, inner: int, seed: int = 0, **changes) -> LlamaForCausalLM:
    """3 blocks that read 64 tokens, unless told."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocab, hidden_size=width, intermediate_size=inner)
    sizes |= dict(num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(**sizes | changes))


def tiny_model(seed: int = 0, width: int = 16, bos: bool = True) -> LanguageModel:
    hf_model = random_llama(VOCAB, width, 2 * width, seed)
    return LanguageModel.from_live(hf_model, tiny_tokenizer(bos), "tiny")


def words(seed: int, count: int) -> str:
    """A text of ``count`` words, that is tokens."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(0, 50, (count,), generator=generator).tolist())


def write_jsonl(path: Path, lengths: list[int]) -> Path:
    """One document per length, with its number as a label."""
    rows = [{"text": words(i, n), "number": i} for i, n in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


BLOCKS, WIDTH = 4, 32
FAMILIES = ("gpt2", "llama", "neox", "neox-sequential", "gemma2", "unknown")
KNOWN = FAMILIES[:-1]
WITH_MID = ("gpt2", "llama", "neox-sequential", "gemma2")


def tiny_hf_model(family: str, seed: int = 0):
    """A random model large enough in its weights that blocks do something to the stream."""
    torch.manual_seed(seed)
    t = transformers
    neox = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=BLOCKS)
    neox |= dict(num_attention_heads=4, intermediate_size=64, max_position_embeddings=32)
    gpt2 = dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=32)
    llama = dict(neox, num_key_value_heads=2)
    model_class, config_class, sizes = {
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, gpt2),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, llama),
        "neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, neox),
        "neox-sequential": (
            t.GPTNeoXForCausalLM, t.GPTNeoXConfig, neox | {"use_parallel_residual": False}
        ),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, llama | {"head_dim": 8}),
        "experts": (
            t.MixtralForCausalLM, t.MixtralConfig, llama | {"num_local_experts": 4}
        ),
        "unknown": (t.BioGptForCausalLM, t.BioGptConfig, neox),
    }[family]  # fmt: skip
    hf_model = model_class(config_class(**sizes))
    with torch.no_grad():
        for parameter in hf_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return hf_model


@functools.cache
def model_of(family: str) -> LanguageModel:
    return LanguageModel.from_live(tiny_hf_model(family), tiny_tokenizer())


def of_families(*names: str):
    """Run a test with the ``model`` of each."""
    return looped("model", names, model_of)


def sites_of(model: LanguageModel, blocks: tuple[int, ...] = (0, 2, BLOCKS - 1)) -> list[Site]:
    points = [point for point in POINTS if point in ("pre", "post", *model.paths.inside)]
    return [Site(block, point) for block in blocks for point in points]


def hooks_of(model: LanguageModel) -> list[tuple]:
    """Everything that a forward could leave behind on a module."""
    return [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
        for name, m in model.hf_model.named_modules()
    ]


def save_hf_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    tiny_hf_model(family).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def bridge_of(model: LanguageModel):
    """TransformerLens' bridge over the same weights, made without a network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge

        hf_model, tokenizer = share_weights(model.hf_model), copy.deepcopy(model.tokenizer)
        hf_model.config.architectures = [type(hf_model).__name__]
        tokenizer.init_kwargs |= {"name_or_path": model.name, "add_bos_token": True}
        return TransformerBridge.boot_transformers(
            model.name, hf_model=hf_model, tokenizer=tokenizer, device="cpu", dtype=model.dtype
        )


def tiny_encoder() -> tuple[BertModel, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    vocab = {f"w{i}": i for i in range(50)} | {"<pad>": 50}
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=len(vocab), max_position_embeddings=300, **sizes)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    return BertModel(config).eval(), fast


def save_encoder(folder: Path) -> Path:
    for part in tiny_encoder():
        part.save_pretrained(folder)
    return folder
