"""Several dictionaries in one pass over the same batches.

Reading and normalising a batch is shared, so each further arm costs only its own step, and the
arms differ in nothing but what their configuration says: same rows, same order, same schedule.
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

from llm_wsae.data.shuffling import ActivationSource
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.files import read_json, remove_partials, write_json
from llm_wsae.hardware import choose_device, fast_dtype
from llm_wsae.processes import Processes, join
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.checkpoint import (
    CHECKPOINT,
    Reached,
    check_identity,
    differences,
    load_checkpoint,
    save_checkpoint,
)
from llm_wsae.training.config import TrainConfig, default_learning_rate, learning_rate_factor
from llm_wsae.training.export import dictionary_of
from llm_wsae.training.log import TrainingLog
from llm_wsae.training.normaliser import Normaliser, Spaces, in_spaces
from llm_wsae.training.parallel.group import GO_ON, SAVE, STOP, Team, team_of

FINISHED = "training.json"
MAX_DEAD_AFTER = 10_000_000


class Interrupted(LlmWsaeError):
    """The training was stopped by a signal after saving a checkpoint."""


def train(
    source: ActivationSource, arms: Sequence[ArmConfig], config: TrainConfig, out: Path
) -> dict[str, Dictionary]:
    """Train every arm on the source's rows and save one dictionary folder each under ``out``.

    A run that was stopped or killed goes on from its last checkpoint with the same call, and on the
    CPU ends with the same bits as an unbroken run. A finished one is read back.

    Under ``torchrun`` all processes make the same call and train the same dictionaries together, up
    to the order in which numbers are added up; ``config.shard`` says what they share out. They need
    one folder that all can reach, and a run may go on with more of them or fewer. A source that is
    not a store is read whole by each process.

    Returns the dictionaries by arm name. Raises UsageError for settings that cannot be,
    LlmWsaeError when ``out`` belongs to another training or is being written, and Interrupted
    after Ctrl-C or SIGTERM.
    """
    names = [arm.name for arm in arms]
    if not arms:
        raise UsageError(
            "there is nothing to train: give at least one rule or weights file, one k or L1 "
            "coefficient, and one seed"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the arms must be different, but {twice[0]} is asked for twice")
    out, processes, device = Path(out), join(), choose_device(config.device)
    with processes.together():
        with team_of(processes, device, config.shard) as team:
            # first: a refused request leaves no folder
            training = _Training(source, arms, config, out, device, team)
            _check_agreed(processes, {**training.identity, "shard": config.shard}, "settings")
            with processes.folder_lock(out, "training"):
                if not processes.lead(training.is_finished):
                    training.run()
                    processes.lead(training.finish)
        return {name: Dictionary.load(out / name) for name in names}


def _check_agreed(processes: Processes, mine: dict[str, Any], what: str) -> None:
    """Raise LlmWsaeError, naming each difference, unless all processes have the same."""
    if clauses := differences(processes.lead(lambda: mine), mine):
        raise LlmWsaeError(
            f"process {processes.rank} has other {what} than process 0 ({clauses}); start all with "
            "the same command, on machines of one kind that can reach one folder"
        )
    processes.meet()  # so that none goes on and leaves something


class _Training:
    def __init__(
        self,
        source: ActivationSource,
        arms: Sequence[ArmConfig],
        config: TrainConfig,
        out: Path,
        device: torch.device,
        team: Team,
    ):
        self.source, self.config, self.out, self.team = source, config, out, team
        self.leads = team.processes.leads
        tokens = config.tokens if config.tokens is not None else source.num_rows
        if tokens is None:
            raise UsageError("a stream has no end: say on how many tokens to train")
        self.num_steps = tokens // config.batch_size
        if self.num_steps == 0:
            raise UsageError(
                f"{tokens} rows are less than one batch of {config.batch_size}; "
                "harvest more tokens or lower the batch size"
            )
        d_sae = config.expansion * source.d_in
        for arm in arms:
            arm.check(d_sae)
        fast = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
        self.statistics = source.statistics()
        self.normaliser = Normaliser(self.statistics, device, fast, team.split)
        self.learning_rate = config.learning_rate or default_learning_rate(d_sae)
        rows = self.num_steps * config.batch_size
        dead_after = config.dead_after or min(MAX_DEAD_AFTER, rows // 10)
        self.dead_after = max(dead_after, config.batch_size)  # what fired a step ago is not dead
        spaces = Spaces(device)
        self.arms = [
            Arm(arm, source.d_in, d_sae, device, spaces.of(arm.weights), team.split) for arm in arms
        ]
        self.last_numbers: dict[str, dict[str, float]] = {}
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
        """Whether nothing is left to do; raises LlmWsaeError if something else was done there."""
        remove_partials(self.out)
        if not (self.out / FINISHED).exists():
            return False
        check_identity(self.out, read_json(self.out / FINISHED, "training record"), self.identity)
        (self.out / CHECKPOINT).unlink(missing_ok=True)  # of a run killed at the very end
        return True

    def run(self) -> None:
        step, self.last_numbers = load_checkpoint(self.out, self.arms, self.identity)
        _check_agreed(self.team.processes, {"step": step}, "checkpoints")
        config, total = self.config, self.num_steps * self.config.batch_size
        log = TrainingLog(self.out, step, config.tracker) if self.leads else None
        batches = self.team.split.batches(self.source, config.batch_size, config.shuffle_seed, step)
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
                wish = GO_ON
                while step < self.num_steps and wish < STOP:
                    rows = next(batches)
                    agreed = self.team.agree(lambda: self._wish(stopped))
                    self._step(step, rows)
                    step += 1
                    bar.update(config.batch_size)
                    if step % config.log_every == 0 or step == self.num_steps:
                        self._read_numbers(step)
                        if log is not None:
                            self._log(log, bar, step)
                    wish = agreed()
                    if wish >= SAVE:
                        self._save(step)
            if step < self.num_steps:
                raise Interrupted(
                    f"stopped after step {step} of {self.num_steps}, saved in {self.out}; "
                    "run the same command again to go on"
                )
            if self.team.split.latent_parts > 1:
                self._save(step)  # where rank 0 finds all latents
        finally:
            if log is not None:
                log.close()
            close = getattr(batches, "close", None)
            if close is not None:
                close()  # ends the source's reading thread

    def _wish(self, stopped: threading.Event) -> int:
        if stopped.is_set():
            return STOP
        due = time.monotonic() - self.saved_at > self.config.checkpoint_seconds
        return SAVE if due and self.leads else GO_ON

    def _save(self, step: int) -> None:
        reached = Reached(step, self.last_numbers)
        save_checkpoint(self.out, self.arms, reached, self.identity, self.team)
        self.saved_at = time.monotonic()

    def _step(self, step: int, rows: torch.Tensor) -> None:
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

    def _read_numbers(self, step: int) -> None:
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
        """Save the dictionaries and tell that they are whole. Rank 0 does it."""
        settings = {k: v for k, v in self.identity.items() if k not in ("rows", "arms")}
        for arm in self.arms:
            name = arm.config.name
            dictionary = dictionary_of(
                self._whole(arm),
                self.source,
                self.statistics,
                self.normaliser,
                self.last_numbers.get(name, {}),
                settings,
            )
            if not all(bool(p.isfinite().all()) for p in dictionary.state_dict().values()):
                # of latents that never fire: the loss does not tell
                raise LlmWsaeError(
                    f"{name} has weights that are not finite; lower the learning rate (of llm-wsae "
                    "train) and start again in another folder"
                )
            dictionary.save(self.out / name)
        write_json(self.out / FINISHED, self.identity)
        (self.out / CHECKPOINT).unlink(missing_ok=True)

    def _whole(self, arm: Arm) -> Arm:
        """The arm with the latents of all processes, which have just saved them."""
        if len(arm.own_latents) == arm.d_sae:
            return arm
        whole = Arm(arm.config, self.source.d_in, arm.d_sae, torch.device("cpu"))
        load_checkpoint(self.out, [whole], self.identity)
        return whole


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that a step is never torn; a second one interrupts.

    Outside the main thread, where signals cannot be caught, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
