"""What a page shows of its dictionaries, in a few lines: how many latents fire, five of them in
words with a text each, and how many are found again in the dictionary beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.inspecting.directions import Vocabulary
from llm_wsae.inspecting.labels import Label
from llm_wsae.pages.collecting import Firings, Windows
from llm_wsae.terminal import aligned, printable

PARTNER = 0.7
"""Cosine of two decoder rows from which on they are called the same feature."""
_CLOSE = f"cosine ≥ {PARTNER:g}"
BEFORE, AFTER = 20, 8  # tokens shown around an example
_TOLD = 5  # latents in words
_WORDS, _LETTERS, _STEM = 3, 6, 4  # of ``recognisable``
_USUAL, _VAGUE = (1e-4, 1e-2), 0.1
_SIDE = 48  # characters of text on either side


@dataclass(frozen=True)
class Told:
    """A latent in words."""

    latent: int
    label: str
    density: float  # share of the page's rows on which it fires
    context: str  # around its largest activation, whose token stands between « and »

    def text(self) -> str:
        """For people."""
        share = f"on {100 * self.density:.2g} % of the tokens"
        return f"  {self.latent:>6}  {self.label}, {share}\n          {self.context}"


@dataclass(frozen=True)
class Found:
    """What a dictionary holds."""

    name: str
    latents: int
    silent: int  # latents that fire on none of the page's rows
    labelled: int  # latents with a rule about their tokens
    told: tuple[Told, ...]
    """The five most ``recognisable`` ones."""
    partner: str | None = None  # name of the dictionary beside it
    partners: int = 0  # latents with a decoder row there at a cosine of at least 0.7


def told(found: Sequence[Found]) -> str:
    """For people: a row for each dictionary, then latents of the first in words."""
    rows = [["dictionary", "latents that fire", "with a label", f"with a partner ({_CLOSE})"]]
    for one in found:
        firing = f"{one.latents - one.silent:,} of {one.latents:,}"
        beside = f"{one.partners:,} in {one.partner}" if one.partner else ""
        rows.append([one.name, firing, f"{one.labelled:,}", beside])
    if all(one.partner is None for one in found):
        rows = [row[:-1] for row in rows]
    lines = [aligned(rows, left=len(rows[0]))]
    if found[0].told:
        lines += ["", f"{len(found[0].told)} latents of {found[0].name} in words:"]
    return "\n".join(lines + [one.text() for one in found[0].told])


def found_in(
    name: str,
    firings: Firings,
    labels: Sequence[Label],
    texts: Windows,
    vocabulary: Vocabulary,
    partner: tuple[str, Float[Tensor, " d_sae"]] | None = None,
) -> Found:
    """``texts`` are those of all examples; ``partner`` is the dictionary beside it, and the largest
    cosine of each latent with one there."""
    density, clear = firings.density.tolist(), recognisable(firings.density, labels)
    ruled = [latent for latent, label in enumerate(labels) if label.clauses]
    best = sorted(ruled, key=lambda one: float(clear[one]), reverse=True)[:_TOLD]
    each = firings.row.shape[1]
    words = (
        Told(one, labels[one].text(), density[one], context_of(texts, one * each, vocabulary))
        for one in best
    )
    return Found(
        name=name,
        latents=len(labels),
        silent=int((firings.count == 0).sum()),
        labelled=len(ruled),
        told=tuple(words),
        partner=None if partner is None else partner[0],
        # with the digits that the page has
        partners=0 if partner is None else int((partner[1].round(decimals=4) >= PARTNER).sum()),
    )


def recognisable(
    density: Float[Tensor, " d_sae"], labels: Sequence[Label]
) -> Float[Tensor, " d_sae"]:
    """How well a label finds the firing of each latent (its F1), if it fires on 1e-4 to 1e-2 of the
    rows; else 0. Labels other than some words, of which three have six letters and differ in the
    first four, count a tenth: a few forms of a word, or short ones, say little."""
    usual = (density >= _USUAL[0]) & (density <= _USUAL[1])
    clear = [label.f1 * (1 if _is_clear(label) else _VAGUE) for label in labels]
    return torch.tensor(clear) * usual


def _is_clear(label: Label) -> bool:
    if [clause.family for clause in label.clauses] != ["word"]:
        return False
    words = [word.rstrip("…") for word in label.clauses[0].values]
    stems = {word[:_STEM] for word in words if word.isalpha() and len(word) >= _LETTERS}
    return len(stems) >= _WORDS


def context_of(texts: Windows, example: int, vocabulary: Vocabulary) -> str:
    """The text of an example on one line, its token between « and », at most about 100 characters
    long."""
    here = texts.run(example)
    at = BEFORE - here.start
    pieces = vocabulary.pieces(texts.ids[example, here].tolist(), [at, at + 1])
    before, token, after = (printable(piece.replace("\n", "↵")) for piece in pieces)
    before = before if len(before) <= _SIDE else f"…{before[1 - _SIDE :]}"
    after = after if len(after) <= _SIDE else f"{after[: _SIDE - 1]}…"
    bare = token.lstrip(" ")  # the space in front of a word, which most tokens begin with
    return f"{before}{token[: len(token) - len(bare)]}«{bare}»{after}"
