"""A harvest ends with the same bytes whatever interrupts it, also by several processes, and refuses
what it cannot do."""

import functools
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import HARVEST, call, content, save_model, works
from places import ROOT
from refusals import fails, misused
from several import run, start
from tiny import tiny_model

from llm_wsae.commands.verifying import verify
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest, kept_rows
from llm_wsae.data.packing import Packer
from llm_wsae.data.store import RECORDS, Manifest, complete_shards
from llm_wsae.errors import LlmWsaeError
from llm_wsae.model.site import Site

SITES = [Site(0, "pre"), Site(1, "post")]
CONFIG = HarvestConfig(context_size=12, tokens=3000, batch_tokens=48, shard_tokens=300)


@pytest.fixture(scope="module")
def unbroken(model, corpus, tmp_path_factory):
    return harvest(model, corpus, SITES, tmp_path_factory.mktemp("unbroken") / "s", CONFIG)


def files(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def stop():
    raise InterruptedError


def after(forwards, happens=stop):
    """The same model; something happens at each forward behind so many."""
    new = tiny_model()
    activations, count = new.activations, iter(range(forwards))

    def watched(ids, sites):
        if next(count, None) is None:
            happens()
        return activations(ids, sites)

    new.activations = watched
    return new


def test_what_a_stopped_or_killed_writer_left_is_removed(model, corpus, unbroken, tmp_path):
    out = tmp_path / "s"
    for forwards in (20, 9):
        with pytest.raises(InterruptedError):
            harvest(after(forwards), corpus, SITES, out, CONFIG)
    (out / "tokens/.00003.safetensors.77.partial").write_bytes(b"half")
    (out / "tokens/.write.x8k2.77.partial").mkdir()
    (out / "tokens/.write.x8k2.77.partial/.tmpAb12Cd").write_bytes(b"half")  # safetensors'
    (out / "tokens/00099.safetensors").write_bytes(b"never listed")
    harvest(model, corpus, SITES, out, CONFIG)
    assert files(out) == files(unbroken.folder)
    theirs = [out / "theirs" / ".notes.5.partial", out / str(SITES[0]) / ".tmpABC123"]
    theirs[0].parent.mkdir()
    for path in theirs:
        path.touch()
    harvest(model, corpus, SITES, out, CONFIG)
    assert all(path.exists() for path in theirs)


def test_a_complete_store_is_left_alone_mended_or_grown(model, corpus, unbroken, tmp_path, capsys):
    out = tmp_path / "s"
    harvest(model, corpus, SITES, out, replace(CONFIG, tokens=1000))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    harvest(after(0), corpus, SITES, out, replace(CONFIG, tokens=999))
    assert "is already complete" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    with pytest.raises(LlmWsaeError, match="already holds 1,008 tokens, more than the 504 reque"):
        harvest(model, corpus, SITES, out, replace(CONFIG, tokens=500))
    path = out / "tokens/00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # no later step reads tokens, so they are compared here
    path.write_bytes(data)
    (out / str(SITES[0]) / "00001.safetensors").unlink()
    harvest(model, corpus, SITES, out, CONFIG)
    assert files(out) == files(unbroken.folder)
    (out / str(SITES[1]) / "statistics.safetensors").unlink()
    assert "run the same harvest again" in "; ".join(verify(out).problems)
    harvest(after(0), corpus, SITES, out, CONFIG)
    assert files(out) == files(unbroken.folder)


def test_another_harvest_into_the_folder_is_refused(model, corpus, text, unbroken):
    before = files(unbroken.folder)
    for message, options, changes in (
        ("model weights_sha256: .* in the saved activation store", {"model": tiny_model(5)}, {}),
        ('corpus part: "train" in', {"corpus": Corpus.open(str(text), "all")}, {}),
        ("sites 1: .blocks.1.hook_resid_post. in", {"sites": SITES[:1]}, {}),
        ('dtype: "float32" in the saved activation store, "bf', {}, {"dtype": "bfloat16"}),
        ("packing context_size: 12 in .*, 13 in", {}, {"context_size": 13}),
    ):
        asked = {"model": model, "corpus": corpus, "sites": SITES} | options
        fails(message, harvest, **asked, out=unbroken.folder, config=replace(CONFIG, **changes))
    assert files(unbroken.folder) == before


def test_a_corpus_that_is_too_small(model, corpus, text, tmp_path):
    """One of known size costs nothing; one that ends early can still be completed."""
    out, config = tmp_path / "s", replace(CONFIG, tokens=100_000)
    there = sum(1 for _ in Packer.for_model(model, CONFIG).contexts(corpus)) * 12
    said = rf"train part of the corpus text\.jsonl fills .* request {there} tokens"
    fails(said, harvest, model, corpus, SITES, out, config)
    assert not out.exists()
    streamed = Corpus.open(str(text))
    streamed.num_bytes = None  # as with a dataset of the Hub
    fails(said, harvest, model, streamed, SITES, out, config)
    store = harvest(model, streamed, SITES, out, replace(CONFIG, tokens=there))
    assert store.manifest.num_contexts * 12 == there and verify(out).problems == []
    before = files(out)
    fails(said, harvest, model, corpus, SITES, out, config)  # nor is a complete store opened
    assert files(out) == before


def test_requests_that_cannot_be(model, corpus, tmp_path):
    for message, sites, changes in (
        ("the model has 3 blocks", [Site(3, "pre")], {}),
        ("name at least one", [], {}),
        ("reads at most 64", SITES, {"context_size": 65}),
        ("a shard would need .* GiB of memory", SITES, {"shard_tokens": 10**13}),
    ):
        misused(message, harvest, model, corpus, sites, tmp_path / "s", replace(CONFIG, **changes))
    assert not (tmp_path / "s").exists()


def test_padding_does_not_change_the_rows(model, corpus):
    config = replace(CONFIG, one_document_per_context=True)
    (block, *_) = Packer.for_model(model, config).blocks(corpus, 8)
    rows = kept_rows(model, block, SITES)[SITES[1]]
    lengths = (block.document >= 0).sum(1).tolist()
    assert min(lengths) < 11 and sum(lengths) == len(rows)
    for context, length, own in zip(block.each(), lengths, rows.split(lengths), strict=True):
        alone = model.activations(torch.from_numpy(context.ids[: length + 1])[None], SITES)
        torch.testing.assert_close(own, alone[SITES[1]][0, 1:], rtol=1e-4, atol=1e-5)


MEMORY = """
import sys
from pathlib import Path
from tiny import tiny_model, write_jsonl
from llm_wsae import Corpus, HarvestConfig, Site, harvest
from llm_wsae.machine.hardware import peak_memory_bytes
folder = Path(sys.argv[1])
corpus = Corpus.open(str(write_jsonl(folder / "t.jsonl", [500] * 300)))
for tokens in (20_000, 120_000):
    config = HarvestConfig(tokens=tokens, context_size=64, batch_tokens=1024, shard_tokens=4096)
    harvest(tiny_model(width=64), corpus, [Site(1, "post")], folder / str(tokens), config)
    print(peak_memory_bytes() >> 20)
"""


def test_memory_does_not_grow_with_the_number_of_tokens(tmp_path):
    env = os.environ | {"MALLOC_ARENA_MAX": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", MEMORY, str(tmp_path)]
    out = subprocess.check_output(words, cwd=ROOT, env=env)
    short, long = map(int, out.split())
    assert long - short < 20  # 100,000 rows are 26 MB


# --- By several processes


def make(text, out, config=CONFIG, unlucky=None, forwards=None, what=None):
    """One process's part; something happens to the unlucky one behind so many forwards."""
    is_unlucky = os.environ["RANK"] == str(unlucky)
    corpus = Corpus.open(str(text))
    corpus.num_bytes = None  # as with a streamed dataset
    model = after(forwards, what) if is_unlucky else tiny_model()
    return harvest(model, corpus, SITES, out, config).num_rows


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody wrote {path.name}"
        time.sleep(0.005)


def die_behind(path):
    wait_for(path)
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise LlmWsaeError("the moon is full")


def record(out, shard):
    return out / RECORDS / f"{shard:05d}.json"


def whole(out):
    return sorted(complete_shards(out, Manifest.load(out)))


def test_several_processes_write_the_bytes_of_one(model, corpus, text, unbroken, tmp_path):
    """Beginning with the store of one that was killed when its manifest was whole."""
    out = tmp_path / "s"
    harvest(model, corpus, SITES, out, replace(CONFIG, tokens=1000))
    (out / RECORDS).mkdir()
    record(out, 2).write_text("{}")
    assert run(3, make, text, out) == [unbroken.num_rows] * 3
    assert files(out) == files(unbroken.folder)
    when = (out / "manifest.json").stat().st_mtime_ns
    assert run(2, make, text, out) == [unbroken.num_rows] * 2  # nothing is left to do
    assert when == (out / "manifest.json").stat().st_mtime_ns


@pytest.mark.parametrize("dies", [(0, 9, 5), (1, 2, 4)])
def test_a_killed_process_loses_no_whole_shard(model, corpus, text, unbroken, tmp_path, dies):
    """It dies in a shard of its own, when the other process is shards ahead."""
    (unlucky, forwards, other), out = dies, tmp_path / "s"
    what = functools.partial(die_behind, record(out, other))
    outcomes = run(2, make, text, out, CONFIG, unlucky, forwards, what)
    assert outcomes[unlucky] is None
    assert "exited without an error message" in outcomes[1 - unlucky]
    there = whole(out)
    assert other in there and there != list(range(len(there))), there
    before = {path: path.stat().st_mtime_ns for path in out.rglob("0*.safetensors")}
    if unlucky:
        harvest(model, corpus, SITES, out, CONFIG)
    else:
        assert run(2, make, text, out) == [unbroken.num_rows] * 2
    assert files(out) == files(unbroken.folder) and verify(out).problems == []
    for shard in there:  # none was made again
        path = out / f"tokens/{shard:05d}.safetensors"
        assert path.stat().st_mtime_ns == before[path]


def test_only_what_is_missing_is_fed_to_the_model(model, corpus, unbroken, tmp_path):
    """Nine shards, seven forward passes each, but six for the last, which is shorter."""
    out = tmp_path / "s"
    fails("the moon", harvest, after(62, fail), corpus, SITES, out, CONFIG)
    assert whole(out) == list(range(8))
    for shard in (0, 3, 6, 7):
        record(out, shard).unlink()
    (out / "tokens" / ".00003.safetensors.1.partial").touch()
    damaged, good = record(out, 1), record(out, 1).read_text()
    damaged.write_text(good.replace('"contexts": 28', '"contexts": 27'))
    with pytest.raises(LlmWsaeError, match=r"00001\.json is damaged: its checksum does not match"):
        harvest(model, corpus, SITES, out, CONFIG)
    damaged.write_text(good)
    fails("the moon", harvest, after(34, fail), corpus, SITES, out, CONFIG)
    assert whole(out) == list(range(8))
    harvest(model, corpus, SITES, out, CONFIG)
    assert files(out) == files(unbroken.folder)


def test_an_error_of_one_process_ends_all_with_its_sentence(text, tmp_path):
    outcomes = run(2, make, text, tmp_path / "s", CONFIG, 1, 9, fail)
    assert outcomes == ["LlmWsaeError: the moon is full"] * 2


def of_own(text, out):
    is_first = os.environ["RANK"] == "0"
    own = {"tokens": 1000, "dtype": "float32"} if is_first else {"dtype": "bfloat16"}
    return make(text, out, replace(CONFIG, **own))


def test_different_requests_are_not_one_harvest(text, tmp_path):
    first, second = run(2, of_own, text, tmp_path / "s")
    assert first == second and "than process 0 (contexts: " in first and "dtype:" in first


def test_a_second_run_is_refused_while_a_process_of_the_first_lives(model, corpus, text, tmp_path):
    out, go = tmp_path / "s", tmp_path / "go"
    first = start(2, both_wait, text, out, go)
    for rank in (0, 1):
        wait_for(tmp_path / f"go.{rank}")
    refusal = "another process is writing the activation store"
    assert all(refusal in outcome for outcome in run(2, make, text, out))
    first[0].kill()
    fails(refusal, harvest, model, corpus, SITES, out, CONFIG)
    first[1].kill()
    harvest(model, corpus, SITES, out, CONFIG)


def both_wait(text, out, go):
    def wait():
        go.with_suffix("." + os.environ["RANK"]).touch()
        wait_for(go)

    return make(text, out, CONFIG, os.environ["RANK"], 10, wait)


def test_the_command(text, tmp_path):
    words = ("harvest", "--model", save_model(tmp_path / "model"), "--corpus", text, *HARVEST,
             "--dtype", "float32", "--tokens", "4000", "--out")  # fmt: skip
    works(*words, tmp_path / "alone")
    done = run(2, call, *words, tmp_path / "both", "--json")
    assert [one.code for one in done] == [0, 0], done
    assert '"rows"' in done[0].out and "harvest: 100%" in done[0].err
    assert done[1].out == "" and "harvest:" not in done[1].err
    assert content(tmp_path / "both") == content(tmp_path / "alone")
    refusals = run(2, call, *words, tmp_path / "both", "--tokens", "3000")
    assert [one.code for one in refusals] == [1, 1]
    (sentence,) = (one.err for one in refusals if "llm-wsae: " in one.err)
    assert f"{tmp_path / 'both'} already holds 4,000 tokens" in sentence
