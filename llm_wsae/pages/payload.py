"""What the page knows of a dictionary, as JSON: facts, one table of all latents, and the latents
themselves in chunks that the browser unpacks one by one.
"""

import base64
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.dictionary.explanations import Explanation
from llm_wsae.inspecting.latents import dimensions_written, written
from llm_wsae.inspecting.readout import Readout
from llm_wsae.inspecting.vocabulary import Vocabulary
from llm_wsae.outside import mapping, number
from llm_wsae.pages.collecting import Firings, Windows, windows
from llm_wsae.statistics.documents import FEWEST, TextSize
from llm_wsae.statistics.measures import DRAWN, MEASURES, MONOSEMANTICITY, score_text
from llm_wsae.terminal import printable

CHUNK = 64
"""Latents that are unpacked together."""
BEFORE, AFTER = 20, 8
"""Tokens shown around an example."""
_NEIGHBOURS, _WORDS, _DIMENSIONS = 5, 8, 6
_SHADES = 99  # levels of an activation: two digits
_LONGEST = 80  # characters of a token that are shown
_ROWS_AT_ONCE = 1024
_LOGITS_AT_ONCE = 4 * CHUNK
SCORES = {one.name: one.title for one in MONOSEMANTICITY if one.source == "latents"}
"""Scores of latents that become measures of the page, with their titles."""
_DOCUMENTS = ("documents", "effective_documents")


class Words:
    """The tokens that a page shows, each once."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._numbers: dict[int, int] = {}
        self.texts: list[str] = []

    def number(self, token: int) -> int:
        """The place of a token in the page's list."""
        if token not in self._numbers:
            self._numbers[token] = len(self.texts)
            self.texts.append(shown(self._vocabulary.text(token)))
        return self._numbers[token]

    def numbers(self, tokens: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The places of many tokens; −1 stays."""
        found = np.unique(tokens)
        places = np.full(found.max(initial=0) + 2, -1, dtype=np.int32)  # the last is that of −1
        for token in found[found >= 0].tolist():
            places[token] = self.number(token)
        return places[tokens]


def shown(text: str) -> str:
    """A token as the page shows it: harmless, on one line and not too long."""
    text = printable(text.replace("\n", "↵").replace("\t", "→"))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def nearest(
    ours: Float[Tensor, "d_sae d_in"], theirs: Float[Tensor, "other d_in"], count: int, same: bool
) -> tuple[Int[Tensor, "d_sae count"], Float[Tensor, "d_sae count"]]:
    """For each latent, the ``count`` others whose decoder rows have the largest cosine with its
    own; not itself, if both are the ``same`` dictionary."""
    normal = torch.nn.functional.normalize(theirs, dim=1)
    indices, cosines = [], []
    for start in range(0, len(ours), _ROWS_AT_ONCE):
        part = torch.nn.functional.normalize(ours[start : start + _ROWS_AT_ONCE], dim=1)
        cosine = part @ normal.T
        if same:
            rows = torch.arange(len(part))
            cosine[rows, rows + start] = -torch.inf
        best = cosine.topk(min(count, cosine.shape[1] - same), dim=1)
        indices.append(best.indices)
        cosines.append(best.values)
    return torch.cat(indices), torch.cat(cosines)


def _known(fidelity: Mapping[str, Any]) -> list[str]:
    """The numbers of ``DRAWN``, if all of them are there."""
    values = [number(fidelity.get(one.key)) for one in DRAWN]
    return [] if None in values else [one.cell(fidelity).split()[0] for one in DRAWN]


def facts(dictionary: Dictionary, name: str, found: Firings, seen: TextSize) -> dict[str, Any]:
    """What the overview says of a dictionary: titles, and lines of name, value and meaning;
    ``seen`` is the size of the text of the page's rows."""
    info = dictionary.info
    fidelity, scores = (mapping(info.metrics.get(name)) for name in ("fidelity", "monosemanticity"))
    weights = "none" if info.rule == "uniform" else f"{info.rule}, α = {info.alpha:g}"
    weights += ", as a space" if info.weights.get("place") == "space" else ""
    alive = max(found.rows_seen, 1)
    titles = ", ".join(one.title for one in DRAWN)
    groups = {
        "What it is": [
            ("model", printable(str(info.model.get("name", "not known"))), ""),
            ("site", printable(info.site), ""),
            ("weights", printable(weights), ""),
            ("sparsity", printable(str(dictionary.sparsity)), ""),
            ("latents", f"{dictionary.d_sae:,}, in {dictionary.d_in} dimensions", ""),
        ],
        "On the rows of this page": [
            ("rows", f"{found.rows_seen:,}", ""),
            ("documents", _documents(float(seen.documents), seen.effective), ""),
            ("active latents a row", f"{float(found.count.sum()) / alive:.1f}", ""),
            ("silent latents", f"{int((found.count == 0).sum()):,}", ""),
            (
                "dense latents",
                f"{int((found.count > DENSE_DENSITY * alive).sum()):,}",
                "on > 10 % of rows",
            ),
        ],
        "Fidelity on held-out text": [
            (one.title, text, one.meaning) for one in DRAWN if (text := one.text(fidelity))
        ]
        + [
            ("documents", _documents(float(count), float(effective)), "that it was measured on")
            for count, effective in [[number(fidelity.get(key)) for key in _DOCUMENTS]]
            if count is not None and effective is not None
        ],
        f"The same of untrained and half-trained baselines ({titles})": [
            (printable(str(label)), ", ".join(values), "")
            for label, own in mapping(info.metrics.get("baselines")).items()
            if (values := _known(mapping(mapping(own).get("fidelity"))))
        ],
        "Monosemanticity on held-out text": [
            (one.title, text, one.meaning)
            if (one := MEASURES.get(key)) is not None
            else (printable(key.replace("_", " ")), text, "")
            for key in scores
            if (text := score_text(scores, key))
        ],
    }
    return {
        "name": printable(name),
        "facts": [[title, lines] for title, lines in groups.items() if lines],
        "d_sae": dictionary.d_sae,
        "firstEdge": found.first_edge,
    }


def _documents(number: float, effective: float) -> str:
    few = ": too few to say much of other text" if effective < FEWEST else ""
    return f"{number:,.0f} (effectively {effective:.0f}{few})"


def table(
    dictionary: Dictionary,
    found: Firings,
    cosine: Float[Tensor, " d_sae"],
    partner: tuple[Tensor, Tensor] | None,
    scores: Mapping[str, Float[Tensor, " d_sae"]],
) -> dict[str, list[float | None]]:
    """Measures of all latents, column by column; ``cosine`` is that of the nearest latent."""
    first, second = principal_components(dictionary.W_dec).T
    columns = {
        "density": found.count / max(found.rows_seen, 1),
        "mean": found.total / found.count.clamp(min=1),
        "largest": found.value[:, 0],
        "dimensions": dimensions_written(dictionary.W_dec),
        "nearest": cosine,
        "pca1": first,
        "pca2": second,
        **scores,
    }
    if partner is not None:
        columns["likeness"] = partner[1][:, 0]
    rounded = {name: _rounded(column) for name, column in columns.items()}
    return rounded if partner is None else rounded | {"partner": partner[0][:, 0].tolist()}


def principal_components(decoder: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae 2"]:
    """Where the decoder rows, at length 1, lie along the two directions in which they differ most.

    The largest weight of each direction is positive, so that the same dictionary gives the same
    picture.
    """
    rows = torch.nn.functional.normalize(decoder, dim=1)
    with torch.random.fork_rng(devices=[]):  # the method starts from random directions
        torch.manual_seed(0)
        _, _, directions = torch.pca_lowrank(rows, q=min(6, *rows.shape), niter=4)
    directions = directions[:, :2]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    found = (rows - rows.mean(0)) @ (directions * largest.sign())
    return torch.nn.functional.pad(found, (0, 2 - found.shape[1]))  # a single latent has one


class Latents:
    """The latents of one dictionary, chunk by chunk."""

    def __init__(
        self,
        dictionary: Dictionary,
        store: ActivationStore,
        found: Firings,
        floor: Float[Tensor, " rows"],
        words: Words,
        readout: Readout | None,
        explanations: Mapping[int, Explanation],
    ):
        self._dictionary, self._found, self._words = dictionary, found, words
        self._readout, self._explanations = readout, explanations
        self._logits: Tensor | None = None
        self.neighbours = nearest(dictionary.W_dec, dictionary.W_dec, _NEIGHBOURS, same=True)
        """Numbers and cosines of the latents nearest to each."""
        every = torch.arange(dictionary.d_sae)
        self._written = [
            [[one.dimension, *map(_short, (one.decoder, one.share, one.gamma))] for one in own]
            for own in written(dictionary, every, _DIMENSIONS)
        ]
        self._windows: Windows = windows(store, dictionary, every, found.row, floor, BEFORE, AFTER)
        self._tokens = words.numbers(self._windows.ids)
        largest = found.value.amax(1).clamp(min=1e-30).repeat_interleave(found.row.shape[1]).numpy()
        shades = np.ceil(self._windows.activation / largest[:, None] * _SHADES)
        self._shades = shades.clip(0, _SHADES).astype(np.uint8)
        self.search: list[str] = []
        """Of each latent: its explanation, the tokens that it fires on most, and those that it
        promotes."""

    def chunks(self) -> Iterator[str]:
        """Packed lists of latents; ``search`` grows with them."""
        for start in range(0, self._dictionary.d_sae, CHUNK):
            if start % _LOGITS_AT_ONCE == 0 and self._readout is not None:
                rows = self._dictionary.W_dec[start : start + _LOGITS_AT_ONCE]
                self._logits = self._readout.logits(rows)
            stop = min(start + CHUNK, self._dictionary.d_sae)
            yield packed([self._latent(latent) for latent in range(start, stop)])

    def _latent(self, latent: int) -> dict[str, Any]:
        examples, firing = [], []
        per_latent = self._found.row.shape[1]
        values = _rounded(self._found.value[latent])
        for rank in torch.where(self._found.row[latent] >= 0)[0].tolist():
            place = latent * per_latent + rank
            there = np.flatnonzero(self._tokens[place] >= 0)  # a run around the centre
            first, stop = int(there[0]), int(there[-1]) + 1
            tokens = self._tokens[place, first:stop].tolist()
            shades = self._shades[place, first:stop].tolist()
            document = shown(self._windows.document[place])
            source = self._windows.source[place].tolist(), self._windows.part[place].tolist()
            sources = [
                [dimension, _short(part, 3)] for dimension, part in zip(*source, strict=True)
            ]
            examples.append([rank, values[rank], document, BEFORE - first, tokens, shades, sources])
            firing.append(self._words.texts[tokens[BEFORE - first]].strip())
        new: dict[str, Any] = {
            "examples": examples,
            "histogram": self._found.histogram[latent].tolist(),
            "neighbours": _pairs(self.neighbours[0][latent], self.neighbours[1][latent]),
            "together": [
                pair
                for pair in _pairs(self._found.together[latent], self._found.overlap[latent])
                if pair[1] > 0
            ],
            "dimensions": self._written[latent],
        }
        promoted: list[str] = []
        if self._logits is not None:
            logits = self._logits[latent % _LOGITS_AT_ONCE]
            for key, largest in (("promotes", True), ("suppresses", False)):
                best = logits.topk(min(_WORDS, len(logits)), largest=largest)
                ids = [self._words.number(token) for token in best.indices.tolist()]
                new[key] = [[i, v] for i, v in zip(ids, _rounded(best.values), strict=True)]
            new["logits"] = _histogram(logits)
            promoted = [self._words.texts[i].strip() for i, _ in new["promotes"][:3]]
        listed = [*dict.fromkeys(firing[:6]), "›", *dict.fromkeys(promoted)]
        if (said := self._explanations.get(latent)) is not None:
            new["explanation"] = _said(said)
            listed = [printable(said.text), "·", *listed] if said.text else listed
        self.search.append(" ".join(listed))
        return new


def _said(said: Explanation) -> dict[str, Any]:
    """What a language model said of a latent, and how well it recognised the latent by that."""
    return {
        "text": printable(said.text or ""),
        "explainer": shown(said.explainer),
        "scores": [
            [shown(name), *map(_short, (score.value, *score.interval)), score.answered, score.asked]
            for name, score in said.scores.items()
        ],
    }


def _histogram(logits: Float[Tensor, " words"], bins: int = 24) -> list[float | list[int] | None]:
    """Smallest and largest logit, and how many lie in each of equal bins between.

    By NumPy: for one row of a vocabulary torch takes longer to wake its threads than to count.
    """
    row = logits.numpy()
    low, high = float(row.min()), float(row.max())
    scale = bins / (high - low) if high > low else 0.0
    counts = np.bincount(((row - low) * scale).astype(np.intp).clip(max=bins - 1), minlength=bins)
    return [_short(low), _short(high), counts.tolist()]


def _pairs(indices: Tensor, values: Tensor) -> list[list[Any]]:
    return [[i, v] for i, v in zip(indices.tolist(), _rounded(values), strict=True)]


def _rounded(values: Tensor) -> Any:
    """Four significant digits are enough to look at; numbers of latents stay whole."""
    if not values.is_floating_point():
        return values.tolist()
    return _short(float(values)) if values.ndim == 0 else [_short(v) for v in values.tolist()]


def _short(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or math.isnan(value) else float(f"{value:.{digits}g}")


def packed(value: Any) -> str:
    """JSON, gzipped, base64."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def prompt_facts(
    sentences: Sequence[Sequence[Any]], words: Words
) -> list[list[tuple[int, list[tuple[int, float | None]]]]]:
    """The tokens of a sentence as each dictionary sees them, with the latents that fire on them."""
    return [
        [
            (
                words.number(token.id),
                [(one.latent, _short(one.activation)) for one in token.latents[:12]],
            )
            for token in tokens
        ]
        for tokens in sentences
    ]
