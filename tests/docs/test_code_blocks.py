"""The code blocks of README and pages: commands are parsed, and run on a tiny model and text where
that is quick; Python runs as it stands, except for a smaller model, text and number of tokens."""

import re
import shlex
import shutil
import sys
import types

import pytest
import torch
from command_line import works
from foreign_folders import gemma_scope
from places import ROOT, Block, blocks
from safetensors.torch import save_file
from tiny import tiny_hf_model, tiny_tokenizer, write_jsonl

from llm_wsae.cli import COMMANDS
from llm_wsae.commands.parser import parse

pytest_plugins = ("hub_fixtures",)
COMMAND = re.compile(r"^(?:torchrun .*?-m llm_wsae|llm-wsae) (.+?)(?:\s+#.*)?$", re.MULTILINE)
SMALLER = {
    '"gpt2"': '"model"',
    '"smollm2-135m.gguf"': '"model"',
    '"HuggingFaceFW/fineweb:sample-10BT"': '"text.jsonl"',
    "blocks.8.": "blocks.1.",
    "tokens=1_000_000)": "tokens=8000, context_size=16)",
    "TrainConfig(tokens=8000, context_size=16)": "TrainConfig(tokens=8000)",
    "max_new_tokens=30": "max_new_tokens=20, eos_token_id=None",
}


def commands() -> list[tuple[str, list[str]]]:
    """Every line of ``llm-wsae`` in a code block, with its page."""
    return [
        (block.page, shlex.split(line))
        for block in blocks("bash")
        for line in COMMAND.findall(block.code.replace(" \\\n", " "))
    ]


def block(page: str, words: str) -> Block:
    """The one block of Python on a page that holds these words."""
    (found,) = (b for b in blocks("python") if b.page == page and words in b.code)
    return found


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with ``model``, a tiny GPT-2, and ``text.jsonl``; the current one."""
    monkeypatch.chdir(tmp_path)
    tiny_hf_model("gpt2").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_jsonl(tmp_path / "text.jsonl", [60] * 300)
    return tmp_path


def run(found: Block, **changes: str) -> dict:
    """The names that a block of Python leaves, with everything in it smaller."""
    code = found.code
    for old, new in {**SMALLER, **changes}.items():
        code = code.replace(old, new)
    names = {}
    exec(compile(code, found.page, "exec"), names)
    return names


def test_every_command_on_the_pages_parses():
    found = commands()
    assert len(found) > 25 and {words[0] for _, words in found} >= set(COMMANDS)
    for page, (name, *words) in found:
        assert name in COMMANDS, f"{page}: {name}"
        parse(name, COMMANDS[name], words)  # raises UsageError


def test_every_script_on_the_pages_is_there():
    text = "\n".join(found.code for found in blocks("bash"))
    scripts = re.findall(r"(?:bash|python) (scripts/\S+)", text)
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_the_pages_of_the_commands_run(world, hub):
    """In the order in which one command needs another's output."""
    small = {
        "harvest": "--context-size 16 --batch-tokens 512 --tokens 8000",
        "train": "--batch-size 256",
        "run": "--harvest.context-size 16 --train.batch-size 256 --tokens 8000 --eval-tokens 300",
        "evaluate": "--tokens 300",
        "theory": "--steps 20 --rows 200",
    }
    order = ["harvest", "train", "weigh", "evaluate", "inspect", "dashboard", "export", "verify",
             "run", "push", "list", "pull", "theory"]  # fmt: skip
    lines = {name: [words for page, words in commands() if page == f"docs/commands/{name}.md"]
             for name in order}  # fmt: skip
    for name in order:
        mine = [words for words in lines[name] if words[0] == name]
        assert mine, name
        for words in mine:
            if "--monosemantic" in words:  # needs a sentence encoder
                continue
            changes = {"smollm2-135m.gguf": "model", "sotu": "text.jsonl"}
            line = shlex.join(changes.get(word, word) for word in words)
            line = line.replace("blocks.9.", "blocks.1.").replace("The state of our Union", "w1 w2")
            result = works(*shlex.split(line), *small.get(name, "").split())
            assert result.out.strip()


def test_gpt2_from_end_to_end(world, hub):
    names = run(block("docs/getting-started.md", "Steer("))
    assert list(names["dictionaries"]) == ["uniform-k32", "variance-a-0.25-k32"]
    assert names["codes"].values.shape == (10, 32)
    assert float(names["codes"].values.max()) > 0
    pushed, pulled = names["dictionaries"]["variance-a-0.25-k32"], names["wsae"]
    assert torch.equal(pushed.W_dec, pulled.W_dec) and pulled.info.rule == "variance"
    card = hub.store.content("user/gpt2-wsae", "README.md").decode()
    assert "`blocks.1.hook_resid_post/variance-a-0.25-k32`" in card

    # As the page says: latent 123 is 20 more active on every token but the first.
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


def test_the_readmes_ten_lines(world, capsys):
    found = block("README.md", "encode_sparse")
    assert len([line for line in found.code.splitlines() if line]) <= 11
    names = run(found)
    assert list(names["dictionaries"]) == ["uniform-k32", "variance-a-0.25-k32"]
    assert "tensor(" in capsys.readouterr().out


def test_a_training_without_a_store(world):
    small = "context_size=16, batch_tokens=512, buffer_tokens=2048, statistics_tokens=2048"
    new = f'"model"), corpus, site, __import__("llm_wsae").StreamConfig({small}))'
    run(block("docs/getting-started.md", "ActivationStream"), **{'"model"), corpus, site)': new})
    assert (world / "runs/streamed/uniform-k32/wsae.json").is_file()


def test_planted_features_in_python(world, capsys):
    text = ("--model", "model", "--corpus", "text.jsonl", "--tokens", 8000, "--context-size", 16)
    works("harvest", *text, "--site", "blocks.1.hook_resid_post", "--out", "runs/store")
    few = 'PlantedSource(store, site, __import__("llm_wsae").PlantConfig(per_cell=2))'
    names = run(
        block("docs/commands/study.md", "measure_recovery"),
        **{"PlantedSource(store, site)": few, "TrainConfig()": "TrainConfig(batch_size=256)"},
    )
    assert list(names["dictionaries"]) == ["uniform-k32", "variance-a-0.5-k32"]
    assert capsys.readouterr().out.count("'recovered': ") == 2


def test_the_pretrained_dictionary_opens(monkeypatch):
    monkeypatch.chdir(ROOT)
    for page in ("docs/getting-started.md", "checkpoints/README.md"):
        code = (ROOT / page).read_text(encoding="utf-8")
        assert 'load_pretrained("smollm2-135m/blocks.9.hook_resid_post/uniform-k32")' in code
    dictionary = run(block("docs/getting-started.md", "dictionary = load_pretrained"))["dictionary"]
    assert dictionary.d_in == 576 and dictionary.d_sae == 4608
    assert dictionary.info.metrics["fidelity"]["ce_recovered"] > 0.9


def test_latents_in_a_running_model(world):
    site = "blocks.1.hook_resid_post"
    text = ("--model", "model", "--corpus", "text.jsonl", "--tokens", 5000, "--context-size", 16)
    works("harvest", *text, "--site", site, "--out", "store")
    works("train", "store", "--site", site, "--batch-size", 256, "--out", "d")
    found = block("docs/running-model.md", "Clamp(")
    old = 'load_pretrained("smollm2-135m/blocks.9.hook_resid_post/uniform-k32")'
    new = '__import__("llm_wsae").Dictionary.load("d/uniform-k32")'
    names = run(found, **{old: new})
    codes = names["codes"]
    clamped = (codes.values * (codes.indices == 123)).sum(2)
    assert clamped[:, 1:].eq(8.0).all() and clamped[:, 0].eq(0.0).all()
    logits = names["model"].hf_model(names["ids"]).logits
    assert not torch.equal(names["logits"], logits)


def test_a_dictionary_of_another_tool(world):
    gemma_scope(world / "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")
    names = run(block("docs/formats.md", "theirs = "))
    assert torch.equal(names["Dictionary"].load("mine").W_dec, names["theirs"].W_dec)


def test_saelens_reads_a_folder_of_ours(world):
    pytest.importorskip("sae_lens")
    shutil.copytree(
        ROOT / "checkpoints/smollm2-135m/blocks.9.hook_resid_post/uniform-k32",
        world / "runs/trained/uniform-k32",
    )
    assert run(block("docs/formats.md", "SAE.load_from_disk"))["sae"].cfg.d_sae == 4608


def test_saelens_runner_is_called_with_weights_of_ours(world, monkeypatch):
    """The runner itself would fetch a model; that its class trains is tested beside SAELens."""
    found = block("docs/formats.md", "LanguageModelSAETrainingRunner")
    asked = {}
    runner = types.SimpleNamespace(run=lambda: asked.update(ran=True))
    module = types.ModuleType("sae_lens")
    module.LanguageModelSAERunnerConfig = lambda **options: asked.update(options)
    module.LanguageModelSAETrainingRunner = lambda config: runner
    monkeypatch.setitem(sys.modules, "sae_lens", module)
    import llm_wsae.saelens

    monkeypatch.setitem(vars(llm_wsae.saelens), "WeightedTopKTrainingSAEConfig", dict)
    save_file({"gamma": torch.ones(768)}, "weights.safetensors")
    run(found)
    assert asked["ran"] and asked["sae"]["k"] == 32


def test_every_python_block_is_run_by_a_test():
    tested = (ROOT / "tests/docs/test_code_blocks.py").read_text(encoding="utf-8")
    pages = {"README.md": 1, "docs/getting-started.md": 3, "docs/running-model.md": 1,
             "docs/formats.md": 3, "docs/commands/study.md": 1}  # fmt: skip
    found = [b for b in blocks("python") if b.page != "docs/adding-an-architecture.md"]
    assert {p: sum(b.page == p for b in found) for p in {b.page for b in found}} == pages
    assert tested.count('block("') >= sum(pages.values())
