"""The README's Python runs as it stands, but for a smaller model, text and number of tokens."""

import re
from pathlib import Path

import pytest
from command_line import save_model
from tiny import write_jsonl

import llm_wsae.cli as cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_block_trains_dictionaries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "text.jsonl", [60] * 300)
    changes = {
        '"gpt2"': '"model"',
        '"Skylion007/openwebtext"': '"text.jsonl"',
        "blocks.8.": "blocks.1.",
        "tokens=1_000_000": "tokens=8000, context_size=16",
    }
    code = BLOCKS[0]
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert list(names["dictionaries"]) == ["uniform-k32", "variance-a-0.25-k32"]
    assert names["codes"].values.shape == (10, 32)
    assert float(names["codes"].values.max()) > 0


def test_the_pretrained_dictionary_opens(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    names = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    dictionary = names["dictionary"]
    assert dictionary.d_in == 576 and dictionary.d_sae == 4608
    assert dictionary.info.metrics["fidelity"]["ce_recovered"] > 0.9


@pytest.mark.parametrize("command", re.findall(r"`llm-wsae (\w+)`", README))
def test_the_commands_named_exist(command):
    assert command in cli.COMMANDS
