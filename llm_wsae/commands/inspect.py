"""The command that describes single latents."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from llm_wsae.commands.options import Result
from llm_wsae.pipeline.request import Flat, LoadConfig


def inspect(
    dictionary: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DICT")],
    latent: tuple[int, ...] = (),
    store: Path | None = None,
    text: str | None = None,
    model: str | None = None,
    top: int = 10,
    loading: Flat[LoadConfig] = LoadConfig(),  # noqa: B008 - frozen
) -> Result:
    """Look at latents: where they fire, which tokens they promote, what they write; or at a text.

    Args:
        dictionary: Dictionary folder.
        latent: Latents to look at.
        store: Activation store of the same model; adds density and top contexts.
        text: A sentence; shows which latents fire on it.
        model: The model that the dictionary explains; may be omitted if the Hub's cache has it.
        top: Number of contexts, tokens, neighbours and dimensions to show.
    """
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.inspecting.inspection import inspect, latents_text, sentence_text

    opened = Dictionary.load(dictionary)
    found = inspect(
        opened,
        latent,
        store=store,
        model=model,
        text=text,
        top=top,
        revision=loading.revision,
        device=loading.device,
        dtype=loading.model_dtype,
    )
    facts: dict[str, Any] = {"dictionary": str(dictionary), "latents": found.latents}
    parts = [latents_text(opened, found.latents)] if found.latents else []
    if found.no_model is not None:
        parts.append(f"tokens are not shown: {found.no_model}")
    if found.tokens is not None:
        facts["tokens"] = found.tokens
        parts.append(sentence_text(found.tokens, [view.latent for view in found.latents]))
    return facts, "\n\n".join(parts)
