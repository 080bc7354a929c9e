"""Several stores are read as one: the same rows and batches, merged statistics."""

import shutil
from dataclasses import replace
from itertools import islice

import pytest
import torch
from tiny import tiny_model, write_jsonl

from llm_wsae.data import covariance
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.covariance import second_moment_of
from llm_wsae.data.harvesting import harvest
from llm_wsae.data.shuffling import shuffled_batches
from llm_wsae.data.store import ActivationStore
from llm_wsae.data.stores import open_stores
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.site import Site
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment
from llm_wsae.training.arm import make_arms
from llm_wsae.training.checkpoint import check_same_rows
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import train
from llm_wsae.weights.loss_weights import choose_weights
from llm_wsae.weights.weighing import measure_inputs

SITE = Site.parse("blocks.1.hook_resid_post")
CONFIG = HarvestConfig(tokens=3000, context_size=16, batch_tokens=256, shard_tokens=1024)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Of three texts; the second in other shards."""
    place = tmp_path_factory.mktemp("stores")
    for number, size in enumerate((1024, 512, 1024)):
        text = write_jsonl(place / f"text{number}.jsonl", [20 + number] * 300)
        config = replace(CONFIG, shard_tokens=size)
        harvest(model, Corpus.open(str(text), "train"), [SITE], place / f"s{number}", config)
    return [place / f"s{number}" for number in range(3)]


@pytest.fixture(scope="module")
def stores(folders):
    return [ActivationStore.open(folder) for folder in folders]


@pytest.fixture
def joined(folders):
    return open_stores(folders)


class Whole:
    """The same rows in memory."""

    def __init__(self, rows):
        self.rows, self.num_rows = rows, len(rows)
        self.row_bytes, self.dtype = rows[0].nbytes, rows.dtype

    def read(self, start, out):
        out.copy_(self.rows[start : start + len(out)])


def every_row(stores):
    return torch.cat([store.rows(SITE, 0, store.num_rows) for store in stores])


def test_rows_and_batches_are_those_of_one_store_after_the_other(stores, joined):
    rows = every_row(stores)
    assert joined.num_rows == len(rows) == sum(store.num_rows for store in stores)
    assert torch.equal(joined.rows(SITE, 0, len(rows)), rows)
    first = stores[0].num_rows
    assert torch.equal(joined.rows(SITE, first - 5, first + 5), rows[first - 5 : first + 5])
    expected = shuffled_batches(Whole(rows), 100, seed=3)
    for one, other in islice(zip(joined.source(SITE).batches(100, 3), expected, strict=True), 120):
        assert torch.equal(one, other)


def test_one_store_is_that_store(folders, stores):
    assert open_stores(folders[:1]).identity(SITE) == stores[0].identity(SITE)


def test_statistics_are_those_of_all_rows(stores, joined):
    rows = every_row(stores)
    where = torch.cat([store.locate(torch.arange(store.num_rows)).position for store in stores])
    whole, found = Statistics(16, 16).update(rows, where), joined.statistics(SITE)
    assert found.count == whole.count and found.massive_count == whole.massive_count
    assert torch.equal(found.minimum, whole.minimum) and torch.equal(found.maximum, whole.maximum)
    torch.testing.assert_close(found.mean, whole.mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.variance, whole.variance, rtol=1e-6, atol=0)


def test_the_covariance_is_added_up_without_a_pass(stores, joined, monkeypatch):
    whole = SecondMoment(16).update(every_row(stores).float())
    monkeypatch.setattr(covariance, "_sums_of_parts", pytest.fail)
    found, wanted = second_moment_of(joined, SITE).to_tensors(), whole.to_tensors()
    torch.testing.assert_close(found["scatter"], wanted["scatter"], rtol=1e-4, atol=1e-4)


def test_a_threshold_that_leaves_out_other_rows_needs_a_pass(folders, joined, monkeypatch):
    monkeypatch.setattr(Statistics, "same_are_massive", lambda own, other: False)
    before = second_moment_of(joined, SITE)
    kept = list((folders[0] / "evidence").glob(f"{SITE}.second_moment.*.safetensors"))
    assert len(kept) == 1  # beside that of the first store alone
    monkeypatch.setattr(covariance, "_sums_of_parts", pytest.fail)
    again = second_moment_of(joined, SITE).to_tensors()
    assert torch.equal(again["scatter"], before.to_tensors()["scatter"])


def test_rows_know_their_documents(stores, joined):
    rows = torch.arange(joined.num_rows)
    found, before = joined.locate(rows), 0
    for store in stores:
        own = store.locate(torch.arange(store.num_rows))
        here = slice(before, before + store.num_rows)
        for name in ("position", "offset", "ids"):
            assert torch.equal(getattr(found, name)[here], getattr(own, name))
        assert joined.document(before + 7) == store.document(7)
        before += store.num_rows
    sizes = [store.text_size().documents for store in stores]
    assert joined.text_size().documents == sum(sizes)


def test_a_training_resumes_wherever_the_stores_are_but_in_that_order(folders, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]
    config = TrainConfig(batch_size=128, expansion=2, dtype="float32")

    def trained(stores, out):
        weights = choose_weights(measure_inputs(["whitening"], stores, SITE), ["whitening"], [0.5])
        train(stores.source(SITE), make_arms(weights, (4,), (), (0,), ("topk",)), config, out)
        return next(out.glob("*/sae_weights.safetensors")).read_bytes()

    out = tmp_path / "trained"
    assert trained(open_stores(folders), out) == trained(open_stores(copies), tmp_path / "again")
    check_same_rows(out, open_stores(copies).source(SITE).identity())
    for other in (folders[::-1], folders[:2]):
        with pytest.raises(LlmWsaeError, match="other settings"):
            check_same_rows(out, open_stores(other).source(SITE).identity())


def test_the_corpus_is_all_texts(joined):
    corpus = joined.source(SITE).identity()["corpus"]
    assert corpus["name"] == "text0.jsonl+text1.jsonl+text2.jsonl" and corpus["part"] == "train"


def test_what_cannot_be_read_together_is_refused(model, folders, tmp_path):
    first, second, _ = folders
    text = str(folders[0].parent / "text2.jsonl")

    def other(name, part="train", model=model, **changes):
        corpus = Corpus.open(text, part)
        return harvest(model, corpus, [SITE], tmp_path / name, replace(CONFIG, **changes)).folder

    with pytest.raises(UsageError, match="name at least one"):
        open_stores([])
    with pytest.raises(UsageError, match="is listed twice; name each store once"):
        open_stores([first, second, first])
    with pytest.raises(LlmWsaeError, match=r"does not fit .*packing context_size: 16 in the first"):
        open_stores([first, other("short", context_size=8)])
    with pytest.raises(LlmWsaeError, match=r"does not fit .*model weights_sha256"):
        open_stores([first, other("model", model=tiny_model(seed=5))])
    with pytest.raises(LlmWsaeError, match=r"part: .train. in the first store, .heldout."):
        open_stores([first, other("heldout", part="heldout", tokens=500)])


def test_the_same_text_twice_is_refused(model, folders, tmp_path):
    def of(name, text, tokens):
        corpus = Corpus.open(str(text), "train")
        return harvest(
            model, corpus, [SITE], tmp_path / name, replace(CONFIG, tokens=tokens)
        ).folder

    text = folders[0].parent / "text0.jsonl"
    with pytest.raises(LlmWsaeError, match=r"the beginning of text0\.jsonl"):
        open_stores([folders[0], of("same", text, 1000)])
    more = tmp_path / "more"
    more.mkdir()
    (more / "text0.jsonl").write_text(text.read_text() + '{"text": "w1 w2 w3"}\n')
    with pytest.raises(LlmWsaeError, match="documents, such as"):
        open_stores([folders[0], of("longer", more / "text0.jsonl", 3000)])
