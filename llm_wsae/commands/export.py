"""The command that writes a dictionary in the files of other viewers."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from llm_wsae.commands.options import Result
from llm_wsae.pipeline.request import Flat, LoadConfig


def export(
    dictionary: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DICT")],
    store: Path,
    model: str,
    to: Literal["neuronpedia"],
    out: Path,
    top: int = 20,
    bands: int = 5,
    contexts: int | None = None,
    model_id: str | None = None,
    sae_set: str | None = None,
    sae_id_suffix: str | None = None,
    loading: Flat[LoadConfig] = LoadConfig(),  # noqa: B008 - frozen
) -> Result:
    """Write every latent into the files that SAEDashboard writes and Neuronpedia imports.

    Args:
        dictionary: Dictionary folder.
        store: Activation store of its site.
        model: The model that the store came from.
        to: Whose files to write.
        out: Folder to write them into.
        top: Strongest contexts shown for each latent.
        bands: Quantile bands of its activation, of each of which a context is shown.
        contexts: Look at the first contexts of the store only; the default is all.
        model_id: Name of the model on Neuronpedia; the default is the model's own.
        sae_set: Name of the set of dictionaries there; the default is the dictionary's own.
        sae_id_suffix: What tells dictionaries of one set and block apart there.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.pages.neuronpedia import export_in, export_neuronpedia

    export_in(out).check_place()
    opened = ActivationStore.open(store)
    done = export_neuronpedia(
        dictionary,
        opened,
        loading.load_model(model, opened.manifest.model),
        out,
        top=top,
        bands=bands,
        contexts=contexts,
        model_id=model_id,
        sae_set=sae_set,
        sae_id_suffix=sae_id_suffix,
    )
    facts = {name: getattr(done, name) for name in ("path", "files", "latents", "explained")}
    explained = f", {done.explained:,} of them explained" if done.explained else ""
    return facts, f"{done.latents:,} latents in {done.files} files{explained}: {done.path}"
