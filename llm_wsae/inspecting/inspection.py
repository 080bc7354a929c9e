"""``inspect``: single latents of a dictionary, or those that fire on a text.

``firings`` finds where given latents fire in an activation store; no model is needed. It is one
pass over the rows. A latent's pre-activation costs one column of the encoder, so it is computed for
every row. Whether the latent fires may depend on all others (TopK). So the complete dictionary
encodes a row if the pre-activation is larger than what is known of the latent's top contexts, and
evenly spread rows, from which the density is estimated.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.config import PackConfig
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting import check_asked
from llm_wsae.inspecting.directions import (
    Readout,
    Vocabulary,
    Written,
    check_store,
    check_width,
    dimensions_written,
    nearest,
    not_massive,
    top_words,
    written,
)
from llm_wsae.inspecting.labels import Label, families_of, labels_of
from llm_wsae.inspecting.strongest import Strongest, context_of_every_row
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import check_number, parsing
from llm_wsae.outside import text as known_text
from llm_wsae.terminal import printable

SAMPLE_ROWS = 1 << 15
"""The fewest rows that the density is estimated from (or all rows of a smaller store)."""
_ROWS_AT_ONCE = 1 << 12
_SLACK = 1e-5  # relative, between two float32 ways to the same pre-activation
_BEFORE, _AFTER = 24, 12  # tokens shown around the marked one
_LEFT, _RIGHT = 56, 32  # characters printed on either side of it
_STRONGEST = 5  # latents printed for each token of a text


@dataclass(frozen=True)
class Active:
    """A latent that fires."""

    latent: int
    activation: float


@dataclass(frozen=True)
class Token:
    """One token of the text."""

    id: int
    token: str
    latents: list[Active]
    """All that fire, by descending activation; none at positions excluded from training."""


@dataclass(frozen=True)
class Firing:
    """What one latent does in a store."""

    density: float  # fraction of the rows looked at on which it fires
    rows_looked_at: int  # number of rows, evenly spread over the store, without massive activations
    mean_activation: float | None  # mean over those rows on which it fires; None if it never does
    rows: list[int]
    """Rows of its largest activations, each in a different context, in descending order."""
    values: list[float]  # its activations on these rows


@dataclass(frozen=True)
class Word:
    """A token that a latent promotes or suppresses."""

    id: int
    token: str
    logit: float  # as ``Readout.logits`` gives it


@dataclass(frozen=True)
class Neighbour:
    """Another latent, and the cosine of the two decoder directions."""

    latent: int
    cosine: float


@dataclass(frozen=True)
class Marked:
    """A run of text split at one of its tokens."""

    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Example:
    """A place in the store's text where a latent fires."""

    row: int  # number of the row in the store
    document: str | None  # name of its document
    activation: float
    text: Marked


@dataclass(frozen=True)
class Latent:
    """One latent of a dictionary."""

    latent: int
    label: str | None  # made automatically (``labels``); None without a store and a model
    neighbours: list[Neighbour]  # by descending cosine
    dimensions: list[Written]  # by descending share
    effective_dimensions: float
    """(Σw²)²/Σw⁴ over all decoder weights w: how many dimensions it writes to."""
    promotes: list[Word] | None  # tokens by descending logit; None without a model
    suppresses: list[Word] | None  # tokens by ascending logit; None without a model
    firing: Firing | None  # None without a store
    examples: list[Example]  # its top contexts, one of each context of the store


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found."""

    latents: list[Latent]
    """The latents asked for, each once, in the order given."""
    tokens: list[Token] | None
    """The tokens of the text with the latents that fire on them; None without a text."""
    no_model: str | None
    """Why no model was used, so that tokens are not shown; None if one was."""


def inspect(
    dictionary: Dictionary | Path | str,
    latents: Sequence[int] = (),
    *,
    store: ActivationStore | Path | str | None = None,
    model: LanguageModel | str | None = None,
    text: str | None = None,
    top: int = 10,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Inspection:
    """Look at latents: where they fire, which tokens they promote, what they write; or at a text.

    ``dictionary`` and ``store`` may be opened or given by their folders. The store, which must
    come from the same model, adds density and top contexts. ``model`` is a LanguageModel or
    whatever ``LanguageModel.load`` takes; without it, the model that the dictionary names is
    loaded if the Hub's local cache has it: a dictionary may come from anybody, so it makes nothing
    be downloaded. (If that fails and no ``text`` was given, the latents are described without
    tokens.) ``revision``, ``device`` and ``dtype`` apply to a model that is loaded here. ``top`` is
    the number of contexts, tokens, neighbours and dimensions to report.

    Raises UsageError if neither latents nor a text are given, for a latent that does not exist, or
    for a text without a model; LlmWsaeError if a folder or the model cannot be read.
    """
    check_asked(latents, text, store)
    check_number("top", top, 1)
    if not isinstance(dictionary, Dictionary):
        dictionary = Dictionary.load(dictionary)
    for latent in latents:
        check_latent(dictionary, latent)
    if store is not None:
        store = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
        check_store(store, dictionary)
    loading: dict[str, Any] = {"revision": revision, "device": device, "dtype": dtype}
    no_model = None
    if model is None:
        model, no_model = _own_model(dictionary, loading)
    elif not isinstance(model, LanguageModel):
        print(f"loading {printable(model)}", file=sys.stderr)
        model = LanguageModel.load(model, **loading)
    if model is not None:
        check_model(model, dictionary, store)
    elif text is not None:
        raise UsageError(f"reading a text needs the model, but {no_model}")
    tokens = None
    if model is not None and text is not None:
        tokens = read_sentence(model, dictionary, text)
    different = list(dict.fromkeys(latents))
    views = _views(dictionary.on_cpu(), different, store, model, top) if different else []
    return Inspection(views, tokens, no_model)


def _own_model(
    dictionary: Dictionary, loading: dict[str, Any]
) -> tuple[LanguageModel | None, str | None]:
    """The model that the dictionary names, from the Hub's cache; or None and the reason."""
    name, commit = (known_text(dictionary.info.model.get(key)) for key in ("name", "revision"))
    if name is None:
        reason = "the dictionary does not say which model it was trained on"
    elif commit is None:
        reason = f"{printable(name)}, the dictionary's model, did not come from the Hub"
    else:
        try:
            loading = loading | {"revision": loading["revision"] or commit}
            return LanguageModel.load(name, download=False, **loading), None
        except LlmWsaeError as error:
            reason = printable(str(error))
    return None, f"{reason}; name the model with --model"


def check_latent(dictionary: Dictionary, latent: int) -> None:
    """Raises UsageError if there is no such latent."""
    if not 0 <= latent < dictionary.d_sae:
        raise UsageError(
            f"there is no latent {latent}; {dictionary.info.name} has latents 0 to "
            f"{dictionary.d_sae - 1}"
        )


def check_model(
    model: LanguageModel, dictionary: Dictionary, store: ActivationStore | None
) -> None:
    """Raises UsageError for a model of another width, LlmWsaeError if another one made the store,
    whose tokens would be misread; warns if the dictionary was trained on other weights."""
    check_width(model, dictionary)
    if dictionary.info.is_of_other_weights(model.identity()):
        print(
            f"llm-wsae: the dictionary was trained on a model whose weights differ from those of "
            f"{model.name}",
            file=sys.stderr,
        )
    if store is None:
        return
    made_by = store.manifest.model
    if made_by.get("weights_sha256") != model.identity()["weights_sha256"]:
        raise LlmWsaeError(
            f"the store {store.folder} was made by {made_by.get('name')}, not by "
            f"{model.name} (other weights); give that model, or a store of this one"
        )


def _views(
    dictionary: Dictionary,
    latents: list[int],
    store: ActivationStore | None,
    model: LanguageModel | None,
    top: int,
) -> list[Latent]:
    """The latents of a dictionary on the CPU, with ``top`` of everything."""
    vocabulary = Vocabulary(None if model is None else model.tokenizer)
    numbers = torch.tensor(latents)
    decoder = dictionary.W_dec[numbers]
    logits = None if model is None else Readout(model).logits(decoder)
    near, cosines = nearest(decoder, dictionary.W_dec, top, numbers)
    writes, effective = written(dictionary, numbers, top), dimensions_written(decoder).tolist()
    found = sample = None
    labels: list[Label] = []
    if store is not None:
        found, sample = firings(store, dictionary, numbers, top)
    if store is not None and sample is not None and model is not None:
        families = families_of(store, vocabulary, sample.rows)
        labels = labels_of(families, sample.place, sample.number, len(latents))

    def words(place: int, largest: bool) -> list[Word] | None:
        if logits is None:
            return None
        best = top_words(logits[place], top, largest)
        return [Word(token, vocabulary.text(token), value) for token, value in best]

    return [
        Latent(
            latent=latent,
            label=_said(labels[place], words(place, largest=True)) if labels else None,
            neighbours=list(map(Neighbour, near[place].tolist(), cosines[place].tolist())),
            dimensions=writes[place],
            effective_dimensions=effective[place],
            promotes=words(place, largest=True),
            suppresses=words(place, largest=False),
            firing=found[place] if found else None,
            examples=examples_of(store, vocabulary, found[place]) if store and found else [],
        )
        for place, latent in enumerate(latents)
    ]


def _said(label: Label, promoted: Sequence[Word] | None) -> str:
    return label.text([word.token.strip() for word in promoted or []][:3])


def examples_of(store: ActivationStore, vocabulary: Vocabulary, firing: Firing) -> list[Example]:
    """The text around the largest activations of a latent."""
    where = store.locate(torch.tensor(firing.rows, dtype=torch.long))
    examples = []
    for number, (row, value) in enumerate(zip(firing.rows, firing.values, strict=True)):
        at = int(where.position[number])
        shard, place = store.place_of_context(int(where.context[number]))
        contexts = store.contexts(shard)
        first, stop = max(0, at - _BEFORE), at + _AFTER + 1
        own = contexts.document[place, first:stop] == contexts.document[place, at]
        first, last = (first + np.flatnonzero(own)[[0, -1]]).tolist()
        ids = contexts.ids[place, first : last + 1].tolist()
        name = contexts.headers.get(int(where.document[number]), {}).get("name")
        text = Marked(*vocabulary.pieces(ids, [at - first, at - first + 1]))
        examples.append(Example(row, name, value, text))
    return examples


class Sample(NamedTuple):
    """Evenly spread rows, without massive ones, and where the latents fire among them."""

    rows: Int[np.ndarray, " sample"]  # their numbers in the store
    place: Int[np.ndarray, " firings"]  # of each firing's row among them
    number: Int[np.ndarray, " firings"]  # of its latent among those asked for


def firings(
    store: ActivationStore,
    dictionary: Dictionary,
    latents: Int[Tensor, " latents"],
    top: int,
    *,
    sample_rows: int = SAMPLE_ROWS,
    most_rows: int | None = None,
) -> tuple[list[Firing], Sample]:
    """Density and ``top`` contexts of each latent in the first ``most_rows`` rows, or all. The
    density is estimated from ``sample_rows`` rows, or almost twice as many, the sample that is
    returned beside it.

    The store must fit (``check_store``). Raises UsageError if it does not have the dictionary's
    site, LlmWsaeError if its rows cannot be read.
    """
    num_rows = min(store.num_rows, most_rows or store.num_rows)
    reader, stride = store.reader(dictionary.site.reads), max(1, num_rows // sample_rows)
    column = latents.new_full((dictionary.d_sae,), len(latents))
    column[latents] = torch.arange(len(latents))
    strongest = Strongest(len(latents), top, torch.from_numpy(context_of_every_row(store)))
    looked_at, sums = 0, torch.zeros(2, len(latents))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    starts = range(0, num_rows, _ROWS_AT_ONCE)
    for start in tqdm(starts, desc="rows of the store", unit="tile", leave=False):
        x = reader.rows(start, min(start + _ROWS_AT_ONCE, num_rows)).float()
        usable, rows = not_massive(dictionary, x), torch.arange(start, start + len(x))
        sampled = usable & (rows % stride == 0)
        pre = torch.addmm(dictionary.b_enc[latents], x, dictionary.W_enc[:, latents])
        positive = usable[:, None] & (pre > 0)
        contends = positive & (pre > strongest.lowest - _SLACK * strongest.lowest.abs())
        encoded = (contends | (positive & sampled[:, None])).any(1).nonzero()[:, 0]
        codes = dictionary.encode_sparse(x[encoded])
        at = column[codes.indices]
        row, slot = ((at < len(latents)) & (codes.values > 0)).nonzero(as_tuple=True)
        number, value, row = at[row, slot], codes.values[row, slot], encoded[row]
        strongest.add(number, value, value, start + row)
        place, kept = looked_at + sampled.cumsum(0) - 1, sampled[row]
        seen.append((rows[sampled], place[row[kept]], number[kept]))
        sums.index_add_(1, number[kept], torch.stack([torch.ones_like(value), value])[:, kept])
        looked_at += int(sampled.sum())
    found = []
    for own, values, (count, total) in zip(*strongest.table(), sums.T.tolist(), strict=True):
        found.append(
            Firing(
                density=count / max(looked_at, 1),
                rows_looked_at=looked_at,
                mean_activation=total / count if count else None,
                rows=own[own >= 0].tolist(),
                values=values[own >= 0].tolist(),
            )
        )
    return found, Sample(*(torch.cat(parts).numpy() for parts in zip(*seen, strict=True)))


def read_sentence(model: LanguageModel, dictionary: Dictionary, text: str) -> list[Token]:
    """The tokens of a text, after the model's BOS if the dictionary was trained with it.

    Raises UsageError for a text without tokens, one that is too long for the model, or a model that
    does not fit the dictionary; LlmWsaeError for a model without a tokenizer.
    """
    model.check_site(dictionary.site)
    check_width(model, dictionary)
    ids = torch.tensor(token_ids(model, dictionary, text))
    place = dictionary.site.reads
    hidden = model.activations(ids[None], [place])[place][0].cpu().float()
    codes = dictionary.encode_sparse(hidden.to(dictionary.W_enc.device))
    packing = PackConfig.remembered(dictionary.info.store.get("packing"))
    trained_on = torch.arange(len(ids)) >= packing.drop_positions
    if packing.drop_special:
        trained_on &= ~torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids).long())
    values = codes.values.cpu() * (trained_on & not_massive(dictionary, hidden))[:, None]
    vocabulary, tokens = Vocabulary(model.tokenizer), []
    for token, *pair in zip(ids.tolist(), codes.indices.tolist(), values.tolist(), strict=True):
        active = [Active(*one) for one in zip(*pair, strict=True) if one[1] > 0]
        active.sort(key=lambda one: -one.activation)
        tokens.append(Token(token, vocabulary.text(token), active))
    return tokens


def token_ids(model: LanguageModel, dictionary: Dictionary, text: str) -> list[int]:
    """The ids of ``read_sentence``. Raises UsageError for a text without tokens or that is not
    Unicode, LlmWsaeError for a model without a tokenizer or with that of another."""
    if model.tokenizer is None:
        raise LlmWsaeError("a text cannot be read without a tokenizer; pass one with the model")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("the text holds bytes that are not UTF-8; give it in UTF-8")
    with parsing(f"the tokenizer of {model.name} cannot read the text"):
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise UsageError("the text is empty; give a sentence")
    if dictionary.info.prepend_bos is not False and model.bos_token_id is not None:
        ids = [model.bos_token_id, *ids]
    if max(ids) >= len(model.W_E):
        raise LlmWsaeError(
            f"the tokenizer returns id {max(ids)}, but {model.name} has {len(model.W_E)} "
            "embeddings; give its own tokenizer"
        )
    return ids


def latents_text(dictionary: Dictionary, latents: Sequence[Latent]) -> str:
    """All latents, one paragraph each."""
    return "\n\n".join("\n".join(_latent(dictionary, latent)) for latent in latents)


def _latent(dictionary: Dictionary, latent: Latent) -> Iterator[str]:
    firing = latent.firing
    yield f"latent {latent.latent} of {printable(dictionary.info.name)} at {dictionary.info.site}"
    if latent.label:
        yield f"label       {printable(latent.label)}  (automatic)"
    if firing:
        share, mean = 100 * firing.density, firing.mean_activation
        on_average = "" if mean is None else f"; {mean:.2f} on average where it fires"
        rows = f"{firing.rows_looked_at:,} rows, evenly spread over the store"
        yield f"density     {share:.3g} % of {rows}{on_average}"
    for name, words in (("promotes", latent.promotes), ("suppresses", latent.suppresses)):
        if words is not None:
            shown = (f"«{printable(word.token)}» {word.logit:+.2f}" for word in words)
            yield f"{name:<12}{' · '.join(shown)}"
    near = " · ".join(f"{n.latent} {n.cosine:.2f}" for n in latent.neighbours)
    yield f"nearest     {near}  (latent, cosine)"
    effective = f"effectively {latent.effective_dimensions:.1f} of {dictionary.d_in} dimensions"
    yield f"writes to   {effective}"
    yield f"            {'dimension':>9}{'decoder':>10}{'share %':>10}{'weight γ':>10}"
    for d in latent.dimensions:
        gamma = "—" if d.gamma is None else f"{d.gamma:.3f}"
        yield f"            {d.dimension:>9}{d.decoder:>10.4f}{100 * d.share:>10.2f}{gamma:>10}"
    if latent.examples:
        yield "contexts    its largest activations, one per context"
    elif firing:
        yield "contexts    none: it does not fire in this store"
    for one in latent.examples:
        before, token, after = map(printable, (one.text.before, one.text.token, one.text.after))
        before = before if len(before) <= _LEFT else "…" + before[1 - _LEFT :]
        after = after if len(after) <= _RIGHT else after[: _RIGHT - 1] + "…"
        yield f"{one.activation:>10.2f}  {before:>{_LEFT}}«{token}»{after}"


def sentence_text(tokens: Sequence[Token], latents: Sequence[int]) -> str:
    """Each token with its strongest latents, then where each of ``latents`` fires."""
    names = [f"«{printable(token.token)}»" for token in tokens]
    width = max(map(len, names))
    lines = ["latents that fire, with their activations"]
    for name, token in zip(names, tokens, strict=True):
        shown = [f"{one.latent} {one.activation:.2f}" for one in token.latents[:_STRONGEST]]
        more = len(token.latents) - len(shown)
        shown += [f"and {more} more"] if more else []
        lines.append(f"  {name:<{width}}  {' · '.join(shown) or 'none'}")
    for latent in latents:
        fires = [
            f"{name} {one.activation:.2f}"
            for name, token in zip(names, tokens, strict=True)
            for one in token.latents
            if one.latent == latent
        ]
        lines.append(f"latent {latent}: {' · '.join(fires) if fires else 'silent'}")
    return "\n".join(lines)
