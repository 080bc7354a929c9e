"""Can a run go on in its folder?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_wsae.data.manifest import MANIFEST, Manifest
from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.pipeline.request import Run
from llm_wsae.pipeline.tuning import CHOICE
from llm_wsae.training.checkpoint import recorded, training_in

STORE = "store"


def begun(out: Path, sites: Sequence[Site]) -> list[Site]:
    """The sites of which something was trained, or the exponent was chosen."""
    folders = {site: out / str(site) for site in sites}
    return [
        site
        for site, folder in folders.items()
        if training_in(folder).is_begun() or (folder / CHOICE).exists()
    ]


def model_begun(request: Run) -> dict[str, Any] | None:
    """What the records in a run's folder say of the model; None if nothing was begun there."""
    out = request.folder
    if (out / STORE / MANIFEST).is_file():
        return Manifest.load(out / STORE).model
    trainings = (recorded(out / str(site)) for site in request.sites)
    return next((found["rows"].get("model") for found in trainings if found is not None), None)


def check_folder(request: Run) -> None:
    """Raises UsageError, before hours of harvesting, for a folder where dictionaries were trained
    on fewer rows, or on a store where a stream is asked for, or the other way round."""
    out, stored = request.folder, request.folder / STORE / MANIFEST
    trained = begun(out, request.sites)
    if trained and stored.is_file() and not request.stream:
        manifest = Manifest.load(out / STORE)
        if request.harvest.num_contexts > manifest.num_contexts:
            raise UsageError(
                f"{out} holds a training of {trained[0]} on "
                f"{manifest.num_contexts * manifest.context_size:,} tokens; choose another folder "
                "for more"
            )
    for site in request.sites:
        found = recorded(out / str(site))
        if found is not None and (found["rows"].get("kind") == "stream") != request.stream:
            made, change = ("store", "omit") if request.stream else ("stream", "add")
            raise UsageError(
                f"{out} holds a training of {site} on a {made}; {change} --stream to resume it, or "
                "choose another folder"
            )
