"""Several dictionaries in one pass over the same batches.

Reading and normalising a batch is shared, so each further arm costs only its own step, and the
arms differ only in their configuration: same rows, same order, same schedule. Several sites of a
stream also share the forward pass; each of them is a ``Training`` of its own.
"""

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from llm_wsae.data.shuffling import ActivationSource, JointSource, SharedSource
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
from llm_wsae.training.parallel.group import (
    CONTINUE,
    FAIL,
    SAVE,
    STOP,
    ProcessGroup,
    process_group,
)


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
    folder that all can reach, and a run may be resumed with another number of processes. Of a
    source that is not a ``SharedSource``, each process reads all rows.

    Returns the dictionaries by arm name. Raises UsageError for impossible settings, LlmWsaeError
    when ``out`` belongs to another training or is being written, and Interrupted after Ctrl-C or
    SIGTERM. When the source fails, in whichever process, a checkpoint and the dictionaries as they
    are then are saved first.
    """
    out = Path(out)
    job = _Job(source, arms, out)

    def batches(start: int, part: tuple[int, int]) -> Generator[tuple[Tensor, ...], None, None]:
        number, parts = part
        wanted = (config.batch_size, config.shuffle_seed, start)
        if isinstance(source, SharedSource):
            own = source.batches_of_part(*wanted, part)
        elif parts == 1:
            own = source.batches(*wanted)
        else:
            own = (batch.tensor_split(parts)[number] for batch in source.batches(*wanted))
        with _closing(own):
            for batch in own:
                yield (batch,)

    return _train([job], batches, config, out)[0]


def train_sites(
    source: JointSource,
    arms: Mapping[Site, Sequence[ArmConfig]],
    config: TrainConfig,
    out: Path,
) -> dict[Site, dict[str, Dictionary]]:
    """Train the arms of several sites in step, on rows that are computed together.

    Each site has its own folder under ``out``, named after it, as ``train`` would fill it.
    Everything else is as for ``train``.
    """
    if unknown := [str(site) for site in arms if site not in source.sites]:
        raise UsageError(
            f"the rows that are computed are of {', '.join(map(str, source.sites))}, not of "
            f"{', '.join(unknown)}"
        )
    jobs = [_Job(source.source(site), own, Path(out) / str(site)) for site, own in arms.items()]
    places = [source.sites.index(site) for site in arms]

    def batches(start: int, part: tuple[int, int]) -> Generator[tuple[Tensor, ...], None, None]:
        every = source.batches(config.batch_size, config.shuffle_seed, start, part)
        with _closing(every):
            for rows in every:
                yield tuple(rows[place] for place in places)

    return dict(zip(arms, _train(jobs, batches, config, Path(out)), strict=True))


class _Job(NamedTuple):
    """What is asked of one site."""

    source: ActivationSource
    arms: Sequence[ArmConfig]
    out: Path


_Batches = Callable[[int, tuple[int, int]], Generator[tuple[Tensor, ...], None, None]]
"""From (number of the first batch, part of the rows): of every batch, the rows of each site."""


def _train(
    jobs: Sequence[_Job], batches: _Batches, config: TrainConfig, out: Path
) -> list[dict[str, Dictionary]]:
    for job in jobs:
        check_arms(job.arms, job.source.d_in, config)
        check_out(job.out)
    processes, device = join(), choose_device(config.device)
    with processes.together():
        with process_group(processes, device, config.shard) as group:
            # before the lock: a refused request leaves no folder
            unfinished = [job for job in jobs if not is_finished(job.out)]
            widths = [job.source.d_in for job in unfinished for _ in job.arms]
            check_room(widths, config, group.strategy.latent_parts)
            trainings = [Training(*job[:2], config, job.out, device, group) for job in jobs]
            for training in trainings:
                settings = {**training.identity, "shard": config.shard}
                processes.check_agreed(settings, "settings")
            with ExitStack() as locks:
                for job in jobs:
                    locks.enter_context(processes.folder_lock(job.out, "training"))
                done = processes.lead(lambda: [t.is_finished() for t in trainings])
                missing = {i: t for i, t in enumerate(trainings) if not done[i]}
                if missing:
                    return_freed_memory()  # by the stages before, for the rows
                    _run(missing, batches, config, group, out)
                    for training in missing.values():
                        processes.lead(training.finish)
                    return_freed_memory()
        return [{arm.name: _load(job.out / arm.name) for arm in job.arms} for job in jobs]


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


def _run(
    numbered: Mapping[int, Training],
    batches: _Batches,
    config: TrainConfig,
    group: ProcessGroup,
    out: Path,
) -> None:
    """All steps of the sites with these numbers, from their checkpoints on. A site whose checkpoint
    is newer than that of another waits for it."""
    with ExitStack() as opened:
        for training in numbered.values():
            opened.callback(training.close)
            training.begin()
            group.processes.check_agreed({"step": training.reached}, "checkpoints")
        _take_steps(numbered, batches, config, group, out)


def _take_steps(
    numbered: Mapping[int, Training],
    batches: _Batches,
    config: TrainConfig,
    group: ProcessGroup,
    out: Path,
) -> None:
    """From where they stand to the end, or to a signal."""
    trainings = list(numbered.values())
    step = min(training.reached for training in trainings)
    num_steps, arms = trainings[0].num_steps, sum(len(training.arms) for training in trainings)
    bar = tqdm(
        total=num_steps * config.batch_size,
        initial=step * config.batch_size,
        desc=f"train {arms} arm{'s' * (arms > 1)}",
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not group.processes.leads,
    )

    def save() -> None:
        for training in trainings:
            training.save()

    rows_of_all = batches(step, group.strategy.row_part)
    failure: LlmWsaeError | None = None  # of the rows of the next step
    saved_at = time.monotonic()
    try:
        with _stop_signals() as stopped, bar:

            def want() -> int:
                if failure is not None:
                    return FAIL
                if stopped:
                    return STOP
                due = time.monotonic() - saved_at > config.checkpoint_seconds
                return SAVE if due and group.processes.leads else CONTINUE

            def fetch() -> tuple[Tensor, ...]:
                nonlocal failure
                try:
                    return next(rows_of_all)
                except LlmWsaeError as error:
                    failure = error
                except Exception:  # whatever it is, what was trained is kept
                    if step and group.processes.size == 1:  # others would not come to save
                        save()
                    raise
                return ()

            rows = fetch() if step < num_steps else ()
            wanted = group.agree(lambda: CONTINUE if failure is None else FAIL)()
            while step < num_steps and wanted < STOP:
                # before this step, so that no process begins one that another cannot take
                following = fetch() if step + 1 < num_steps else ()
                agreed = group.agree(want)
                for number, training in numbered.items():
                    if training.reached == step:
                        training.advance(rows[number], bar)
                step += 1
                bar.update(config.batch_size)
                wanted, rows = agreed(), following
                if wanted >= SAVE:
                    save()
                    saved_at = time.monotonic()
        if wanted == FAIL:
            if step:
                for training in trainings:
                    group.processes.lead(training.save_dictionaries)
            if failure is None:
                group.processes.meet()  # raises the sentence of the process that failed
            assert failure is not None
            if not step:
                raise failure
            size = config.batch_size
            raise LlmWsaeError(
                f"{failure} (stopped after step {step} of {num_steps}, {step * size:,} of "
                f"{num_steps * size:,} rows; the dictionaries so far are in {out}, and the same "
                "command goes on from there)"
            ) from failure
        if wanted == STOP:
            raise Interrupted(
                f"stopped after step {step} of {num_steps}, saved in {out}; "
                "run the same command again to resume",
                stopped[0] if stopped else signal.SIGTERM,  # that of another process
            )
        if group.strategy.latent_parts > 1:
            save()  # from which rank 0 takes the latents of all
    finally:
        rows_of_all.close()


@contextmanager
def _closing(batches: Iterator[Any]) -> Iterator[None]:
    """End the thread that reads ahead of these batches, if there is one."""
    try:
        yield
    finally:
        if (close := getattr(batches, "close", None)) is not None:
            close()


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
