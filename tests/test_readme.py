"""The README's Python runs as it stands, but for a smaller model, text and number of tokens."""

import re

import pytest
import torch
from places import ROOT
from tiny import tiny_tokenizer, write_jsonl
from tiny_families import tiny_hf_model

import llm_wsae.cli as cli

pytest_plugins = ("hub_fixtures",)
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(words: str) -> str:
    """The one block of Python that holds these words."""
    (found,) = (code for code in BLOCKS if words in code)
    return found


def test_gpt2_from_end_to_end(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    tiny_hf_model("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "text.jsonl", [60] * 300)
    changes = {
        '"gpt2"': '"model"',
        '"HuggingFaceFW/fineweb:sample-10BT"': '"text.jsonl"',
        "blocks.8.": "blocks.1.",
        "tokens=1_000_000": "tokens=8000, context_size=16",
        "max_new_tokens=30": "max_new_tokens=20, eos_token_id=None",
    }
    code = block("Steer(")
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert list(names["dictionaries"]) == ["uniform-k32", "variance-a-0.25-k32"]
    assert names["codes"].values.shape == (10, 32)
    assert float(names["codes"].values.max()) > 0
    pushed, pulled = names["dictionaries"]["variance-a-0.25-k32"], names["wsae"]
    assert torch.equal(pushed.W_dec, pulled.W_dec) and pulled.info.rule == "variance"
    card = hub.store.content("user/gpt2-wsae", "README.md").decode()
    assert "`blocks.1.hook_resid_post/variance-a-0.25-k32`" in card

    # As the README says: latent 123 is 20 more active on every token but the first.
    model, ids, written = names["model"], names["ids"], names["written"]
    expected = ids
    for _ in range(20):
        hidden = model.activations(expected, [pulled.site])[pulled.site]
        hidden[:, 1:] += 20 * pulled.W_dec[123]
        logits = model.resume(expected, pulled.site, hidden)
        expected = torch.cat([expected, logits[:, -1:].argmax(2)], 1)
    assert torch.equal(written, expected)
    alone = model.hf_model.generate(ids, max_new_tokens=20, eos_token_id=None)
    assert not torch.equal(written, alone)


def test_the_pretrained_dictionary_opens(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(block("load_pretrained"), "README.md", "exec"), names)
    dictionary = names["dictionary"]
    assert dictionary.d_in == 576 and dictionary.d_sae == 4608
    assert dictionary.info.metrics["fidelity"]["ce_recovered"] > 0.9


@pytest.mark.parametrize("command", re.findall(r"`llm-wsae (\w+)`", README))
def test_the_commands_named_exist(command):
    assert command in cli.COMMANDS
