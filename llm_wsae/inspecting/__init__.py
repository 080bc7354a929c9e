"""Looking at single latents of a dictionary: where they fire, what they write, who is near."""

from collections.abc import Sequence
from typing import Any

from llm_wsae.errors import UsageError


def check_asked(latents: Sequence[int], text: str | None, store: Any) -> None:
    """Raises UsageError if neither latents nor a text are named, or a store without latents. Free
    of torch, for the command line."""
    if not latents and text is None:
        raise UsageError("there is nothing to inspect: name latents (--latent) or give a --text")
    if store is not None and not latents:
        raise UsageError("a store shows where latents fire, so name some with --latent")
