"""Short labels of latents, made from where they fire, without a language model as judge.

Every row of the text has a value in each of some families: the word up to its token, its last
letters, the word before, its kind (a number, a capital, punctuation, the start of a sentence), and
its place in the context. A label is a rule about these: a few values of one family, perhaps only
beside a few of another, whose F1 with the latent's firing is the largest. So a label can be tested
on other text. A latent without such a rule is labelled with the tokens that it promotes.

The best values of a family are found exactly: F1 = 2·both / (rule + latent), and with its largest
value F, a value belongs to the rule if the latent fires on more than F/2 of its rows.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from scipy.sparse import csr_matrix

from llm_wsae.data.store import ActivationStore
from llm_wsae.inspecting.directions import Vocabulary

Numbers = Int[np.ndarray, " _"]

MOST_VALUES = 4  # of a family in a label
LEAST_F1 = 0.15  # of a rule, or the label names promoted tokens instead
_GAIN = 0.05  # in F1, for which a rule gets a second family
_FEWEST = 5  # rows on which a latent must fire
_LONGEST, _SHOWN = 40, 20  # letters of a word, as some tokenizers know no spaces; of a shown one
_ENDING, _STEM = 3, 5  # letters of an ending, and of the shortest word that has one
_PLACES = {"the first tokens of a context": 4}  # positions below the number
_MOST_ROWS = 20_000  # of a rule that is refined: a dense latent has no need of it


class Family(NamedTuple):
    """What rows are told apart by."""

    of_row: Numbers  # the number of each row's value
    values: list[str]  # in words; an empty one is none


@dataclass(frozen=True)
class Clause:
    """A row has one of these values."""

    family: str
    values: tuple[str, ...]

    def text(self) -> str:
        """In words: ``“war”, “wars”`` or ``after “civil”``."""
        if self.family in ("kind", "place"):
            return " or ".join(self.values)
        short = (one if len(one) <= _SHOWN else f"{one[:_SHOWN]}…" for one in self.values)
        listed = ", ".join(f"“{one}”" for one in short)
        return {"before": "after ", "ending": "words in "}.get(self.family, "") + listed

    def holds(self, families: dict[str, Family]) -> Bool[np.ndarray, " rows"]:
        """On which rows."""
        own = families[self.family]
        wanted = [number for number, value in enumerate(own.values) if value in self.values]
        return np.isin(own.of_row, wanted)


@dataclass(frozen=True)
class Label:
    """What one latent fires on, made automatically."""

    clauses: tuple[Clause, ...]  # all must hold; empty if no rule is good enough
    f1: float  # of the rule, on the rows it was made from; 0 without one

    def text(self, promotes: Sequence[str] = ()) -> str:
        """In words; without a rule, what it promotes."""
        if self.clauses:
            return ", ".join(clause.text() for clause in self.clauses)
        return "promotes " + ", ".join(f"“{one}”" for one in promotes) if promotes else ""

    def holds(self, families: dict[str, Family]) -> Bool[np.ndarray, " rows"]:
        """On which rows the rule says that the latent fires."""
        found = np.full(len(next(iter(families.values())).of_row), bool(self.clauses))
        for clause in self.clauses:
            found &= clause.holds(families)
        return found


def families_of(store: ActivationStore, vocabulary: Vocabulary, rows: Numbers) -> dict[str, Family]:
    """The families of some rows of a store, ascending."""
    wanted, found, first, text = set(rows.tolist()), [], 0, functools.cache(vocabulary.text)
    for shard in range(len(store.manifest.shards)):
        contexts = store.contexts(shard)
        for ids, keep, document in zip(contexts.ids, contexts.keep, contexts.document, strict=True):
            for at, said in _read([*map(text, ids.tolist())], document.tolist()):
                if keep[at]:
                    if first in wanted:
                        found.append(said)
                    first += 1
    *columns, goes_on = zip(*found, strict=True) if found else [()] * 6
    names = ("word", "ending", "before", "kind", "place")
    families = {name: _family(column) for name, column in zip(names, columns, strict=True)}
    return families | {"word": _with_dots(families["word"], np.array(goes_on, dtype=bool))}


def _family(column: Sequence[str]) -> Family:
    values, of_row = np.unique(np.array(column, dtype=object), return_inverse=True)
    return Family(of_row, values.tolist())


def _with_dots(words: Family, goes_on: Bool[np.ndarray, " rows"]) -> Family:
    """Words, with dots behind those that mostly go on in the next token."""
    share = np.bincount(words.of_row, goes_on) / np.bincount(words.of_row)
    dots = ("…" if part > 0.5 else "" for part in share)
    return Family(words.of_row, [word + end for word, end in zip(words.values, dots, strict=True)])


def _read(
    tokens: Sequence[str], document: Sequence[int]
) -> Iterator[tuple[int, tuple[str, str, str, str, str, bool]]]:
    """Each position of a context with the values of its token, by family, and whether its word goes
    on in the next token."""
    word = before = ""
    starts = True  # a sentence
    for at, (token, own) in enumerate(zip(tokens, document, strict=True)):
        if at and own != document[at - 1]:
            word, before, starts = "", "", True
        bare, goes_on = token.strip(), _continues(word, token)
        if not goes_on:
            word, before = "", word or before
        word += bare
        folded = word.casefold()
        ending = f"-{folded[-_ENDING:]}" if folded.isalpha() and len(folded) >= _STEM else ""
        place = next((name for name, end in _PLACES.items() if at < end), "")
        kind = _kind(word, token, starts and not goes_on)
        more = at + 1 < len(tokens) and _continues(word, tokens[at + 1])
        yield at, (_visible(folded or token), ending, before.casefold(), kind, place, more)
        if bare:
            starts = bare[-1] in ".!?" or (starts and not bare[-1].isalnum())
        starts |= "\n" in token


def _continues(word: str, token: str) -> bool:
    return word[-1:].isalnum() and token[:1].isalnum() and len(word) < _LONGEST


def _kind(word: str, token: str, starts: bool) -> str:
    if word.isdigit():
        return "years" if len(word) == 4 and word[0] in "12" else "numbers"
    if "\n" in token and not word:
        return "line breaks"
    if word and not any(map(str.isalnum, word)):
        return "punctuation"
    if starts:
        return "first words of sentences"
    return "capitalised words" if word[:1].isupper() else ""


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace(" ", "␣").replace("\t", "→")


def labels_of(
    families: dict[str, Family], rows: Numbers, latents: Numbers, d_sae: int
) -> list[Label]:
    """A label for each latent. ``rows`` and ``latents`` are one entry for each firing: the place of
    its row among those of the families, and the latent."""
    number = len(next(iter(families.values())).of_row)
    ones = np.ones(len(rows), dtype=np.float32)
    fires = csr_matrix((ones, (latents, rows)), shape=(d_sae, number))
    counted = {name: _counted(family, fires) for name, family in families.items()}
    where = {name: _Where(family) for name, family in families.items()}
    made = []
    for latent in range(d_sae):
        own = fires.indices[fires.indptr[latent] : fires.indptr[latent + 1]]
        made.append(_label(latent, own, families, counted, where))
    return made


def _counted(family: Family, fires: csr_matrix) -> tuple[csr_matrix, Numbers]:
    """Of each latent and value, on how many of its rows the latent fires; and all its rows."""
    shape = (len(family.of_row), len(family.values))
    ones = np.ones(shape[0], dtype=np.float32)
    has = csr_matrix((ones, (np.arange(shape[0]), family.of_row)), shape=shape)
    return (fires @ has).tocsr(), np.bincount(family.of_row, minlength=shape[1])


class _Where:
    """The rows of each value of a family."""

    def __init__(self, family: Family):
        self._order = np.argsort(family.of_row, kind="stable")
        self._ends = np.searchsorted(family.of_row[self._order], np.arange(len(family.values) + 1))

    def rows(self, values: Numbers) -> Numbers:
        parts = [self._order[self._ends[one] : self._ends[one + 1]] for one in values]
        return np.concatenate(parts)


def _label(
    latent: int,
    fires: Numbers,
    families: dict[str, Family],
    counted: dict[str, tuple[csr_matrix, Numbers]],
    where: dict[str, _Where],
) -> Label:
    nothing = Label((), 0.0)
    if len(fires) < _FEWEST:
        return nothing
    found = {}
    for name, (both, all_rows) in counted.items():
        own = slice(both.indptr[latent], both.indptr[latent + 1])
        values, hits = both.indices[own], both.data[own]
        found[name] = _best(families[name], values, hits, all_rows[values], len(fires))
    # words say most to a reader
    name = max(found, key=lambda one: found[one][1] + _GAIN * (one == "word"))
    values, f1 = found[name]
    if f1 < LEAST_F1:
        return nothing
    clauses = [_clause(name, families, values)]
    rows = where[name].rows(values)
    if len(rows) <= _MOST_ROWS:
        hit = np.isin(rows, fires)
        for other in (one for one in families if one != name):  # in an order: there may be ties
            of_rows = families[other].of_row[rows]
            among, place = np.unique(of_rows, return_inverse=True)
            counts = np.bincount(place, hit), np.bincount(place)
            refined, gained = _best(families[other], among, *counts, len(fires))
            if gained > f1 + (_GAIN if len(clauses) == 1 else 0):
                clauses, f1 = [clauses[0], _clause(other, families, refined)], gained
    return Label(tuple(clauses), float(f1))


def _best(
    family: Family, values: Numbers, hits: np.ndarray, rows: np.ndarray, fires: int
) -> tuple[Numbers, float]:
    """The at most four values whose rows together have the largest F1, and that. Each counts one
    row more than it has, on which the latent is silent: a rare value may fit by chance."""
    named = np.array([bool(family.values[one]) for one in values.tolist()], dtype=bool)
    values, hits, rows = values[named], hits[named], rows[named] + 1
    kept = np.argsort(-(hits**2) / rows, kind="stable")[:MOST_VALUES]
    kept = kept[np.argsort(-(hits / rows)[kept], kind="stable")]
    if not len(kept):
        return values[:0], 0.0
    f1 = 2 * hits[kept].cumsum() / (rows[kept].cumsum() + fires)
    count = int(f1.argmax()) + 1
    return values[kept[:count]], float(f1[count - 1])


def _clause(name: str, families: dict[str, Family], values: Numbers) -> Clause:
    return Clause(name, tuple(families[name].values[one] for one in values.tolist()))
