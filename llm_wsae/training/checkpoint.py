"""The state of a training on disk: one safetensors file, replaced atomically; in the end a record
of the finished training takes its place.

It records the settings it belongs to, so that a run with others is told what differs instead of
resuming from a state that is not its own. It is read only if every byte is as it was written, and
if its tensors are those of the arms.

Several processes write the file at once, each the rows that it holds. The format is a header with
every tensor's place, then their bytes. Rows of a tensor are contiguous, so each process writes its
own rows in place, and the file equals one written by a single process with all rows. Nothing is
gathered: no process holds more than its part.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_wsae.artifact.digests import HEADER, blank_header, fill_header
from llm_wsae.artifact.files import (
    open_tensors,
    own_facts,
    read_own_json,
    save_own_tensors,
    write_atomic,
    write_error,
)
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.machine.processes import Processes
from llm_wsae.training.arm import Arm, Learnt
from llm_wsae.training.log import Written
from llm_wsae.training.parallel.group import ProcessGroup
from llm_wsae.training.parameters import Parameters

CHECKPOINT, FINISHED = "checkpoint.safetensors", "training.json"
DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32"}
_ALIGNED = 8  # bytes of the largest of them
_SAME_WEIGHTS = 1e-5  # relative: the sum of a matrix is recorded with six digits
WHAT = "training checkpoint"
WAY_OUT = "delete it to start that training again"


class Rows(NamedTuple):
    """Some consecutive rows of a tensor."""

    tensor: Tensor
    first: int
    """Number of the first one."""
    total: int
    """Number of rows over all processes."""


def save_rows(
    path: Path, parts: dict[str, Rows | Tensor], facts: Mapping[str, Any], processes: Processes
) -> None:
    """Write the file atomically, as ``save_own_tensors`` does; rank 0 writes tensors that are not
    ``Rows``, and its ``facts`` count.

    All processes must call this with the same names. Raises LlmWsaeError, in all of them, if one
    cannot write.
    """
    header, places = _layout(parts, blank_header(facts))

    def write(partial: Path) -> None:
        if processes.leads:
            partial.write_bytes(header)
        common = Path(processes.lead(lambda: str(partial)))
        begin = processes.lead(lambda: len(header))  # of rank 0
        _write(common, parts, places, begin, processes.leads)
        processes.meet()
        if processes.leads:
            fill_header(partial)

    if processes.leads:
        write_atomic(path, write)
        return
    try:
        write(path)
    except OSError as error:
        raise write_error(path, error) or error from error


def _layout(
    parts: dict[str, Rows | Tensor], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, and where each tensor begins after it."""
    entries, starts, at = {}, {}, 0
    tensors = {name: p.tensor if isinstance(p, Rows) else p for name, p in parts.items()}
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        part, tensor = parts[name], tensors[name]
        shape = list(tensor.shape)
        if isinstance(part, Rows):
            shape[0] = part.total
        end = at + math.prod(shape) * tensor.itemsize
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [at, end]}
        starts[name], at = at, end
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    header = len(text).to_bytes(8, "little") + text
    return header, starts


def _write(
    path: Path, parts: dict[str, Rows | Tensor], places: dict[str, int], begin: int, leads: bool
) -> None:
    with open(path, "r+b") as file:
        for name, part in parts.items():
            if not isinstance(part, Rows):
                if not leads:
                    continue
                part = Rows(part, 0, 1)
            ready = part.tensor.detach().cpu().contiguous()
            row_bytes = ready[0].nbytes if part.first else 0
            file.seek(begin + places[name] + part.first * row_bytes)
            file.write(ready.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


class Reached(NamedTuple):
    """How far a training has come."""

    step: int
    """Steps done."""
    numbers: dict[str, dict[str, float]]
    """The numbers last logged for each arm."""
    log: Written | None = None
    """What the log held; None in processes that write none."""


def save_checkpoint(
    folder: Path,
    arms: Sequence[Arm],
    reached: Reached,
    identity: dict[str, Any],
    group: ProcessGroup,
) -> None:
    """Replace the folder's checkpoint. Raises LlmWsaeError when it cannot be written.

    The file is the same however the training is distributed, so any number of processes can resume
    from it. Rank 0 writes it; where other processes hold latents, each writes its own part.
    """
    log = None if reached.log is None else reached.log._asdict()
    header = {**reached._asdict(), "log": log, "identity": identity}
    parts: dict[str, Tensor | Rows] = {}
    for arm in arms:
        for name, value in arm.state().items():
            part: Tensor | Rows = value
            if group.strategy.latent_parts > 1 and _per_latent(name, value.shape):
                part = Rows(value, arm.own_latents.start, arm.d_sae)
            parts[f"{arm.config.name}/{name}"] = part
    if group.strategy.latent_parts > 1:
        save_rows(folder / CHECKPOINT, parts, header, group.processes)
    elif group.processes.leads:
        save_own_tensors(folder / CHECKPOINT, parts, header)


def load_checkpoint(
    folder: Path, arms: Sequence[Arm], identity: dict[str, Any], processes: Processes
) -> Reached:
    """Restore the arms, or the latents that they hold, from the folder's checkpoint, if it has one.

    All processes call this together; rank 0 checks the bytes for all. Raises LlmWsaeError when the
    checkpoint belongs to other settings or is damaged.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return Reached(0, {})
    with open_tensors(path, WHAT, WAY_OUT) as file:
        header = processes.lead(lambda: own_facts(file, path, WHAT, WAY_OUT) or {})
        with _refused(path):
            check_identity(folder, _identity(header), identity)
            reached = _reached(header, identity["num_steps"])
            for arm in arms:
                _check_tensors(file, arm)
        for arm in arms:  # what goes wrong now, as memory that runs out, is no fault of the file
            arm.load_state(_own_state(file, arm))
        return reached


def load_learnt(folder: Path, arm: Arm) -> Learnt:
    """What an arm learnt, with the latents of all processes, from the checkpoint that this run has
    just saved.

    Only what a dictionary is made of is read: the optimiser's moments are twice as large as the
    weights, and such dictionaries fill memory as it is.
    """
    path, config = folder / CHECKPOINT, arm.config
    architecture = config.kind(config.level, arm.d_sae)
    with open_tensors(path, WHAT) as file, _refused(path):

        def read(name: str) -> Tensor:
            return file.get_tensor(f"{config.name}/{name}")

        parameters = Parameters(*map(read, Parameters._fields))
        architecture.load_state({name: read(name) for name in arm.architecture.state()})
    return Learnt(parameters, architecture)


def log_at_checkpoint(folder: Path) -> Written | None:
    """What the log held at the folder's checkpoint, the bytes of which are not checked here."""
    path = folder / CHECKPOINT
    with open_tensors(path, WHAT) as file, _refused(path):
        return _log(json.loads(file.metadata()[HEADER]))


def recorded(folder: Path) -> dict[str, Any] | None:
    """The settings of the training in a folder, finished or not; None if there is none. The bytes
    of a checkpoint are not checked here."""
    if (folder / FINISHED).exists():
        return read_finished(folder).settings
    if not (path := folder / CHECKPOINT).exists():
        return None
    with open_tensors(path, WHAT, WAY_OUT) as file, _refused(path):
        return _complete(_identity(json.loads(file.metadata()[HEADER])))


def check_same_rows(folder: Path, rows: dict[str, Any]) -> None:
    """Raise LlmWsaeError, before anything is measured, if the folder holds a training on other
    rows."""
    if (found := recorded(folder)) is not None:
        check_identity(folder, {"rows": found["rows"]}, {"rows": rows})


class Finished(NamedTuple):
    """What is recorded of a finished training."""

    settings: dict[str, Any]
    log: Written
    """What its log held at the end."""
    weights: dict[str, str]
    """The SHA-256 of each dictionary's weights."""


def read_finished(folder: Path) -> Finished:
    """What is recorded of the finished training in a folder.

    Raises LlmWsaeError if its record is damaged.
    """
    path = folder / FINISHED
    found = read_own_json(path, "training record", WAY_OUT)
    with _refused(path):
        log, weights = Written.from_json(found.pop("log")), dict(found.pop("weights_sha256"))
        return Finished(_complete(found), log, weights)


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """What no training writes, as an error of ours."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise LlmWsaeError(
            f"{path} is not what this version writes ({error}); {WAY_OUT}"
        ) from error


def _reached(header: dict[str, Any], num_steps: int) -> Reached:
    """How far the training had come. Raises ValueError or KeyError for what no training writes."""
    step, numbers = header["step"], header.get("numbers", {})
    if type(step) is not int or not 0 <= step <= num_steps:
        raise ValueError(f"its step is {shown(step)} of {num_steps}")
    for found in numbers.values():
        if not all(isinstance(number, float) for number in found.values()):
            raise ValueError(f"its numbers are {shown(numbers)}")
    return Reached(step, numbers, _log(header))


def _log(header: dict[str, Any]) -> Written | None:
    """What the log held. Raises ValueError or KeyError for what no training writes."""
    return None if header["log"] is None else Written.from_json(header["log"])


def _identity(header: dict[str, Any]) -> dict[str, Any]:
    """The settings it belongs to. Raises ValueError if it names none."""
    found = header["identity"]
    if not isinstance(found, dict):
        raise ValueError("it does not say which settings it belongs to")
    return found


def _complete(found: dict[str, Any]) -> dict[str, Any]:
    """The same settings. Raises ValueError or KeyError unless they say what was trained on what."""
    for own in (found["rows"], found["arms"], *found["arms"].values()):
        if not isinstance(own, dict):
            raise ValueError(f"its rows or arms are {shown(own)}")
    return found


def _check_tensors(file: Any, arm: Arm) -> None:
    """Raise ValueError unless the file has the arm's tensors, in their shapes.

    It may have single numbers in addition: what an architecture remembers only after a while.
    """
    missing = arm.state()
    for name in _names(file, arm):
        piece = file.get_slice(f"{arm.config.name}/{name}")
        shape, dtype = piece.get_shape(), piece.get_dtype()
        wanted = missing.pop(name, None)
        if wanted is None or wanted.ndim == 0:  # of any precision: mps has no float64
            is_float = dtype.startswith("F")
            fits = shape == [] and (wanted is None or is_float == wanted.is_floating_point())
        else:
            latents = arm.d_sae if _per_latent(name, wanted.shape) else len(wanted)
            fits = shape == [latents, *wanted.shape[1:]] and dtype == DTYPES[wanted.dtype]
        if not fits:
            raise ValueError(f"its {arm.config.name}/{name} is {dtype} {shape}")
    if missing:
        raise ValueError(f"it lacks {arm.config.name}/{min(missing)}")


def _names(file: Any, arm: Arm) -> list[str]:
    prefix = f"{arm.config.name}/"
    names = file.keys()
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _own_state(file: Any, arm: Arm) -> dict[str, Tensor]:
    own, found = arm.own_latents, {}
    for name in _names(file, arm):
        piece = file.get_slice(f"{arm.config.name}/{name}")
        if len(own) < arm.d_sae and _per_latent(name, piece.get_shape()):
            found[name] = piece[own.start : own.stop]
        else:
            found[name] = file.get_tensor(f"{arm.config.name}/{name}")
    return found


def _per_latent(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of an arm's state has one row for each latent."""
    return len(shape) > 0 and not name.startswith("decoder_bias")


def check_identity(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise LlmWsaeError, naming each difference, unless both settings are the same."""
    if clauses := differences(found, wanted):
        raise LlmWsaeError(
            f"{folder} holds a training with other settings ({clauses}); "
            "choose another folder, or delete that one"
        )


def differences(
    found: dict[str, Any],
    wanted: dict[str, Any],
    owners: tuple[str, str] = ("the saved training", "this command"),
) -> str:
    """How the settings of two ``owners`` differ, in words; empty if they are the same, up to the
    last digits of weights, which depend on the machine."""
    wanted = json.loads(json.dumps(wanted))  # as it looks after a round trip
    return "; ".join(_differences(found, wanted, owners))


def _differences(
    found: dict[str, Any], wanted: dict[str, Any], owners: tuple[str, str], under: str = ""
) -> Iterator[str]:
    first, second = owners
    for name in sorted(found.keys() | wanted.keys()):
        there, asked = found.get(name), wanted.get(name)
        if there == asked or (name == "gamma_sum" and _alike(there, asked)):
            continue
        if isinstance(there, dict) and isinstance(asked, dict):
            yield from _differences(there, asked, owners, f"{under}{name} ")
        elif isinstance(there, dict):
            yield f"{first} has {under}{name}; {second} does not"
        elif isinstance(asked, dict):
            yield f"{second} has {under}{name}; {first} does not"
        else:
            yield f"{under}{name}: {_short(there)} in {first}, {_short(asked)} in {second}"


def _alike(there: Any, asked: Any) -> bool:
    both = isinstance(there, float) and isinstance(asked, float)
    return both and math.isclose(there, asked, rel_tol=_SAME_WEIGHTS)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
