"""The command that writes the page."""

from pathlib import Path
from typing import Annotated

import tyro

from llm_wsae.artifact.outputs import check_file
from llm_wsae.commands.options import Result
from llm_wsae.errors import UsageError
from llm_wsae.pipeline.request import Flag, Flat, LoadConfig, note


def dashboard(
    dictionaries: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DICT…")],
    store: Path,
    model: str,
    out: Path,
    prompt: tuple[str, ...] = (),
    top: int = 10,
    bands: int = 10,
    rows: int | None = None,
    scores: Path | None = None,
    live: Flag = False,
    port: int = 0,
    loading: Flat[LoadConfig] = LoadConfig(),  # noqa: B008 - frozen
) -> Result:
    """Write one HTML file that shows what dictionaries found, alone and side by side.

    Args:
        dictionaries: Dictionary folders, all of one site.
        store: Activation store of the site.
        model: The model that the store came from.
        out: HTML file to write. It needs no network and no other file.
        prompt: Sentences whose latents are shown token by token.
        top: Strongest contexts shown for each latent.
        bands: Further contexts, one from each of that many bands of its activation.
        rows: Look at the first rows of the store only; the default is all.
        scores: Report of `evaluate --monosemantic`, whose scores of latents become measures here.
        live: Also serve the page on this machine, to type sentences and steer the model.
        port: Port to serve it on; 0 takes a free one.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.pages.dashboard import dashboard as write
    from llm_wsae.pages.dashboard import named_dictionaries
    from llm_wsae.pages.frame import is_page
    from llm_wsae.pages.live import listen, serve

    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"the page is an HTML file, so --out cannot be {out}")
    check_file(out, is_page)  # before the model is loaded
    if port and not live:
        raise UsageError("--port is for --live; add that")
    listening = listen(port) if live else None  # refused before the work
    named = named_dictionaries(dictionaries)
    opened = ActivationStore.open(store)
    language_model = loading.load_model(model, opened.manifest.model)
    page = write(
        named,
        opened,
        language_model,
        out,
        prompts=prompt,
        top=top,
        bands=bands,
        rows=rows,
        scores=scores,
        live=live,
    )
    if listening is not None:
        serve(out, language_model, named, listening, lambda address: note(f"open {address}"))
    facts = {"page": page.path, "megabytes": page.megabytes}
    return facts, f"page  {page.path}  ({page.megabytes:.1f} MB; open it in a browser)"
