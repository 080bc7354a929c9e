"""``dashboard``: one HTML file that shows what dictionaries found. It opens without a network.

What the page knows of a dictionary is JSON: facts, one table of all latents, and the latents
themselves in chunks that the browser unpacks one by one.
"""

import base64
import gzip
import html
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from llm_wsae.artifact.artifact import check_file
from llm_wsae.artifact.files import read_own_json, write_text
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.dictionary.explanations import Explanation, read_explanations
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.directions import (
    Readout,
    Vocabulary,
    check_width,
    dimensions_written,
    nearest,
    top_words,
    written,
)
from llm_wsae.inspecting.inspection import Token, read_sentence
from llm_wsae.inspecting.labels import Family, Label, families_of, labels_of
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import check_number, mapping, number, pair
from llm_wsae.pages.collecting import ROLES, Firings, collect, role_of_every_row, windows
from llm_wsae.pages.frame import filled, is_page
from llm_wsae.pages.telling import AFTER, BEFORE, Found, found_in, recognisable
from llm_wsae.statistics.measures import DRAWN, MEASURES, MONOSEMANTICITY, did_weights_help
from llm_wsae.statistics.uncertainty import FEWEST, TextSize
from llm_wsae.terminal import printable

MOST_MEGABYTES, _MOST_OF_SITES = 60, 100  # of a page; of one with several sites
EXAMPLES = 10  # of each kind (strongest, and from bands), shown for a latent
_FEWEST = 3  # of each kind, before a dictionary is left out rather
_BYTES_A_LATENT, _BYTES_AN_EXAMPLE = 200, 105  # packed: docs/log.md
_RARE = 1.5  # times the limit: latents that fire rarely have fewer examples, so a page may be less
_MOST_EXAMPLES = 1000  # of one kind, for each latent

CHUNK = 64  # latents that are unpacked together
_NEIGHBOURS, _WORDS, _DIMENSIONS = 5, 8, 6
_SHOWN = 12  # latents of a token of a sentence
_SHADES = 99  # levels of an activation: two digits
_LONGEST = 80  # characters of a token that are shown
_LOGITS_AT_ONCE = 4 * CHUNK
_BINS = 24  # of the histogram of logits
_NO_QUOTES = str.maketrans("", "", "“”")
_OF_LATENTS = [one for one in MONOSEMANTICITY if one.source == "latents"]
SCORES = {one.name: one.title for one in _OF_LATENTS}


@dataclass(frozen=True)
class Dashboard:
    """A page that was written; a notebook shows it inline."""

    path: Path
    megabytes: float
    found: tuple[Found, ...]  # in each dictionary

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:720px;border:0"></iframe>'


def dashboard(
    dictionaries: Sequence[Dictionary | Path | str] | Mapping[str, Dictionary],
    store: ActivationStore | Path | str,
    model: LanguageModel | str,
    out: Path | str,
    *,
    prompts: Sequence[str] = (),
    top: int = EXAMPLES,
    bands: int = EXAMPLES,
    rows: int | None = None,
    scores: Path | str | None = None,
    live: bool = False,
) -> Dashboard:
    """Write one HTML file that shows what dictionaries found in a store.

    ``dictionaries`` (a list, or by the names to show) and ``store`` may be opened or given by their
    folders, ``model`` is a LanguageModel or whatever ``LanguageModel.load`` takes. Of every latent,
    ``top`` contexts and one of each of ``bands`` quantile bands are shown, among the first ``rows``
    of the store; of ``prompts``, the latents token by token. ``scores`` is a report of ``evaluate
    --monosemantic``. ``live`` adds the panels that ask a server (``live.serve``). Dictionaries of
    one site stand side by side; those of several, such as the transcoders of all blocks, are
    searched together.

    Raises UsageError for no dictionary, or a page that would be larger than 60 MB (with
    several sites 100); LlmWsaeError for a folder, store or model that cannot be read or does not
    fit.
    """
    out = Path(out)
    check_file(out, is_page)
    named = named_dictionaries(dictionaries)
    store = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
    model = model if isinstance(model, LanguageModel) else LanguageModel.load(model)
    store.check_model(model.identity())
    for dictionary in named.values():
        check_width(model, dictionary)
    for what, count in (("top", top), ("bands", bands)):
        check_number(what, count, 1, _MOST_EXAMPLES)
    check_number("rows", 1 if rows is None else rows, 1)
    read = min(store.num_rows, rows or store.num_rows)
    firings = [read * (one.sparsity.k or one.d_sae) for one in named.values()]
    most = MOST_MEGABYTES if len({one.site for one in named.values()}) == 1 else _MOST_OF_SITES
    size = most_megabytes([one.d_sae for one in named.values()], top + bands, firings)
    _check_size(size, most, _RARE)  # before its rows are read, if it is sure to be too large
    scored = {} if scores is None else read_scores(Path(scores), named)
    vocabulary, said = Vocabulary(model.tokenizer), {}
    for name, dictionary in named.items():
        said[name] = read_explanations(dictionary.folder) if dictionary.folder else {}
    sentences = [[read_sentence(model, one, text) for one in named.values()] for text in prompts]
    tokens = {token.id for each in sentences for own in each for token in own}
    word = cache(lambda token: shown(vocabulary.text(token)))
    seen, names, held = store.text_size(rows), list(named), []
    families: dict[str, Family] = {}
    parts: list[tuple[str, str]] = []
    overviews = []
    for _, same in itertools.groupby(names, lambda name: named[name].site):
        group = list(same)  # one after the other: their firings take much memory
        found = collect(store, {name: named[name] for name in group}, top, bands, rows)
        families = families or families_of(store, vocabulary, found[group[0]].sample)
        for name in group:
            index, dictionary = names.index(name), named[name]
            others = [one for one in group if one != name]
            partners = {
                names.index(one): nearest(dictionary.W_dec, named[one].W_dec, 1) for one in others
            }
            labels = labels_of(families, *found[name].firings, dictionary.d_sae)
            read_from = upstream(dictionary, named)
            latents = Latents(
                dictionary, store, found[name], labels, word, model, said[name], read_from
            )
            # the first is compared with the second, all others with the first
            beside = [(one, partners[names.index(one)][1][:, 0]) for one in others[:1]]
            held.append(found_in(name, found[name], labels, latents.windows, vocabulary, *beside))
            parts += [(f"chunk-{index}-{i}", chunk) for i, chunk in enumerate(latents.chunks())]
            own = scored.get(name, {}) | {"recognisable": recognisable(found[name].density, labels)}
            columns = table(dictionary, found[name], latents.cosine, partners, own)
            parts += [(f"table-{index}", packed(columns))]
            parts += [(f"search-{index}", packed(latents.search))]
            tokens |= latents.tokens
            overviews.append(facts(dictionary, name, found[name], seen))
    about = {
        "dictionaries": overviews,
        "top": top,
        "bands": bands,
        "before": BEFORE,
        "dense": DENSE_DENSITY,
        "scores": SCORES,
        "meanings": {one.name: one.meaning for one in _OF_LATENTS},
        "prompts": [
            [[(token.id, strongest(token)) for token in own] for own in each] for each in sentences
        ],
        "live": live,
        "reports": reports_of(named.values(), out),
        "corpus": str(store.manifest.corpus.get("name", "")),
    }
    parts.append(("words", packed({token: word(token) for token in sorted(tokens)})))
    page = filled("page.html", about, parts, asks_server=live)
    megabytes = len(page.encode()) / 1e6
    _check_size(megabytes, most)
    write_text(out, page)
    return Dashboard(out, megabytes, tuple(held))


def most_megabytes(latents: Sequence[int], examples: int, firings: Sequence[int] = ()) -> float:
    """Size of a page if every latent fires often enough to have that many examples. ``latents`` are
    those of each dictionary; ``firings``, if known, the most that each has in the page's rows."""
    shown = [count * examples for count in latents]
    if firings:
        shown = [min(*both) for both in zip(shown, firings, strict=True)]
    return (sum(latents) * _BYTES_A_LATENT + sum(shown) * _BYTES_AN_EXAMPLE) / 1e6


def what_fits(latents: Sequence[int]) -> tuple[int, int]:
    """How many of the dictionaries, from the first on, and how many examples of each kind, fit onto
    a page; one example of one dictionary if nothing does."""
    for count in range(len(latents), 0, -1):
        for examples in range(EXAMPLES, _FEWEST - 1 if count > 1 else 0, -1):
            if most_megabytes(latents[:count], 2 * examples) <= MOST_MEGABYTES:
                return count, examples
    return 1, 1


def _check_size(megabytes: float, most: int, slack: float = 1.0) -> None:
    if megabytes > slack * most:
        raise UsageError(
            f"the page would be {megabytes:.0f} MB large, more than {most}; ask for "
            "fewer dictionaries, or for fewer examples with --top and --bands"
        )


def reports_of(dictionaries: Iterable[Dictionary], out: Path) -> list[str]:
    """Addresses of the reports of the runs that dictionaries come from, if they lie beside the page
    or in folders beside it."""
    folders = {one.folder.resolve().parent for one in dictionaries if one.folder is not None}
    beside, found = out.resolve().parent, [folder / "report.html" for folder in sorted(folders)]
    there = [path for path in found if path.is_file() and path.is_relative_to(beside)]
    return [quote(path.relative_to(beside).as_posix()) for path in there]


def named_dictionaries(
    dictionaries: Sequence[Dictionary | Path | str] | Mapping[str, Dictionary],
) -> dict[str, Dictionary]:
    """The dictionaries by the given names, or by some that tell them apart; those of earlier sites
    first, on the CPU as the rows of a store are. Raises UsageError if there is none, LlmWsaeError
    as ``load`` does."""
    given = isinstance(dictionaries, Mapping)
    if isinstance(dictionaries, Mapping):
        pairs = list(dictionaries.items())
    else:
        pairs = [
            (one.info.name, one)
            if isinstance(one, Dictionary)
            else (os.path.basename(os.path.abspath(one)), Dictionary.load(one))  # also of . and ..
            for one in dictionaries
        ]
    if not pairs:
        raise UsageError("name at least one dictionary")
    sites = Counter(dictionary.site for _, dictionary in pairs)
    named: dict[str, Dictionary] = {}
    for name, dictionary in sorted(pairs, key=lambda pair: pair[1].site):
        if len(sites) > 1 and not given:
            name = str(dictionary.site) + (f" {name}" if sites[dictionary.site] > 1 else "")
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        name = next(one for one in itertools.chain([name], numbered) if one not in named)
        named[name] = dictionary.on_cpu()
    return named


def upstream(
    dictionary: Dictionary, named: Mapping[str, Dictionary]
) -> list[list[tuple[int, int, float | None]]]:
    """For each latent of a transcoder, those of earlier blocks that write most nearly what it
    reads: the place of their dictionary, their number, and the cosine of their decoder row with its
    column of the encoder. The gain of the norm in between is left out."""
    places = [
        place
        for place, one in enumerate(named.values())
        if one.site.is_mlp and one.site < dictionary.site
    ]
    if not (dictionary.site.is_mlp and places):
        return [[] for _ in range(dictionary.d_sae)]
    decoders: list[Tensor] = [[*named.values()][place].W_dec for place in places]
    ends = np.cumsum([len(one) for one in decoders])
    found, cosines = nearest(dictionary.W_enc.T, torch.cat(decoders), _NEIGHBOURS)
    which = np.searchsorted(ends, found.numpy(), side="right")
    latents = found.numpy() - np.array([0, *ends])[which]
    return [
        [(places[one], n, _short(c)) for one, n, c in zip(*own, strict=True)]
        for own in zip(which.tolist(), latents.tolist(), cosines.tolist(), strict=True)
    ]


def read_scores(
    report: Path, dictionaries: Mapping[str, Dictionary]
) -> dict[str, dict[str, Float[Tensor, " d_sae"]]]:
    """The scores of latents that ``evaluate --monosemantic`` found, by dictionary; NaN for none.
    Raises LlmWsaeError for a file that cannot be read, was edited or is about others."""
    read = read_own_json(report, "report of evaluate --monosemantic")
    theirs = mapping(mapping(read.get("monosemanticity")).get("dictionaries"))
    found: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in dictionaries if name in theirs]:
        if theirs[name].get("sha256") != dictionaries[name].decoder_digest():
            raise LlmWsaeError(
                f"{report} is about another dictionary named {name}; run `llm-wsae evaluate "
                "--monosemantic` on this one"
            )
        found[name] = {
            key: torch.tensor([math.nan if value is None else value for value in column])
            for key, column in theirs[name]["per_latent"].items()
            if key in SCORES
        }
    if not found:
        raise LlmWsaeError(
            f"{report} holds no scores of latents of {' or '.join(dictionaries)}; "
            "`llm-wsae evaluate --monosemantic` writes them"
        )
    return found


def shown(text: str) -> str:
    """A token as the page shows it: harmless, on one line and not too long."""
    text = printable(text.replace("\n", "↵").replace("\t", "→"))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def facts(dictionary: Dictionary, name: str, found: Firings, seen: TextSize) -> dict[str, Any]:
    """What the overview says of a dictionary: titles, and lines of name, value and meaning;
    ``seen`` is the size of the text of the page's rows."""
    info = dictionary.info
    weights = "none" if info.rule == "uniform" else f"{info.rule}, α = {info.alpha:g}"
    weights += ", as a space" if info.weights.get("place") == "space" else ""
    rows, dense = found.rows_seen, found.count > DENSE_DENSITY * max(found.rows_seen, 1)
    groups = {
        "What it is": [
            ("model", str(info.model.get("name", "not known")), ""),
            ("site", info.site, ""),
            ("weights", weights, ""),
            ("sparsity", dictionary.sparsity.words, ""),
            ("latents", f"{dictionary.d_sae:,}, in {dictionary.d_in} dimensions", ""),
        ],
        "On the rows of this page": [
            ("rows", f"{rows:,}", ""),
            ("documents", _documents(seen.documents, seen.effective), ""),
            ("active latents a row", f"{float(found.count.sum()) / max(rows, 1):.1f}", ""),
            ("silent latents", f"{int((found.count == 0).sum()):,}", ""),
            ("dense latents", f"{int(dense.sum()):,}", "on > 10 % of rows"),
        ],
        **_measured(info.metrics),
    }
    return {
        "name": name,
        "site": info.site,
        "answer": printable(did_weights_help(name, mapping(info.metrics.get("fidelity")))),
        "facts": [[title, lines] for title, lines in groups.items() if lines],
        "d_sae": dictionary.d_sae,
        "firstEdge": found.first_edge,
    }


def _measured(metrics: Mapping[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    """What ``evaluate --keep`` stored. It may come from the Hub, so numbers may be missing."""
    fidelity, scores = mapping(metrics.get("fidelity")), mapping(metrics.get("monosemanticity"))
    faithful = [(one.title, text, one.meaning) for one in DRAWN if (text := one.text(fidelity))]
    documents = pair([fidelity.get(key) for key in ("documents", "effective_documents")])
    if documents is not None:
        faithful.append(("documents", _documents(*documents), "that it was measured on"))
    beside = []
    for label, own in mapping(metrics.get("baselines")).items():
        record = mapping(mapping(own).get("fidelity"))
        if all(number(record.get(one.key)) is not None for one in DRAWN):
            values = (one.cell(record).split()[0] for one in DRAWN)
            beside.append((label, ", ".join(values), ""))
    titles = ", ".join(one.title for one in DRAWN)
    measured = [(m.title, text, m.meaning) for m in MEASURES.values() if (text := m.text(scores))]
    return {
        "Fidelity on held-out text": faithful,
        f"The same of untrained and half-trained baselines ({titles})": beside,
        "Monosemanticity on held-out text": measured,
    }


def _documents(number: int | float, effective: float) -> str:
    few = ": too few to say much of other text" if effective < FEWEST else ""
    return f"{number:,.0f} (effectively {effective:.0f}{few})"


def table(
    dictionary: Dictionary,
    found: Firings,
    cosine: Float[Tensor, " d_sae"],
    partners: Mapping[int, tuple[Tensor, Tensor]],
    scores: Mapping[str, Float[Tensor, " d_sae"]],
) -> dict[str, list[float | None]]:
    """Measures of all latents, column by column; ``cosine`` is that of the nearest latent,
    ``partners`` the nearest latents of other dictionaries, by their numbers, and their cosines."""
    first, second = principal_components(dictionary.W_dec).T
    columns = {
        "density": found.density,
        "mean": found.total / found.count.clamp(min=1),
        "largest": found.value[:, 0],
        "dimensions": dimensions_written(dictionary.W_dec),
        "nearest": cosine,
        "pca1": first,
        "pca2": second,
        **scores,
    }
    for other, (partner, likeness) in partners.items():
        columns |= {f"partner-{other}": partner[:, 0], f"likeness-{other}": likeness[:, 0]}
    return {name: _rounded(column) for name, column in columns.items()}


def principal_components(decoder: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae 2"]:
    """Where the decoder rows, at length 1, lie along the two directions in which they differ most.
    The largest weight of each is positive: the same dictionary gives the same picture."""
    rows = normalize(decoder, dim=1)
    with torch.random.fork_rng(devices=[]):  # the method starts from random directions
        torch.manual_seed(0)
        _, _, directions = torch.pca_lowrank(rows, q=min(6, *rows.shape), niter=4)
    directions = directions[:, :2]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    found = (rows - rows.mean(0)) @ (directions * largest.sign())
    return pad(found, (0, 2 - found.shape[1]))  # a single latent has one


class Latents:
    """The latents of one dictionary, chunk by chunk."""

    def __init__(
        self,
        dictionary: Dictionary,
        store: ActivationStore,
        found: Firings,
        labels: Sequence[Label],
        word: Callable[[int], str],
        model: LanguageModel,
        explanations: Mapping[int, Explanation],
        read_from: Sequence[Sequence[tuple[int, int, float | None]]],
    ):
        self._decoder, self._found, self._word = dictionary.W_dec, found, word
        self._labels, self._explanations, self._read_from = labels, explanations, read_from
        self._readout, self._roles = Readout(model), role_of_every_row(store, model.tokenizer)
        every = torch.arange(dictionary.d_sae)
        self._near = nearest(dictionary.W_dec, dictionary.W_dec, _NEIGHBOURS, every)
        # of each latent with the one nearest to it; NaN for one that is alone
        self.cosine = pad(self._near[1], (0, 1), value=math.nan)[:, 0]
        self._written = [
            [[one.dimension, *map(_short, (one.decoder, one.share, one.gamma))] for one in own]
            for own in written(dictionary, every, _DIMENSIONS)
        ]
        self.windows = windows(store, dictionary, every, found.row, found.floor, BEFORE, AFTER)
        self.tokens = {*np.unique(self.windows.ids).tolist()} - {-1}  # ``chunks`` adds to them
        largest = found.value.amax(1).clamp(min=1e-30).repeat_interleave(found.row.shape[1]).numpy()
        shades = np.ceil(self.windows.activation / largest[:, None] * _SHADES)
        self._shades = shades.clip(0, _SHADES).astype(np.uint8)
        # of each latent: its explanation, the tokens that it fires on most and those it promotes
        self.search: list[str] = []

    def chunks(self) -> Iterator[str]:
        """Packed lists of latents; ``search`` grows with them."""
        for first in range(0, len(self._decoder), _LOGITS_AT_ONCE):
            logits = self._readout.logits(self._decoder[first : first + _LOGITS_AT_ONCE])
            made = [self._latent(latent, own) for latent, own in enumerate(logits, first)]
            yield from (packed(made[at : at + CHUNK]) for at in range(0, len(made), CHUNK))

    def _latent(self, latent: int, logits: Float[Tensor, " words"]) -> dict[str, Any]:
        found = self._found
        ranks = torch.where(found.row[latent] >= 0)[0].tolist()
        examples = [self._example(latent, rank) for rank in ranks]
        together = _pairs(found.together[latent], found.overlap[latent])
        promotes, suppresses = (
            [(token, _short(value)) for token, value in top_words(logits, _WORDS, largest)]
            for largest in (True, False)
        )
        self.tokens.update(token for token, _ in [*promotes, *suppresses])
        promoted = [self._named(token) for token, _ in promotes[:3]]
        new: dict[str, Any] = {
            "label": printable(self._labels[latent].text(promoted)),
            "examples": examples,
            "histogram": found.histogram[latent].tolist(),
            "neighbours": _pairs(self._near[0][latent], self._near[1][latent]),
            "together": [one for one in together if one[1] > 0],
            "dimensions": self._written[latent],
            "upstream": self._read_from[latent],
            "promotes": promotes,
            "suppresses": suppresses,
            "logits": _histogram(logits),
        }
        fires = [self._named(ids[centre]) for _, _, _, centre, ids, _, _ in examples[:6]]
        if self._labels[latent].clauses:
            fires = [new["label"].translate(_NO_QUOTES)]
        listed = [*dict.fromkeys(fires), "›", *dict.fromkeys(promoted)]
        if (said := self._explanations.get(latent)) is not None:
            new["explanation"] = _said(said)
            listed = [printable(said.text), "·", *listed] if said.text else listed
        self.search.append(" ".join(listed))
        return new

    def _named(self, token: int) -> str:
        """A token in the list, where one of spaces alone would not be seen."""
        return self._word(token).strip() or "␣"

    def _example(self, latent: int, rank: int) -> list[Any]:
        """Rank, activation, document and role, place of the centre, tokens, their shades, and
        sources."""
        role = ROLES[self._roles[int(self._found.row[latent, rank])]]
        place = latent * self._found.row.shape[1] + rank
        here = self.windows.run(place)
        sources = zip(self.windows.source[place], self.windows.part[place], strict=True)
        return [
            rank,
            _short(float(self._found.value[latent, rank])),
            " · ".join(filter(None, [role, shown(self.windows.document[place])])),
            BEFORE - here.start,
            self.windows.ids[place, here].tolist(),
            self._shades[place, here].tolist(),
            [[int(dimension), _short(float(part), 3)] for dimension, part in sources],
        ]


def _said(said: Explanation) -> dict[str, Any]:
    """What a language model said of a latent, with its scores."""
    return {
        "text": printable(said.text or ""),
        "explainer": shown(said.explainer),
        "scores": [
            [shown(name), *map(_short, (score.value, *score.interval)), score.answered, score.asked]
            for name, score in said.scores.items()
        ],
    }


def _histogram(logits: Float[Tensor, " words"]) -> list[float | list[int] | None]:
    """Smallest and largest logit, and how many lie in each of equal bins between."""
    row = logits.numpy()  # torch takes longer to wake its threads than to count
    low, high = float(row.min()), float(row.max())
    scale = _BINS / (high - low) if high > low else 0.0
    bins = ((row - low) * scale).astype(np.intp).clip(max=_BINS - 1)
    return [_short(low), _short(high), np.bincount(bins, minlength=_BINS).tolist()]


def _pairs(indices: Tensor, values: Tensor) -> list[list[Any]]:
    return [[i, v] for i, v in zip(indices.tolist(), _rounded(values), strict=True)]


def _rounded(values: Float[Tensor, " n"] | Int[Tensor, " n"]) -> list[Any]:
    """Four significant digits are enough to look at; numbers of latents stay whole."""
    found = values.tolist()
    return [_short(value) for value in found] if values.is_floating_point() else found


def _short(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or math.isnan(value) else float(f"{value:.{digits}g}")


def packed(value: Any) -> str:
    """JSON, gzipped, base64."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def strongest(token: Token) -> list[tuple[int, float | None]]:
    """The latents that fire most on a token of a sentence, and their activations."""
    return [(one.latent, _short(one.activation)) for one in token.latents[:_SHOWN]]
