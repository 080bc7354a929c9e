import hashlib
import json
import shutil

import pytest
import torch
from tiny import tiny_model, write_jsonl

from llm_wsae.artifact.files import load_tensors, save_tensors
from llm_wsae.commands.verifying import verify
from llm_wsae.data import shard_writer
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest
from llm_wsae.data.manifest import MANIFEST, Manifest, save_record
from llm_wsae.data.store import ActivationStore
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.site import Site

SITES = [Site(1, "post"), Site(0, "pre")]
CONFIG = HarvestConfig(context_size=12, tokens=1000, batch_tokens=48, shard_tokens=300)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    lengths = [7 * i % 50 + 1 for i in range(80)]
    path = write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", lengths)
    return Corpus.open(str(path), "train")


@pytest.fixture(scope="module")
def made(model, corpus, tmp_path_factory):
    return harvest(model, corpus, SITES, tmp_path_factory.mktemp("made") / "store", CONFIG)


@pytest.fixture
def store(made, tmp_path):
    """A copy that a test may damage."""
    return ActivationStore.open(shutil.copytree(made.folder, tmp_path / "store"))


def expected_rows(model, corpus, site):
    """The rows as the definition has them: one context at a time, position by position."""
    from llm_wsae.data.packing import Packer

    rows = []
    contexts = Packer.for_model(model, CONFIG).contexts(corpus)
    for context, _ in zip(contexts, range(CONFIG.num_contexts), strict=False):
        hidden = model.activations(torch.from_numpy(context.ids)[None], [site])[site][0]
        rows += [hidden[i] for i in range(12) if context.keep[i]]
    return torch.stack(rows)


def test_any_user_that_may_read_new_files_may_read_a_tensor_file(tmp_path):
    beside, path = tmp_path / "a.txt", tmp_path / "a.safetensors"
    beside.touch()
    save_tensors(path, {"x": torch.ones(2)})
    assert path.stat().st_mode == beside.stat().st_mode


def test_rows_are_those_of_the_model_and_sites_are_sorted(made, model, corpus):
    assert made.sites == [Site(0, "pre"), Site(1, "post")]
    assert made.d_in == 16 and made.context_size == 12
    for site in SITES:
        rows = made.rows(site, 0, made.num_rows)
        expected = expected_rows(model, corpus, site)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(rows[40:90], made.rows(site, 40, 90))  # across a shard's end


def test_manifest_says_what_the_rows_are(made, model, corpus):
    value = json.loads((made.folder / MANIFEST).read_text())
    request = value["request"]
    assert request["model"] == model.identity() and request["corpus"] == corpus.identity()
    assert request["packing"] == {
        "context_size": 12,
        "prepend_bos": True,
        "one_document_per_context": False,
        "drop_positions": 1,
        "drop_special": True,
    }
    assert value["complete"] and value["num_contexts"] == 84
    assert [s["contexts"] for s in value["shards"]] == [28, 28, 28]
    assert sum(s["rows"] for s in value["shards"]) == made.num_rows
    assert len(value["shards"][0]["files"]) == 5
    for name, record in made.manifest.all_files().items():
        content = (made.folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (record.bytes, record.sha256)
    on_disk = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*.safetensors")}
    covariances = {f"evidence/{site}.second_moment.safetensors" for site in SITES}
    assert on_disk == set(made.manifest.all_files()) | covariances


def test_statistics_are_those_of_all_rows(made):
    for site in SITES:
        rows = made.rows(site, 0, made.num_rows).double()
        statistics = made.statistics(site)
        assert statistics.count == made.num_rows
        torch.testing.assert_close(statistics.mean, rows.mean(0))
        torch.testing.assert_close(statistics.variance, rows.var(0, correction=0))


def test_bfloat16_on_disk(model, corpus, tmp_path, made):
    config = HarvestConfig(
        context_size=12, tokens=1000, batch_tokens=48, shard_tokens=300, dtype="bfloat16"
    )
    store = harvest(model, corpus, SITES[:1], tmp_path / "half", config)
    rows = store.rows(SITES[0], 0, store.num_rows)
    assert torch.equal(rows, made.rows(SITES[0], 0, made.num_rows).bfloat16())
    # the statistics are of the rows as stored
    torch.testing.assert_close(store.statistics(SITES[0]).mean, rows.double().mean(0))


def test_every_row_leads_back_to_its_text(made, corpus):
    texts = {d.document: d for d in corpus.sections(None)}  # each is one section
    order = torch.randperm(made.num_rows, generator=torch.Generator().manual_seed(0))
    found = made.locate(order)
    for i, row in enumerate(order.tolist()):
        document = texts[int(found.document[i])]
        token = int(document.text.split()[int(found.offset[i])][1:])
        assert int(found.ids[i, found.position[i]]) == token
        if row % 50 == 0:
            assert made.document(row) == {"name": document.name, "labels": document.labels}
    by_row = made.locate(torch.arange(made.num_rows))
    place = by_row.context * 12 + by_row.position
    assert bool((place.diff() > 0).all()) and bool((by_row.position > 0).all())
    with pytest.raises(UsageError, match="not one of the store's"):
        made.locate(torch.tensor([made.num_rows]))


def test_a_store_of_another_model_is_refused(made, model):
    made.check_model(model.identity())
    with pytest.raises(LlmWsaeError, match="other weights"):
        made.check_model(tiny_model(seed=1).identity())
    with pytest.raises(LlmWsaeError, match=r"in float32, not by .* in bfloat16"):
        made.check_model({**model.identity(), "dtype": "bfloat16"})


def test_unknown_site_is_named(made):
    with pytest.raises(UsageError, match=r"no blocks\.1\.hook_resid_pre; did you mean"):
        made.source(Site(1, "pre"))
    with pytest.raises(UsageError, match="there are no rows 5 to 100000"):
        made.rows(SITES[0], 5, 100_000)


def test_a_lost_shard_leaves_the_others_readable(store):
    path = store.folder / str(SITES[0]) / "00001.safetensors"
    path.unlink()
    with pytest.raises(LlmWsaeError, match=r"cannot read .*00001\.safetensors"):
        store.rows(SITES[0], 0, store.num_rows)
    first = store.manifest.shards[0].rows
    assert len(store.rows(SITES[0], 0, first)) == first


def test_foreign_folders_are_named(store, tmp_path):
    with pytest.raises(LlmWsaeError, match=r"there is no activation store in .*no manifest\.json"):
        ActivationStore.open(tmp_path / "nowhere")
    path = store.folder / MANIFEST
    path.write_text("{")
    with pytest.raises(LlmWsaeError, match="is not a readable record of the activation store"):
        ActivationStore.open(store.folder)


def test_an_incomplete_store_is_refused(store):
    save_record(store.folder, 1, store.manifest.shards[1])
    store.manifest.complete, store.manifest.statistics, store.manifest.shards = False, {}, []
    store.manifest.save(store.folder)
    with pytest.raises(LlmWsaeError, match="is not complete: 28 of 84 contexts"):
        ActivationStore.open(store.folder)
    assert "is not complete" in verify(store.folder).problems[0]


def test_batches_behind_a_failed_one_never_complete_its_shard(store, tmp_path):
    """They may already wait in the writer when it fails."""
    manifest = Manifest.load(store.folder)
    manifest.shards, manifest.complete, manifest.statistics = [], False, {}
    out = tmp_path / "new"
    out.mkdir()
    contexts = store.contexts(0)
    half = type(contexts)(*(a[:14] for a in contexts[:4]), *contexts[4:])
    rows = {s: torch.zeros(int(half.keep.sum()), 16) for s in manifest.sites}
    bad = {s: torch.full_like(r, torch.inf) for s, r in rows.items()}
    message = r"shard 00000: (\d+) of \1 rows hold NaN or infinite"
    with (
        pytest.raises(LlmWsaeError, match=message),
        shard_writer.StoreWriter(out, manifest) as w,
    ):
        w.add(0, half, bad)
        w.add(0, half, rows)
        w.wait()
    assert list(out.rglob("*")) == []


def test_documents_of_a_shard(made, corpus):
    tensors, metadata = load_tensors(made.folder / "tokens/00001.safetensors", "tokens")
    headers = json.loads(metadata["documents"])
    present = tensors["document"][tensors["document"] >= 0].unique().tolist()
    assert [int(key) for key in headers] == present
    documents = {s.document: s for s in corpus.sections(None)}
    assert headers == {str(number): documents[number].header() for number in present}
