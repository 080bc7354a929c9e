"""Stores that separate jobs harvested become one that reads like any other."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, words

from llm_wsae.data import covariance, merging
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.covariance import second_moment_of
from llm_wsae.data.manifest import MANIFEST, Manifest
from llm_wsae.data.merging import merge
from llm_wsae.data.store import ActivationStore
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.files import read_own_json, write_json
from llm_wsae.harvesting import harvest
from llm_wsae.model.site import Site
from llm_wsae.statistics import moments
from llm_wsae.verifying import verify_store

SITES = [Site(0, "pre"), Site(1, "post")]
CONFIG = HarvestConfig(context_size=12, tokens=1000, batch_tokens=48, shard_tokens=300)
ONE_EACH = replace(CONFIG, one_document_per_context=True, tokens=1)
LENGTHS = [7 * i % 50 + 1 for i in range(130)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def write_texts(path, seed, lengths):
    """One document of random words per length."""
    rows = [{"text": words(seed + i, length)} for i, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number, name in enumerate("abc"):
        write_texts(folder / f"{name}.jsonl", 500 * number, LENGTHS)
    return folder


@pytest.fixture(scope="module")
def stores(model, texts, tmp_path_factory):
    """Of the same settings, none of which fills its last shard; the third has smaller shards."""
    folder = tmp_path_factory.mktemp("stores")

    def made(name, **changes):
        corpus, config = Corpus.open(str(texts / f"{name}.jsonl")), replace(CONFIG, **changes)
        return harvest(model, corpus, SITES, folder / name, config).folder

    return [made("a"), made("b", tokens=1500), made("c", batch_tokens=24, shard_tokens=100)]


@pytest.fixture(scope="module")
def merged(stores, tmp_path_factory):
    return merge(stores, tmp_path_factory.mktemp("merged") / "s")


def files(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def is_of_a_shard(name):
    return "/" in name and "/statistics." not in name and not name.startswith("evidence/")


def test_the_rows_are_those_of_the_parts_and_every_file_keeps_its_digest(stores, tmp_path):
    before = [files(store) for store in stores]
    merged, parts = merge(stores, tmp_path / "s"), [ActivationStore.open(s) for s in stores]
    assert [files(store) for store in stores] == before
    assert verify_store(merged.folder) == []
    assert merged.num_rows == sum(part.num_rows for part in parts)
    for site in SITES:
        rows = torch.cat([part.rows(site, 0, part.num_rows) for part in parts])
        assert torch.equal(merged.rows(site, 0, merged.num_rows), rows)
    contents = [digest for part in before for name, digest in part.items() if is_of_a_shard(name)]
    assert sorted(contents) == sorted(
        digest for name, digest in files(merged.folder).items() if is_of_a_shard(name)
    )
    assert [shard.contexts for shard in merged.manifest.shards] == [
        *(28, 28, 28), *(28, 28, 28, 28, 13), *(10, 10, 10, 10, 10, 10, 10, 10, 4)
    ]  # fmt: skip


def test_every_row_leads_back_to_its_text(merged, stores, texts):
    names = {}
    first = 0
    for store, name in zip(stores, "abc", strict=True):
        part = ActivationStore.open(store)
        corpus = Corpus.open(str(texts / f"{name}.jsonl"))
        documents = {s.document: s for s in corpus.sections(None)}
        found = merged.locate(torch.arange(first, first + part.num_rows))
        for row, own in enumerate(part.locate(torch.arange(part.num_rows)).document.tolist()):
            number = int(found.document[row])
            assert names.setdefault(number, documents[own].name) == documents[own].name
            word = documents[own].text.split()[int(found.offset[row])]
            assert f"w{int(found.ids[row, found.position[row]])}" == word
            if row % 100 == 0:
                assert merged.document(first + row)["name"] == documents[own].name
        first += part.num_rows
    assert len(set(names.values())) == len(names)  # no two documents have one number
    context = merged.locate(torch.arange(merged.num_rows)).context
    assert context.unique().tolist() == list(range(merged.manifest.num_contexts))
    for number in context.unique().tolist():
        shard, place = merged.place_of_context(number)
        assert merged.first_context(shard) + place == number
        assert 0 <= place < len(merged.contexts(shard).ids)
    cursors = [merged.contexts(shard).first for shard in range(len(merged.manifest.shards))]
    assert cursors == sorted(cursors)


def one_harvest_and_its_parts(model, folder, counts):
    """Documents of one context each, in two files: harvested at once, and file by file."""
    texts = [words(i, 5 + i % 7) for i in range(sum(counts))]

    def made(name, texts):
        """A harvest that reads the texts in this order (``data.sections`` shuffles them)."""
        order = np.random.default_rng(0).permutation(len(texts))
        rows = [json.dumps({"text": texts[at]}) for at in np.argsort(order)]
        (path := folder / f"{name}.jsonl").write_text("\n".join(rows))
        config = replace(ONE_EACH, tokens=12 * len(texts))
        return harvest(model, Corpus.open(str(path), "all"), SITES, folder / name, config)

    whole = made("whole", texts)
    parts = [made("a", texts[: counts[0]]), made("b", texts[counts[0] :])]
    return whole, merge([part.folder for part in parts], folder / "merged")


def test_the_statistics_are_those_of_one_harvest(model, tmp_path):
    """Where the parts end within a shard, and within a forward pass."""
    whole, merged = one_harvest_and_its_parts(model, tmp_path, (117, 75))
    for site in SITES:
        torch.testing.assert_close(
            merged.rows(site, 0, merged.num_rows), whole.rows(site, 0, whole.num_rows)
        )
        one, other = whole.statistics(site), merged.statistics(site)
        assert one.count == other.count == whole.num_rows
        assert torch.equal(one._norms.sum(), other._norms.sum())
        assert (one.median_norm, one.massive_threshold, one.massive_positions()) == (
            other.median_norm, other.massive_threshold, other.massive_positions()
        )  # fmt: skip
        for name in ("mean", "variance", "skewness", "excess_kurtosis", "minimum", "maximum"):
            mine, theirs = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6, msg=name)
        assert len(one.sample) == len(other.sample) == whole.num_rows  # few rows: all of them


def test_parts_of_whole_shards_are_one_harvest_to_the_last_byte(model, tmp_path):
    whole, merged = one_harvest_and_its_parts(model, tmp_path, (56, 40))
    one, other = files(whole.folder), files(merged.folder)
    different = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    covariances = {f"evidence/{site}.second_moment.safetensors" for site in SITES}  # are rounded
    # a file of tokens also has the numbers of documents, and their names, which have the file's
    tokens = {f"tokens/{shard:05}.safetensors" for shard in range(4)}
    assert different == {MANIFEST} | tokens | covariances
    for shard in range(4):
        mine, theirs = whole.contexts(shard), merged.contexts(shard)
        assert all(np.array_equal(a, b) for a, b in zip(mine[:4], theirs[:4], strict=True))
        assert mine.headers.keys() == theirs.headers.keys()


@pytest.fixture
def anew(monkeypatch):
    """The sites whose covariance is measured in a pass over the rows."""
    sites, measure = [], covariance._sums_of_parts

    def counted(store, site, *part):
        sites.append(site)
        return measure(store, site, *part)

    monkeypatch.setattr(covariance, "_sums_of_parts", counted)
    return sites


@pytest.fixture
def copies(stores, tmp_path):
    return [shutil.copytree(store, tmp_path / store.name) for store in stores]


def covariance_file(folder, site):
    return folder / "evidence" / f"{site}.second_moment.safetensors"


@pytest.mark.parametrize(("ratio", "lacking"), [(10.0, []), (1.25, SITES[:1])])
def test_the_covariance_is_that_of_a_pass_over_all_rows(
    copies, tmp_path, monkeypatch, anew, ratio, lacking
):
    """The first site's median norm, and so its threshold, is another in the second store. At a
    ratio of 1.25 there are rows between the two, and rows that are left out at both sites."""
    monkeypatch.setattr(moments, "MASSIVE_RATIO", ratio)
    for part, site in product(copies, SITES):
        covariance_file(part, site).unlink()
        second_moment_of(ActivationStore.open(part), site)
    anew.clear()
    merged = merge(copies, tmp_path / "s")
    assert anew == lacking and verify_store(merged.folder) == []
    for site, number in zip(SITES, (2, 1), strict=True):
        own = [ActivationStore.open(part).statistics(site).massive_threshold for part in copies]
        assert len(set(own)) == number
        found = second_moment_of(merged, site)
        assert anew == lacking
        rows = merged.rows(site, 0, merged.num_rows)
        rows = rows[rows.norm(dim=1) <= merged.statistics(site).massive_threshold].double().numpy()
        assert (len(rows) < merged.num_rows) == (ratio < 10)
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-6, atol=1e-9)
        exact = np.cov(rows.T, bias=True)  # products of at most 4096 rows are in float32
        scatter = found.to_tensors()["scatter"] / found.count
        np.testing.assert_allclose(scatter, exact, rtol=1e-6, atol=1e-10)


def test_a_covariance_that_a_store_lacks_is_measured_anew(copies, tmp_path, anew):
    whole = second_moment_of(merge(copies, tmp_path / "whole"), SITES[1])
    shutil.copy(covariance_file(copies[0], SITES[1]), covariance_file(copies[1], SITES[1]))
    for name in ("of other rows", "none"):
        assert anew == []
        merged = merge(copies, tmp_path / name)
        assert anew == SITES[1:]
        found = second_moment_of(merged, SITES[1])
        assert found.count == whole.count
        torch.testing.assert_close(found.covariance(), whole.covariance(), rtol=1e-6, atol=1e-9)
        before = files(merged.folder)
        covariance_file(merged.folder, SITES[0]).unlink()
        merge(copies, merged.folder)  # adds what is missing, leaves what is there
        assert files(merged.folder) == before
        covariance_file(copies[1], SITES[1]).unlink(missing_ok=True)
        anew.clear()


def test_a_merge_of_merges_is_the_merge_of_all(stores, merged, tmp_path):
    two = merge(stores[:2], tmp_path / "two")
    assert files(merge([two.folder, stores[2]], tmp_path / "s").folder) == files(merged.folder)


def test_the_manifest_says_what_the_store_was_made_from(stores, merged, texts):
    parts = [Manifest.load(store) for store in stores]
    value = json.loads((merged.folder / MANIFEST).read_text())
    assert value["format_version"] == 2 and value["corpus"] == {
        "name": "a.jsonl+b.jsonl+c.jsonl",
        "part": "train",
        "heldout_fraction": 0.1,
        "text_column": None,
        "fingerprint": "+".join(part.corpus["fingerprint"] for part in parts),
    }
    for store, own, part in zip(stores, parts, value["parts"], strict=True):
        assert part["sha256"] == hashlib.sha256((store / MANIFEST).read_bytes()).hexdigest()
        for name in ("corpus", "num_contexts", "contexts_per_batch", "contexts_per_shard"):
            assert part[name] == getattr(own, name)
        # a harvest's manifest is what every version of the package reads
        harvested = json.loads((store / MANIFEST).read_text())
        assert harvested["format_version"] == 1 and "parts" not in harvested
    assert (value["contexts_per_shard"], value["num_contexts"]) == (28, 84 + 125 + 84)


def test_manifests_that_no_merge_writes_are_refused(merged, tmp_path):
    folder = shutil.copytree(merged.folder, tmp_path / "s")
    value = read_own_json(folder / MANIFEST, "manifest")
    first, *others = value["parts"]
    for change in (
        {"parts": []},
        {"parts": [first]},
        {"parts": {}},
        {"parts": [{**first, "sha256": "x"}, *others]},
        {"parts": [{**first, "corpus": None}, *others]},
        {"parts": [{**first, "num_contexts": 56}, *others]},
        {"parts": [{**first, "contexts_per_shard": 0}, *others]},
        {"parts": [{**first, "contexts_per_shard": 12}, *others]},
        {"parts": [{**first, "more": 1}, *others]},
        {"contexts_per_shard": 27},
        {"num_contexts": 300},
        {"format_version": 1},
        {"shards": value["shards"][:-1]},
        {"shards": [*value["shards"][:-1], {**value["shards"][-1], "next": [2**31, 0]}]},
    ):
        write_json(folder / MANIFEST, {**value, **change})
        with pytest.raises(LlmWsaeError, match=r"cannot be a harvest's: its .*restore it from"):
            ActivationStore.open(folder)


def test_what_is_held_out_of_each_text_is_held_out_of_the_store(model, merged, texts, tmp_path):
    names = {d["name"] for s in range(len(merged.manifest.shards))
             for d in merged.contexts(s).headers.values()}  # fmt: skip
    together = Corpus.open("+".join(str(texts / f"{n}.jsonl") for n in "abc"), "heldout")
    heldout = {document.name for document in together.documents()}
    assert len(heldout) > 20 and len(names) > 100 and not names & heldout
    assert together.name == merged.manifest.corpus["name"]
    assert together.identity()["fingerprint"] == merged.manifest.corpus["fingerprint"]


def test_stores_of_different_parts_are_refused(model, stores, texts, tmp_path):
    """Also of different texts: what is held out of one would be trained on with the other."""

    def harvested(name, part):
        corpus = Corpus.open(str(texts / f"{name}.jsonl"), part)
        config = replace(CONFIG, tokens=240)
        return harvest(model, corpus, SITES, tmp_path / f"{name}-{part}", config).folder

    heldout, everything = harvested("a", "heldout"), harvested("c", "all")
    silent = shutil.copytree(stores[0], tmp_path / "silent")
    manifest = Manifest.load(silent)
    del manifest.corpus["part"]  # every harvest says it
    manifest.save(silent)
    for given, sentence in (
        ([stores[0], heldout], f"{heldout} holds the heldout part of a.jsonl, but {stores[0]} the "
         "train part of a.jsonl, and what is held out of a text must stay apart; harvest one again "
         "with --part train, or all with --part all to keep nothing apart"),
        ([heldout, stores[1]], f"{stores[1]} holds the train part of b.jsonl, but {heldout} the "
         "heldout part of a.jsonl, and what is held out of a text must stay apart; harvest one "
         "again with --part train, or"),
        ([*stores[:2], everything], f"{everything} holds the all part of c.jsonl, but {stores[0]}"),
        ([everything, heldout], "harvest one again with --part heldout, or all with --part all"),
        ([silent, stores[1]], f"holds the train part of b.jsonl, but {silent} the None part of a."),
    ):  # fmt: skip
        with pytest.raises(LlmWsaeError, match=re.escape(sentence)):
            merge(given, tmp_path / "s")
        assert not (tmp_path / "s").exists()
    both = merge([heldout, harvested("b", "heldout")], tmp_path / "both")
    assert both.manifest.corpus["part"] == "heldout"
    with pytest.raises(LlmWsaeError, match=r"holds the heldout part of a\.jsonl\+b\.jsonl, but"):
        merge([stores[2], both.folder], tmp_path / "s")


def test_a_store_that_does_not_fit_is_refused_by_the_setting(model, stores, texts, tmp_path):
    def refused(message, model=model, sites=SITES, **changes):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        corpus = Corpus.open(str(texts / "b.jsonl"))
        config = replace(CONFIG, **{"tokens": 200, **changes})
        other = harvest(model, corpus, sites, tmp_path / "other", config)
        with pytest.raises(LlmWsaeError, match=message) as caught:
            merge([stores[0], other.folder], tmp_path / "s")
        assert str(caught.value).startswith(f"{other.folder} does not fit {stores[0]} (")
        assert not (tmp_path / "s").exists()

    refused(r"\(packing context_size is 16, not 12\); merge stores of one", context_size=16)
    refused(r"\(its dtype is 'bfloat16', not 'float32'\)", dtype="bfloat16")
    refused("packing prepend_bos is False, not True", prepend_bos=False)
    refused("its bos token id is None, not 50", prepend_bos=False)
    refused("one_document_per_context is True, not False", one_document_per_context=True)
    refused("packing drop_positions is 2, not 1", drop_positions=2)
    refused("packing drop_special is False, not True", drop_special=False)
    refused(r"sites is \['blocks.0.hook_resid_pre'\], not \['blocks.0.h.*', '", sites=SITES[:1])
    refused("model weights_sha256 is '.{8}…', not '.{8}…'", model=tiny_model(seed=1))
    refused("its d in is 32, not 16", model=tiny_model(width=32))


def test_the_name_of_the_model_does_not_matter(model, stores, texts, tmp_path):
    same = tiny_model()
    same.name = "a-copy-of-it"
    other = harvest(same, Corpus.open(str(texts / "b.jsonl")), SITES[::-1], tmp_path / "b", CONFIG)
    merged = merge([stores[0], other.folder], tmp_path / "s")
    merged.check_model(same.identity())
    assert merged.manifest.model["name"] == "tiny"


def test_the_same_text_twice_is_refused(model, stores, merged, texts, tmp_path):
    def harvested(name, spec, **changes):
        corpus = Corpus.open(spec, "train")
        return harvest(model, corpus, SITES, tmp_path / name, replace(CONFIG, **changes)).folder

    def refused(message, *given):
        with pytest.raises(LlmWsaeError, match=message) as caught:
            merge(given, tmp_path / "s")
        names = [f"{one} and {other} hold the same text (" for one, other in permutations(given)]
        assert str(caught.value).startswith(tuple(names))
        assert not (tmp_path / "s").exists()

    a = str(texts / "a.jsonl")
    again = harvested("again", a, tokens=300)
    refused(r"the beginning of the train part of a\.jsonl\), whose rows would", stores[0], again)
    refused(r"the beginning of the train part of a\.jsonl", merged.folder, again)
    mixed = harvested("mixed", f"{a}+{texts / 'b.jsonl'}")
    # the first sections of each document are in both
    refused(rf"documents of {stores[0]}, such as 'a\.jsonl#\d+'\)", stores[0], mixed)
    # a text that has grown has another fingerprint
    longer = tmp_path / "a.jsonl"
    longer.write_text((texts / "a.jsonl").read_text() + '{"text": "w1 w2"}\n')
    refused(r"such as 'a\.jsonl#\d+'", stores[0], harvested("longer", str(longer)))
    # other documents of the same names
    other = tmp_path / "other" / "a.jsonl"
    other.parent.mkdir()
    write_texts(other, 9000, LENGTHS)
    merge([stores[0], harvested("names", str(other))], tmp_path / "s")


def test_a_few_documents_in_common_are_chance(model, tmp_path, monkeypatch):
    lengths = [3] * 160
    for name, seed in (("x", 0), ("y", 0), ("z", 5000)):
        (tmp_path / name).mkdir()
        path = write_texts(tmp_path / name / "t.jsonl", seed, lengths)
        if name == "z":  # one document of 160 is that of the others
            lines = path.read_text().splitlines()
            lines[7] = (tmp_path / "x/t.jsonl").read_text().splitlines()[7]
            path.write_text("\n".join(lines) + "\n")
    made = {
        name: harvest(model, Corpus.open(str(tmp_path / name / "t.jsonl"), "all"), SITES[:1],
                      tmp_path / f"store-{name}", replace(ONE_EACH, tokens=12 * 160)).folder
        for name in "xyz"
    }  # fmt: skip
    assert len(list(merging._documents(ActivationStore.open(made["x"])))) == 160
    merge([made["x"], made["z"]], tmp_path / "s")
    monkeypatch.setattr(merging, "CHANCE", 0.006)
    with pytest.raises(LlmWsaeError, match=r"\(1 of the 160 documents of .*, such as 't\.jsonl#8'"):
        merge([made["x"], made["z"]], tmp_path / "t")


def test_an_unfinished_store_is_refused(model, stores, texts, tmp_path):
    half = shutil.copytree(stores[1], tmp_path / "half")
    manifest = Manifest.load(half)
    manifest.complete, manifest.statistics = False, {}
    manifest.save(half)
    with pytest.raises(LlmWsaeError, match=r"half is not complete: .*; run its harvest again"):
        merge([stores[0], half], tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_damaged_store_is_refused_and_after_its_repair_the_merge_goes_on(
    stores, merged, tmp_path
):
    bad, out = shutil.copytree(stores[1], tmp_path / "bad"), tmp_path / "s"
    path = bad / str(SITES[1]) / "00002.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    way_out = r"delete it, if it is there, and run the same harvest \(or merge\) again"
    with pytest.raises(LlmWsaeError, match=rf"00002\.safetensors is truncated.*; {way_out}"):
        merge([stores[0], bad, stores[2]], out)
    path.unlink()
    with pytest.raises(LlmWsaeError, match=rf"00002\.safetensors is missing; {way_out}"):
        merge([stores[0], bad, stores[2]], out)
    assert not out.exists()
    for link in (False, True):
        path.write_bytes(good[:500] + bytes([good[500] ^ 1]) + good[501:])
        with pytest.raises(LlmWsaeError, match=rf"{path} is damaged: its checksum.*; {way_out}"):
            merge([stores[0], bad, stores[2]], out, link)
        assert not (out / str(SITES[1]) / "00005.safetensors").exists()
        assert (out / str(SITES[1]) / "00004.safetensors").exists()
        with pytest.raises(
            LlmWsaeError, match=r"is not complete: 140 of 293 .* run its merge agai"
        ):
            ActivationStore.open(out)
        assert "the merge is not complete: 140 of 293 contexts" in verify_store(out)[0]
        path.write_bytes(good)
        merge([stores[0], bad, stores[2]], out, link)
        assert files(out) == files(merged.folder)
        shutil.rmtree(out)


KILLED = 77


def killed(stores, out, renames):
    """Merge in a process that ends without a word instead of renaming one more file; whether it
    was."""
    child = os.fork()
    if child == 0:
        replace_file, left = os.replace, [renames]

        def counted(*paths):
            if left[0] == 0:
                os._exit(KILLED)
            left[0] -= 1
            replace_file(*paths)

        os.replace = counted
        try:
            merge(stores, out)
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), code
    return code == KILLED


def test_a_killed_merge_is_no_store_and_resumes_to_the_same_bytes(stores, tmp_path, monkeypatch):
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the kernel lives on
    stores, merged = stores[:2], merge(stores[:2], tmp_path / "whole")
    shards, renames = set(), 0
    while killed(stores, tmp_path / "s", renames):
        with pytest.raises(LlmWsaeError, match=r"is not complete|has no manifest\.json"):
            ActivationStore.open(tmp_path / "s")
        shards.add(len(list((tmp_path / "s/shards").glob("*.json"))))
        merge(stores, tmp_path / "s")
        assert files(tmp_path / "s") == files(merged.folder), renames
        shutil.rmtree(tmp_path / "s")
        renames += 7
    assert {0, 3, 8} <= shards and renames > 40


def test_a_complete_merge_is_left_alone_and_files_that_are_missing_come_back(
    stores, merged, tmp_path, capsys
):
    out = shutil.copytree(merged.folder, tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    merge(stores, out)
    assert f"{out} is already complete" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "tokens/00004.safetensors").unlink()
    (out / str(SITES[0]) / "statistics.safetensors").unlink()
    assert verify_store(out)[-1].startswith("delete the damaged files and run the same merge")
    merge(stores, out)
    assert files(out) == files(merged.folder)
    untouched = out / "tokens/00003.safetensors"
    assert untouched.stat().st_mtime_ns == before[untouched]


def test_other_folders_are_refused(model, stores, merged, texts, tmp_path):
    def refused(error, message, given, out):
        before = files(out) if out.exists() else None
        with pytest.raises(error, match=message):
            merge(given, out)
        assert before == (files(out) if out.exists() else None)

    refused(UsageError, "nothing to merge; name at least two", stores[:1], tmp_path / "s")
    twice = [stores[0], stores[0] / "../a"]
    refused(UsageError, "a is listed twice; name each store once", twice, tmp_path / "s")
    refused(UsageError, "b is one of the stores to merge", stores, stores[1])
    refused(LlmWsaeError, "there is no activation store", [*stores, "nowhere"], tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    refused(LlmWsaeError, r"holds other files \(notes\.txt\)", stores, tmp_path / "mine")
    assert not (tmp_path / "mine/.lock").exists()
    other = r"holds another merge \(it was merged from other stores, or from these in another order"
    refused(LlmWsaeError, other, stores[::-1], merged.folder)
    refused(LlmWsaeError, other, stores[:2], merged.folder)
    harvested = r"holds another harvest \(.*it was made by a harvest, not by a merge\)"
    refused(LlmWsaeError, harvested, stores[1:], stores[0])
    corpus = Corpus.open(str(texts / "a.jsonl"))
    before = files(merged.folder)
    with pytest.raises(LlmWsaeError, match="it was made by a merge, not by a harvest"):
        harvest(model, corpus, SITES, merged.folder, replace(CONFIG, tokens=2000))
    assert files(merged.folder) == before


def test_the_disk_is_looked_at_before_anything_is_copied(stores, merged, tmp_path, monkeypatch):
    usage, free = namedtuple("usage", "total used free"), [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free[0]))
    with pytest.raises(LlmWsaeError, match=r"s needs 0\.0 GiB, but its disk has 0\.0 free; free "):
        merge(stores, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    # what is there already needs no space
    out = shutil.copytree(merged.folder, tmp_path / "s")
    lost = out / "tokens/00001.safetensors"
    free[0] = lost.stat().st_size
    lost.unlink()
    merge(stores, out)
    assert files(out) == files(merged.folder)


def test_links_share_the_files(stores, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: 1 / 0)  # they need no space
    linked = merge(stores, tmp_path / "s", link=True)
    assert files(linked.folder) == files(merged.folder)
    site = str(SITES[0])
    assert (linked.folder / site / "00003.safetensors").samefile(
        stores[1] / site / "00000.safetensors"
    )

    def refuse(*paths):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(LlmWsaeError, match=r"cannot be linked \(Invalid cross-device link\); omit"):
        merge(stores, tmp_path / "t", link=True)


def test_a_store_of_the_first_version_can_be_merged(model, stores, tmp_path):
    """Its shards have no checksums of rows, and its packing names fewer settings."""
    old = shutil.copytree(stores[0], tmp_path / "old")
    manifest = Manifest.load(old)
    del manifest.packing["drop_special"]
    manifest.shards = [replace(shard, row_checks={}) for shard in manifest.shards]
    manifest.save(old)
    merged = merge([old, stores[1]], tmp_path / "s")
    assert verify_store(merged.folder) == []
    batch = next(merged.source(SITES[1]).batches(64, seed=0))
    assert batch.shape == (64, 16)


def test_names_and_files_of_the_merged_store(merged):
    on_disk = {p.relative_to(merged.folder).as_posix() for p in merged.folder.rglob("*.saf*")}
    covariances = {f"evidence/{site}.second_moment.safetensors" for site in SITES}
    assert on_disk == set(merged.manifest.all_files()) | covariances
    assert len(on_disk) == 17 * 5 + 2 * 2
    tokens = load_file(merged.folder / "tokens/00003.safetensors")
    assert int(tokens["document"].max()) < int(merged.contexts(3).document.max())
