"""Measures of latents that other reports hold, as columns of the page."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import read_own_json
from llm_wsae.outputs import is_record_of
from llm_wsae.outside import mapping, number
from llm_wsae.pages.payload import SCORES

RECOVERY = "recovery.json"
"""Name of the report of ``recover``."""
RECOVER = "recover"
"""The command that writes it."""
ROUND_TRIP = ("vanished", "shrunk", "false", "missed", "answer", "refit")
"""What it says of every latent that becomes a measure of the page."""


def read_scores(
    report: Path, dictionaries: Mapping[str, Dictionary]
) -> dict[str, dict[str, Float[Tensor, " d_sae"]]]:
    """The scores of latents that ``evaluate --monosemantic`` found, by dictionary; NaN where a
    latent has none.

    Raises LlmWsaeError for a file that cannot be read or is about other dictionaries.
    """
    read = mapping(read_own_json(report, "report of evaluate --monosemantic"))
    theirs = mapping(mapping(read.get("monosemanticity")).get("dictionaries"))
    found: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in dictionaries if name in theirs]:
        columns = mapping(mapping(theirs[name]).get("per_latent"))
        d_sae, digest = dictionaries[name].d_sae, mapping(theirs[name]).get("sha256")
        if digest is not None and digest != dictionaries[name].decoder_digest():
            raise LlmWsaeError(
                f"{report} is about another dictionary named {name}; run `llm-wsae evaluate "
                "--monosemantic` on this one"
            )
        for key in [key for key in SCORES if key in columns]:
            column = columns[key]
            if not isinstance(column, list) or len(column) != d_sae:
                raise LlmWsaeError(
                    f"{report} does not hold a {key} of each of the {d_sae:,} latents of {name}; "
                    "it was made with another dictionary of that name"
                )
            found.setdefault(name, {})[key] = torch.tensor(_numbers(column))
    if not found:
        raise LlmWsaeError(
            f"{report} holds no scores of latents of {' or '.join(dictionaries)}; "
            "`llm-wsae evaluate --monosemantic` writes them"
        )
    return found


def read_recovery(
    report: Path | None, dictionaries: Mapping[str, Dictionary]
) -> dict[str, dict[str, Float[Tensor, " d_sae"]]]:
    """What the round trip does to latents, by dictionary; NaN where nothing was measured. ``taker``
    is the latent that takes most from each, -1 for none, and ``taken`` the share that it takes.

    Without ``report``, a recovery.json beside a dictionary's folder is read. Dictionaries are known
    by their decoders, whatever their names. Raises LlmWsaeError for a file that cannot be read, and
    for a ``report`` that is about none of them.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, dictionary in dictionaries.items():
        path = report
        if path is None and dictionary.folder is not None:
            path = dictionary.folder.parent / RECOVERY
            if not is_record_of(RECOVER)(path):
                continue
        if path is None:
            continue
        theirs = mapping(mapping(read_own_json(path, "recovery report")).get("dictionaries"))
        digest = dictionary.decoder_digest()
        for one in map(mapping, theirs.values()):
            if one.get("sha256") == digest:
                found[name] = _columns(mapping(one.get("per_latent")), dictionary.d_sae, path)
    if report is not None and not found:
        raise LlmWsaeError(
            f"{report} is not about {' or '.join(dictionaries)}; "
            f"`llm-wsae {RECOVER}` writes a report of them"
        )
    return found


def _columns(columns: Mapping[str, Any], d_sae: int, path: Path) -> dict[str, Tensor]:
    """The round trip of every latent; raises LlmWsaeError if a column is missing."""
    for key in ROUND_TRIP:
        if not isinstance(columns.get(key), list) or len(columns[key]) != d_sae:
            raise LlmWsaeError(
                f"{path} does not hold a {key!r} of each of {d_sae:,} latents; delete it and run "
                f"`llm-wsae {RECOVER}` again"
            )
    found = {key: torch.tensor(_numbers(columns[key])) for key in ROUND_TRIP}
    takers = columns.get("takers")
    if isinstance(takers, list) and len(takers) == d_sae:
        largest = [_largest(one, d_sae) for one in takers]
        found["taker"] = torch.tensor([latent for latent, _ in largest])
        found["taken"] = torch.tensor([share for _, share in largest])
    return found


def _largest(takers: Any, d_sae: int) -> tuple[int, float]:
    """The first taker of a latent and the share of the strength that it takes."""
    first = takers[0] if isinstance(takers, list) and takers else None
    latent, share = map(number, first) if isinstance(first, list) and len(first) == 2 else (-1, 0)
    if latent is None or share is None or not 0 <= latent < d_sae:
        return -1, math.nan
    return int(latent), abs(share)


def _numbers(column: list[Any]) -> list[float]:
    return [math.nan if value is None else value for value in map(number, column)]
