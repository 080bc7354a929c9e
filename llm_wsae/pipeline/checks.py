"""Can a run do what it is asked for, and go on in its folder?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.manifest import MANIFEST, Manifest
from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.pipeline.tuning import CHOICE
from llm_wsae.training.checkpoint import recorded, training_in
from llm_wsae.weights.rules import Rule

STORE = "store"
Alphas = Sequence[float | Literal["auto"]]


def check_alphas(rules: Sequence[Rule], alphas: Alphas) -> None:
    """Refuse an automatic α without whitening, and rules that are left without a number."""
    numbers = [alpha for alpha in alphas if alpha != "auto"]
    if "auto" in alphas and not any(rule.has_automatic_alpha for rule in rules):
        raise UsageError(
            "an alpha of auto is chosen for whitening, which is not among the rules; add it, or "
            "give numbers"
        )
    others = [
        rule.name
        for rule in rules
        if not rule.is_plain and not ("auto" in alphas and rule.has_automatic_alpha)
    ]
    if others and not numbers:
        raise UsageError(
            f"the rule {others[0]!r} needs an alpha that is a number, next to auto for whitening: "
            "--alpha auto 0.5"
        )


def begun(out: Path, sites: Sequence[Site]) -> list[Site]:
    """The sites of which something was trained, or the exponent was chosen."""
    folders = {site: out / str(site) for site in sites}
    return [
        site
        for site, folder in folders.items()
        if training_in(folder).is_begun() or (folder / CHOICE).exists()
    ]


def check_not_trained_on_less(out: Path, sites: Sequence[Site], harvesting: HarvestConfig) -> None:
    """Refuse a longer harvest: what was trained belongs to the shorter one."""
    trained = begun(out, sites)
    if trained and (out / STORE / MANIFEST).is_file():
        manifest = Manifest.load(out / STORE)
        if harvesting.num_contexts > manifest.num_contexts:
            raise UsageError(
                f"{out} holds a training of {trained[0]} on "
                f"{manifest.num_contexts * manifest.context_size:,} tokens; choose another folder "
                "for more"
            )


def model_begun(out: Path, sites: Sequence[Site]) -> dict[str, Any] | None:
    """What the records in a run's folder say of the model; None if nothing was begun there."""
    if (out / STORE / MANIFEST).is_file():
        return Manifest.load(out / STORE).model
    trainings = (recorded(out / str(site)) for site in sites)
    return next((found["rows"].get("model") for found in trainings if found is not None), None)


def check_trained_alike(out: Path, sites: Sequence[Site], streamed: bool) -> None:
    """Refuse, before hours of harvesting, to go on from a store with what was streamed, and the
    other way round."""
    for site in sites:
        found = recorded(out / str(site))
        if found is not None and (found["rows"].get("kind") == "stream") != streamed:
            how = "a store; omit --stream" if streamed else "a stream; add --stream"
            raise UsageError(
                f"{out} holds a training of {site} on {how} to go on with it, or choose another "
                "folder"
            )
