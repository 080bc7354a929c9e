"""Units of work: each is computed once, and its result is a file.

An interrupted run therefore resumes where it stopped, and a larger one adds to what exists.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.files import read_own_json, write_json
from llm_wsae.outside import mapping
from llm_wsae.provenance import plain

UNITS = "units"
"""Folder of the units' files within that of the experiments."""
REPORT = "theory.json"
_WAY_OUT = "delete it to compute it again"
Check = Callable[[], None]
"""Called by a unit now and then; raises when the run is being stopped."""


@dataclass(frozen=True)
class Unit:
    """A piece of work with a JSON-able result."""

    path: Path
    """The file of its result."""
    identity: dict[str, Any]
    """Everything the result depends on; written to the same file."""
    compute: Callable[[Check], dict[str, Any]]


class _Stopped(Exception):
    """Ends a unit whose run has ended; never leaves this module."""


def finish(units: Sequence[Unit], workers: int, label: str) -> list[dict[str, Any]]:
    """The results of all units, in order: from their files, or computed now and written.

    ``workers`` units run in parallel, each on one core; 0 takes every core. An error or an
    interruption ends all of them within a step and keeps the finished files.

    Raises LlmWsaeError when a file holds the result of another configuration, and whatever a unit
    raises.
    """
    results = {i: _read(unit) for i, unit in enumerate(units) if unit.path.exists()}
    stopping = threading.Event()

    def check() -> None:
        if stopping.is_set():
            raise _Stopped

    def work(unit: Unit) -> dict[str, Any]:
        result = plain(unit.compute(check))
        write_json(unit.path, {"identity": plain(unit.identity), "result": result})
        return result

    missing = [i for i in range(len(units)) if i not in results]
    bar = tqdm(total=len(missing), desc=label, unit="unit", disable=not missing)
    with _one_thread_each(), bar, ThreadPoolExecutor(workers or _cores()) as pool:
        running = {pool.submit(work, units[i]): i for i in missing}
        try:
            for future in as_completed(running):
                results[running[future]] = future.result()
                bar.update()
        except BaseException:  # Ctrl-C too: the other threads must stop
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[i] for i in range(len(units))]


def read_result(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The identity and the result in a unit's file. Raises LlmWsaeError if it is damaged."""
    found = read_own_json(path, "result of a planted experiment", _WAY_OUT)
    identity, result = (mapping(found).get(name) for name in ("identity", "result"))
    if not isinstance(identity, dict) or not isinstance(result, dict):
        raise LlmWsaeError(f"{path} is not a result of planted experiments; {_WAY_OUT}")
    return identity, result


def _read(unit: Unit) -> dict[str, Any]:
    identity, result = read_result(unit.path)
    for key, wanted in plain(unit.identity).items():
        before = identity.get(key)
        if before != wanted:
            raise LlmWsaeError(
                f"{unit.path} was computed with another {key.replace('_', ' ')} "
                f"({shown(before)}, now {shown(wanted)}); choose another folder, or delete that "
                "file"
            )
    return result


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """A unit's matrix products are too small to be split over cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
