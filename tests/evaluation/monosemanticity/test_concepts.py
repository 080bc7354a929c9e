import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_wsae.errors import UsageError
from llm_wsae.evaluation.heldout import HeldoutText
from llm_wsae.evaluation.monosemanticity.concepts import (
    document_concepts,
    folded_tokens,
    halves_of_documents,
    token_concepts,
    token_texts,
    units_of_documents,
    units_of_tokens,
)

STORY = [
    'He said: "Stop now!" Then 42 men2 left.\n"Why?" asked Bob. (They went.) end',
    "the rest of “his words” here… No more",
]


def text_of(texts, length=None):
    """Each text a document, all packed one after the other in contexts of ``length`` tokens, and
    their tokenizer: a token for each piece that GPT-2's rules cut (words with their space, signs,
    digits)."""
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = {piece for text in [*texts, "a"] for piece, _ in cutter.pre_tokenize_str(text)}
    vocab = {piece: i for i, piece in enumerate(sorted(pieces))} | {"<s>": len(pieces)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    words.pre_tokenizer, words.decoder = cutter, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    flat = torch.tensor([i for document in ids for i in document])
    document = torch.tensor([n for n, own in enumerate(ids) for _ in own])
    offset = torch.tensor([i for own in ids for i in range(len(own))])
    length = length or len(flat)
    count = len(flat) // length
    keep = torch.ones(count, length + 1, dtype=torch.bool)
    keep[:, 0] = False

    def packed(values, bos):
        rows = values[: count * length].view(count, length)
        return torch.cat([torch.full((count, 1), bos), rows], 1)

    headers = {n: {"name": str(n), "labels": {}} for n in range(len(texts))}
    columns = packed(flat, len(pieces)), keep, packed(document, -1), packed(offset, -1)
    return HeldoutText(*columns, headers), tokenizer


def yes(text, tokenizer, name):
    """The texts of the tokens for which a concept holds, and those it applies to."""
    rows = torch.arange(text.num_rows)
    found = token_concepts(text, tokenizer, rows, torch.ones(text.num_rows).bool(), least=0)
    number = found.names.index(name)
    spelt, applies = token_texts(tokenizer, text.token.tolist()), found.applies[:, number]
    return tuple(
        [spelt[i] for i in column.nonzero()[:, 0].tolist()]
        for column in (found.positive[:, number] & applies, applies)
    )


def test_concepts_of_tokens_are_read_off_the_text():
    story = text_of(STORY)
    words = ["He", " said", "Stop", " now", " Then", " men", " left", "Why", " asked", " Bob",
             "They", " went", " end", "the", " rest", " of", "his", " words", " here", " No",
             " more"]  # fmt: skip
    assert yes(*story, "letter s") == ([" said", "Stop"], words)
    assert yes(*story, "letter t")[0] == [" Then", "They", "the"]
    capitals = ["He", "Stop", " Then", "Why", " Bob", "They", " No"]
    assert yes(*story, "capital") == (capitals, words)
    # "Bob" is no start, since a question mark and a word came before; "No" follows an ellipsis
    starts = ["He", " Then", "Why", " asked", "They", " end", "the"]
    assert yes(*story, "sentence start") == (starts, words)
    assert yes(*story, "digit")[0] == [" 42", "2"]
    assert len(yes(*story, "digit")[1]) == story[0].num_rows
    assert yes(*story, "continuation") == (["2"], [*words[:5], " 42", " men", "2", *words[6:]])
    assert yes(*story, "quotation")[0] == ["Stop", " now", "Why", "his", " words"]


def test_concepts_look_across_contexts_but_not_across_gaps_or_lines():
    """Contexts of three tokens; without the second one, nothing is known of what came before. An
    unpaired quote ends with its line."""
    whole, tokenizer = text_of(['Yes. "Go on now" he said. So it is'], 3)
    assert yes(whole, tokenizer, "quotation")[0] == ["Go", " on", " now"]
    assert yes(whole, tokenizer, "sentence start")[0] == ["Yes", "Go", " So"]
    parts = (part[[0, 3]] for part in (whole.ids, whole.keep, whole.document, whole.offset))
    cut = HeldoutText(*parts, whole.headers)
    assert yes(cut, tokenizer, "quotation")[0] == []
    assert yes(cut, tokenizer, "sentence start")[0] == ["Yes", " So"]
    assert yes(*text_of(['a "b c\nd e "f" g']), "quotation")[0] == ["b", " c", "f"]


def test_tokens_are_spelt_with_their_space_and_fold_with_space_and_case():
    text, tokenizer = text_of(["The the cat The, THE 42 42"])
    spelt = token_texts(tokenizer, text.token.tolist())
    assert spelt == ["The", " the", " cat", " The", ",", " THE", " 42", " 42"]
    folded = folded_tokens(text, tokenizer).tolist()
    assert [folded.index(one) for one in folded] == [0, 0, 2, 0, 4, 0, 6, 6]


PARTIES = ("left", "right", "none")
LABELS = [
    {"party": PARTIES[n % 3], "spoken": n % 2 == 0, "year": 1800 + n, "name": f"document {n}"}
    for n in range(12)
]
HEADERS = dict(enumerate({"labels": own} for own in [*LABELS, {}]))


def test_concepts_of_documents_are_their_labels():
    document, numbers = torch.tensor([*range(12), *range(12), 12]), torch.arange(12)
    half = torch.arange(25) < 12
    found = document_concepts(HEADERS, document, half, least=0)
    expected = {
        "party=left": numbers % 3 == 0,
        "party=none": numbers % 3 == 2,
        "party=right": numbers % 3 == 1,
        "spoken=False": numbers % 2 == 1,
        "year<1804": numbers < 4,
        "1804<=year<1808": (numbers >= 4) & (numbers < 8),
        "year>=1808": numbers >= 8,
    }
    assert set(found.names) == expected.keys()  # no single document's name
    assert set(found.families) == {"party", "spoken", "year"}
    for i, name in enumerate(found.names):
        assert found.positive[:24, i].tolist() == expected[name].repeat(2).tolist()
        assert found.applies[:, i].tolist() == [True] * 24 + [False]
    asked = document_concepts(HEADERS, document, half, ("year", "year"), least=0)
    assert asked.families == ["year"] * 3  # listed twice, counted once
    with pytest.raises(UsageError, match="no document has a label 'yaer'; did you mean 'year'"):
        document_concepts(HEADERS, document, half, ("yaer",))
    # a number that is mostly one value still divides the documents
    headers = {n: {"labels": {"score": max(0, n - 9)}} for n in range(16)}
    found = document_concepts(headers, torch.arange(16).repeat(4), torch.arange(64) < 32, least=4)
    assert found.names == ["score<1"]
    assert found.positive[:16, 0].tolist() == [n <= 9 for n in range(16)]
    # enough examples are needed in both halves
    asked = HEADERS, document[:24], document[:24] < 6
    names = document_concepts(*asked, least=0).names
    assert names == ["party=left", "party=none", "party=right", "spoken=False", "1804<=year<1808"]
    assert document_concepts(*asked, least=5).names == ["spoken=False"]
    assert document_concepts(*asked).names == []


def test_halves_pair_like_documents():
    text, _ = text_of(["a b c"] * 13, 3)
    text.headers.update(HEADERS)
    drawn = [halves_of_documents(text, seed) for seed in range(8)]
    assert drawn[0] == halves_of_documents(text, 0) and any(d != drawn[0] for d in drawn)
    for halves in drawn:
        for party in range(3):  # four documents of each: two and two, and one is spoken in each
            assert sum(halves[n] for n in range(12) if n % 3 == party) == 2


def test_units_are_rows_or_the_rows_of_a_document_in_a_context():
    text, _ = text_of(["a b c d e", "a b c", "a b c d"], 4)
    text.headers[2]["labels"]["x"] = 1
    text.headers[0]["labels"]["x"] = 2
    # contexts: 0000 | 0111 | 2222; the second is the unlabelled document's
    assert text.owner.tolist() == [0, 1, 2]
    units = units_of_documents(text, 0)
    assert units.of_row.tolist() == [0] * 4 + [-1] * 4 + [1] * 4
    assert (units.size.tolist(), units.document.tolist()) == ([4, 4], [0, 2])
    text.headers[1]["labels"]["x"] = 2
    units = units_of_documents(text, 0)
    assert units.of_row.tolist() == [0] * 4 + [-1, 1, 1, 1] + [2] * 4
    assert units.size.tolist() == [4, 3, 4] and not units.single
    rows = units_of_tokens(text, 5, 0)
    chosen = (rows.of_row >= 0).nonzero()[:, 0]
    assert rows.of_row[chosen].tolist() == [0, 1, 2, 3, 4] and rows.single
    assert torch.equal(rows.document, text.document_of[chosen])
