"""Contexts by hand, from any cursor on, and what cannot be packed; and text that is drawn over
documents, so that no long one fills what is read first."""

import json
from dataclasses import replace
from itertools import islice
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from looping import over
from refusals import misused
from tiny import BOS, EOS, VOCAB, tiny_model, tiny_tokenizer, words, write_jsonl

from llm_wsae.data.config import HarvestConfig, PackConfig
from llm_wsae.data.corpus import Corpus, Document, TextSource
from llm_wsae.data.packing import Cursor, Packer
from llm_wsae.errors import LlmWsaeError
from llm_wsae.statistics.uncertainty import TextSize, owners


def listed(*lengths):
    """A corpus of documents of given lengths in tokens, such that they are read in this order."""
    there = [(i, n) for i, n in enumerate(lengths) if n]
    order = np.argsort(np.random.default_rng(0).permutation(len(there)))  # of data.corpus
    inverse = [there[at] for at in order]
    documents = [Document(f"d{i}", words(i, n), {"length": n}) for i, n in inverse]
    return Corpus([TextSource("listed", None, lambda: str(lengths), lambda: iter(documents))])


def ids_of(document, n):
    return [int(word[1:]) for word in words(document, n).split()]


def packer(bos=True, eos=True, **config):
    tokenizer = tiny_tokenizer(bos, eos)
    return Packer(tokenizer, tokenizer.bos_token_id, VOCAB, PackConfig(**config))


def joined(blocks, name):
    return np.concatenate([getattr(block, name) for block in blocks])


def test_packing_by_hand():
    (block,) = packer(context_size=5).blocks(listed(6, 1, 4), 8)
    a, b, c = ids_of(0, 6), ids_of(1, 1), ids_of(2, 4)
    # the last token and separator fill no context
    assert block.ids.tolist() == [[BOS, *a[:4]], [BOS, *a[4:], EOS, *b], [BOS, EOS, *c[:3]]]
    assert block.keep.astype(int).tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 1, 1, 1]]
    assert block.document.tolist() == [[-1, 0, 0, 0, 0], [-1, 0, 0, -1, 1], [-1, -1, 2, 2, 2]]
    assert block.offset.tolist() == [[-1, 0, 1, 2, 3], [-1, 4, 5, -1, 0], [-1, -1, 0, 1, 2]]
    assert (block.first, block.next) == (Cursor(0, 0), Cursor(2, 3))
    assert block.headers[1] == {"name": "d1", "labels": {"length": 1}}
    assert block.ids.dtype == block.document.dtype == block.offset.dtype == np.int32


TEMPLATE = "{% for m in messages %}</s> {{ m.role }} {{ m.content }} {% endfor %}"
TALK = [{"role": "w1", "content": "w2 w3"}, {"role": "w4", "content": "w5 " * 30 + "w6"}]


@over(kind=["jsonl", "parquet"])
def test_a_conversation_is_read_through_the_models_template(kind, tmp_path):
    """Whole, though it is longer than two contexts; the marks of the roles give no row."""
    path = tmp_path / f"talks.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps({"messages": TALK, "source": "here"}) + "\n")
    else:
        table = pyarrow.table({"id": [[1]], "messages": [TALK], "source": ["here"]})
        pyarrow.parquet.write_table(table, path)
    own = packer(context_size=12)
    with pytest.raises(LlmWsaeError, match=f"talks.{kind}#1 is a conversation, but .* no chat"):
        next(own.blocks(Corpus.open(str(path), "all"), 8))
    own._tokenizer.chat_template = TEMPLATE
    (block,) = own.blocks(Corpus.open(str(path), "all"), 8)
    ids = [EOS, 1, 2, 3, EOS, 4, *[5] * 30, 6]
    assert block.ids[:, 1:].flatten().tolist() == [*ids, EOS][:33]
    assert block.headers[0]["labels"] == {"source": "here"}
    kept = block.ids[block.keep].tolist()
    assert EOS not in kept and kept[:3] == [1, 2, 3]


def test_one_document_per_context_by_hand():
    (block,) = packer(context_size=5, one_document_per_context=True).blocks(listed(6, 0, 2), 8)
    assert block.ids.tolist() == [[BOS, *ids_of(0, 6)[:4]], [BOS, *ids_of(2, 2), EOS, EOS]]
    assert block.keep.astype(int).tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert block.document.tolist() == [[-1, 0, 0, 0, 0], [-1, 1, 1, -1, -1]]
    assert block.offset.tolist() == [[-1, 0, 1, 2, 3], [-1, 0, 1, -1, -1]]
    assert block.next == Cursor(2, 0)


def test_without_bos_or_separator_and_with_special_tokens_kept():
    (block,) = packer(bos=False, eos=False, context_size=4).blocks(listed(5, 3), 8)
    assert block.ids.tolist() == [ids_of(0, 5)[:4], [ids_of(0, 5)[4], *ids_of(1, 3)]]
    assert block.keep.tolist() == [[False, True, True, True]] * 2
    (block,) = packer(context_size=4, drop_special=False, drop_positions=0).blocks(listed(2), 8)
    assert block.ids[0, 3] == EOS and block.keep.all()
    (block,) = packer(context_size=4, drop_positions=3).blocks(listed(3), 8)
    assert block.keep.tolist() == [[False, False, False, True]]
    (block,) = packer(context_size=4, prepend_bos=False).blocks(listed(4), 8)
    assert block.ids.tolist() == [ids_of(0, 4)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    context_size=st.integers(2, 9),
    block_size=st.integers(1, 5),
    one_each=st.booleans(),
    eos=st.booleans(),
    data=st.data(),
)
def test_packing_goes_on_at_any_cursor(lengths, context_size, block_size, one_each, eos, data):
    p = packer(eos=eos, context_size=context_size, one_document_per_context=one_each)
    corpus = listed(*lengths)
    whole = list(p.blocks(corpus, block_size))
    total = sum(len(block.ids) for block in whole)
    if not total:
        return
    stop = data.draw(st.integers(1, total))
    head = list(p.blocks(corpus, data.draw(st.integers(1, 5)), limit=stop))
    tail = list(p.blocks(corpus, data.draw(st.integers(1, 5)), head[-1].next))
    assert sum(len(block.ids) for block in head) == stop
    for name in ("ids", "keep", "document", "offset"):
        assert np.array_equal(joined(head + tail, name), joined(whole, name)), name
    assert (tail or head)[-1].next == whole[-1].next
    # the tokens of each document are those of its text, from its beginning on
    names = {number: h["name"] for block in whole for number, h in block.headers.items()}
    ids, document = joined(whole, "ids"), joined(whole, "document")
    for number, name in names.items():
        own, index = ids[document == number].tolist(), int(name[1:])
        assert own == ids_of(index, lengths[index])[: len(own)]
    if not one_each:  # each token of the text is there once, but the last incomplete context
        sections = sum(1 for _ in corpus.sections(p._two_contexts))
        assert total == (sum(lengths) + eos * sections) // p.content_size
        assert int((document >= 0).sum()) + eos * sections >= total * p.content_size


def test_blocks_of_any_size_hold_the_same_contexts_and_bring_no_warning(caplog):
    """Of documents longer than the model's context that are tokenised in several batches."""
    corpus = listed(*[2000] * 30)
    few, many = (joined(list(packer(context_size=8).blocks(corpus, n)), "ids") for n in (3, 700))
    assert np.array_equal(few, many) and not caplog.records


def test_tokenizers_that_do_not_fit():
    class PanicException(BaseException):
        """As a library written in Rust raises it."""

    panicking = Mock(side_effect=PanicException("stack overflow in regex"))
    panicking.eos_token_id, panicking.all_special_ids = None, ()
    config = PackConfig(context_size=5)
    for tokenizer, bos, said in (
        (tiny_tokenizer(bos=False, eos=False), None, r"the id \d+, but the model has 30 em"),
        (tiny_tokenizer(), BOS, "returns the id 5[01], but the model has 30 embeddings"),
        (panicking, None, "tokenizer cannot read the text: stack overflow"),
        (None, None, "without a tokenizer"),
    ):
        with pytest.raises(LlmWsaeError, match=said):
            list(Packer(tokenizer, bos, 30, config).blocks(listed(50), 8))


def test_settings():
    misused("context-size is 1, but must be at least 2", HarvestConfig, context_size=1)
    said = "drop-positions is 8, but must be at most 7"
    misused(said, HarvestConfig, context_size=8, drop_positions=8)
    misused("tokens is 0", HarvestConfig, tokens=0)
    said, config = "too long for tiny, which reads at most 64", PackConfig(context_size=65)
    misused(said, Packer.for_model, tiny_model(), config)
    remembered = {"context_size": 32, "drop_positions": True, "prepend_bos": False, "x": 1}
    assert PackConfig.remembered(remembered) == PackConfig(context_size=32, prepend_bos=False)
    config = HarvestConfig(context_size=100, tokens=1001, batch_tokens=450, shard_tokens=1500)
    shards = config.num_contexts, config.contexts_per_batch, config.contexts_per_shard
    assert shards == (11, 4, 16)  # a shard is of whole batches
    assert HarvestConfig(context_size=8192).contexts_per_batch == 1


# --- Sections of documents

CONTEXT = 16
PAGE = 3 * CONTEXT
PAGES = packer(eos=False, context_size=CONTEXT)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One document of sixty pages, before 300 of one."""
    lengths = [60 * PAGE, *[PAGE] * 300]
    path = write_jsonl(tmp_path_factory.mktemp("texts") / "a.jsonl", lengths)
    return Corpus.open(str(path), "all")


def names_in(corpus, contexts):
    """The document of each token."""
    (block,) = PAGES.blocks(corpus, contexts, limit=contexts)
    return [block.headers[n]["name"] for n in block.document[block.keep].tolist()]


def test_a_long_document_gives_two_contexts_before_all_others_have_given(written):
    names = names_in(written, 300)
    assert names.count("a.jsonl#1") <= 2 * CONTEXT
    size = TextSize.of(np.unique(names, return_inverse=True)[1])
    assert size.documents > 150 and size.effective > 0.9 * size.documents
    assert not size.warnings()
    everything = names_in(written, 1100)  # and then the rest of it
    assert everything.count("a.jsonl#1") > 40 * PAGE


def test_the_same_sections_every_time_and_from_any_section_on(written):
    everything = list(written.sections(PAGES._two_contexts))
    assert everything == list(written.sections(PAGES._two_contexts))
    assert everything[17:] == list(written.sections(PAGES._two_contexts, 17))
    texts = {s.name: s.text for s in written.sections(None)}
    found = dict.fromkeys(texts, "")
    for section in everything:
        found[section.name] += section.text
    assert found == texts
    assert [s.index for s in everything] == list(range(len(everything)))
    numbers = [s.document for s in everything]
    assert sorted(set(numbers)) == list(dict.fromkeys(numbers)) == list(range(301))


def test_windows_bound_what_is_read_ahead(tmp_path):
    corpus = Corpus.open(str(write_jsonl(tmp_path / "a.jsonl", [40] * 1100)), "all")
    (file,) = corpus.sources
    documents = file.documents()
    next(Corpus([replace(file, documents=lambda: documents)]).sections(lambda texts: 20))
    assert next(documents).name == "a.jsonl#513"
    order = [s.name for s in corpus.sections(None)]
    assert {int(name.split("#")[1]) for name in order[:512]} == set(range(1, 513))


def test_texts_of_a_mixture_take_turns_by_length(tmp_path):
    long = write_jsonl(tmp_path / "a.jsonl", [400] * 3)
    both = Corpus.open(f"{long}+{write_jsonl(tmp_path / 'b.jsonl', [10] * 120)}", "all")
    sections = list(islice(both.sections(lambda texts: 100), 60))
    long = sum(len(s.text) for s in sections if s.name.startswith("a"))
    assert long == pytest.approx(sum(len(s.text) for s in sections) / 2, rel=0.1)


def test_the_size_of_a_text():
    size = TextSize.of(np.array([0, 0, 0, 7]))
    assert (size.tokens, size.documents) == (4, 2) and size.effective == pytest.approx(1.6)
    assert size.text("text") == "4 tokens of text from 2 documents (effectively 2)"
    assert "effectively of 1.6 documents, fewer than 20" in size.warnings()[0]
    assert owners([np.array([5, 5, 9]), np.array([9]), np.array([5])]).tolist() == [0, 1, 0]
