"""Several dictionaries in one pass over the same batches.

Reading and normalising a batch is shared, so each further arm costs only its own step, and the
arms differ only in their configuration: same rows, same order, same schedule. Several sites of a
stream also share the forward pass; each of them is a ``Training`` of its own.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.shuffling import ActivationSource, SiteRows
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine.hardware import check_memory, choose_device, return_freed_memory
from llm_wsae.machine.processes import join
from llm_wsae.model.site import Site
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.checkpoint import is_finished, training_in
from llm_wsae.training.config import TrainConfig
from llm_wsae.training.log import LOG
from llm_wsae.training.one_site import NAMES, Training
from llm_wsae.training.optimiser import PAIR_BYTES
from llm_wsae.training.parallel.strategy import strategy_of

_CONTINUE, _SAVE, _STOP, _FAIL = range(4)
# What a process may want after a step; the largest one wins. One that fails has no next rows.


class Interrupted(LlmWsaeError):
    """The training was stopped by a signal after saving a checkpoint.

    The exit code is what a shell reports for that signal: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, sentence: str, number: int):
        super().__init__(sentence)
        self.exit_code = 128 + number


def train(
    source: ActivationSource, arms: Sequence[ArmConfig], config: TrainConfig, out: Path
) -> dict[str, Dictionary]:
    """Train every arm on the source's rows and save one dictionary folder each under ``out``.

    The same call resumes a run that was stopped or killed from its last checkpoint, and on the CPU
    ends with the same bits as an uninterrupted run. A finished run is only loaded.

    Under ``torchrun`` all processes make the same call and train the same dictionaries together, up
    to the order in which numbers are added; ``config.shard`` says what is distributed. They need a
    folder that all can reach, and a run may be resumed with another number of processes.

    Returns the dictionaries by arm name. Raises UsageError for impossible settings, LlmWsaeError
    when ``out`` belongs to another training or is being written, and Interrupted after Ctrl-C or
    SIGTERM. When the source fails, in whichever process, a checkpoint and the dictionaries as they
    are then are saved first.
    """
    return _train([(source, arms, Path(out))], source.batches, config)[0]


def train_sites(
    rows: SiteRows, arms: Mapping[Site, Sequence[ArmConfig]], config: TrainConfig, out: Path
) -> dict[Site, dict[str, Dictionary]]:
    """Train the arms of several sites: of a stream in step, since one forward pass gives the rows
    of all; of a store one after the other.

    Each site has its own folder under ``out``, named after it, as ``train`` would fill it.
    Everything else is as for ``train``.
    """
    if unknown := [str(site) for site in arms if site not in rows.sites]:
        raise UsageError(
            f"the rows that are computed are of {', '.join(map(str, rows.sites))}, not of "
            f"{', '.join(unknown)}"
        )
    jobs = [(rows.source(site), own, Path(out) / str(site)) for site, own in arms.items()]
    if rows.in_step:
        places = [rows.sites.index(site) for site in arms]
        trained = _train(jobs, rows.batches, config, places)
    else:
        trained = [train(source, own, config, folder) for source, own, folder in jobs]
    return dict(zip(arms, trained, strict=True))


_Batches = Callable[[int, int, int, tuple[int, int]], Iterator[Any]]
"""Those of a source, or of several sites."""


def _train(
    jobs: Sequence[tuple[ActivationSource, Sequence[ArmConfig], Path]],
    batches: _Batches,
    config: TrainConfig,
    places: Sequence[int] = (0,),
) -> list[dict[str, Dictionary]]:
    """``places`` says which rows of a batch are those of each job."""
    for source, arms, out in jobs:
        check_arms(arms, source.d_in, config)
        check_out(out)
    processes, device = join(), choose_device(config.device)
    with processes.together():
        with strategy_of(processes, device, config.shard) as strategy:
            # before the lock: a refused request leaves no folder
            unfinished = [job for job in jobs if not is_finished(job[2])]
            widths = [source.d_in for source, arms, _ in unfinished for _ in arms]
            check_room(widths, config, strategy.latent_parts)
            trainings = [
                Training(source, arms, config, out, device, strategy, place)
                for (source, arms, out), place in zip(jobs, places, strict=True)
            ]
            settings = [{**training.identity, "shard": config.shard} for training in trainings]
            for own in settings:
                processes.check_agreed(own, "settings")
            with ExitStack() as locks:
                for training in trainings:
                    locks.enter_context(processes.folder_lock(training.out, "training"))
                done = processes.lead(lambda: [training.is_finished() for training in trainings])
                missing = [one for one, is_done in zip(trainings, done, strict=True) if not is_done]
                if missing:
                    return_freed_memory()  # by the stages before, for the rows
                    _take_steps(missing, batches)
                    for training in missing:
                        processes.lead(training.finish)
                    return_freed_memory()
        return [{arm.name: _load(out / arm.name) for arm in arms} for _, arms, out in jobs]


def _take_steps(trainings: Sequence[Training], batches: _Batches) -> None:
    """All steps of these sites, from their checkpoints on."""
    with ExitStack() as opened:
        for training in trainings:
            opened.callback(training.close)
            training.begin()
            training.processes.check_agreed({"step": training.reached}, "checkpoints")
        steps = _Steps(trainings, batches)
        opened.callback(steps.close)
        with _stop_signals() as steps.stopped, steps.bar:
            wanted = steps.take()
        steps.end(wanted)


class _Steps:
    """The steps of all sites, from where they stand to the end or to a signal. A site whose
    checkpoint is newer than that of another waits for it."""

    def __init__(self, trainings: Sequence[Training], batches: _Batches):
        first, arms = trainings[0], sum(len(training.arms) for training in trainings)
        self._trainings, self._num_steps = trainings, first.num_steps
        self._config, self._strategy = first.config, first.strategy
        self._processes = first.processes
        self._done = min(training.reached for training in trainings)
        wanted = (self._config.batch_size, self._config.shuffle_seed, self._done)
        self._rows = batches(*wanted, self._strategy.row_part)
        self._failure: LlmWsaeError | None = None  # of the rows of the next step
        self._saved_at = time.monotonic()
        self.stopped: list[int] = []
        self.bar = tqdm(
            total=self._num_steps * self._config.batch_size,
            initial=self._done * self._config.batch_size,
            desc=f"train {arms} arm{'s' * (arms > 1)}",
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not self._processes.leads,
        )

    def take(self) -> int:
        """Take the steps; returns what the processes agreed on at last."""
        rows = self._fetch(self._done)
        wanted = self._strategy.agree(lambda: _FAIL if self._failure else _CONTINUE)()
        while self._done < self._num_steps and wanted < _STOP:
            # before this step, so that no process begins one that another cannot take
            following = self._fetch(self._done + 1)
            agreed = self._strategy.agree(self._want)
            for training in self._trainings:
                if training.reached == self._done:
                    training.advance(rows[training.place], self.bar)
            self._done += 1
            self.bar.update(self._config.batch_size)
            wanted, rows = agreed(), following
            if wanted >= _SAVE:
                self._save()
                self._saved_at = time.monotonic()
        return wanted

    def end(self, wanted: int) -> None:
        """Raises Interrupted after a signal, LlmWsaeError if the rows of a process failed."""
        out, size = self._trainings[0].out, self._config.batch_size
        where = out if len(self._trainings) == 1 else out.parent
        progress = f"stopped after step {self._done} of {self._num_steps}"
        if wanted == _FAIL:
            if self._done:
                for training in self._trainings:
                    self._processes.lead(training.save_dictionaries)
            if self._failure is None:
                self._processes.meet()  # raises the sentence of the process that failed
            assert self._failure is not None
            if not self._done:
                raise self._failure
            raise LlmWsaeError(
                f"{self._failure} ({progress}, {self._done * size:,} of "
                f"{self._num_steps * size:,} rows; the dictionaries so far are in {where}, and the "
                "same command goes on from there)"
            ) from self._failure
        if wanted == _STOP:
            raise Interrupted(
                f"{progress}, saved in {where}; run the same command again to resume",
                self.stopped[0] if self.stopped else signal.SIGTERM,  # that of another process
            )
        if self._strategy.latent_parts > 1:
            self._save()  # from which rank 0 takes the latents of all

    def close(self) -> None:
        """End a thread that reads ahead."""
        if (close := getattr(self._rows, "close", None)) is not None:
            close()

    def _fetch(self, step: int) -> tuple[Tensor, ...]:
        """The rows of a step, of each site; nothing if there is no such step, or on a failure."""
        if step >= self._num_steps:
            return ()
        try:
            rows = next(self._rows)
            return rows if isinstance(rows, tuple) else (rows,)
        except LlmWsaeError as error:
            self._failure = error
        except Exception:  # whatever it is, what was trained is kept
            if self._done and self._processes.size == 1:  # others would not come to save
                self._save()
            raise
        return ()

    def _want(self) -> int:
        if self._failure is not None:
            return _FAIL
        if self.stopped:
            return _STOP
        due = time.monotonic() - self._saved_at > self._config.checkpoint_seconds
        return _SAVE if due and self._processes.leads else _CONTINUE

    def _save(self) -> None:
        for training in self._trainings:
            training.save()


def _load(folder: Path) -> Dictionary:
    """The dictionary of a finished training. Raises LlmWsaeError if it is not there any more."""
    try:
        return Dictionary.load(folder)
    except LlmWsaeError as error:
        if folder.is_dir():
            raise
        raise LlmWsaeError(
            f"{error}; to train it again, delete {training_in(folder.parent).path} and {LOG} "
            "beside it, and run the same command again"
        ) from error


def check_arms(arms: Sequence[ArmConfig], d_in: int, config: TrainConfig) -> None:
    """Raise UsageError if there are none, two of the same name, or one that cannot be trained so.

    No weights are looked at, so this can be asked before they are measured.
    """
    names = [arm.name for arm in arms]
    if not arms:
        raise UsageError(
            "there is nothing to train: give at least one rule or weights file, one k or L1 "
            "coefficient, and one seed"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the arms must be different, but {twice[0]} is listed twice")
    for arm in arms:
        arm.check(config.expansion * d_in)
        arm.lengths(config.lengths)


def check_room(widths: Sequence[int], config: TrainConfig, parts: int = 1) -> None:
    """Raises UsageError if arms for rows of these widths, one for each, need more memory together
    than the device has; ``parts`` devices share the latents."""
    needed = sum(config.expansion * d_in**2 for d_in in widths) * PAIR_BYTES // parts
    check_memory(
        needed,
        choose_device(config.device),
        f"training {sum(config.expansion * d_in for d_in in widths):,} latents",
        "lower the expansion, or train fewer dictionaries at once",
    )


def check_out(out: Path) -> None:
    """Raises LlmWsaeError, before any folder is made, for one that holds something else."""
    training_in(out).check_place(*NAMES)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are collected here, so that no step is cut short; a second one interrupts.

    Outside the main thread, where signals cannot be caught, the list stays empty.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
