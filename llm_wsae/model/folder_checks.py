"""Whether what a model's files announce is in proportion to their size.

A file of a few kilobytes can announce billions of numbers, or a text that grows without end, and
the libraries that read it allocate memory for them before they miss anything.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from llm_wsae.artifact.files import read_json
from llm_wsae.outside import LARGEST_JSON, mapping, text

_MOST_PER_BYTE = 8
"""Numbers for each byte of a model's weights: packed ones have up to four, and an embedding that is
also the head may count twice."""
_LARGEST_GROWTH = 10_000
_GROWS = {"ByteLevel": 2, "NFD": 20, "NFC": 20, "NFKD": 20, "NFKC": 20, "Precompiled": 20}
"""How many times as long a text at most becomes, by the kind of a tokenizer's step."""


def check_weights(config: Any, folder: Path, kind: Any) -> None:
    """Check that the weights in a model's folder can be those of its configuration.

    ``kind`` is the class of transformers that will load it. Raises ValueError if the configuration
    or a pickle of weights announces far more numbers than the files have bytes.
    """
    pickles = list(folder.glob("*.bin"))
    stored = sum(path.stat().st_size for path in (*folder.glob("*.safetensors"), *pickles))
    most = _MOST_PER_BYTE * stored
    if stored:  # otherwise transformers says what is missing
        check_numbers_of(config, kind, stored, most, "weights")
    for path in pickles:
        tensors = load_state_dict(path, weights_only=True)  # maps the file
        shapes = [tuple(one.shape) for one in mapping(tensors).values() if torch.is_tensor(one)]
        if sum(map(math.prod, shapes)) > _MOST_PER_BYTE * path.stat().st_size:
            raise ValueError(f"{path.name} announces more numbers than it can hold")


def check_numbers_of(config: Any, kind: Any, blocks: int, most: int, what: str) -> None:
    """Check how many numbers a configuration asks for, without allocating them.

    Raises ValueError for more than ``blocks`` blocks or more than ``most`` numbers.
    """
    if (wanted := getattr(config, "num_hidden_layers", 0)) > blocks:
        raise ValueError(f"its {what} are too few for {wanted:,} blocks")
    with torch.device("meta"):
        built = kind.from_config(copy.deepcopy(config), trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in built.parameters())
    if wanted > most:
        raise ValueError(
            f"its configuration needs {wanted:,} numbers, but its {what} hold at most {most:,}"
        )


def check_tokenizer(source: str, options: dict[str, Any]) -> None:
    """Check that no step of a model's ``tokenizer.json`` makes a text so much longer that the
    library would end the process for want of memory.

    ``source`` and ``options`` are those of ``from_pretrained``. Raises ValueError for such a file.
    """
    asked = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    found = cached_file(
        source,
        "tokenizer.json",
        _raise_exceptions_for_missing_entries=False,
        **asked,
    )
    if found is None:
        return
    if Path(found).stat().st_size > LARGEST_JSON:
        raise ValueError("its tokenizer.json is too large to be read")
    value = mapping(read_json(Path(found), "tokenizer"))
    for parts in (("normalizer", "pre_tokenizer"), ("decoder",)):
        growth = 1
        for step in _steps([value.get(part) for part in parts]):
            growth *= _growth(step)
            if growth > _LARGEST_GROWTH:
                raise ValueError("its tokenizer makes a text thousands of times longer")


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in a value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from _steps(inner)


def _growth(step: dict[str, Any]) -> int:
    kind = step.get("type")
    if kind != "Replace":
        return _GROWS.get(text(kind) or "", 1)
    longer = len(text(step.get("content")) or "")
    # a regular expression may match between any two characters
    return max(1, longer) if "String" in mapping(step.get("pattern")) else 1 + longer
