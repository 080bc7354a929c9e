"""Ways to damage a dictionary's files, each the same every time.

``OTHER_VALUES`` take the place of each value in a configuration, one at a time; ``tensor_changes``
break what a file of tensors says.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OTHER_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**70, 10**400, 1.5, float("nan"), float("inf"), "", "x",
    "two\nlines", "../../etc", [], [1], {}, {"a": 1},
)  # fmt: skip
REMOVED = "removed"
OTHER_JSON = {
    "a list": b"[]",
    "a text": b'"x"',
    "two objects": b"{}{}",
    "nothing in it": b"{}",
    "brackets without end": b"[" * 100_000,
    "a number of 5000 digits": b'{"d_in": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "a byte-order mark": b"\xef\xbb\xbf{}",
}


def config_changes(config: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(key, value, the configuration): each value, two deep, exchanged or ``"removed"``."""
    paths = [(key,) for key in config]
    paths += [
        (key, own) for key, value in config.items() if isinstance(value, dict) for own in value
    ]
    for *above, key in paths:
        for value in (REMOVED, *OTHER_VALUES):
            changed = copy.deepcopy(config)
            inner = changed[above[0]] if above else changed
            if value is REMOVED:
                del inner[key]
            else:
                inner[key] = value
            yield ".".join([*above, key]), value, changed


def tensor_changes(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(what was done, the tensors): each one missing, renamed, of another shape or content."""
    yield "nothing in it", {}
    yield "one more", tensors | {"scale": torch.ones(3)}
    for name, tensor in tensors.items():
        others = {other: kept for other, kept in tensors.items() if other != name}
        yield f"{name} missing", others
        yield f"{name} renamed", others | {f"{name}2": tensor}
        for what, changed in _changed(tensor).items():
            yield f"{name} {what}", others | {name: changed}


def _changed(tensor: Tensor) -> dict[str, Tensor]:
    flat = tensor.reshape(-1)
    changed = {
        "as whole numbers": tensor.to(torch.int32),
        "as truth values": tensor > 0,
        "in a box": tensor[None],
        "twice as long": torch.cat([flat, flat]),
        "without anything": tensor.new_zeros(0),
    }
    if tensor.is_floating_point():
        for what, value in (("not a number", "nan"), ("infinite", "-inf")):
            changed[what] = tensor.clone()
            changed[what].view(-1)[-1] = float(value)
    if tensor.ndim:
        changed["one short"] = tensor[1:].clone()
        changed["one long"] = torch.cat([tensor, tensor[:1]])
    if tensor.ndim == 2:
        changed["turned"] = tensor.T.contiguous()
        changed["flat"] = flat
    return changed


def write(path: Path, config: Any) -> None:
    """As JSON, or what Python takes for JSON (NaN)."""
    path.write_text(json.dumps(config))
