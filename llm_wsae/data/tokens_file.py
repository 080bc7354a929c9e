"""The token file of a shard: ids, keep-mask, and each token's place in its document."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_wsae.data.packing import Contexts, Cursor
from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import load_tensors, save_tensors

_FIELDS = ("ids", "keep", "document", "offset")


def save_contexts(path: Path, batches: Sequence[Contexts]) -> None:
    """Write consecutive batches of contexts as one file."""
    tensors = {
        name: torch.from_numpy(np.concatenate([getattr(batch, name) for batch in batches]))
        for name in _FIELDS
    }
    headers: dict[int, dict[str, Any]] = {}
    for batch in batches:
        headers |= batch.headers
    # One string: the order in which safetensors writes several differs between runs.
    text = json.dumps({str(index): headers[index] for index in sorted(headers)})
    save_tensors(path, tensors, metadata={"documents": text})


def load_contexts(path: Path, first: tuple[int, int], following: tuple[int, int]) -> Contexts:
    """Read such a file; the cursors come from the manifest.

    Raises LlmWsaeError if it is missing or damaged.
    """
    tensors, metadata = load_tensors(path, "tokens of a shard")
    try:
        headers = json.loads(metadata["documents"])
        arrays = [tensors[name].numpy() for name in _FIELDS]
    except (KeyError, ValueError) as error:
        raise LlmWsaeError(f"{path} is not the tokens of a shard: {error}") from error
    numbered = {int(index): header for index, header in headers.items()}
    return Contexts(*arrays, Cursor(*first), Cursor(*following), numbered)
