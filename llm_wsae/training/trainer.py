"""Several dictionaries in one pass over the same batches.

Reading and normalising a batch is shared, so each further arm costs only its own step, and the
arms differ only in their configuration: same rows, same order, same schedule.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llm_wsae.data.manifest import MANIFEST
from llm_wsae.data.shuffling import ActivationSource, SharedSource
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import INFO, check_replaceable
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.files import remove_partials, write_json
from llm_wsae.hardware import check_memory, choose_device, fast_dtype
from llm_wsae.outputs import check_file, check_folder
from llm_wsae.processes import Processes, join
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.checkpoint import (
    CHECKPOINT,
    FINISHED,
    Reached,
    check_identity,
    differences,
    load_checkpoint,
    load_just_saved,
    read_finished,
    save_checkpoint,
)
from llm_wsae.training.config import TrainConfig, default_learning_rate, learning_rate_factor
from llm_wsae.training.export import dictionary_of
from llm_wsae.training.log import LOG, TrainingLog, Written, is_log
from llm_wsae.training.normaliser import Normaliser, Spaces, in_spaces
from llm_wsae.training.parallel.group import CONTINUE, SAVE, STOP, ProcessGroup, process_group

MAX_DEAD_AFTER = 10_000_000


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
    source that is not a store, each process reads all rows.

    Returns the dictionaries by arm name. Raises UsageError for impossible settings, LlmWsaeError
    when ``out`` belongs to another training or is being written, and Interrupted after Ctrl-C or
    SIGTERM.
    """
    names = [arm.name for arm in arms]
    if not arms:
        raise UsageError(
            "there is nothing to train: give at least one rule or weights file, one k or L1 "
            "coefficient, and one seed"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the arms must be different, but {twice[0]} is listed twice")
    out, processes, device = Path(out), join(), choose_device(config.device)
    _check_out(out)
    with processes.together():
        with process_group(processes, device, config.shard) as group:
            # before the lock: a refused request leaves no folder
            training = Training(source, arms, config, out, device, group)
            _check_agreed(processes, {**training.identity, "shard": config.shard}, "settings")
            with processes.folder_lock(out, "training"):
                if not processes.lead(training.is_finished):
                    training.run()
                    processes.lead(training.finish)
        return {name: Dictionary.load(out / name) for name in names}


def _check_out(out: Path) -> None:
    """Raises LlmWsaeError, before any folder is made, for one that holds something else."""
    check_folder(out)
    ours = (out / CHECKPOINT).exists() or (out / FINISHED).exists()
    check_file(out / LOG, lambda path: ours or is_log(path))  # if ours is damaged, that is said
    for name, what in ((MANIFEST, "an activation store"), (INFO, "a dictionary")):
        if (out / name).is_file():
            raise LlmWsaeError(f"{out} is {what}; choose another folder for the training")


def _check_agreed(processes: Processes, mine: dict[str, Any], what: str) -> None:
    """Raise LlmWsaeError, naming each difference, unless all processes have the same."""
    if clauses := differences(processes.lead(lambda: mine), mine):
        raise LlmWsaeError(
            f"process {processes.rank} has other {what} than process 0 ({clauses}); start all with "
            "the same command, on machines of one kind that share the output folder"
        )
    processes.meet()  # so that none continues and leaves files behind


class Training:
    """Several arms on the batches of one source: what ``train`` runs, step by step."""

    def __init__(
        self,
        source: ActivationSource,
        arms: Sequence[ArmConfig],
        config: TrainConfig,
        out: Path,
        device: torch.device,
        group: ProcessGroup,
    ):
        self.source, self.config, self.out, self.group = source, config, out, group
        self.leads = group.processes.leads
        tokens = config.tokens if config.tokens is not None else source.num_rows
        if tokens is None:
            raise UsageError("a stream has no end: set the number of tokens to train on")
        self.num_steps = tokens // config.batch_size
        if self.num_steps == 0:
            raise UsageError(
                f"{tokens} rows are fewer than one batch of {config.batch_size}; "
                "harvest more tokens or lower the batch size"
            )
        d_sae = config.expansion * source.d_in
        for arm in arms:
            arm.check(d_sae)
        # two matrices, each with its two moments, in float32
        matrices = len(arms) * 6 * 4 * source.d_in * d_sae // group.strategy.latent_parts
        check_memory(
            matrices,
            device,
            f"{len(arms)} × {d_sae:,} latents in training",
            "lower the expansion, or train fewer of them at once",
        )
        fast = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
        self.statistics = source.statistics()
        self.normaliser = Normaliser(self.statistics, device, fast, group.strategy)
        self.learning_rate = config.learning_rate or default_learning_rate(d_sae)
        rows = self.num_steps * config.batch_size
        dead_after = config.dead_after or min(MAX_DEAD_AFTER, rows // 10)
        self.dead_after = max(dead_after, config.batch_size)  # what fired a step ago is not dead
        spaces = Spaces(device)
        self.arms = [
            Arm(arm, source.d_in, d_sae, device, spaces.of(arm.weights), group.strategy)
            for arm in arms
        ]
        self.last_numbers: dict[str, dict[str, float]] = {}
        self.log: TrainingLog | None = None
        self.identity: dict[str, Any] = {
            "rows": source.identity(),
            "arms": {arm.name: arm.identity() for arm in arms},
            "num_steps": self.num_steps,
            "batch_size": config.batch_size,
            "d_in": source.d_in,
            "d_sae": d_sae,
            "learning_rate": self.learning_rate,
            "warmup": config.warmup,
            "decay": config.decay,
            "aux_coefficient": config.aux_coefficient,
            "dead_after": self.dead_after,
            "seed": config.shuffle_seed,
            "dtype": str(fast).removeprefix("torch."),
        }

    def is_finished(self) -> bool:
        """Whether nothing is left to do. Raises LlmWsaeError if another training was done there."""
        remove_partials(self.out)
        if not (self.out / FINISHED).exists():
            return False
        found, _ = read_finished(self.out)
        check_identity(self.out, found, self.identity)
        (self.out / CHECKPOINT).unlink(missing_ok=True)  # of a run killed at the very end
        return True

    def run(self) -> None:
        if self.leads:
            for arm in self.arms:  # rather than when all is trained
                check_replaceable(self.out / arm.config.name)
        processes = self.group.processes
        reached = load_checkpoint(self.out, self.arms, self.identity, processes)
        step, self.last_numbers = reached.step, reached.numbers
        _check_agreed(processes, {"step": step}, "checkpoints")
        config, total = self.config, self.num_steps * self.config.batch_size
        if self.leads:
            self.log = TrainingLog(self.out, step, config.tracker, reached.log)
        batches = self._batches(step)
        bar = tqdm(
            total=total,
            initial=step * config.batch_size,
            desc=f"train {len(self.arms)} arm{'s' * (len(self.arms) > 1)}",
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not self.leads,
        )
        self.saved_at = time.monotonic()
        try:
            with _stop_signals() as stopped, bar:
                wanted = CONTINUE
                while step < self.num_steps and wanted < STOP:
                    rows = next(batches)
                    agreed = self.group.agree(lambda: self._want(stopped))
                    self.step(step, rows)
                    step += 1
                    bar.update(config.batch_size)
                    if step % config.log_every == 0 or step == self.num_steps:
                        self.read_numbers(step)
                        if self.log is not None:
                            self._log(self.log, bar, step)
                    wanted = agreed()
                    if wanted >= SAVE:
                        self._save(step)
            if step < self.num_steps:
                raise Interrupted(
                    f"stopped after step {step} of {self.num_steps}, saved in {self.out}; "
                    "run the same command again to resume",
                    stopped[0] if stopped else signal.SIGTERM,  # that of another process
                )
            if self.group.strategy.latent_parts > 1:
                self._save(step)  # from which rank 0 takes the latents of all
        finally:
            if self.log is not None:
                self.log.close()
            close = getattr(batches, "close", None)
            if close is not None:
                close()  # ends the source's reading thread

    def _batches(self, start: int) -> Iterator[torch.Tensor]:
        """Of every batch from number ``start`` on, the rows of this process."""
        wanted = (self.config.batch_size, self.config.shuffle_seed, start)
        number, parts = self.group.strategy.row_part
        if parts == 1:
            return self.source.batches(*wanted)
        if isinstance(self.source, SharedSource):
            return self.source.batches_of_part(*wanted, (number, parts))
        return (batch.tensor_split(parts)[number] for batch in self.source.batches(*wanted))

    def _want(self, stopped: list[int]) -> int:
        if stopped:
            return STOP
        due = time.monotonic() - self.saved_at > self.config.checkpoint_seconds
        return SAVE if due and self.leads else CONTINUE

    def _save(self, step: int) -> None:
        reached = Reached(step, self.last_numbers, self._logged())
        save_checkpoint(self.out, self.arms, reached, self.identity, self.group)
        self.saved_at = time.monotonic()

    def _logged(self) -> Written | None:
        return None if self.log is None else self.log.written

    def step(self, step: int, rows: torch.Tensor) -> None:
        """Step number ``step`` of every arm, on a batch of rows."""
        config = self.config
        batch = self.normaliser.batch(rows)
        factor = learning_rate_factor(step, self.num_steps, config.warmup, config.decay)
        own_batches = in_spaces(batch, [arm.space for arm in self.arms])
        for arm, own in zip(self.arms, own_batches, strict=True):
            arm.anneal(step / self.num_steps)
            arm.step(
                own,
                (step + 1) * config.batch_size,
                self.learning_rate * factor,
                config.aux_coefficient,
                self.dead_after,
            )

    def read_numbers(self, step: int) -> None:
        """The numbers of every arm since the last call; waits until the device has them."""
        rows = step * self.config.batch_size
        variance = self.normaliser.variance / self.normaliser.scale**2
        self.last_numbers = {
            arm.config.name: arm.read_progress(rows, self.dead_after, variance) for arm in self.arms
        }
        for name, numbers in self.last_numbers.items():
            if not math.isfinite(numbers["loss"]):
                raise LlmWsaeError(
                    f"the loss of {name} is {numbers['loss']} at step {step}; "
                    "lower the learning rate (of llm-wsae train) and start again in another folder"
                )

    def _log(self, log: TrainingLog, bar: tqdm, step: int) -> None:
        numbers, size = self.last_numbers, self.config.batch_size
        speed = bar.format_dict["rate"] or 0.0
        left = (self.num_steps - step) * size / speed if speed else 0.0
        log.write(step, step * size, numbers, tokens_per_second=speed, seconds_left=left)
        first = next(iter(numbers.values()))
        bar.set_postfix_str(
            f"loss {first['loss']:.3g} FVU {first['fvu']:.3f} L0 {first['l0']:.0f} "
            f"dead {first['dead']:.1%}"
            + (f" (first of {len(numbers)})" if len(numbers) > 1 else "")
        )

    def finish(self) -> None:
        """Save the dictionaries, then the record that they are complete. Rank 0 does it."""
        settings = {k: v for k, v in self.identity.items() if k not in ("rows", "arms")}
        for arm in self.arms:
            name = arm.config.name
            dictionary = dictionary_of(
                self._with_all_latents(arm),
                self.source,
                self.statistics,
                self.normaliser,
                self.last_numbers.get(name, {}),
                settings,
            )
            if not all(bool(p.isfinite().all()) for p in dictionary.state_dict().values()):
                # in latents that never fire, which the loss does not show
                raise LlmWsaeError(
                    f"{name} has weights that are not finite; lower the learning rate (of llm-wsae "
                    "train) and start again in another folder"
                )
            dictionary.save(self.out / name)
        logged = self._logged()
        assert logged is not None
        write_json(self.out / FINISHED, {**self.identity, "log": logged._asdict()})
        (self.out / CHECKPOINT).unlink(missing_ok=True)

    def _with_all_latents(self, arm: Arm) -> Arm:
        """The arm with the latents of all processes, which have just saved them."""
        if len(arm.own_latents) == arm.d_sae:
            return arm
        complete = Arm(arm.config, self.source.d_in, arm.d_sae, torch.device("cpu"))
        load_just_saved(self.out, complete)
        return complete


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
