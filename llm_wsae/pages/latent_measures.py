"""Scores of latents that a report holds, as columns of the page."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.files import read_own_json
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError
from llm_wsae.outside import mapping, number
from llm_wsae.pages.payload import SCORES


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


def _numbers(column: list[Any]) -> list[float]:
    return [math.nan if value is None else value for value in map(number, column)]
