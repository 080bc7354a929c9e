"""Fuzzing: damage that a seed decides, and what came of each case.

A case is refused (in a sentence of ours), harmless (what was read is what the undamaged file
gives), or a failure, which names the kind and the number of the case: the same number gives the
same damage again.
"""

import copy
import dataclasses
import json
import os
import pickle
import random
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_wsae.cli import _explained

_SHOWN = 10  # failures in a message
SECONDS = 30
"""The longest that a case in a process of its own may take; what it takes is mostly much less."""


class Fuzz:
    """The counts of a test, and its failures. ``times`` is that of ``--fuzz``."""

    def __init__(self, times: int):
        self.times = times
        self.counts: dict[str, Counter[str]] = {}
        self.failures: list[str] = []

    def cases(self, kind: str, usual: int) -> Iterator[tuple[int, random.Random]]:
        """Number and randomness of each case: ``usual`` ones, or ``--fuzz`` times as many."""
        for number in range(usual * self.times):
            yield number, random.Random(f"{kind} {number}")

    def count(self, kind: str, outcome: str, case: object = "", why: object = "") -> None:
        """Count a case. Any outcome but two fails the test."""
        counts = self.counts.setdefault(kind, Counter())
        counts["tried"] += 1
        counts[outcome] += 1
        if outcome not in ("refused", "harmless"):
            self.failures.append(f"{kind}, {case}: {outcome} {why}"[:600])

    def reads(self, kind: str, case: object, read: Callable[[], Any], good: Any) -> str:
        """Read what was damaged, which must be refused or give what was there before. ``good`` is
        that, ``frozen``; None accepts everything that can be read. The outcome."""
        outcome, why = "harmless", ""
        try:
            found = read()
            if good is not None and frozen(found) != good:
                outcome = "different"
        except Exception as error:
            sentence = _explained(error)
            outcome = "traceback" if sentence is None else "refused"
            if sentence is None or "\n" in str(sentence):
                outcome, why = "traceback", f"{type(error).__name__}: {error}"
        self.count(kind, outcome, case, why)
        return outcome

    def end(self) -> None:
        """Fail if a case did."""
        if self.failures:
            shown = "\n".join(self.failures[:_SHOWN])
            pytest.fail(f"{len(self.failures)} failures:\n{shown}", pytrace=False)


def begun(work: Callable[[], Any], memory: int) -> Callable[[], Any]:
    """Begin a piece of work in a process of its own, which may not take long nor have more than
    ``memory`` bytes of addresses. The function waits for it and gives or raises what it did, or
    RuntimeError if the process ended otherwise."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            signal.alarm(SECONDS)
            try:
                found = work(), None
            except Exception as error:
                found = None, error
            with open(writing, "wb") as pipe:
                pickle.dump(found, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)

    def end() -> Any:
        with open(reading, "rb") as pipe:
            found = pipe.read()
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise RuntimeError(f"the process ended with {status}")
        value, error = pickle.loads(found)
        if error is not None:
            raise error
        return value

    return end


def frozen(value: Any) -> Any:
    """A value that is equal to another one only if everything in both is, NaN and types too."""
    if isinstance(value, torch.nn.Module):
        return frozen(dict(value.state_dict()))
    if isinstance(value, Tensor):
        whole = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), whole.view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value).__name__, tuple(frozen(getattr(value, f.name)) for f in fields)
    if isinstance(value, Mapping):
        return tuple(sorted((repr(key), frozen(one)) for key, one in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    return type(value).__name__, repr(value)


# --- Damage without regard to what a file is


def blind(data: bytes, draw: random.Random, other: bytes) -> tuple[str, bytes]:
    """(what was done, the bytes): one to three times something that disks, transfers and editors
    do. ``other`` is another file of the kind."""
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        name = draw.choice(list(_BLIND))
        data = _BLIND[name](data, draw, other)
        done.append(name)
    return " and ".join(done), data


def _piece(data: bytes, draw: random.Random, longest: int = 200) -> tuple[int, int]:
    """Begin and end of a piece of the bytes; often a small one."""
    begin = draw.randint(0, len(data))
    return begin, min(len(data), begin + draw.choice((1, 2, 8, draw.randint(1, longest))))


def flipped(data: bytes, at: int, bit: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def _flip(data: bytes, draw: random.Random, _: bytes) -> bytes:
    return flipped(data, *divmod(draw.randrange(8 * len(data)), 8)) if data else data


def _put(data: bytes, draw: random.Random, new: bytes) -> bytes:
    begin, end = _piece(data, draw)
    return data[:begin] + new + data[end:]


def _digit(data: bytes, draw: random.Random, _: bytes) -> bytes:
    digits = [at for at, byte in enumerate(data[:20_000]) if chr(byte).isdigit()]
    if not digits:
        return data
    at = draw.choice(digits)
    return data[:at] + str(draw.randint(0, 9)).encode() + data[at + 1 :]


def _swap(data: bytes, draw: random.Random, _: bytes) -> bytes:
    a, b, c = sorted(draw.randint(0, len(data)) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


_BLIND: dict[str, Callable[[bytes, random.Random, bytes], bytes]] = {
    "a bit flipped": _flip,
    "a digit changed": _digit,
    "bytes changed": lambda data, draw, _: _put(data, draw, draw.randbytes(draw.randint(1, 9))),
    "zeros": lambda data, draw, _: _put(data, draw, bytes(draw.randint(1, 600))),
    "a piece lost": lambda data, draw, _: _put(data, draw, b""),
    "the end lost": lambda data, draw, _: data[: draw.randint(0, len(data))],
    "more at the end": lambda data, draw, _: data + draw.randbytes(draw.randint(1, 99)),
    "spaces": lambda data, draw, _: _put(data, draw, b" " * draw.randint(1, 3)),
    "pieces exchanged": _swap,
    "a piece of another file": lambda data, draw, other: _put(
        data, draw, other[slice(*_piece(other, draw))]
    ),
    "the end of another file": lambda data, draw, other: (
        data[: (at := draw.randint(0, len(data)))] + other[at:]
    ),
    "another line ending": lambda data, draw, _: data.replace(b"\n", b"\r\n"),
}


# --- Damage to values of JSON

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


def change(value: Any, draw: random.Random) -> str:
    """Change one value somewhere in JSON, in place; what was done."""
    known = list(places(value))
    if not known:
        return "nothing"
    inner, key = draw.choice(known)
    old = inner[key]
    how = draw.choice(("other", "near", "removed", "renamed", "exchanged"))
    if how == "removed":
        del inner[key]
        new: Any = REMOVED
    elif how == "renamed" and isinstance(inner, dict):
        new = draw.choice(("x", f"{key}x", str(key)[:-1], str(key).upper()))
        inner[new] = inner.pop(key)
    elif how == "exchanged":
        other, its_key = draw.choice(known)
        new = other[its_key] if its_key in _keys(other) else None
        inner[key] = json.loads(json.dumps(new))  # no circle
    elif how == "near":
        new = inner[key] = _near(old, draw)
    else:
        new = inner[key] = draw.choice(OTHER_VALUES)
    return f"{key!r} = {old!r:.40} became {new!r:.40}"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    for key in _keys(value):
        yield value, key
        yield from places(value[key])


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def _near(old: Any, draw: random.Random) -> Any:
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return draw.choice((old + 1, old - 1, -old, 2 * old, float(old), str(old), [old]))
    if isinstance(old, float):
        return draw.choice((old * 1.0001, -old, int(old) if abs(old) < 1e9 else 0, old + 1))
    if isinstance(old, str):
        return draw.choice(
            (old[:-1], old + " ", old.upper(), old[::-1], f"../{old}", "é", "\x1b[2J")
        )
    if isinstance(old, list):
        return draw.choice((old[:-1], old[::-1], old + old, [*old, old]))
    if isinstance(old, dict):
        return draw.choice((list(old), {**old, "x": 1}, {}))
    return draw.choice((0, "", "null"))


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


# --- Damage to what a file of tensors says


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
