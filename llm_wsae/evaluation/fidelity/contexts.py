"""The contexts that dictionaries are evaluated on, and their batches."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from llm_wsae.errors import LlmWsaeError


@runtime_checkable
class Context(Protocol):
    """What is read of a context: token ids and which positions are kept, both [positions]."""

    @property
    def ids(self) -> np.ndarray | Tensor: ...

    @property
    def keep(self) -> np.ndarray | Tensor: ...


def take_contexts(contexts: Iterable[Context], tokens: int) -> list[Context]:
    """The first contexts, at least two, that hold ``tokens`` rows.

    Raises LlmWsaeError if there are too few.
    """
    taken, rows = [], 0
    for context in contexts:
        taken.append(context)
        rows += int(context.keep.sum())
        if rows >= tokens and len(taken) >= 2:
            break
    if rows < tokens or len(taken) < 2:
        raise LlmWsaeError(
            f"the text to evaluate on holds {rows:,} tokens in {len(taken)} contexts, but "
            f"{tokens:,} tokens in at least 2 contexts are needed; ask for fewer tokens or "
            "provide more text"
        )
    return taken


def batches_of(contexts: Sequence[Context], batch_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """The contexts as batches of (ids, keep), both [contexts, positions]; at least one context in
    each."""
    ids = [torch.as_tensor(context.ids).long() for context in contexts]
    keep = [torch.as_tensor(context.keep).bool() for context in contexts]
    size = max(1, batch_tokens // len(ids[0]))
    return [
        (torch.stack(ids[at : at + size]), torch.stack(keep[at : at + size]))
        for at in range(0, len(ids), size)
    ]
