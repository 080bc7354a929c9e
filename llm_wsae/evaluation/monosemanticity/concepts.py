"""Concepts whose truth is known: labels that latents can be tested against.

A concept says yes or no about every unit it applies to. A unit is one row (for concepts of tokens)
or the mean of one document's rows in one context (for concepts of documents). Concepts of tokens
are computed from the text: first letter, capital, digit, sentence start, continuation of a word,
quotation. Concepts of documents come from the labels that their corpus gives them. A concept is
kept when both halves of the documents hold enough examples and counterexamples: a probe that was
trained on one half is tested on the other, so no document is on both sides.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llm_wsae.errors import UsageError, nearest
from llm_wsae.evaluation.config import MonosemanticConfig
from llm_wsae.evaluation.heldout import HeldoutText
from llm_wsae.statistics.measures import LETTER

MIN_UNITS = 20  # examples, and counterexamples, of a concept in each half
NO_UNIT = -1
MAX_CONTEXTS = 1000  # units of documents
_MIN_DOCUMENTS = 2  # with examples, and with counterexamples, in each half
_MAX_VALUES = 6  # numbers with more values are cut into thirds
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CLOSERS = "\"'”’»)]}"
_OPENERS = "\"'“‘«([{-–—*"


class Units(NamedTuple):
    """Which rows make up which unit."""

    of_row: Int[Tensor, " rows"]  # the unit of each row of the text, -1 if it has none
    size: Int[Tensor, " units"]  # rows in each unit
    document: Int[Tensor, " units"]  # the document of each unit

    @property
    def single(self) -> bool:
        """Whether every unit is one row: few latents are then active in a unit."""
        return bool((self.size == 1).all())


class Concepts(NamedTuple):
    """Concepts of units (rows, or parts of documents)."""

    names: list[str]
    families: list[str]
    """The group of each concept, e.g. ``letter``; each label of documents is a family."""
    positive: Bool[Tensor, "units concepts"]  # whether the unit is an example of the concept
    applies: Bool[Tensor, "units concepts"]  # whether the concept says anything about the unit
    half: Bool[Tensor, " units"]  # which half of the documents the unit belongs to

    def with_enough(self, groups: Int[Tensor, " units"], min_groups: int, least: int) -> "Concepts":
        """The concepts that have, in each half, at least ``least`` examples and ``least``
        counterexamples, each from at least ``min_groups`` groups."""
        kept = torch.ones(len(self.names), dtype=torch.bool)
        numbers, group = groups.unique(return_inverse=True)
        for half in (self.half, ~self.half):
            for side in (self.positive, ~self.positive):
                found = side & self.applies & half[:, None]
                kept &= found.sum(0) >= least
                seen = torch.zeros(len(numbers), found.shape[1])
                seen.index_add_(0, group, found.float())
                kept &= (seen > 0).sum(0) >= min_groups
        chosen = kept.nonzero()[:, 0].tolist()
        names, families = ([own[i] for i in chosen] for own in (self.names, self.families))
        return Concepts(names, families, self.positive[:, kept], self.applies[:, kept], self.half)


def concepts_of(
    text: HeldoutText, tokenizer: Any, config: MonosemanticConfig
) -> list[tuple[Units, Concepts]]:
    """The concepts of tokens and of documents; a kind of units without concepts is left out.
    Raises UsageError for a label that no document has."""
    halves = halves_of_documents(text, config.seed)

    def half(units: Units) -> Tensor:
        return torch.tensor([halves[n] for n in units.document.tolist()], dtype=torch.bool)

    tokens = units_of_tokens(text, config.probe_tokens, config.seed)
    contexts = units_of_documents(text, config.seed)
    rows = (tokens.of_row != NO_UNIT).nonzero()[:, 0]
    of_tokens = token_concepts(text, tokenizer, rows, half(tokens))
    labelled = text.headers, contexts.document, half(contexts), config.labels
    found = (tokens, of_tokens), (contexts, document_concepts(*labelled))
    return [(units, concepts) for units, concepts in found if concepts.names]


def halves_of_documents(text: HeldoutText, seed: int) -> dict[int, bool]:
    """For each document, whether it is in the first half. Documents with similar labels, or of
    similar length where they have none, are paired, and chance sends one of each pair to either
    half, so that the halves are alike even for few documents."""
    numbers, rows = text.document_of.unique(return_counts=True)
    sizes = dict(zip(numbers.tolist(), rows.tolist(), strict=True))
    labels = {n: text.headers[n]["labels"] if n in text.headers else {} for n in sizes}
    pairs = {(key, str(value)) for own in labels.values() for key, value in own.items()}
    values = Counter(key for key, _ in pairs)
    columns = sorted(values, key=lambda key: (values[key], key))  # the coarsest label first

    def order(number: int) -> tuple[bool, list[str], int, int]:
        own = labels[number]
        return not own, [str(own.get(key)) for key in columns], sizes[number], number

    ordered = sorted(sizes, key=order)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(2, ((len(ordered) + 1) // 2,), generator=generator).tolist()
    return {number: (i + first[i // 2]) % 2 == 0 for i, number in enumerate(ordered)}


def units_of_documents(text: HeldoutText, seed: int) -> Units:
    """Up to 1000 contexts, drawn at random; a unit is the rows of the document that most of its
    context belongs to. Only documents with labels count."""
    owner = text.owner
    labelled = [number for number, header in text.headers.items() if header["labels"]]
    mine = text.document_of == owner[text.context]
    rows = torch.bincount(text.context[mine], minlength=text.num_contexts)
    usable = (torch.isin(owner, torch.tensor(labelled)) & (rows > 0)).nonzero()[:, 0]
    chosen = _drawn(usable, MAX_CONTEXTS, seed)
    unit = torch.full((text.num_contexts,), NO_UNIT)
    unit[chosen] = torch.arange(len(chosen))
    return Units(unit[text.context].where(mine, NO_UNIT), rows[chosen], owner[chosen])


def units_of_tokens(text: HeldoutText, count: int, seed: int) -> Units:
    """``count`` rows of documents, drawn at random (all, if there are fewer), each a unit."""
    chosen = _drawn((text.document_of >= 0).nonzero()[:, 0], count, seed)
    of_row = torch.full((text.num_rows,), NO_UNIT)
    of_row[chosen] = torch.arange(len(chosen))
    return Units(of_row, torch.ones_like(chosen), text.document_of[chosen])


def _drawn(numbers: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return numbers[order[:count]].sort().values


def document_concepts(
    headers: Mapping[int, dict[str, Any]],
    document: Int[Tensor, " units"],
    half: Bool[Tensor, " units"],
    wanted: tuple[str, ...] = (),
    least: int = MIN_UNITS,
) -> Concepts:
    """One concept for each value of each label, of units that belong to documents. A label with two
    values is one concept; numbers with more than six values are cut into thirds of the documents.
    Raises UsageError for a wanted label that no document has."""
    present = document.unique().tolist()
    labels = {n: headers[n]["labels"] for n in present if n in headers}
    columns = sorted({key for own in labels.values() for key in own})
    for name in wanted:
        if name not in columns:
            raise UsageError(f"no document has a label {name!r}; {nearest(name, columns)}")

    def of(documents: Iterable[int]) -> Tensor:
        return torch.isin(document, torch.tensor(sorted(documents)))

    names: list[str] = []
    families: list[str] = []
    nothing = torch.zeros(len(document), 0, dtype=torch.bool)
    positive, applies = [nothing], [nothing]
    for column in dict.fromkeys(wanted) or columns:
        values = {number: own[column] for number, own in labels.items() if column in own}
        for name, having in _divided(column, values):
            names.append(name)
            families.append(column)
            positive.append(of(having)[:, None])
            applies.append(of(values)[:, None])
    found = Concepts(names, families, torch.cat(positive, 1), torch.cat(applies, 1), half)
    return found.with_enough(document, _MIN_DOCUMENTS, least)


def _divided(column: str, values: dict[int, Any]) -> list[tuple[str, set[int]]]:
    """The concepts of one label, each with its documents."""
    distinct = sorted(set(values.values()), key=lambda value: (str(type(value)), value))
    numeric = all(type(value) in (int, float) for value in distinct)
    if not numeric or len(distinct) <= _MAX_VALUES:
        return [
            (f"{column}={value}", {number for number, own in values.items() if own == value})
            for value in (distinct[:1] if len(distinct) == 2 else distinct)
        ]
    ordered = sorted(values.values())
    # Above the smallest value, or nothing would lie below the cut.
    above = next(value for value in ordered if value > ordered[0])
    first, *more = sorted({float(max(ordered[i * len(ordered) // 3], above)) for i in (1, 2)})
    parts = [(f"{column}<{first:g}", -math.inf, first)]
    for second in more:  # two parts make one concept
        parts.append((f"{first:g}<={column}<{second:g}", first, second))
        parts.append((f"{column}>={second:g}", second, math.inf))
    return [(name, {n for n, v in values.items() if low <= v < high}) for name, low, high in parts]


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
    least: int = MIN_UNITS,
) -> Concepts:
    """Concepts of the tokens at some rows, as far as there are enough examples. First letter,
    capital and sentence start apply to the first tokens of words, continuation and quotation to
    tokens that begin with a letter or a digit, digit to all. What comes before a token matters, so
    positions that give no row are read too."""
    document, offset = text.document.flatten(), text.offset.flatten()
    cells = (document >= 0).nonzero()[:, 0]
    document, offset = document[cells], offset[cells]
    ids, index = text.ids.flatten()[cells].unique(return_inverse=True)
    spellings = token_texts(tokenizer, ids.tolist())
    follows = torch.zeros(len(cells), dtype=torch.bool)
    follows[1:] = (document[1:] == document[:-1]) & (offset[1:] == offset[:-1] + 1)
    tokens = zip(index.tolist(), follows.tolist(), (offset == 0).tolist(), strict=True)
    facts = _token_facts((spellings[number], *places) for number, *places in tokens)
    found = torch.tensor(list(facts), dtype=torch.long).view(-1, 8)
    place = torch.full((text.ids.numel(),), -1)
    place[cells] = torch.arange(len(cells))
    letter, *answers = found[place[text.cell[rows]]].T
    capital, digit, wordlike, begins, starts, continues, quoted = (one > 0 for one in answers)
    letters = {f"{LETTER} {x}": (letter == i, begins) for i, x in enumerate(_LETTERS)}
    columns = letters | {
        "capital": (capital, begins),
        "digit": (digit, torch.ones_like(begins)),
        "sentence start": (starts, begins),
        "continuation": (continues, wordlike),
        "quotation": (quoted, wordlike),
    }
    concepts = Concepts(
        list(columns),
        [LETTER if name in letters else name for name in columns],
        torch.stack([yes for yes, _ in columns.values()], 1),
        torch.stack([applies for _, applies in columns.values()], 1),
        half,
    )
    return concepts.with_enough(text.document_of[rows], 0, least)


def _token_facts(tokens: Iterable[tuple[str, bool, bool]]) -> Iterator[tuple[int, ...]]:
    """Of each token: the number of its first letter, or -1; whether it begins with a capital, holds
    a digit, begins with a letter or a digit, begins a word, begins a sentence, continues a word,
    and stands in quotes. ``tokens`` are spellings, each with whether it stands right behind the one
    before, and whether it is the first of its document."""
    in_word = is_start = is_known = False
    straight = curved = 0  # quotes since the line began: an unpaired one does no more harm
    for spelling, follows, opens in tokens:
        if not follows:
            in_word, is_start, is_known, straight, curved = False, opens, False, 0, 0
        visible = spelling.strip()
        first, newline = visible[:1], "\n" in spelling
        letter = _LETTERS.find(first.lower()) if first else -1
        continues = in_word and spelling[:1].isalnum()
        begins = letter >= 0 and not continues
        digit, wordlike = any(map(str.isdigit, spelling)), first.isalnum()
        starts, quoted = begins and is_start, straight % 2 == 1 or curved > 0
        yield letter, first.isupper(), digit, wordlike, begins, starts, continues, quoted
        in_word = spelling[-1:].isalnum()
        if visible.strip(_CLOSERS + _OPENERS):  # more than space, quotes and brackets
            is_known = True
            is_start = newline or visible.rstrip(_CLOSERS)[-1:] in (".", "!", "?")
        elif newline and is_known:
            is_start = True
        straight += spelling.count('"')
        curved += spelling.count("“") - spelling.count("”")
        if newline:
            straight = curved = 0
