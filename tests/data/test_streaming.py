"""Rows that go from the model straight into training."""

import hashlib
import json
import re
import shutil
import threading
from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch
from refusals import fails, misused
from tiny import tiny_model, write_jsonl

from llm_wsae.commands.verifying import verify
from llm_wsae.data.config import HarvestConfig, StreamConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest, kept_rows
from llm_wsae.data.packing import Packer
from llm_wsae.data.rows import ActivationSource
from llm_wsae.data.streaming import ActivationStream, ActivationStreams
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import read_folder
from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine import hardware
from llm_wsae.model.site import Site
from llm_wsae.training.arm import make_arms
from llm_wsae.training.checkpoint import CHECKPOINT, is_finished
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.trainer import train, train_sites
from llm_wsae.weights.config import RuleInputConfig
from llm_wsae.weights.loss_weights import choose_weights
from llm_wsae.weights.scoring import RuleInputs
from llm_wsae.weights.weighing import measure_inputs

SITES = [Site(0, "pre"), Site(1, "post")]
STREAM = StreamConfig(context_size=12, batch_tokens=48, buffer_tokens=500, statistics_tokens=700)
TRAIN = TrainConfig(expansion=2, tokens=64 * 40, batch_size=64, log_every=10, device="cpu")


@pytest.fixture
def streams(model, corpus):
    return ActivationStreams(model, corpus, SITES, STREAM)


def files(folder):
    """What a training leaves, without what holds times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_stream_gives_the_rows_of_the_corpus_shuffled_again_and_again(model, corpus, capsys):
    stream = ActivationStream(model, corpus, SITES[1], STREAM)
    assert isinstance(stream, ActivationSource) and stream.num_rows is None
    blocks = list(Packer.for_model(model, STREAM).blocks(corpus, 4))
    assert len(blocks) % 10  # a buffer of ten mixes the end of the corpus with its beginning
    rows = [kept_rows(model, block, SITES)[SITES[1]] for block in blocks]
    rows, batches = cycle(rows), stream.batches(1, seed=0)
    for _ in range(2 * len(blocks) // 10):
        expected = torch.cat(list(islice(rows, 10)))
        found = torch.cat(list(islice(batches, len(expected))))
        assert not torch.equal(found, expected)
        assert torch.equal(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])
    said = capsys.readouterr().err
    assert said.count("it is read again") == 1
    assert re.search(r"text.jsonl ends after 4,5\d\d rows", said)


def test_statistics_covariance_and_identity(streams, model, corpus):
    blocks = Packer.for_model(model, STREAM).blocks(corpus, 4, limit=58)
    rows = torch.cat([kept_rows(model, block, SITES)[SITES[1]] for block in blocks]).double()
    statistics, moment = streams.statistics(SITES[1]), streams.second_moment(SITES[1])
    assert statistics.count == moment.count == len(rows)
    torch.testing.assert_close(statistics.mean, rows.mean(0))
    scatter = moment.to_tensors()["scatter"] / len(rows)
    torch.testing.assert_close(scatter, torch.cov(rows.T, correction=0), rtol=1e-5, atol=1e-7)
    own = streams.identity(SITES[1])
    assert own == ActivationStream(model, corpus, SITES[1], STREAM).identity()
    other = replace(STREAM, buffer_tokens=1000)
    assert own != ActivationStream(model, corpus, SITES[1], other).identity()


def test_stream_errors(model, corpus, tmp_path):
    tiny = Corpus.open(str(write_jsonl(tmp_path / "a.jsonl", [3])), "all")
    batches = ActivationStream(model, tiny, SITES[1], STREAM).batches(5, 0)
    fails("fills contexts of 12 with 0 tokens", next, batches)
    without_rows = replace(STREAM, drop_positions=8, one_document_per_context=True)
    short = Corpus.open(str(write_jsonl(tmp_path / "b.jsonl", [6] * 30)), "all")
    for read in (lambda s: next(s.batches(5, 0)), lambda s: s.statistics()):
        with pytest.raises(LlmWsaeError, match="no token of these documents gives a row; lower"):
            read(ActivationStream(model, short, SITES[1], without_rows))
    broken = tiny_model()
    broken.hf_model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    batches = ActivationStream(broken, corpus, SITES[1], STREAM).batches(5, 0)
    fails(r"blocks\.1\.hook_resid_post from section 0 of text", next, batches)


def test_several_sites_have_the_rows_of_one_from_any_batch_on(streams, model, corpus):
    together = list(islice(streams.batches(SITES, 64, seed=3), 30))
    for start in (1, 7, 29):
        own = next(streams.batches(SITES, 64, 3, start))
        assert all(map(torch.equal, own, together[start]))
    assert not torch.equal(next(streams.batches(SITES, 64, seed=4))[0], together[0][0])
    for number, site in enumerate(SITES):
        alone = ActivationStream(model, corpus, site, STREAM)
        for source in (alone, streams.source(site)):
            for own, batch in zip(islice(source.batches(64, seed=3), 30), together, strict=True):
                assert torch.equal(own, batch[number])
        assert torch.equal(streams.statistics(site).mean, alone.statistics().mean)


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_the_parts_of_a_batch_are_the_batch(streams, model, corpus, parts):
    """Each process has its own rows, and needs no forward pass of the others'."""
    whole = islice(streams.batches(SITES, 64, seed=3, start=5), 20)
    shares = [streams.batches(SITES, 64, 3, 5, (number, parts)) for number in range(parts)]
    sizes = []
    for batch in whole:
        pieces = [next(share) for share in shares]
        for site, rows in enumerate(batch):
            found = torch.cat([piece[site] for piece in pieces])
            assert torch.equal(found[found[:, 0].argsort()], rows[rows[:, 0].argsort()])
        sizes.append([len(piece[0]) for piece in pieces])
    assert parts == 50 or min(map(sum, zip(*sizes, strict=True))) > 0.7 * 64 * 20 / parts


def test_batches_that_are_computed_ahead_end_while_the_text_is_awaited(streams):
    """As on a GPU, where a thread waits for the text when the last batch is taken."""
    blocks, waits, goes_on = streams._endless_blocks(), threading.Event(), threading.Event()

    def slow():
        yield from islice(blocks, 20)
        waits.set()
        goes_on.wait(5)
        yield from blocks

    streams._endless_blocks, streams._computes_ahead = slow, True
    batches = streams.batches(SITES, 8, seed=0)
    next(batches)
    assert waits.wait(5)
    threading.Timer(0.2, goes_on.set).start()
    batches.close()


@pytest.fixture(scope="module")
def whole(model, corpus, tmp_path_factory):
    """Two sites in step: the arms by site, and the folder of the finished training."""
    streams, folder = ActivationStreams(model, corpus, SITES, STREAM), tmp_path_factory.mktemp("w")
    arms = {}
    for site in SITES:
        inputs = RuleInputs(streams.statistics(site), second_moment=streams.second_moment(site))
        arms[site] = make_arms(choose_weights(inputs, ("uniform", "whitening"), (0.5,)), (4,))
    train_sites(streams, arms, TRAIN, folder)
    return arms, folder


def test_sites_in_step_are_trained_as_alone(whole, streams, tmp_path, monkeypatch):
    arms, together = whole
    for site in SITES:
        train(streams.source(site), arms[site], TRAIN, tmp_path / str(site))
        assert files(tmp_path / str(site)) == files(together / str(site))
    found = verify(together)
    assert found.checks and not found.problems
    enough = 24 * len(arms[site]) * TRAIN.expansion * streams.d_in**2  # bytes for one site alone
    monkeypatch.setattr(hardware, "memory_of", lambda device: enough)
    misused("GiB of memory, but", train_sites, streams, arms, TRAIN, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    train(streams.source(site), arms[site], TRAIN, tmp_path / "one")


class Broken(ActivationStreams):
    """Streams whose text ends in an error at a batch."""

    def __init__(self, streams, at):
        vars(self).update(vars(streams))
        self._at = at

    def batches(self, sites, batch_size, seed, start=0, part=(0, 1)):
        whole = super().batches(sites, batch_size, seed, start, part)
        yield from islice(whole, self._at - start)
        raise LlmWsaeError("the connection to the text broke")


def test_what_was_trained_is_kept_when_the_text_fails(whole, streams, tmp_path):
    arms, finished = whole
    for again in (False, True):  # without a step between the two
        given = (Broken(streams, 17), arms, TRAIN, tmp_path / "t")
        said = fails("connection to the text broke", train_sites, *given)
        assert "(stopped after step 17 of 40, 1,088 of 2,560 rows; the dictionaries so far" in said
        names = [f"{site}/{arm.name}" for site in SITES for arm in arms[site]]
        for folder in (tmp_path / "t" / name for name in names):
            early = Dictionary.load(folder)
            assert early.info.training["step"] == 17
            assert torch.isfinite(early.W_dec).all()
            if not again:
                shutil.rmtree(folder)
    train_sites(streams, arms, TRAIN, tmp_path / "t")
    assert files(tmp_path / "t") == files(finished)
    assert "step" not in Dictionary.load(folder).info.training
    nothing = tmp_path / "nothing"
    fails(r"broke$", train_sites, Broken(streams, 0), arms, TRAIN, nothing)  # nothing was learnt
    assert not list(tmp_path.glob("nothing/*/*.safetensors"))


def test_a_site_whose_checkpoint_is_newer_waits(whole, streams, tmp_path):
    """A kill between the checkpoints of two sites, or between the ends of two."""
    arms, finished = whole
    stopped = {40: finished}
    for at in (9, 23):
        stopped[at] = tmp_path / str(at)
        with pytest.raises(LlmWsaeError):
            train_sites(Broken(streams, at), arms, TRAIN, stopped[at])
    for steps in ((9, 23), (23, 9), (40, 23)):
        mixed = tmp_path / str(steps)
        for site, at in zip(map(str, SITES), steps, strict=True):
            shutil.copytree(stopped[at] / site, mixed / site)
        train_sites(streams, arms, TRAIN, mixed)
        assert files(mixed) == files(finished)
        assert not list(mixed.rglob(CHECKPOINT))
        assert all(is_finished(mixed / str(site)) for site in SITES)


def test_what_was_measured_is_kept_and_read_back(model, corpus, tmp_path):
    first = ActivationStreams(model, corpus, SITES, STREAM, tmp_path)
    statistics, moment = first.statistics(SITES[0]), first.second_moment(SITES[1])
    other = tiny_model(seed=1)
    other.identity = model.identity  # if it computed anything, that would be something else
    again = ActivationStreams(other, corpus, SITES, STREAM, tmp_path)
    assert torch.equal(again.statistics(SITES[0]).mean, statistics.mean)
    assert torch.equal(again.second_moment(SITES[1]).mean, moment.mean)
    few = RuleInputConfig(sensitivity_tokens=300)
    fisher, kept, other = (
        measure_inputs(["sensitivity"], streams, SITES[1], config=config).fisher
        for streams, config in ((first, few), (again, few), (first, replace(few, seed=1)))
    )
    assert torch.equal(kept, fisher) and not torch.allclose(other, fisher)
    more = replace(STREAM, statistics_tokens=1400)
    longer = ActivationStreams(model, corpus, SITES, more, tmp_path)
    assert longer.statistics(SITES[0]).count > statistics.count
    path = tmp_path / f"{SITES[0]}.statistics.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    damaged = ActivationStreams(model, corpus, SITES, STREAM, tmp_path)
    assert torch.equal(damaged.statistics(SITES[0]).mean, statistics.mean)  # measured again


def test_a_dictionary_says_whether_its_contexts_began_with_a_bos(corpus, tmp_path):
    """Not every tokenizer has one, and packing only asks for it."""
    few = replace(TRAIN, tokens=64)
    for bos, asked, expected in ((True, True, True), (True, False, False), (False, True, False)):
        model, folder = tiny_model(bos=bos), tmp_path / f"{bos} {asked}"
        config = HarvestConfig(context_size=12, tokens=500, prepend_bos=asked)
        store = harvest(model, corpus, SITES[1:], folder / "store", config)
        stream = ActivationStream(model, corpus, SITES[1], replace(STREAM, prepend_bos=asked))
        for kind, source in (("stored", store.source(SITES[1])), ("streamed", stream)):
            arms = make_arms(choose_weights(source.statistics(), ("uniform",), (1.0,)), (4,))
            train(source, arms, few, folder / kind)
            info = read_folder(folder / kind / "uniform-k4").info
            assert info.prepend_bos is expected, (kind, bos, asked)
            assert info.store["packing"]["prepend_bos"] is asked  # identities stay as they were
            cfg = json.loads((folder / kind / "uniform-k4" / "cfg.json").read_text())
            assert cfg["metadata"]["prepend_bos"] is expected
