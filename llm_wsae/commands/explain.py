"""The command that has latents explained by a language model."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from llm_wsae.commands.options import Result
from llm_wsae.explaining.protocol import ExplainConfig
from llm_wsae.pipeline.request import Flag, Flat, LoadConfig


def explain(
    dictionaries: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DICT…")],
    store: Path,
    model: str,
    endpoint: str,
    explainer: str,
    out: Path,
    yes: Flag = False,
    explaining: Flat[ExplainConfig] = ExplainConfig(),  # noqa: B008 - frozen
    loading: Flat[LoadConfig] = LoadConfig(),  # noqa: B008 - frozen
) -> Result:
    """Have a language model explain latents, and score how well it recognises them by that.

    Without --yes it only says what that costs. Run it again to resume after an interruption: no
    answer is paid for twice.

    Args:
        dictionaries: Dictionary folders; the explanations are kept in them.
        store: Activation store of their site.
        model: The model that the store came from.
        endpoint: Address of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000/v1.
            Its key is read from LLM_WSAE_API_KEY, for OpenAI's also from OPENAI_API_KEY.
        explainer: Name of the language model there, which explains and judges.
        out: Folder of the answers and the report.
        yes: Ask the questions, and pay for them.
    """
    from llm_wsae.data.store import ActivationStore
    from llm_wsae.dictionary.dictionary import Dictionary
    from llm_wsae.explaining.endpoint import check_endpoint
    from llm_wsae.explaining.explaining import check_folders, price_of
    from llm_wsae.explaining.explaining import explain as explain_all

    check_endpoint(endpoint)
    opened, folders = ActivationStore.open(store), check_folders(dictionaries)
    widths = [Dictionary.load(folder).d_sae for folder in folders.values()]
    asked = [w if explaining.latents == "all" else min(w, explaining.latents) for w in widths]
    price = price_of(explaining, sum(asked))
    if not yes:
        facts: dict[str, Any] = {"price": price, "done": False}
        return facts, f"{price}\nNothing was asked; add --yes to go on."
    language_model = loading.load_model(model, opened.manifest.model)
    found = explain_all(folders, opened, language_model, endpoint, explainer, out, explaining)
    kept = [f"explanations  {folder}" for folder in folders.values()]
    return {"price": price, "done": True, **found.to_dict()}, "\n".join([found.table(), *kept])
