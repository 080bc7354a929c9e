"""``dashboard``: one HTML file that shows what dictionaries found. It opens without a network."""

import html
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import write_text
from llm_wsae.artifact.outputs import check_file
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import DENSE_DENSITY, Dictionary
from llm_wsae.dictionary.explanations import read_explanations
from llm_wsae.errors import UsageError
from llm_wsae.inspecting.readout import Readout
from llm_wsae.inspecting.sentence import check_width, read_sentence
from llm_wsae.inspecting.vocabulary import Vocabulary
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import check_number
from llm_wsae.pages.collecting import collect
from llm_wsae.pages.frame import filled, is_page
from llm_wsae.pages.latent_measures import read_scores
from llm_wsae.pages.payload import (
    SCORES,
    Latents,
    Words,
    facts,
    nearest,
    packed,
    prompt_facts,
    table,
)
from llm_wsae.pages.size import EXAMPLES, MOST_MEGABYTES, most_megabytes
from llm_wsae.terminal import printable

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
    _check_size(named, top + bands, min(store.num_rows, rows or store.num_rows))
    scored = {} if scores is None else read_scores(Path(scores), named)
    words = Words(Vocabulary(model.tokenizer))
    sentences = [
        [read_sentence(model, dictionary, text) for dictionary in named.values()]
        for text in prompts
    ]
    said = {n: read_explanations(d.folder) if d.folder else {} for n, d in named.items()}
    found, floors = collect(store, named, top, bands, rows)
    readout, parts = Readout(model), []
    decoders = [dictionary.W_dec for dictionary in named.values()]
    seen = store.text_size(rows)
    shown: list[dict[str, Any]] = []
    for index, (name, dictionary) in enumerate(named.items()):
        own, partner, beside = found[name], None, None
        if len(named) > 1:  # the first is compared with the second, all others with the first
            partner = 0 if index else 1
            beside = nearest(dictionary.W_dec, decoders[partner], 1, same=False)
        latents = Latents(dictionary, store, own, floors[name], words, readout, said[name])
        chunks = list(latents.chunks())
        parts += [(f"chunk-{index}-{i}", chunk) for i, chunk in enumerate(chunks)]
        near = latents.neighbours[1]
        cosine = near[:, 0] if near.shape[1] else near.new_full((1,), nan)  # of a single latent
        columns = table(dictionary, own, cosine, beside, scored.get(name, {}))
        parts.append((f"table-{index}", packed(columns)))
        parts.append((f"search-{index}", packed(latents.search)))
        shown.append(facts(dictionary, name, own, seen) | {"partner": partner})
    about = {
        "dictionaries": shown,
        "top": top,
        "bands": bands,
        "dense": DENSE_DENSITY,
        "scores": SCORES,
        "prompts": [prompt_facts(one, words) for one in sentences],
        "live": live,
        "corpus": printable(str(store.manifest.corpus.get("name", ""))),
    }
    parts.append(("words", packed(words.texts)))
    page = filled("page.html", about, parts, asks_server=live)
    megabytes = len(page.encode()) / 1e6
    if megabytes > MOST_MEGABYTES:
        raise _too_large(megabytes)
    write_text(out, page)
    return Dashboard(out, megabytes)


def _check_size(named: Mapping[str, Dictionary], examples: int, rows: int) -> None:
    """Raises UsageError if the page is sure to be too large, before its rows are read."""
    latents = [one.d_sae for one in named.values()]
    firings = [rows * getattr(one.sparsity, "k", one.d_sae) for one in named.values()]
    megabytes = most_megabytes(latents, examples, firings)
    if megabytes > _RARE * MOST_MEGABYTES:
        raise _too_large(megabytes)


def _too_large(megabytes: float) -> UsageError:
    return UsageError(
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
    if isinstance(dictionaries, Mapping):
        named = dict(dictionaries)
    else:
        named = {}
        for one in dictionaries:
            if isinstance(one, Dictionary):
                dictionary, name = one, one.info.name
            else:
                dictionary = Dictionary.load(one)
                name = os.path.basename(os.path.abspath(one))  # also of . and ..
            numbered = (f"{name} ({number})" for number in itertools.count(2))
            free = (n for n in itertools.chain([name], numbered) if n not in named)
            named[next(free)] = dictionary
    sites = {dictionary.info.site for dictionary in named.values()}
    if len(sites) > 1:
        raise UsageError(
            f"a page shows dictionaries of one site, but these are of {' and '.join(sorted(sites))}"
        )
    return {name: dictionary.on_cpu() for name, dictionary in named.items()}
