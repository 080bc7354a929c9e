"""One run in several processes, as ``torchrun`` starts them.

The processes of a run have the ranks 0 to size − 1. Apart from tensors they exchange a few JSON
values, through the launcher's key-value store. These are deliberately not collectives: a process
that waits in a collective for one that failed or died waits until a time limit, which must be long
enough for the slowest step. Here a waiting process polls the store. So it sees at once the error
that another process left there, and within a minute that another has no heartbeat.

Without a launcher there is one process, and nothing here costs anything. torch is needed only when
there are several.
"""

import atexit
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from llm_wsae import files
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import from_environment

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MOST = 1 << 16  # processes of one run
_JOIN = timedelta(minutes=10)  # for all processes to arrive
_POLL_SECONDS = 0.05
_BEAT_SECONDS = 1.0
_BEATS_MISSED = 60  # counted in polls, so that a run that was suspended as a whole can continue
_LINGER_SECONDS = 10.0  # how long a failed rank 0, which may host the store, waits for others
_ASK_SECONDS = 2.0  # the same, until the others have asked whether they may speak


class Processes:
    """All processes of this run; this class is the ordinary case of one process."""

    rank = 0
    """Number of this process."""
    size = 1
    """Number of processes."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which shows progress and writes files."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A piece of work that all processes start and end together.

        An error in one process ends it for all: the others raise the same sentence (as a
        LlmWsaeError with the same exit code) when they next wait or ``count``.
        """
        self._counts.clear()
        yield

    def lead(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 only; all processes return its result, which must be JSON."""
        return work()

    def meet(self) -> None:
        """Wait until all processes have called this."""

    def count(self, name: str, amount: int) -> int:
        """Add to a sum over all processes in this piece of work; returns the sum so far.

        For long loops: it raises the error of another process, if there is one.
        """
        self._counts[name] = self._counts.get(name, 0) + amount
        return self._counts[name]

    @contextmanager
    def folder_lock(self, folder: Path, what: str) -> Iterator[None]:
        """Lock a folder for this run: no other may write there while a process of this one lives.

        Raises LlmWsaeError if another run has locked it.
        """
        with files.folder_lock(folder, what):
            yield


class Several(Processes):
    """Several processes, started by a launcher and connected by its key-value store."""

    def __init__(self, part: Callable[[str], Any], rank: int, size: int):
        """``part`` returns a part of the launcher's store by name."""
        self.rank, self.size = rank, size
        self._part, self._stores = part, 0
        self._store = self._part("llm_wsae")
        self._piece = 0  # counts pieces of work; the same in all processes
        self._turn = 0  # counts exchanges within this piece; likewise
        self._left: threading.Event = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()
        atexit.register(self._stop)

    @contextmanager
    def together(self) -> Iterator[None]:
        self._piece, self._turn = self._piece + 1, 0
        try:
            yield
            self.meet()
        except BaseException as error:
            self._report(error)
            raise
        with _reachable():
            self._leave(self._until)  # rank 0 last: it may host the store that the others read

    def lead(self, work: Callable[[], T]) -> T:
        key = self._next_key()
        if self.leads:
            result = json.dumps(work())
            with _reachable():
                self._store.set(key, result)
        else:
            self._until(lambda: self._store.check([key]))
        with _reachable():
            return json.loads(self._store.get(key))

    def meet(self) -> None:
        key = self._next_key()
        with _reachable():
            self._store.add(key, 1)
        self._until(lambda: self._store.add(key, 0) == self.size)

    def count(self, name: str, amount: int) -> int:
        self._check()
        with _reachable():
            return self._store.add(self._key(name), amount)

    def new_store(self) -> Any:
        """A part of the launcher's store that nobody used before, the same for all processes."""
        self._stores += 1
        return self._part(f"llm_wsae/{self._stores}")

    def explain(self, error: BaseException) -> LlmWsaeError:
        """The error to raise for a failed exchange with another process: the one that it left, or
        that it left none."""
        until = time.monotonic() + _LINGER_SECONDS
        try:
            while time.monotonic() < until:
                self._check()
                time.sleep(_POLL_SECONDS)
        except LlmWsaeError as reported:
            return reported
        return LlmWsaeError(
            f"another process of this run exited without an error message ({_first_line(error)}); "
            "run the same command again to resume"
        )

    def _check(self) -> None:
        """Raise the error of another process, if there is one."""
        key = self._key("error")
        with _reachable():
            if not self._store.check([key]):
                return
            found = json.loads(self._store.get(key))
        kind = UsageError if found["exit_code"] == UsageError.exit_code else LlmWsaeError
        raise kind(found["sentence"])

    @contextmanager
    def folder_lock(self, folder: Path, what: str) -> Iterator[None]:
        # Rank 0 takes the lock and then all share it, so that it is free only when the last of
        # them has ended, whichever is killed.
        if self.leads:
            with files.folder_lock(folder, what) as share:
                share()
                self.lead(lambda: True)
                yield
        else:
            self.lead(lambda: True)
            with files.folder_lock(folder, what, shared=True):
                yield

    def first(self, name: str) -> bool:
        """Whether this process is the first in the run to ask this. Rank 0, which may host the
        store, stays a little for those who have not asked yet."""
        with _reachable():
            is_first = self._store.add(name, 1) == 1
            until = time.monotonic() + _ASK_SECONDS
            while self.leads and self._store.add(name, 0) < self.size and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
        return is_first

    def _key(self, name: str) -> str:
        return f"{self._piece}/{name}"

    def _next_key(self) -> str:
        self._turn += 1
        return self._key(str(self._turn))

    def _until(self, ready: Callable[[], bool]) -> None:
        """Poll until ready; raise the error of another process, or that one has died."""
        seen: dict[int, int] = {}
        missed: dict[int, int] = {}
        polled = time.monotonic()
        while True:
            with _reachable():
                if ready():
                    return
            try:
                self._check()
            except LlmWsaeError:
                with _reachable():
                    if ready():  # the other process got past this exchange before it failed
                        return
                raise
            if time.monotonic() - polled >= _BEAT_SECONDS:
                polled = time.monotonic()
                for rank in range(self.size):
                    with _reachable():
                        beats = self._store.add(f"beat/{rank}", 0)
                    missed[rank] = missed.get(rank, 0) + 1 if beats == seen.get(rank) else 0
                    seen[rank] = beats
                    if missed[rank] > _BEATS_MISSED:
                        raise LlmWsaeError(
                            f"process {rank} of {self.size} exited without an error message; run "
                            "the same command again to resume"
                        )
            time.sleep(_POLL_SECONDS)

    def _report(self, error: BaseException) -> None:
        """Leave this error for the others, if it is the first of this piece of work."""
        sentence, code = f"process {self.rank} ended: {error!r}", LlmWsaeError.exit_code
        if isinstance(error, LlmWsaeError):
            sentence, code = str(error), error.exit_code
        try:
            value = json.dumps({"sentence": sentence, "exit_code": code})
            self._store.compare_set(self._key("error"), "", value)
            until = time.monotonic() + _LINGER_SECONDS

            def wait(ready: Callable[[], bool]) -> None:
                while not ready() and time.monotonic() < until:
                    time.sleep(_POLL_SECONDS)

            self._leave(wait)
        except RuntimeError:
            pass  # the store has closed, and nobody could read this

    def _leave(self, wait: Callable[[Callable[[], bool]], None]) -> None:
        left = self._key("left")
        self._store.add(left, 1)
        if self.leads:
            wait(lambda: self._store.add(left, 0) == self.size)

    def _beat(self) -> None:
        try:
            while not self._left.wait(_BEAT_SECONDS):
                self._store.add(f"beat/{self.rank}", 1)
        except RuntimeError:
            pass  # the store has closed; its users get an error that says so

    def _stop(self) -> None:
        self._left.set()
        self._heart.join()


def count() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    if any(name not in os.environ for name in _ENVIRONMENT):
        return 1
    from_environment("MASTER_PORT", 0, 65535)
    return from_environment("WORLD_SIZE", 1, _MOST)


def leads() -> bool:
    """Whether this process is rank 0, without waiting for the others."""
    return count() == 1 or from_environment("RANK", 0, count() - 1) == 0


@functools.cache
def join() -> Processes:
    """All processes of this run, as soon as each of them has called this.

    Raises LlmWsaeError if they do not all call it, or cannot reach each other.
    """
    if count() == 1:
        return Processes()
    from_environment("RANK", 0, count() - 1)
    from torch import distributed

    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=_JOIN))
    except (RuntimeError, ValueError) as error:
        raise LlmWsaeError(
            f"the {count()} processes of this run did not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({_first_line(error)}); "
            "start them with torchrun, on another --master-port if this one is taken"
        ) from error
    return Several(lambda name: distributed.PrefixStore(name, store), rank, size)


def may_speak() -> bool:
    """Whether this process is the one that prints an error, for all of them."""
    try:
        processes = join()
        return not isinstance(processes, Several) or processes.first("spoken")
    except LlmWsaeError:
        return True  # they can no longer agree; better twice than never


@contextmanager
def _reachable() -> Iterator[None]:
    """Turn the store's errors into one of ours."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistError, and what it derives from
        raise LlmWsaeError(
            "the process that started this run has ended, and with it the run "
            f"({_first_line(error)}); run the same command again to resume"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0].rstrip(".")
