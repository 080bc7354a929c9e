"""The command that looks at single latents."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from llm_wsae.commands.common import Device, ModelDtype, Result, load_model
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.terminal import printable

if TYPE_CHECKING:
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.model.language_model import LanguageModel


def inspect(
    dictionary: tyro.conf.Positional[Path],
    latent: tuple[int, ...] = (),
    store: Path | None = None,
    text: str | None = None,
    model: str | None = None,
    top: int = 10,
    revision: str | None = None,
    device: Device = "auto",
    model_dtype: ModelDtype = "auto",
) -> Result:
    """Look at latents: where they fire, which tokens they promote, what they write; or at a text.

    Args:
        dictionary: Dictionary folder.
        latent: Latents to look at.
        store: Activation store of the same model: density and top contexts, without a forward pass.
        text: A sentence of your own: which latents fire on it.
        model: The model that was explained; one that came from the Hub need not be named.
        top: How many contexts, tokens, neighbours and dimensions to show.
        revision: Revision of a model on the Hub.
        device: Where the model runs.
        model_dtype: Number format of the model; auto is bfloat16 where the hardware is fast in it.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.inspecting.firings import check_store
    from llm_wsae.inspecting.latents import check_latents, look_at
    from llm_wsae.inspecting.readout import Readout, Vocabulary
    from llm_wsae.inspecting.sentence import read_sentence
    from llm_wsae.inspecting.text import latents_text, sentence_text

    if not latent and text is None:
        raise UsageError("name latents with --latent, or give a --text")
    if store is not None and not latent:
        raise UsageError("--store shows where latents fire: name some with --latent")
    if top < 1:
        raise UsageError(f"--top is {top}, but at least 1 of everything is shown")
    opened = Dictionary.load(dictionary)
    numbers = check_latents(opened, latent)
    place = None if store is None else ActivationStore.open(store)
    if place is not None:
        check_store(place, opened)
    name, revision = _model_of(opened, model, revision)
    if text is not None and name is None:
        raise UsageError(
            f"to read a text the model is needed, and {_trained_on(opened)}; name it with --model"
        )
    loaded: LanguageModel | None = None
    missing = f"{_trained_on(opened)}; name it with --model"
    try:
        loaded = load_model(name, revision, device, model_dtype) if name else None
    except LlmWsaeError as error:
        if model is not None or text is not None:  # it was asked for
            raise
        missing = printable(str(error))
    if loaded is not None:
        _check_model(loaded, opened)
    views = look_at(
        opened,
        numbers.tolist(),
        store=place,
        vocabulary=None if loaded is None else Vocabulary(loaded.tokenizer),
        readout=None if loaded is None else Readout(loaded),
        top=top,
    )
    facts: dict[str, Any] = {"dictionary": str(dictionary), "latents": views}
    parts = [latents_text(opened, views)] if views else []
    if loaded is None:
        parts.append(f"tokens are not shown: {missing}")
    if text is not None and loaded is not None:
        facts["tokens"] = read_sentence(loaded, opened, text)
        parts.append(sentence_text(facts["tokens"], numbers.tolist()))
    return facts, "\n\n".join(parts)


def _model_of(
    dictionary: "Dictionary", model: str | None, revision: str | None
) -> tuple[str | None, str | None]:
    """Name and revision of the model: the one asked for, or the dictionary's if the Hub has it."""
    known = dictionary.info.model
    if model is not None:
        return model, revision
    if not all(isinstance(known.get(key), str) for key in ("name", "revision")):
        return None, None
    return known["name"], revision or known["revision"]


def _trained_on(dictionary: "Dictionary") -> str:
    name = dictionary.info.model.get("name")
    if not isinstance(name, str):
        return "the dictionary does not say which it is"
    return f"{printable(name)}, which it was trained on, is not from the Hub"


def _check_model(model: "LanguageModel", dictionary: "Dictionary") -> None:
    """Raises UsageError for a model of another width; says so if it has other weights."""
    if model.d_model != dictionary.d_in:
        raise UsageError(
            f"the dictionary reads {dictionary.d_in} dimensions, but {model.name} has "
            f"{model.d_model}; give the model that it was trained on"
        )
    trained = dictionary.info.model.get("weights_sha256")
    if trained is not None and trained != model.identity()["weights_sha256"]:
        print(
            f"the dictionary was trained on other weights than these of {model.name}",
            file=sys.stderr,
        )
