"""The command that describes single latents."""

from pathlib import Path
from typing import Any

import tyro

from llm_wsae.commands.common import Device, ModelDtype, Result


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
        store: Activation store of the same model: adds density and top contexts, with no forward
            pass.
        text: A sentence: which latents fire on it.
        model: The model that was explained; one that came from the Hub need not be named.
        top: Number of contexts, tokens, neighbours and dimensions to show.
        revision: Revision of a model on the Hub.
        device: Where the model runs.
        model_dtype: Number format of the model; auto is bfloat16 where the hardware is fast in it.
    """
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.inspecting.inspection import inspect
    from llm_wsae.inspecting.text import latents_text, sentence_text

    opened = Dictionary.load(dictionary)
    found = inspect(
        opened,
        latent,
        store=store,
        model=model,
        text=text,
        top=top,
        revision=revision,
        device=device,
        dtype=model_dtype,
    )
    facts: dict[str, Any] = {"dictionary": str(dictionary), "latents": found.latents}
    parts = [latents_text(opened, found.latents)] if found.latents else []
    if found.no_model is not None:
        parts.append(f"tokens are not shown: {found.no_model}")
    if found.tokens is not None:
        facts["tokens"] = found.tokens
        parts.append(sentence_text(found.tokens, [view.latent for view in found.latents]))
    return facts, "\n\n".join(parts)
