"""``inspect``: what the latents of a dictionary stand for, and which of them fire on a text."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.firings import check_store
from llm_wsae.inspecting.latents import Latent, check_latents, look_at
from llm_wsae.inspecting.readout import Readout, Vocabulary
from llm_wsae.inspecting.sentence import Token, check_width, read_sentence
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import check_number
from llm_wsae.outside import text as known_text
from llm_wsae.terminal import printable


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
        if not isinstance(store, ActivationStore):
            store = ActivationStore.open(store)
        check_store(store, dictionary)
    if not isinstance(model, LanguageModel):
        required = model is not None or text is not None
        loaded, no_model = _load(dictionary, model, revision, device, dtype, required)
    else:
        loaded, no_model = model, None
    if loaded is not None:
        _check_model(loaded, dictionary)
    views = look_at(
        dictionary,
        numbers,
        store=store,
        vocabulary=None if loaded is None else Vocabulary(loaded.tokenizer),
        readout=None if loaded is None else Readout(loaded),
        top=top,
    )
    tokens = None
    if text is not None and loaded is not None:
        tokens = read_sentence(loaded, dictionary, text)
    return Inspection(views, tokens, no_model)


def _load(
    dictionary: Dictionary,
    name: str | None,
    revision: str | None,
    device: str,
    dtype: str,
    required: bool,
) -> tuple[LanguageModel | None, str | None]:
    """The model of that name, or the dictionary's own; or None and the reason.

    Raises LlmWsaeError for that reason if a model is ``required``.
    """
    if name is not None:
        print(f"loading {printable(name)}", file=sys.stderr)
        return LanguageModel.load(name, revision=revision, device=device, dtype=dtype), None
    trained_on, commit = (
        known_text(dictionary.info.model.get(key)) for key in ("name", "revision")
    )
    if trained_on is None:
        reason = "the dictionary does not say which model it was trained on"
    elif commit is None:
        reason = f"{printable(trained_on)}, the dictionary's model, did not come from the Hub"
    else:
        try:
            return LanguageModel.load(
                trained_on,
                revision=revision or commit,
                device=device,
                dtype=dtype,
                download=False,
            ), None
        except LlmWsaeError as error:
            reason = printable(str(error))
    reason += "; name the model with --model"
    if required:
        raise UsageError(f"reading a text needs the model, but {reason}")
    return None, reason


def _check_model(model: LanguageModel, dictionary: Dictionary) -> None:
    """Raises UsageError for a model of another width; warns if it has other weights."""
    check_width(model, dictionary)
    trained = dictionary.info.model.get("weights_sha256")
    if trained is not None and trained != model.identity()["weights_sha256"]:
        print(
            f"llm-wsae: the dictionary was trained on a model whose weights differ from those of "
            f"{model.name}",
            file=sys.stderr,
        )
