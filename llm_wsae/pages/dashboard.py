"""``dashboard``: one HTML file that shows what dictionaries found. It opens without a network."""

import html
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.files import read_own_json, write_text
from llm_wsae.artifact.outputs import check_file
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.dictionary.explanations import read_explanations
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.latents import nearest
from llm_wsae.inspecting.readout import Readout
from llm_wsae.inspecting.sentence import check_width, read_sentence
from llm_wsae.inspecting.vocabulary import Vocabulary
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import check_number, mapping
from llm_wsae.pages.collecting import collect
from llm_wsae.pages.frame import filled, is_page
from llm_wsae.pages.payload import SCORES, Latents, Words, active_latents, facts, packed, table

MOST_MEGABYTES = 60
EXAMPLES = 10
"""Of each kind (strongest, and from bands), shown for a latent unless told otherwise."""
_FEWEST = 3  # of each kind, before a dictionary is left out rather
_BYTES_A_LATENT, _BYTES_AN_EXAMPLE = 200, 105  # packed: docs/log.md
_RARE = 1.5  # times the limit: latents that fire rarely have fewer examples, so a page may be less
_MOST_EXAMPLES = 1000  # of one kind, for each latent


@dataclass(frozen=True)
class Dashboard:
    """A page that was written; a notebook shows it inline."""

    path: Path
    megabytes: float

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
    """Write one HTML file that shows what dictionaries of a site found in a store.

    ``dictionaries`` (a list, or by the names to show) and ``store`` may be opened or given by their
    folders, ``model`` is a LanguageModel or whatever ``LanguageModel.load`` takes. ``top`` contexts
    and one of each of ``bands`` quantile bands of the activation are shown for every latent;
    ``prompts`` are sentences whose latents are shown token by token; ``rows`` limits how many rows
    of the store are looked at. ``scores`` is a report of ``evaluate --monosemantic``, whose scores
    of latents become measures here. ``live`` adds the panels that ask a server (``live.serve``).

    The rows are encoded in one pass, and those of contexts with examples are read once more. Memory
    grows with the store by only 4 bytes a row, and 4 more for each dictionary.

    Raises UsageError for dictionaries of different sites or none, or a page that would be larger
    than 60 MB; LlmWsaeError for a folder, store or model that cannot be read or does not fit.
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
    firings = [read * getattr(one.sparsity, "k", one.d_sae) for one in named.values()]
    # Refused before its rows are read, if it is sure to be too large.
    _check_size(most_megabytes([one.d_sae for one in named.values()], top + bands, firings), _RARE)
    scored = {} if scores is None else read_scores(Path(scores), named)
    words, said = Words(Vocabulary(model.tokenizer)), {}
    for name, dictionary in named.items():
        said[name] = read_explanations(dictionary.folder) if dictionary.folder else {}
    sentences = [[read_sentence(model, one, text) for one in named.values()] for text in prompts]
    found, seen = collect(store, named, top, bands, rows), store.text_size(rows)
    readout, decoders = Readout(model), [one.W_dec for one in named.values()]
    parts: list[tuple[str, str]] = []
    overviews = []
    for index, (name, dictionary) in enumerate(named.items()):
        own, beside = found[name], None
        partner = None
        if len(named) > 1:  # the first is compared with the second, all others with the first
            partner = 0 if index else 1
            beside = nearest(dictionary.W_dec, decoders[partner], 1)
        latents = Latents(dictionary, store, own, words, readout, said[name])
        parts += [(f"chunk-{index}-{i}", chunk) for i, chunk in enumerate(latents.chunks())]
        columns = table(dictionary, own, latents.cosine, beside, scored.get(name, {}))
        parts += [(f"table-{index}", packed(columns)), (f"search-{index}", packed(latents.search))]
        overviews.append(facts(dictionary, name, own, seen) | {"partner": partner})
    about = {
        "dictionaries": overviews,
        "top": top,
        "bands": bands,
        "dense": DENSE_DENSITY,
        "scores": SCORES,
        "prompts": [
            [active_latents(own, lambda token: words.number(token.id)) for own in one]
            for one in sentences
        ],
        "live": live,
        "corpus": str(store.manifest.corpus.get("name", "")),
    }
    parts.append(("words", packed(words.texts)))
    page = filled("page.html", about, parts, asks_server=live)
    megabytes = len(page.encode()) / 1e6
    _check_size(megabytes)
    write_text(out, page)
    return Dashboard(out, megabytes)


def most_megabytes(latents: Sequence[int], examples: int, firings: Sequence[int] = ()) -> float:
    """Size of a page if every latent fires often enough to have that many examples.

    ``latents`` are those of each dictionary; ``firings``, if they are known, are the most that each
    has in the rows that are looked at.
    """
    shown = [count * examples for count in latents]
    if firings:
        shown = [min(*both) for both in zip(shown, firings, strict=True)]
    return (sum(latents) * _BYTES_A_LATENT + sum(shown) * _BYTES_AN_EXAMPLE) / 1e6


def what_fits(latents: Sequence[int]) -> tuple[int, int]:
    """How many of the dictionaries, from the first on, and how many examples of each kind, fit onto
    a page; one example of one dictionary if nothing does."""
    for number in range(len(latents), 0, -1):
        for examples in range(EXAMPLES, _FEWEST - 1 if number > 1 else 0, -1):
            if most_megabytes(latents[:number], 2 * examples) <= MOST_MEGABYTES:
                return number, examples
    return 1, 1


def _check_size(megabytes: float, slack: float = 1.0) -> None:
    if megabytes > slack * MOST_MEGABYTES:
        raise UsageError(
            f"the page would be {megabytes:.0f} MB large, more than {MOST_MEGABYTES}; ask for "
            "fewer dictionaries, or for fewer examples with --top and --bands"
        )


def named_dictionaries(
    dictionaries: Sequence[Dictionary | Path | str] | Mapping[str, Dictionary],
) -> dict[str, Dictionary]:
    """The dictionaries by names that tell them apart, on the CPU as the rows of a store are.

    Raises UsageError if there is none or they are of several sites; LlmWsaeError for a folder that
    holds none.
    """
    if not dictionaries:
        raise UsageError("name at least one dictionary")
    named: dict[str, Dictionary] = {}
    if isinstance(dictionaries, Mapping):
        named = dict(dictionaries)
        dictionaries = ()
    for one in dictionaries:
        if isinstance(one, Dictionary):
            dictionary, name = one, one.info.name
        else:
            dictionary = Dictionary.load(one)
            name = os.path.basename(os.path.abspath(one))  # also of . and ..
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        named[next(n for n in itertools.chain([name], numbered) if n not in named)] = dictionary
    sites = {dictionary.info.site for dictionary in named.values()}
    if len(sites) > 1:
        raise UsageError(
            f"a page shows dictionaries of one site, but these are of {' and '.join(sorted(sites))}"
        )
    return {name: dictionary.on_cpu() for name, dictionary in named.items()}


def read_scores(
    report: Path, dictionaries: Mapping[str, Dictionary]
) -> dict[str, dict[str, Float[Tensor, " d_sae"]]]:
    """The scores of latents that ``evaluate --monosemantic`` found, by dictionary; NaN where a
    latent has none.

    Raises LlmWsaeError for a file that cannot be read, was edited or is about other dictionaries.
    """
    read = read_own_json(report, "report of evaluate --monosemantic")
    theirs = mapping(mapping(read.get("monosemanticity")).get("dictionaries"))
    found = {}
    for name in [name for name in dictionaries if name in theirs]:
        if theirs[name].get("sha256") != dictionaries[name].decoder_digest():
            raise LlmWsaeError(
                f"{report} is about another dictionary named {name}; run `llm-wsae evaluate "
                "--monosemantic` on this one"
            )
        columns = {key: one for key, one in theirs[name]["per_latent"].items() if key in SCORES}
        found[name] = {
            key: torch.tensor([nan if value is None else value for value in column])
            for key, column in columns.items()
        }
    if not found:
        raise LlmWsaeError(
            f"{report} holds no scores of latents of {' or '.join(dictionaries)}; "
            "`llm-wsae evaluate --monosemantic` writes them"
        )
    return found
