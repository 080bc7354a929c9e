"""Several processes of one run, as a launcher starts them, without a launcher's start-up time.

They are forked from a server process that has everything imported, so each takes a moment. A rank's
outcome is what its function returned, or the error that it raised, as ``type: sentence``; None if
it was killed.
"""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from command_line import asked
from torch.distributed import TCPStore

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["command_line", "llm_wsae.pipeline.run"])
_SECONDS = 300


class Rank:
    """One process of a run."""

    def __init__(self, rank: int, size: int, store: Any, work: Callable[..., Any], args: tuple):
        self._store = store  # which must live as long as the run
        self._answer, theirs = _FORKS.Pipe(duplex=False)
        given = (rank, size, store.port, theirs, work, args)
        self.process = _FORKS.Process(target=_rank, args=given)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def outcome(self) -> Any:
        """Wait for the end; it must come."""
        try:
            found = self._answer.recv() if self._answer.poll(_SECONDS) else TimeoutError()
        except EOFError:
            found = None
        self.process.join(_SECONDS)
        if self.process.exitcode is None or isinstance(found, TimeoutError):
            self.kill()
            raise AssertionError("a process hangs")
        return found


def start(size: int, work: Callable[..., Any], *args: Any) -> list[Rank]:
    """Begin ``work(*args)`` in so many processes; it must be a module's own function."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun does
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path, before])  # the server's
    try:
        return [Rank(rank, size, store, work, args) for rank in range(size)]
    finally:
        os.environ["PYTHONPATH"] = before


def run(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """The outcomes by rank."""
    return [rank.outcome() for rank in start(size, work, *args)]


def launched(size: int, *words: Any) -> list[str]:
    """The words that start one of our commands in so many processes of the real launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*launcher, str(size), "-m", "llm_wsae", *asked(words)]


def _rank(rank: int, size: int, port: int, answer: Any, work: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    os.fsync = lambda handle: None
    from llm_wsae.errors import LlmWsaeError
    from llm_wsae.machine import processes

    processes._LINGER_SECONDS = 1
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            answer.send(work(*args))
        except LlmWsaeError as error:
            answer.send(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
