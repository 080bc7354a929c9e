"""Damaged GGUF files: each is refused in a sentence, or loads as what it says.

Every case has a process of its own, with a limit on its time and one on its memory that is far
below what the numbers in a damaged header ask for: a file is to be refused for its sizes, before
anything of those sizes is asked for.
"""

import math
import os
import random
import resource
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import begun, blind, frozen
from refusals import fails
from small_dictionaries import make_dictionary

from llm_wsae.inspecting.inspection import token_ids
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

gguf = pytest.importorskip("gguf")

USUAL = 30
TAIL = 1 << 28  # bytes; a file of that size holds what a damaged length says
MEMORY = 2 << 30  # bytes of addresses, beyond what the process of the tests has
WIDTH, HEADS, BLOCKS, ALIGNMENT = 32, 4, 2, 32
DIGITS = "0123456789"


def write(path: Path, quantized: bool) -> None:
    """A Llama of two blocks: with a byte-level vocabulary and merges; or with a sentencepiece one
    and scores, and packed weights."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for what, value in {
        "name": "tiny", "block_count": BLOCKS, "context_length": 64, "embedding_length": WIDTH,
        "feed_forward_length": 2 * WIDTH, "head_count": HEADS, "head_count_kv": HEADS // 2,
        "layer_norm_rms_eps": 1e-5, "rope_dimension_count": WIDTH // HEADS,
        "rope_freq_base": 10_000.0, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0,
        "add_bos_token": True,
    }.items():  # fmt: skip
        getattr(writer, f"add_{what}")(value)
    space = "▁" if quantized else "Ġ"
    merges = [f"{space} w", *(f"{space}w {digit}" for digit in DIGITS)]
    tokens = ["<unk>", "<s>", "</s>", space, "w", *DIGITS]
    tokens += [merge.replace(" ", "") for merge in merges]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama" if quantized else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    if quantized:
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_token_merges(merges)
    square, wide = (WIDTH, WIDTH), (2 * WIDTH, WIDTH)
    blocks = {
        "attn_norm": (WIDTH,), "attn_q": square, "attn_k": (WIDTH // 2, WIDTH),
        "attn_v": (WIDTH // 2, WIDTH), "attn_output": square, "ffn_norm": (WIDTH,),
        "ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1],
    }  # fmt: skip
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {"output": shapes["token_embd"]} if quantized else {}  # else it is the embedding
    shapes |= {f"blk.{n}.{name}": shape for n in range(BLOCKS) for name, shape in blocks.items()}
    for name, shape in shapes.items():
        weight = draw.standard_normal(shape).astype(np.float32) / 3
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and len(shape) == 2 else None
        packed = weight if kind is None else gguf.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_said(path: Path) -> bool:
    """Load the file and compute with it; whether it has the blocks and weights of the file."""
    try:
        model = LanguageModel.load(str(path), dtype="float32")
        ids = torch.tensor([token_ids(model, make_dictionary("plain-k4"), "w1 w2 w9")])
        site = Site(model.num_blocks - 1, "post")
        stream = model.activations(ids, [site])[site]
    except Exception as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise RuntimeError(f"the sizes were not looked at: {error}") from error
        raise
    reader = gguf.GGUFReader(path)
    with np.errstate(all="ignore"):  # damaged scales
        stored = {_values(gguf.dequantize(one.data, one.tensor_type)) for one in reader.tensors}
    used = {_values(one.numpy()) for one in model.hf_model.parameters()}
    blocks = np.ravel(reader.fields["llama.block_count"].contents())
    whole = stream.shape == (*ids.shape, model.d_model) and blocks == [model.num_blocks]
    return whole and used <= stored


def _values(weight: np.ndarray) -> bytes:
    """In an order that does not depend on how rows are arranged."""
    return np.sort(np.ascontiguousarray(weight, np.float32).view(np.uint32), axis=None).tobytes()


# --- Damage by somebody who knows the format

UINT32, FLOAT32, TEXT, ARRAY = 4, 6, 8, 9
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
COUNTS = (0, 1, 3, 33, 2**16, 2**22, 2**24, 2**25, 2**27, 2**31 - 1, 2**31, 2**32 - 1, 2**40,
          2**62, 2**63, 2**64 - 1)  # fmt: skip
SIZES = (0, 1, 2, 3, 8, 64, 500, 9_999, 2**16, 2**24, 2**28, 2**31 - 2, 2**31, 2**32 - 1)
VALUES = (
    (UINT32, 0), (UINT32, 9_999), (5, -1), (5, -(2**31)), (10, 2**64 - 1), (11, -(2**63)),
    (FLOAT32, 0.5), (FLOAT32, math.nan), (12, math.inf), (12, 1e300), (7, True), (TEXT, ""),
    (TEXT, "x"), (TEXT, "\x1b[2J\n"), (TEXT, "x" * 99_999), (ARRAY, UINT32, []),
    (ARRAY, UINT32, [2]), (ARRAY, UINT32, [4, 4]), (ARRAY, TEXT, ["x"]),
    (ARRAY, ARRAY, UINT32, [[1], []]),
)  # fmt: skip
OTHERS = ("mistral", "gpt2", "qwen2", "qwen2moe", "qwen3moe", "falcon", "bloom", "mamba", "t5",
          "gemma3", "phi3", "starcoder2", "lfm2", "qwen35", "bert", "nothing", "")  # fmt: skip


class File:
    """What a file says: keys with their types and values; tensors with name, dimensions, type and
    offset; and the tensors' bytes."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        found = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
        self.keys = {one.name: (*map(int, one.types), one.contents()) for one in found}
        begin = reader.data_offset
        self.tensors = [
            (one.name, one.shape.tolist(), int(one.tensor_type), one.data_offset - begin)
            for one in reader.tensors
        ]
        self.body = path.read_bytes()[begin:]

    def change(self, name: str, *value: Any) -> None:
        self.keys.pop(name, None)
        self.keys[name] = value

    def rename(self, architecture: str, all_keys: bool = True) -> None:
        self.keys["general.architecture"] = (TEXT, architecture)
        if all_keys:
            own = f"{architecture}."
            self.keys = {name.replace("llama.", own): one for name, one in self.keys.items()}

    def encoded(self, lie: tuple[str, int, int] | None = None) -> bytes:
        """The file. A lie is another number in one place: what kind, which of them, and the other.
        ``numbers`` counts the places."""
        self.numbers: Counter[str] = Counter()

        def number(what: str, true: int, code: str = "Q") -> bytes:
            here = (what, self.numbers[what])
            self.numbers[what] += 1
            told = lie[2] if lie is not None and lie[:2] == here else true
            return struct.pack(f"<{code}", told % 2 ** (8 * struct.calcsize(code)))

        def text(value: str) -> bytes:
            data = value.encode()
            return number("length of a text", len(data)) + data

        def encode(kind: int, *value: Any) -> bytes:
            if kind == TEXT:
                return text(*value)
            if kind != ARRAY:
                return struct.pack(f"<{CODES[kind]}", *value)
            *inner, items = value
            begin = number("type", inner[0], "I") + number("length of a list", len(items))
            return begin + b"".join(encode(*inner, item) for item in items)

        data = b"GGUF" + number("version", 3, "I")
        data += number("tensors", len(self.tensors)) + number("keys", len(self.keys))
        for name, (kind, *value) in self.keys.items():
            data += text(name) + number("type", kind, "I") + encode(kind, *value)
        for name, shape, kind, offset in self.tensors:
            data += text(name) + number("dimensions", len(shape), "I")
            data += b"".join(number("dimension", size) for size in shape)
            data += number("type of a tensor", kind, "I") + number("offset", offset)
        return data + bytes(-len(data) % ALIGNMENT) + self.body


def header(path: Path, draw: random.Random) -> tuple[str, bytes]:
    """(what was done, the bytes): one or two keys with other values, or a number that is a lie."""
    file = File(path)
    done = [_value(file, draw) for _ in range(draw.choice((0, 1, 2)))]
    data = file.encoded()
    if not done:
        what = draw.choice(list(file.numbers))
        place = draw.randrange(file.numbers[what])
        told = draw.choice((*COUNTS, draw.randint(0, 50), draw.randint(0, 2**20)))
        done.append(f"{what} {place} told as {told}")
        data = file.encoded((what, place, told))
    return " and ".join(done), data


def _value(file: File, draw: random.Random) -> str:
    """Another size or architecture, or any value under any key, also one nobody gives."""
    how = draw.choice(("size", "any", "architecture"))
    if how == "architecture":
        new, all_keys = draw.choice(OTHERS), draw.random() < 0.7
        file.rename(new, all_keys)
        return f"architecture {new!r}, {all_keys}"
    if how == "size":
        name = draw.choice([name for name, (kind, *_) in file.keys.items() if kind == UINT32])
        new = (UINT32, draw.choice(SIZES))
    else:
        name = draw.choice([*file.keys, "general.alignment", "llama.expert_count"])
        new = draw.choice(VALUES)
    file.change(name, *new)
    return f"{name} became {new!r:.60}"


@pytest.fixture(scope="module")
def goods(tmp_path_factory) -> list[Path]:
    """Undamaged files."""
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    folder = tmp_path_factory.mktemp("gguf")
    for name in ("plain.gguf", "quantized.gguf"):
        write(folder / name, name == "quantized.gguf")
        assert as_said(folder / name)
        assert File(folder / name).encoded() == (folder / name).read_bytes()
    return sorted(folder.iterdir())


def as_said_in_a_fork(path: Path) -> bool:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return begun(lambda: as_said(path), pages * resource.getpagesize() + MEMORY)()


def test_damaged_gguf_files(goods, tmp_path, fuzz):
    bad = tmp_path / "bad.gguf"
    for number, draw in fuzz.cases("GGUF file", USUAL):
        good, other = draw.sample(goods, 2)
        done, data = (
            header(good, draw)
            if draw.random() < 0.7
            else blind(good.read_bytes(), draw, other.read_bytes())
        )
        bad.write_bytes(data)
        if draw.random() < 0.5:
            os.truncate(bad, len(data) + TAIL)  # zeros that take no disk
        case = f"{good.name} {number} ({done})"
        fuzz.reads("GGUF file", case, lambda: as_said_in_a_fork(bad), frozen(True))
    assert all(map(as_said, goods))


def test_sizes_are_looked_at_before_anything_of_them_is_built(goods, tmp_path):
    bad = tmp_path / "bad.gguf"

    def refused(data: bytes, why: str) -> None:
        bad.write_bytes(data)
        os.truncate(bad, len(data) + TAIL)
        fails(why, as_said_in_a_fork, bad)

    file = File(goods[0])
    refused(file.encoded(("length of a list", 1, 2**25)), "its header has too many entries")
    for lie in (("tensors", 0, 2**25), ("length of a text", 9, 2**40), ("offset", 3, 2**40)):
        refused(file.encoded(lie), "it ends before what its header announces")
    file.change("llama.block_count", UINT32, 9_999)
    refused(file.encoded(), "its tensors are too few for 9,999 blocks")
    file = File(goods[0])
    *kinds, tokens = file.keys["tokenizer.ggml.tokens"]
    file.change("tokenizer.ggml.tokens", *kinds, [*map("x{}".format, range(50)), *tokens])
    refused(file.encoded(), "returns id 65, but bad.gguf has 26 embeddings")
    file = File(goods[0])
    file.change("llama.expert_count", UINT32, 9_000)
    file.rename("qwen3moe")
    refused(file.encoded(), "needs 1,327,687,168 numbers, but its tensors hold at most 38,848")
