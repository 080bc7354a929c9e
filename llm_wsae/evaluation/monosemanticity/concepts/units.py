"""What concepts are tested on: units made of rows.

A unit is one row (for concepts of tokens) or the mean of one document's rows in one context (for
concepts of documents).
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from llm_wsae.evaluation.heldout import HeldoutText

NO_UNIT = -1
MAX_CONTEXTS = 1000  # units of documents


class Units(NamedTuple):
    """Which rows make up which unit."""

    of_row: Int[Tensor, " rows"]
    """The unit of each row of the text, -1 if it has none."""
    size: Int[Tensor, " units"]
    """Rows in each unit."""
    document: Int[Tensor, " units"]
    """The document of each unit."""

    @property
    def single(self) -> bool:
        """Whether every unit is one row: few latents are then active in a unit."""
        return bool((self.size == 1).all())


def units_of_tokens(text: HeldoutText, count: int, seed: int) -> Units:
    """``count`` rows of documents, drawn at random (all, if there are fewer), each a unit."""
    rows = (text.document_of >= 0).nonzero()[:, 0]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen = rows[order[:count]].sort().values
    of_row = torch.full((text.num_rows,), NO_UNIT)
    of_row[chosen] = torch.arange(len(chosen))
    return Units(of_row, torch.ones_like(chosen), text.document_of[chosen])


def units_of_documents(text: HeldoutText, seed: int) -> Units:
    """Up to 1000 contexts, drawn at random; a unit is the rows of the document that most of its
    context belongs to. Only documents with labels count."""
    owner = text.owner
    labelled = [number for number, header in text.headers.items() if header["labels"]]
    mine = text.document_of == owner[text.context]
    rows = torch.bincount(text.context[mine], minlength=text.num_contexts)
    usable = (torch.isin(owner, torch.tensor(labelled)) & (rows > 0)).nonzero()[:, 0]
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    chosen = usable[order[:MAX_CONTEXTS]].sort().values
    unit = torch.full((text.num_contexts,), NO_UNIT)
    unit[chosen] = torch.arange(len(chosen))
    return Units(unit[text.context].where(mine, NO_UNIT), rows[chosen], owner[chosen])
