"""What most files here harvest: a tiny model, and a text of 200 documents."""

import pytest
from tiny import tiny_model, write_jsonl

from llm_wsae.data.corpus import Corpus


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    lengths = [7 * i % 50 + 1 for i in range(200)]
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", lengths)


@pytest.fixture(scope="session")
def corpus(text):
    return Corpus.open(str(text))
