"""What a store holds and where it came from; several stores are read as one."""

import os
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from refusals import fails, misused
from tiny import tiny_model, write_jsonl

from llm_wsae.artifact.files import save_tensors
from llm_wsae.commands.verifying import verify
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import StoreWriter, harvest
from llm_wsae.data.packing import Packer
from llm_wsae.data.rows import ArrayRows
from llm_wsae.data.store import ActivationStore, Manifest, open_stores, save_record
from llm_wsae.errors import LlmWsaeError
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import SecondMoment, Statistics
from llm_wsae.statistics.uncertainty import TextSize

SITES = [Site(1, "post"), Site(0, "pre")]
SITE = SITES[0]
CONFIG = HarvestConfig(context_size=12, tokens=1000, batch_tokens=48, shard_tokens=300)


@pytest.fixture(scope="module")
def made(model, corpus, tmp_path_factory):
    return harvest(model, corpus, SITES, tmp_path_factory.mktemp("made") / "store", CONFIG)


@pytest.fixture
def store(made, tmp_path):
    """A copy that a test may damage."""
    return ActivationStore.open(shutil.copytree(made.folder, tmp_path / "store"))


def expected_rows(model, corpus, site):
    """The rows as the definition has them: one context at a time."""
    rows = []
    contexts = Packer.for_model(model, CONFIG).contexts(corpus)
    for context in islice(contexts, CONFIG.num_contexts):
        hidden = model.activations(torch.from_numpy(context.ids)[None], [site])[site][0]
        rows.append(hidden[torch.from_numpy(context.keep)])
    return torch.cat(rows)


def test_any_user_that_may_read_new_files_may_read_a_tensor_file(tmp_path):
    beside, path = tmp_path / "a.txt", tmp_path / "a.safetensors"
    beside.touch()
    save_tensors(path, {"x": torch.ones(2)})
    assert path.stat().st_mode == beside.stat().st_mode


def test_rows_and_statistics_are_those_of_the_model(made, model, corpus, tmp_path):
    assert made.sites == [Site(0, "pre"), Site(1, "post")]
    assert made.d_in == 16 and made.context_size == 12
    for site in SITES:
        rows = made.rows(site, 0, made.num_rows)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, expected_rows(model, corpus, site), rtol=1e-5, atol=1e-6)
        assert torch.equal(rows[40:90], made.rows(site, 40, 90))  # across a shard's end
        statistics, exact = made.statistics(site), rows.double()
        assert statistics.count == made.num_rows
        torch.testing.assert_close(statistics.mean, exact.mean(0))
        torch.testing.assert_close(statistics.variance, exact.var(0, correction=0))
        usual = exact[rows.norm(dim=1) <= statistics.massive_threshold]
        moment = made.second_moment(site)
        assert moment.count == len(usual)
        scatter = moment.to_tensors()["scatter"] / len(usual)
        torch.testing.assert_close(scatter, torch.cov(usual.T, correction=0), rtol=1e-6, atol=1e-9)
    config = replace(CONFIG, dtype="bfloat16")
    half = harvest(model, corpus, SITES[:1], tmp_path / "half", config)
    rows = half.rows(SITE, 0, half.num_rows)
    assert torch.equal(rows, made.rows(SITE, 0, made.num_rows).bfloat16())
    # the statistics are of the rows as stored
    torch.testing.assert_close(half.statistics(SITE).mean, rows.double().mean(0))


def test_manifest_says_what_the_rows_are(made, model, corpus):
    found = Manifest.load(made.folder)
    assert found.model == model.identity() and found.corpus == corpus.identity()
    assert found.packing == CONFIG.packing() and found.complete and found.num_contexts == 84
    assert [shard.contexts for shard in found.shards] == [28, 28, 28]
    on_disk = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*.safetensors")}
    covariances = {f"evidence/{site}.second_moment.safetensors" for site in SITES}
    assert on_disk == set(found.all_files()) | covariances
    assert verify(made.folder).problems == []


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
    assert bool(((by_row.context * 12 + by_row.position).diff() > 0).all())
    assert bool((by_row.position > 0).all())
    assert made.text_size() == TextSize.of(by_row.document.numpy())
    assert made.text_size().documents > 40 and made.text_size(100).tokens == 100
    for shard in range(3):
        own, headers = made.contexts(shard).document, made.contexts(shard).headers
        assert list(headers) == np.unique(own[own >= 0]).tolist()


def test_what_a_store_does_not_have(made, model, store, tmp_path):
    other, half = tiny_model(seed=1).identity(), {**model.identity(), "dtype": "bfloat16"}
    made.check_model(model.identity())
    (store.folder / str(SITE) / "00001.safetensors").unlink()
    first = store.manifest.shards[0].rows
    assert len(store.rows(SITE, 0, first)) == first
    fails("other weights", made.check_model, other)
    fails(r"in float32, not by .* in bfloat16", made.check_model, half)
    misused("no blocks.1.hook_resid_pre; did", made.source, Site(1, "pre"))
    misused("there are no rows 5 to 100000", made.rows, SITE, 5, 100_000)
    misused("not one of the store's", made.locate, torch.tensor([made.num_rows]))
    fails("cannot read .*00001", store.rows, SITE, 0, store.num_rows)
    fails("there is no activation store in", ActivationStore.open, tmp_path)


def test_a_fifo_among_the_rows_is_not_waited_for(store, tmp_path):
    folder, site = shutil.copytree(store.folder, tmp_path / "with fifo"), store.sites[0]
    path = folder / str(site) / "00000.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(LlmWsaeError, match=r"00000\.safetensors is no file; delete it"):
        ActivationStore.open(folder).rows(site, 0, 1)


def test_an_incomplete_store_is_refused(store):
    save_record(store.folder, 1, store.manifest.shards[1])
    store.manifest.complete, store.manifest.statistics, store.manifest.shards = False, {}, []
    store.manifest.save(store.folder)
    fails("is not complete: 28 of 84 contexts", ActivationStore.open, store.folder)
    assert "is not complete" in verify(store.folder).problems[0]


def test_batches_behind_a_failed_one_never_complete_its_shard(store, tmp_path):
    """They may already wait in the writer when it fails."""
    contexts = store.contexts(0)
    half = type(contexts)(*(a[:14] for a in contexts[:4]), *contexts[4:])
    good, bad = (
        {s: torch.full((int(half.keep.sum()), 16), value) for s in store.manifest.sites}
        for value in (0.0, torch.inf)
    )
    message = r"shard 00000: (\d+) of \1 rows hold NaN or infinite"
    with (
        pytest.raises(LlmWsaeError, match=message),
        StoreWriter(tmp_path / "new", store.manifest) as writer,
    ):
        for batch in (bad, good, good):
            writer.add(0, half, batch)
        writer.wait()
    assert not (tmp_path / "new").exists()


# --- Several stores


SIXTEEN = HarvestConfig(tokens=1600, context_size=16, batch_tokens=256, shard_tokens=1024)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Of three texts; the second in other shards."""
    place = tmp_path_factory.mktemp("stores")
    for number, size in enumerate((1024, 512, 1024)):
        text = write_jsonl(place / f"text{number}.jsonl", [20 + number] * 150)
        config = replace(SIXTEEN, shard_tokens=size)
        harvest(model, Corpus.open(str(text), "train"), [SITE], place / f"s{number}", config)
    return [place / f"s{number}" for number in range(3)]


@pytest.fixture(scope="module")
def stores(folders):
    return [ActivationStore.open(folder) for folder in folders]


@pytest.fixture
def joined(folders):
    return open_stores(folders)


@pytest.fixture(scope="module")
def every_row(stores):
    return torch.cat([store.rows(SITE, 0, store.num_rows) for store in stores])


def test_rows_and_batches_are_those_of_one_store_after_the_other(stores, joined, every_row):
    assert joined.num_rows == len(every_row)
    assert torch.equal(joined.rows(SITE, 0, len(every_row)), every_row)
    first = stores[0].num_rows
    assert torch.equal(joined.rows(SITE, first - 5, first + 5), every_row[first - 5 : first + 5])
    expected = ArrayRows(every_row, SITE).batches(100, 3)
    for one, other in islice(zip(joined.source(SITE).batches(100, 3), expected, strict=True), 60):
        assert torch.equal(one, other)
    found, before = joined.locate(torch.arange(joined.num_rows)), 0
    for store in stores:
        own = store.locate(torch.arange(store.num_rows))
        here = slice(before, before + store.num_rows)
        for name in ("position", "offset", "ids"):
            assert torch.equal(getattr(found, name)[here], getattr(own, name))
        assert joined.document(before + 7) == store.document(7)
        before += store.num_rows
    sizes = [store.text_size().documents for store in stores]
    assert joined.text_size().documents == sum(sizes)


def test_statistics_and_covariance_are_those_of_all_rows(stores, joined, every_row):
    where = torch.cat([store.locate(torch.arange(store.num_rows)).position for store in stores])
    whole, found = Statistics(16, 16).update(every_row, where), joined.statistics(SITE)
    assert found.count == whole.count and found.massive_count == whole.massive_count
    assert torch.equal(found.minimum, whole.minimum) and torch.equal(found.maximum, whole.maximum)
    torch.testing.assert_close(found.mean, whole.mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.variance, whole.variance, rtol=1e-6, atol=0)
    moment = joined.second_moment(SITE).to_tensors()["scatter"]  # added up
    wanted = SecondMoment(16).update(every_row.float()).to_tensors()["scatter"]
    torch.testing.assert_close(moment, wanted, rtol=1e-4, atol=1e-4)
    assert len(list((joined.folder / "evidence").iterdir())) == 1


def test_a_covariance_that_cannot_be_added_up_is_measured_and_kept(folders, joined, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]
    shutil.rmtree(copies[1] / "evidence")
    found, again, wanted = (
        store.second_moment(SITE).to_tensors()["scatter"]
        for store in (open_stores(copies), open_stores(copies), joined)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, again)
    assert len(list((copies[0] / "evidence").iterdir())) == 2  # beside that of the first alone


def test_identity_follows_the_stores_and_their_order_but_not_their_place(folders, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]
    identity = open_stores(folders).identity(SITE)
    assert identity["corpus"]["name"] == "text0.jsonl+text1.jsonl+text2.jsonl"
    assert open_stores(copies).identity(SITE) == identity
    for other in (folders[::-1], folders[:2], folders[:1]):
        assert open_stores(other).identity(SITE)["sha256"] != identity["sha256"]
    alone = ActivationStore.open(folders[0])
    assert open_stores(folders[:1]).identity(SITE) == alone.identity(SITE)


def test_what_cannot_be_read_together_is_refused(model, folders, tmp_path):
    first, second, _ = folders

    def other(name, part="train", model=model, text=2, **changes):
        corpus = Corpus.open(str(folders[0].parent / f"text{text}.jsonl"), part)
        config = replace(SIXTEEN, **{"tokens": 200} | changes)
        return harvest(model, corpus, [SITE], tmp_path / name, config).folder

    not_fit = "does not fit .*"
    for message, third in (
        ("hold the same text", first),
        (f"{not_fit}packing context_size: 16 in the first", other("short", context_size=8)),
        (f"{not_fit}model weights_sha256", other("model", model=tiny_model(seed=5))),
        ("part: .train. in the first store, .heldout.", other("heldout", part="heldout")),
        (r"the beginning of text0\.jsonl", other("same", text=0)),
    ):
        fails(message, open_stores, [first, second, third])
    misused("name at least one", open_stores, [])
