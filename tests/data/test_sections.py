"""Text is drawn over documents: no long one fills what is read first."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from evaluation_cases import WORDS, planted_model
from tiny import words

from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.packing import Packer
from llm_wsae.statistics.uncertainty import TextSize, owners

CONTEXT = 16
PAGE = 3 * CONTEXT


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus.open(str(path), "all")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One document of sixty pages, whose words are of a list of its own, before 300 of one."""
    long = " ".join(WORDS[i % 4] for i in range(60 * PAGE))
    draw = np.random.default_rng(0)
    short = [" ".join(WORDS[i] for i in draw.integers(4, 40, PAGE)) for _ in range(300)]
    return write(tmp_path_factory.mktemp("texts") / "a.jsonl", [long, *short])


@pytest.fixture(scope="module")
def packer():
    return Packer.for_model(planted_model(), PackConfig(context_size=CONTEXT))


def taken(packer, corpus, contexts):
    (block,) = packer.blocks(corpus, contexts, limit=contexts)
    return [block.headers[n]["name"] for n in block.document[block.keep].tolist()]


def test_a_long_document_gives_two_contexts_before_all_others_have_given(packer, corpus):
    names = taken(packer, corpus, 300)
    assert names.count("a.jsonl#1") <= 2 * CONTEXT
    size = TextSize.of(np.unique(names, return_inverse=True)[1])
    assert size.documents > 150 and size.effective > 0.9 * size.documents
    assert not size.warnings()
    everything = taken(packer, corpus, 1100)  # and then the rest of it
    assert everything.count("a.jsonl#1") > 40 * PAGE


def test_the_same_sections_every_time_and_from_any_section_on(packer, corpus):
    everything = list(corpus.sections(packer._two_contexts))
    assert everything == list(corpus.sections(packer._two_contexts))
    assert everything[17:] == list(corpus.sections(packer._two_contexts, 17))
    texts = {s.name: s.text for s in corpus.sections(None)}
    found = dict.fromkeys(texts, "")
    for section in everything:
        found[section.name] += section.text
    assert found == texts
    assert [s.index for s in everything] == list(range(len(everything)))
    numbers = [s.document for s in everything]
    assert sorted(set(numbers)) == list(dict.fromkeys(numbers)) == list(range(301))


def test_windows_bound_what_is_read_ahead(tmp_path):
    corpus = write(tmp_path / "a.jsonl", [words(i, 40) for i in range(1100)])
    (file,) = corpus.sources
    documents = file.documents()
    next(Corpus([replace(file, documents=lambda: documents)]).sections(lambda texts: 20))
    assert next(documents).name == "a.jsonl#513"
    order = [s.name for s in corpus.sections(None)]
    assert {int(name.split("#")[1]) for name in order[:512]} == set(range(1, 513))


def test_texts_of_a_mixture_take_turns_by_length(tmp_path):
    write(tmp_path / "a.jsonl", [words(i, 400) for i in range(3)])
    write(tmp_path / "b.jsonl", [words(i, 10) for i in range(120)])
    both = Corpus.open(f"{tmp_path / 'a.jsonl'}+{tmp_path / 'b.jsonl'}", "all")
    sections = list(islice(both.sections(lambda texts: 100), 60))
    long = sum(len(s.text) for s in sections if s.name.startswith("a"))
    assert long == pytest.approx(sum(len(s.text) for s in sections) / 2, rel=0.1)


def test_the_size_of_a_text():
    size = TextSize.of(np.array([0, 0, 0, 7]))
    assert (size.tokens, size.documents) == (4, 2) and size.effective == pytest.approx(1.6)
    assert size.text("text") == "4 tokens of text from 2 documents (effectively 2)"
    assert "effectively of 1.6 documents, fewer than 20" in size.warnings()[0]
    assert owners([np.array([5, 5, 9]), np.array([9]), np.array([5])]).tolist() == [0, 1, 0]
