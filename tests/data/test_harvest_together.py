"""Harvests by several processes: the bytes of one, whoever is killed; one sentence for an error."""

import functools
import os
import signal
import time
from dataclasses import replace

import pytest
from command_line import HARVEST, call, content, save_model, works
from several import run, start
from test_harvesting import CONFIG, LENGTHS, SITES, after, files
from tiny import tiny_model, write_jsonl

from llm_wsae.commands.verifying import verify
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest
from llm_wsae.data.manifest import RECORDS, Manifest, complete_shards
from llm_wsae.errors import LlmWsaeError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    return alone(corpus, tmp_path_factory.mktemp("alone") / "s")


def alone(corpus, out, model=None, config=CONFIG):
    return harvest(model or tiny_model(), Corpus.open(str(corpus)), SITES, out, config)


def make(corpus, out, config=CONFIG, unlucky=None, forwards=None, what=None):
    """One process's part; something happens to the unlucky one behind so many forwards."""
    is_unlucky = os.environ["RANK"] == str(unlucky)
    text = Corpus.open(str(corpus))
    text.num_bytes = None  # as with a streamed dataset
    model = after(forwards, what) if is_unlucky else tiny_model()
    return harvest(model, text, SITES, out, config).num_rows


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


def test_several_processes_write_the_bytes_of_one(corpus, unbroken, tmp_path):
    """Beginning with the store of one that was killed when its manifest was whole."""
    out = tmp_path / "s"
    alone(corpus, out, config=replace(CONFIG, tokens=1000))
    (out / RECORDS).mkdir()
    record(out, 2).write_text("{}")
    assert run(3, make, corpus, out) == [unbroken.num_rows] * 3
    assert files(out) == files(unbroken.folder)
    when = (out / "manifest.json").stat().st_mtime_ns
    assert run(2, make, corpus, out) == [unbroken.num_rows] * 2  # nothing is left to do
    assert when == (out / "manifest.json").stat().st_mtime_ns


@pytest.mark.parametrize("dies", [(0, 9, 5), (1, 2, 4)])
def test_a_killed_process_loses_no_whole_shard(corpus, unbroken, tmp_path, dies):
    """It dies in a shard of its own, when the other process is shards ahead."""
    (unlucky, forwards, other), out = dies, tmp_path / "s"
    what = functools.partial(die_behind, record(out, other))
    outcomes = run(2, make, corpus, out, CONFIG, unlucky, forwards, what)
    assert outcomes[unlucky] is None
    assert "exited without an error message" in outcomes[1 - unlucky]
    there = whole(out)
    assert other in there and there != list(range(len(there))), there
    before = {path: path.stat().st_mtime_ns for path in out.rglob("0*.safetensors")}
    if unlucky:
        alone(corpus, out)
    else:
        assert run(2, make, corpus, out) == [unbroken.num_rows] * 2
    assert files(out) == files(unbroken.folder) and verify(out).problems == []
    for shard in there:  # none was made again
        path = out / f"tokens/{shard:05d}.safetensors"
        assert path.stat().st_mtime_ns == before[path]


def test_only_what_is_missing_is_fed_to_the_model(corpus, unbroken, tmp_path):
    """Nine shards, seven forward passes each, but six for the last, which is shorter."""
    out = tmp_path / "s"
    with pytest.raises(LlmWsaeError, match="the moon"):
        alone(corpus, out, after(62, fail))
    assert whole(out) == list(range(8))
    for shard in (0, 3, 6, 7):
        record(out, shard).unlink()
    (out / "tokens" / ".00003.safetensors.1.partial").touch()
    damaged, good = record(out, 1), record(out, 1).read_text()
    damaged.write_text(good.replace('"contexts": 28', '"contexts": 27'))
    with pytest.raises(LlmWsaeError, match=r"00001\.json is damaged: its checksum does not match"):
        alone(corpus, out)
    damaged.write_text(good)
    with pytest.raises(LlmWsaeError, match="the moon"):
        alone(corpus, out, after(34, fail))
    assert whole(out) == list(range(8))
    alone(corpus, out)
    assert files(out) == files(unbroken.folder)


def test_an_error_of_one_process_ends_all_with_its_sentence(corpus, tmp_path):
    outcomes = run(2, make, corpus, tmp_path / "s", CONFIG, 1, 9, fail)
    assert outcomes == ["LlmWsaeError: the moon is full"] * 2


def of_own(corpus, out):
    is_first = os.environ["RANK"] == "0"
    own = {"tokens": 1000, "dtype": "float32"} if is_first else {"dtype": "bfloat16"}
    return make(corpus, out, replace(CONFIG, **own))


def test_different_requests_are_not_one_harvest(corpus, tmp_path):
    first, second = run(2, of_own, corpus, tmp_path / "s")
    assert first == second and "than process 0 (contexts: " in first and "dtype:" in first


def test_a_second_run_is_refused_while_a_process_of_the_first_lives(corpus, tmp_path):
    out, go = tmp_path / "s", tmp_path / "go"
    first = start(2, both_wait, corpus, out, go)
    for rank in (0, 1):
        wait_for(tmp_path / f"go.{rank}")
    refusal = "another process is writing the activation store"
    assert all(refusal in outcome for outcome in run(2, make, corpus, out))
    first[0].kill()
    with pytest.raises(LlmWsaeError, match=refusal):
        alone(corpus, out)
    first[1].kill()
    alone(corpus, out)


def both_wait(corpus, out, go):
    def wait():
        go.with_suffix("." + os.environ["RANK"]).touch()
        wait_for(go)

    return make(corpus, out, CONFIG, os.environ["RANK"], 10, wait)


def test_the_command(corpus, tmp_path):
    words = ("harvest", "--model", save_model(tmp_path / "model"), "--corpus", corpus, *HARVEST,
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
