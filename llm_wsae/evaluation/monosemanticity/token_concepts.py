"""Concepts of tokens, computed from the text: first letter, capital, digit, sentence start,
continuation of a word, quotation.

Spelling is analysed once per word of the vocabulary; the rest is arithmetic on whole texts. What
comes before a token matters, so positions that give no row are read too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llm_wsae.evaluation.heldout import HeldoutText
from llm_wsae.evaluation.monosemanticity.concepts import Concepts, with_enough
from llm_wsae.statistics.measures import LETTER

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CLOSERS = "\"'”’»)]}"
_OPENERS = "\"'“‘«([{-–—*"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to a text after another token, with its leading space."""

    def decoded(sequences: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(
            sequences, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    # Some tokenizers drop the space of a token that is alone or first.
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    head = decoded([before])[0]
    behind = decoded([[*before, i] for i in ids])
    return [
        text[len(head) :] if text.startswith(head) else alone
        for text, alone in zip(behind, decoded([[i] for i in ids]), strict=True)
    ]


def folded_tokens(text: HeldoutText, tokenizer: Any) -> Int[Tensor, " rows"]:
    """A number for each row's token; spellings that differ only in space or case share one."""
    ids, index = text.token.unique(return_inverse=True)
    numbers: dict[str, int] = {}
    folded = [
        numbers.setdefault(spelling.strip().casefold() or spelling, len(numbers))
        for spelling in token_texts(tokenizer, ids.tolist())
    ]
    return torch.tensor(folded)[index]


def token_concepts(
    text: HeldoutText,
    tokenizer: Any,
    rows: Int[Tensor, " units"],
    half: Bool[Tensor, " units"],
) -> Concepts:
    """Concepts of the tokens at some rows, as far as there are enough examples.

    First letter, capital and sentence start apply to the first tokens of words, continuation and
    quotation to tokens that begin with a letter or a digit, digit to all.
    """
    cells = (text.document.flatten() >= 0).nonzero()[:, 0]
    facts, linked = _facts(text, tokenizer, cells)
    found = _in_sequence(facts, linked, text.offset.flatten()[cells] == 0)
    place = torch.full((text.ids.numel(),), -1)
    place[cells] = torch.arange(len(cells))
    at = place[text.cell[rows]]
    begins, wordlike, everywhere = found["begins"], facts["wordlike"], torch.ones_like(linked)
    letters = {f"{LETTER} {x}": (facts["letter"] == i, begins) for i, x in enumerate(_LETTERS)}
    columns = letters | {
        "capital": (facts["capital"], begins),
        "digit": (facts["digit"], everywhere),
        "sentence start": (found["first"], begins),
        "continuation": (found["continues"], wordlike),
        "quotation": (found["quoted"], wordlike),
    }
    concepts = Concepts(
        list(columns),
        [LETTER if name in letters else name for name in columns],
        torch.stack([yes[at] for yes, _ in columns.values()], 1),
        torch.stack([applies[at] for _, applies in columns.values()], 1),
        half,
    )
    return with_enough(concepts, text.document_of[rows], 1)


_Facts = dict[str, Tensor]
"""A number for each token, by the names that ``_spelling`` gives."""


def _facts(text: HeldoutText, tokenizer: Any, cells: Tensor) -> tuple[_Facts, Tensor]:
    """The spelling of the tokens of documents, and whether each follows the one before."""
    ids, index = text.ids.flatten()[cells].unique(return_inverse=True)
    table = [_spelling(spelling) for spelling in token_texts(tokenizer, ids.tolist())]
    facts = {name: torch.tensor([row[name] for row in table])[index] for name in table[0]}
    document, offset = text.document.flatten()[cells], text.offset.flatten()[cells]
    linked = torch.zeros(len(cells), dtype=torch.bool)
    linked[1:] = (document[1:] == document[:-1]) & (offset[1:] == offset[:-1] + 1)
    return facts, linked


def _spelling(text: str) -> dict[str, int | bool]:
    visible = text.strip()
    first = visible[:1]
    return {
        "letter": _LETTERS.find(first.lower()) if first else -1,  # its number, or -1
        "capital": first.isupper(),
        "digit": any(character.isdigit() for character in text),
        "wordlike": first.isalnum(),
        "joins": text[:1].isalnum(),  # the token before, without a space
        "open end": text[-1:].isalnum(),
        "stop": visible.rstrip(_CLOSERS)[-1:] in (".", "!", "?"),
        "between": not visible.strip(_CLOSERS + _OPENERS),  # spaces, quotes and brackets only
        "newline": "\n" in text,
        "straight": text.count('"'),
        "depth": text.count("“") - text.count("”"),
    }


def _in_sequence(facts: _Facts, linked: Tensor, opens: Tensor) -> dict[str, Tensor]:
    """What depends on the tokens before. ``opens`` marks the first token of a document."""
    number = torch.arange(len(linked))
    before = _shifted(facts["open end"], False) & linked
    continues = before & facts["joins"]
    begins = (facts["letter"] >= 0) & ~continues
    # The last token before this one that is more than space and quotes, if in the same run.
    run = number.where(~linked, 0).cummax(0).values
    solid = _shifted(number.where(~facts["between"], -1).cummax(0).values, -1)
    newlines = facts["newline"].long().cumsum(0)
    broken = _shifted(newlines, 0) > (newlines - facts["newline"].long())[solid.clamp(min=0)]
    behind_stop = (facts["stop"][solid.clamp(min=0)] | broken) & (solid >= run)
    first_solid = opens[run] & (solid < run)
    # Quotes are counted from the beginning of the line, so that an unpaired one does no more harm.
    line = (number + 1).where(facts["newline"], 0).cummax(0).values
    line = torch.maximum(_shifted(line, 0), run)
    straight = _since(facts["straight"], line) % 2 == 1
    typographic = _since(facts["depth"], line) > 0
    return {
        "continues": continues,
        "begins": begins,
        "first": begins & (behind_stop | first_solid),
        "quoted": straight | typographic,
    }


def _shifted(values: Tensor, first: int | bool) -> Tensor:
    """The value of the token before."""
    return torch.cat([values.new_full((1,), first), values[:-1]])


def _since(values: Tensor, start: Tensor) -> Tensor:
    """Sum over the tokens from ``start`` up to the one before."""
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return total[:-1] - total[start]
