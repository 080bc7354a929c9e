"""Small files of a model that would take much memory are refused before they are loaded."""

import json
import shutil

import pytest
import torch
from small_dictionaries import make_dictionary

from llm_wsae.errors import LlmWsaeError
from llm_wsae.inspecting.sentence import token_ids
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder


@pytest.fixture
def folder(made_world, tmp_path):
    return shutil.copytree(made_world / "model", tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def steps(*kinds):
    return {"type": "Sequence", "normalizers": list(kinds)}


LONGER = {"type": "Replace", "pattern": {"String": "w"}, "content": "w" * 50}
BETWEEN = {"type": "Replace", "pattern": {"Regex": "x?"}, "content": "x"}


@pytest.mark.parametrize(
    "normalizer",
    [steps(*[LONGER] * 12), steps(*[{"type": "ByteLevel"}] * 60), steps(*[BETWEEN] * 40)],
)
def test_a_tokenizer_that_lets_texts_grow(folder, normalizer):
    change(folder / "tokenizer.json", normalizer=normalizer)
    for load in (LanguageModel.load, SentenceEncoder.load):
        with pytest.raises(LlmWsaeError, match="makes a text thousands of times longer"):
            load(str(folder))


def test_usual_steps_of_a_tokenizer_are_read(folder):
    usual = ({"type": "NFKD"}, {"type": "Lowercase"}, {"type": "ByteLevel"},
             {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
             {"type": "Replace", "pattern": {"String": "``"}, "content": '"'})  # fmt: skip
    change(folder / "tokenizer.json", normalizer=steps(*usual))
    assert LanguageModel.load(str(folder)).tokenizer("w1")["input_ids"]


def test_weights_that_cannot_be_those_of_the_configuration(folder):
    change(folder / "config.json", vocab_size=200_000, hidden_size=4096)
    with pytest.raises(LlmWsaeError, match=r"needs 1,6\d\d,\d+,\d+ numbers, but its weights hold"):
        LanguageModel.load(str(folder))
    change(folder / "config.json", num_hidden_layers=9999, hidden_size=16, vocab_size=52)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(LlmWsaeError, match="too few for 9,999 blocks"):
        LanguageModel.load(str(folder))


def test_one_stored_number_expanded_to_many(folder):
    weights = folder / "model.safetensors"
    weights.unlink()
    name = "model.embed_tokens.weight"
    torch.save({name: torch.zeros(1).expand(1 << 14, 1 << 14)}, folder / "pytorch_model.bin")
    change(folder / "config.json", num_hidden_layers=1, hidden_size=4, vocab_size=4)
    with pytest.raises(LlmWsaeError, match="announces more numbers than it can hold"):
        LanguageModel.load(str(folder))


def test_a_regular_expression_that_gives_up(folder):
    split = {"type": "Split", "pattern": {"Regex": "(w+)+$"}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    change(folder / "tokenizer.json", pre_tokenizer=split)
    model = LanguageModel.load(str(folder))
    with pytest.raises(LlmWsaeError, match="the tokenizer of model cannot read the text"):
        token_ids(model, make_dictionary("plain-k4"), "w" * 40 + "!")
