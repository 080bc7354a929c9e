"""``inspect``: what the latents of a dictionary stand for, and which of them fire on a text.

``latents_text`` and ``sentence_text`` format what was found for a terminal.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.latents import Example, Latent, Word, check_latents, check_store, look_at
from llm_wsae.inspecting.sentence import Token, check_width, read_sentence
from llm_wsae.inspecting.vocabulary import Readout, Vocabulary
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import check_number
from llm_wsae.outside import text as known_text
from llm_wsae.terminal import printable

_LEFT, _RIGHT = 56, 32  # characters shown on either side of the marked token
_STRONGEST = 5  # latents shown for each token of a text


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
    tokens.) ``revision``, ``device`` and ``dtype`` apply to a model that is
    loaded here. ``top`` is the number of contexts, tokens, neighbours and dimensions to report.

    Raises UsageError if neither latents nor a text are given, for a latent that does not exist, or
    for a text without a model; LlmWsaeError if a folder or the model cannot be read.
    """
    if not latents and text is None:
        raise UsageError("there is nothing to inspect: name latents (--latent) or give a --text")
    if store is not None and not latents:
        raise UsageError("a store shows where latents fire, so name some with --latent")
    check_number("top", top, 1)
    if not isinstance(dictionary, Dictionary):
        dictionary = Dictionary.load(dictionary)
    numbers = check_latents(dictionary, latents).tolist()
    if store is not None:
        store = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
        check_store(store, dictionary)
    loading: dict[str, Any] = {"revision": revision, "device": device, "dtype": dtype}
    no_model = None
    if model is None:
        model, no_model = _own_model(dictionary, loading)
        if model is None and text is not None:
            raise UsageError(f"reading a text needs the model, but {no_model}")
    elif not isinstance(model, LanguageModel):
        print(f"loading {printable(model)}", file=sys.stderr)
        model = LanguageModel.load(model, **loading)
    if model is not None:
        _check_model(model, dictionary, store)
    views = look_at(
        dictionary,
        numbers,
        store=store,
        vocabulary=None if model is None else Vocabulary(model.tokenizer),
        readout=None if model is None else Readout(model),
        top=top,
    )
    tokens = None
    if text is not None and model is not None:
        tokens = read_sentence(model, dictionary, text)
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
        loading = loading | {"revision": loading["revision"] or commit}
        try:
            return LanguageModel.load(name, download=False, **loading), None
        except LlmWsaeError as error:
            reason = printable(str(error))
    return None, f"{reason}; name the model with --model"


def _check_model(
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


def latents_text(dictionary: Dictionary, latents: Sequence[Latent]) -> str:
    """All latents, one paragraph each."""
    return "\n\n".join(_latent(dictionary, latent) for latent in latents)


def sentence_text(tokens: Sequence[Token], latents: Sequence[int]) -> str:
    """Each token with its strongest latents, then where each of ``latents`` fires."""
    names = [f"«{printable(token.token)}»" for token in tokens]
    width = max(map(len, names))
    lines = ["latents that fire, with their activations"]
    for name, token in zip(names, tokens, strict=True):
        shown = [f"{one.latent} {one.activation:.2f}" for one in token.latents[:_STRONGEST]]
        more = len(token.latents) - len(shown)
        shown += [f"and {more} more"] if more else []
        lines.append(f"  {name:<{width}}  {' · '.join(shown) or '—'}")
    for latent in latents:
        fires = [
            f"{name} {one.activation:.2f}"
            for name, token in zip(names, tokens, strict=True)
            for one in token.latents
            if one.latent == latent
        ]
        lines.append(f"latent {latent}: {' · '.join(fires) if fires else 'silent'}")
    return "\n".join(lines)


def _latent(dictionary: Dictionary, latent: Latent) -> str:
    site, name = dictionary.info.site, printable(dictionary.info.name)
    lines = [f"latent {latent.latent} of {name} at {site}"]
    if firing := latent.firing:
        share, looked = 100 * firing.density, firing.rows_looked_at
        mean = firing.mean_activation
        lines.append(
            f"density     {share:.3g} % of {looked:,} rows, evenly spread over the store"
            + ("" if mean is None else f"; {mean:.2f} on average where it fires")
        )
    if latent.promotes is not None and latent.suppresses is not None:
        lines.append(f"promotes    {_words(latent.promotes)}")
        lines.append(f"suppresses  {_words(latent.suppresses)}")
    near = " · ".join(f"{n.latent} {n.cosine:.2f}" for n in latent.neighbours)
    lines.append(f"nearest     {near}  (latent, cosine)")
    total = dictionary.d_in
    lines.append(f"writes to   effectively {latent.effective_dimensions:.1f} of {total} dimensions")
    lines.append(f"            {'dimension':>9}{'decoder':>10}{'share %':>10}{'weight γ':>10}")
    for d in latent.dimensions:
        gamma = "—" if d.gamma is None else f"{d.gamma:.3f}"
        lines.append(
            f"            {d.dimension:>9}{d.decoder:>10.4f}{100 * d.share:>10.2f}{gamma:>10}"
        )
    if latent.firing:
        lines += _contexts(latent.firing.searched_all, latent.examples)
    return "\n".join(lines)


def _words(words: Sequence[Word]) -> str:
    return " · ".join(f"«{printable(word.token)}» {word.logit:+.2f}" for word in words)


def _contexts(searched_all: bool, examples: Sequence[Example]) -> list[str]:
    if not examples:
        where = "in this store" if searched_all else "on the rows where it comes closest to firing"
        return [f"contexts    none: it does not fire {where}"]
    lines = ["contexts    its largest activations, one per context"]
    for example in examples:
        text = example.text
        before, token, after = map(printable, (text.before, text.token, text.after))
        before = before if len(before) <= _LEFT else "…" + before[1 - _LEFT :]
        after = after if len(after) <= _RIGHT else after[: _RIGHT - 1] + "…"
        lines.append(f"{example.activation:>10.2f}  {before:>{_LEFT}}«{token}»{after}")
    return lines
