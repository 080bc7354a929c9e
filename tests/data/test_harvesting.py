import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import ROOT
from tiny import tiny_model, write_jsonl

from llm_wsae.artifact.files import folder_lock
from llm_wsae.commands.verifying import verify
from llm_wsae.data import covariance
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.covariance import second_moment_of
from llm_wsae.data.harvesting import harvest, kept_rows
from llm_wsae.data.manifest import Manifest, complete_shards
from llm_wsae.data.packing import Packer
from llm_wsae.data.store import ActivationStore
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.site import Site

SITES = [Site(0, "pre"), Site(1, "post")]
CONFIG = HarvestConfig(context_size=12, tokens=3000, batch_tokens=48, shard_tokens=300)
LENGTHS = [7 * i % 50 + 1 for i in range(200)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def corpus(text):
    return Corpus.open(str(text))


@pytest.fixture(scope="module")
def unbroken(model, corpus, tmp_path_factory):
    return harvest(model, corpus, SITES, tmp_path_factory.mktemp("unbroken") / "s", CONFIG)


def files(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


class Stopped(Exception):
    pass


def after(forwards, happens):
    """The same model; something happens at each forward behind so many."""
    new = tiny_model()
    activations, count = new.activations, iter(range(forwards))

    def watched(ids, sites):
        if next(count, None) is None:
            happens()
        return activations(ids, sites)

    new.activations = watched
    return new


def stop(*given):
    raise Stopped


def stop_after(forwards):
    return after(forwards, stop)


@pytest.mark.parametrize("forwards", [0, 8, 20])
def test_a_stopped_harvest_ends_with_the_same_bytes(model, corpus, unbroken, tmp_path, forwards):
    with pytest.raises(Stopped):
        harvest(stop_after(forwards), corpus, SITES, tmp_path / "s", CONFIG)
    with pytest.raises(Stopped):
        harvest(stop_after(9), corpus, SITES, tmp_path / "s", CONFIG)
    harvest(model, corpus, SITES, tmp_path / "s", CONFIG)
    assert files(tmp_path / "s") == files(unbroken.folder)


KILLED = '''
import os, signal, sys
sys.path[:0] = ["tests/data", "tests/helpers"]
from pathlib import Path
import torch
torch.set_num_threads(1)  # no pool of threads that a fork would lose
from tiny import tiny_model
from test_harvesting import CONFIG, SITES
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest

model, corpus, folder = tiny_model(), Corpus.open(sys.argv[1]), Path(sys.argv[2])

def run(name, renames=None):
    """Harvest in a process that is killed when it has renamed that many files; whether it ended."""
    child = os.fork()
    if child == 0:
        replace, left = os.replace, [renames]

        def counted(*paths):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            replace(*paths)

        if renames is not None:
            os.replace = counted
        harvest(model, corpus, SITES, folder / name, CONFIG)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0

assert run("whole")
renames, shards = 0, []
while not run("killed", renames):
    shards.append(len(list((folder / "killed" / "tokens").glob("*.safetensors"))))
    renames += 3
print(*shards)
for path in (folder / "killed" / "evidence").iterdir():
    path.unlink()
assert not run("killed", 0) and not run("killed", 1)  # all shards are there, covariances are not
assert run("killed")
'''


def test_sigkill_at_any_instant_ends_with_the_same_bytes(text, tmp_path):
    """Each run is killed before one more file gets its name, until one ends; each resumes."""
    out = subprocess.run(
        [sys.executable, "-c", KILLED, str(text), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    shards = list(map(int, out.stdout.split()))
    assert len(shards) >= 2 and any(0 < n < 9 for n in shards), shards
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert verify(tmp_path / "killed").problems == []


def test_what_a_killed_writer_left_is_removed(model, corpus, unbroken, tmp_path):
    out = tmp_path / "s"
    with pytest.raises(Stopped):
        harvest(stop_after(20), corpus, SITES, out, CONFIG)
    (out / "tokens" / ".00003.safetensors.77.partial").write_bytes(b"half")
    (out / "tokens" / ".write.x8k2.77.partial").mkdir()
    (out / "tokens" / ".write.x8k2.77.partial" / ".tmpAb12Cd").write_bytes(b"half")  # safetensors'
    (out / "tokens" / "00099.safetensors").write_bytes(b"never listed")
    harvest(model, corpus, SITES, out, CONFIG)
    assert files(out) == files(unbroken.folder)
    theirs = [out / "theirs" / ".notes.5.partial", out / str(SITES[0]) / ".tmpABC123"]
    theirs[0].parent.mkdir()
    for path in theirs:
        path.touch()
    harvest(model, corpus, SITES, out, CONFIG)
    assert all(path.exists() for path in theirs)


def test_tokens_that_changed_are_harvested_again(model, corpus, unbroken, tmp_path):
    out = shutil.copytree(unbroken.folder, tmp_path / "s")
    path = out / "tokens/00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    harvest(model, corpus, SITES, out, CONFIG)
    assert files(out) == files(unbroken.folder)


def test_a_complete_store_is_left_alone_and_a_larger_one_is_grown(
    model, corpus, unbroken, tmp_path, capsys
):
    out = tmp_path / "s"
    harvest(model, corpus, SITES, out, replace(CONFIG, tokens=1000))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    harvest(stop_after(0), corpus, SITES, out, replace(CONFIG, tokens=999))
    assert "is already complete" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    with pytest.raises(
        LlmWsaeError, match="already holds 1,008 tokens, more than the 504 requested"
    ):
        harvest(model, corpus, SITES, out, replace(CONFIG, tokens=500))
    assert ActivationStore.open(out).num_rows > 0
    harvest(model, corpus, SITES, out, CONFIG)
    assert files(out) == files(unbroken.folder)


def test_the_covariance_is_there_when_a_harvest_ends(
    model, corpus, unbroken, tmp_path, monkeypatch
):
    """Also when the first one was stopped before it was measured."""
    out = tmp_path / "s"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(covariance, "_sums_of_parts", stop)
        harvest(model, corpus, SITES, out, CONFIG)
    assert verify(out).problems == [] and not (out / "evidence").exists()
    store = harvest(stop_after(0), corpus, SITES, out, CONFIG)
    assert files(out) == files(unbroken.folder)
    monkeypatch.setattr(covariance, "_sums_of_parts", stop)
    for site in SITES:
        found, rows = second_moment_of(store, site), store.rows(site, 0, store.num_rows)
        usual = rows[rows.norm(dim=1) <= store.statistics(site).massive_threshold].double()
        assert found.count == len(usual)
        scatter = found.to_tensors()["scatter"] / found.count
        torch.testing.assert_close(scatter, torch.cov(usual.T, correction=0), rtol=1e-6, atol=1e-9)


def test_another_harvest_into_the_folder_is_refused(model, corpus, text, unbroken):
    before = files(unbroken.folder)

    def refused(message, model=model, corpus=corpus, sites=SITES, **changes):
        with pytest.raises(LlmWsaeError, match=message):
            harvest(model, corpus, sites, unbroken.folder, replace(CONFIG, **changes))
        assert files(unbroken.folder) == before

    refused("model weights_sha256: .* in the saved activation store", model=tiny_model(seed=5))
    refused(
        'corpus part: "train" in the saved activation store, "all" in',
        corpus=Corpus.open(str(text), "all"),
    )
    refused(r"sites: \[.blocks.0.hook_resid_pre", sites=SITES[:1])
    refused('dtype: "float32" in the saved activation store, "bf', dtype="bfloat16")
    refused("packing context_size: 12 in .*, 13 in", context_size=13)
    refused("contexts_per_shard: 28 in .*, 16 in", shard_tokens=192)


def test_other_files_and_a_second_process_are_refused(model, corpus, tmp_path):
    theirs = [tmp_path / "notes.txt", tmp_path / ".tmp_mine", tmp_path / ".a.7.partial"]
    for path in theirs:
        path.write_text("mine")
    with pytest.raises(LlmWsaeError, match=r"holds other files \(notes\.txt\)"):
        harvest(model, corpus, SITES, tmp_path, CONFIG)
    assert all(path.exists() for path in theirs)
    (tmp_path / "notes.txt").unlink()
    with (
        folder_lock(tmp_path, "activation store"),
        pytest.raises(LlmWsaeError, match="another process is writing the activation store"),
    ):
        harvest(model, corpus, SITES, tmp_path, CONFIG)


def test_a_corpus_that_is_too_small_costs_nothing(model, corpus, tmp_path):
    config = replace(CONFIG, tokens=100_000)
    with pytest.raises(LlmWsaeError, match=r"train part of the corpus text\.jsonl") as caught:
        harvest(model, corpus, SITES, tmp_path / "s", config)
    assert not (tmp_path / "s").exists()
    there = sum(1 for _ in Packer.for_model(model, CONFIG).contexts(corpus)) * 12
    assert f"request {there} tokens" in str(caught.value)
    harvest(model, corpus, SITES, tmp_path / "s", CONFIG)
    before = files(tmp_path / "s")
    with pytest.raises(LlmWsaeError, match=r"train part of the corpus text\.jsonl"):
        harvest(model, corpus, SITES, tmp_path / "s", config)  # nor is a complete store opened
    assert files(tmp_path / "s") == before


def test_a_corpus_that_ends_early_can_still_be_completed(model, text, tmp_path):
    corpus = Corpus.open(str(text))
    corpus.num_bytes = None  # as with a streamed dataset
    out = tmp_path / "s"
    there = sum(1 for _ in Packer.for_model(model, CONFIG).contexts(corpus)) * 12
    with pytest.raises(LlmWsaeError, match=f"or request {there} tokens"):
        harvest(model, corpus, SITES, out, replace(CONFIG, tokens=100_000))
    store = harvest(model, corpus, SITES, out, replace(CONFIG, tokens=there))
    assert store.manifest.num_contexts * 12 == there and verify(out).problems == []
    harvest(model, corpus, SITES, tmp_path / "t", replace(CONFIG, tokens=there))
    assert files(out) == files(tmp_path / "t")


def test_rows_that_are_not_finite_name_site_shard_and_number(model, corpus, tmp_path):
    broken = tiny_model()
    activations = broken.activations
    seen = []

    def overflowing(ids, sites):
        found = activations(ids, sites)
        seen.append(len(ids))
        if sum(seen) > 28:  # in the second shard
            found[sites[-1]][:, :, 3] = torch.inf
        return found

    broken.activations = overflowing
    message = r"blocks.1.hook_resid_post, shard 00001: (\d+) of \1 rows hold NaN or infinite"
    with pytest.raises(LlmWsaeError, match=message):
        harvest(broken, corpus, SITES, tmp_path / "s", CONFIG)
    manifest = Manifest.load(tmp_path / "s")
    assert list(complete_shards(tmp_path / "s", manifest)) == [0] and not manifest.complete
    assert [p for p in verify(tmp_path / "s").problems if "not complete" not in p] == []


def test_a_full_disk_is_one_sentence_and_whole_shards_stay(model, corpus, unbroken, tmp_path):
    """A limit on the size of files, set during the second shard, stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    try:
        with pytest.raises(LlmWsaeError, match=r"cannot write .*free some space"):
            harvest(after(11, full), corpus, SITES, tmp_path / "s", CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.rglob("*.partial"))
    assert list(complete_shards(tmp_path / "s", Manifest.load(tmp_path / "s"))) == [0]
    assert all("not complete" in problem for problem in verify(tmp_path / "s").problems)
    harvest(model, corpus, SITES, tmp_path / "s", CONFIG)
    assert files(tmp_path / "s") == files(unbroken.folder)


def test_requests_that_cannot_be(model, corpus, tmp_path):
    with pytest.raises(UsageError, match="the model has 3 blocks"):
        harvest(model, corpus, [Site(3, "pre")], tmp_path / "s", CONFIG)
    with pytest.raises(UsageError, match="name at least one"):
        harvest(model, corpus, [], tmp_path / "s", CONFIG)
    with pytest.raises(UsageError, match="reads at most 64"):
        harvest(model, corpus, SITES, tmp_path / "s", replace(CONFIG, context_size=65))
    assert not (tmp_path / "s").exists()


def test_padding_does_not_change_the_rows(model, corpus):
    config = replace(CONFIG, one_document_per_context=True)
    (block, *_) = Packer.for_model(model, config).blocks(corpus, 8)
    rows = kept_rows(model, block, SITES)[SITES[1]]
    at = 0
    for context in block.each():
        length = int((context.document >= 0).sum())
        alone = model.activations(torch.from_numpy(context.ids[: length + 1])[None], SITES)
        torch.testing.assert_close(
            rows[at : at + length], alone[SITES[1]][0, 1:], rtol=1e-4, atol=1e-5
        )
        at += length
    assert at == len(rows) and min(len(d.text.split()) for d in corpus.documents()) < 11


def test_memory_does_not_grow_with_the_number_of_tokens(text, tmp_path):
    script = """
import sys
sys.path[:0] = ["tests/data", "tests/helpers"]
import torch
torch.set_num_threads(1)
from tiny import tiny_model, write_jsonl
from pathlib import Path
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.machine.hardware import peak_memory_bytes
from llm_wsae.data.harvesting import harvest
from llm_wsae.model.site import Site
folder = Path(sys.argv[1])
corpus = Corpus.open(str(write_jsonl(folder / "t.jsonl", [500] * 300)))
config = dict(context_size=64, batch_tokens=1024, shard_tokens=4096)
for tokens in (20_000, 120_000):
    store = harvest(tiny_model(width=64), corpus, [Site(1, "post")], folder / str(tokens),
                    HarvestConfig(tokens=tokens, **config))
    print(peak_memory_bytes() >> 20)
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    short, long = map(int, out.stdout.split())
    assert long - short < 20  # 100,000 rows are 26 MB
