"""Several dictionaries in one pass over the same batches.

Reading and normalising a batch is shared, so each further arm costs only its own step, and the
arms differ in nothing but what their configuration says: same rows, same order, same schedule.
"""

import dataclasses
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

from llm_wsae.data.batches import ActivationSource
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.files import folder_lock, read_json, remove_partials, write_json
from llm_wsae.hardware import choose_device, fast_dtype
from llm_wsae.record import command_line, versions
from llm_wsae.train.arm import Arm, ArmConfig, Workspace, folded
from llm_wsae.train.checkpoint import (
    CHECKPOINT,
    check_identity,
    load_checkpoint,
    save_checkpoint,
)
from llm_wsae.train.config import TrainConfig, default_learning_rate, learning_rate_factor
from llm_wsae.train.log import TrainingLog
from llm_wsae.train.normaliser import Normaliser, Spaces, in_spaces

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
    out = Path(out)
    training = _Training(source, arms, config, out)  # first: a refused request leaves no folder
    with folder_lock(out, "training"):
        remove_partials(out)
        if (out / FINISHED).exists():
            check_identity(out, read_json(out / FINISHED, "training record"), training.identity)
        else:
            training.run()
            training.save()
            write_json(out / FINISHED, training.identity)
            (out / CHECKPOINT).unlink(missing_ok=True)
        return {name: Dictionary.load(out / name) for name in names}


class _Training:
    def __init__(
        self, source: ActivationSource, arms: Sequence[ArmConfig], config: TrainConfig, out: Path
    ):
        self.source, self.config, self.out = source, config, out
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
        self.device = choose_device(config.device)
        fast = fast_dtype(self.device) if config.dtype == "auto" else getattr(torch, config.dtype)
        self.statistics = source.statistics()
        self.normaliser = Normaliser(self.statistics, self.device, fast)
        self.learning_rate = config.learning_rate or default_learning_rate(d_sae)
        self.dead_after = config.dead_after or min(
            MAX_DEAD_AFTER, self.num_steps * config.batch_size // 10
        )
        workspace, spaces = Workspace(), Spaces(self.device)
        self.arms = [
            Arm(arm, source.d_in, d_sae, self.device, workspace, spaces.of(arm.weights))
            for arm in arms
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
            "seed": config.seed,
            "dtype": str(fast).removeprefix("torch."),
        }

    def run(self) -> None:
        step = load_checkpoint(self.out, self.arms, self.identity)
        log = TrainingLog(self.out, step, self.config.tracker)
        saved_at = time.monotonic()
        batches = self.source.batches(self.config.batch_size, seed=self.config.seed, start=step)
        bar = tqdm(
            total=self.num_steps * self.config.batch_size,
            initial=step * self.config.batch_size,
            desc=f"train {len(self.arms)} arm{'s' * (len(self.arms) > 1)}",
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
        )
        try:
            with _stop_signals() as stopped, bar:
                while step < self.num_steps and not stopped.is_set():
                    self._step(step, next(batches))
                    step += 1
                    bar.update(self.config.batch_size)
                    if step % self.config.log_every == 0 or step == self.num_steps:
                        self._log(log, bar, step)
                    if time.monotonic() - saved_at > self.config.checkpoint_seconds:
                        save_checkpoint(self.out, self.arms, step, self.identity)
                        saved_at = time.monotonic()
            if step < self.num_steps:
                save_checkpoint(self.out, self.arms, step, self.identity)
                raise Interrupted(
                    f"stopped after step {step} of {self.num_steps}, saved in {self.out}; "
                    "run the same command again to go on"
                )
        finally:
            log.close()
            close = getattr(batches, "close", None)
            if close is not None:
                close()  # ends the source's reading thread

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

    def _log(self, log: TrainingLog, bar: tqdm, step: int) -> None:
        rows = step * self.config.batch_size
        variance = self.normaliser.variance / self.normaliser.scale**2
        numbers = {
            arm.config.name: arm.read_progress(rows, self.dead_after, variance) for arm in self.arms
        }
        self.last_numbers = numbers
        for name, arm_numbers in numbers.items():
            if not math.isfinite(arm_numbers["loss"]):
                raise LlmWsaeError(
                    f"the loss of {name} is {arm_numbers['loss']} at step {step}; "
                    "lower --learning-rate and start again in another folder"
                )
        speed = bar.format_dict["rate"] or 0.0
        left = (self.num_steps - step) * self.config.batch_size / speed if speed else 0.0
        log.write(step, rows, numbers, tokens_per_second=speed, seconds_left=left)
        first = next(iter(numbers.values()))
        bar.set_postfix_str(
            f"FVU {first['fvu']:.3f} L0 {first['l0']:.0f} dead {first['dead']:.1%}"
            + (f" (first of {len(numbers)})" if len(numbers) > 1 else "")
        )

    def save(self) -> None:
        for arm in self.arms:
            weights = arm.config.weights
            provenance = self.source.identity()
            info = DictionaryInfo(
                site=str(self.source.site),
                name=arm.config.name,
                rule=weights.rule,
                alpha=weights.alpha,
                weights=dataclasses.asdict(weights.config),
                seed=arm.config.seed,
                context_size=self.statistics.context_size,
                prepend_bos=provenance.get("packing", {}).get("prepend_bos"),
                massive_threshold=self.statistics.massive_threshold,
                model=provenance.get("model", {}),
                corpus=provenance.get("corpus", {}),
                store=provenance,
                metrics={"training": self.last_numbers.get(arm.config.name, {})},
                training={
                    **{k: v for k, v in self.identity.items() if k not in ("rows", "arms")},
                    **arm.config.kind(),
                    "command": command_line(),
                    "versions": versions(),
                },
            )
            threshold = None if arm.threshold is None else arm.threshold.values()
            space = weights.gamma if weights.config.place == "space" else None
            mean, scale = self.normaliser.mean, self.normaliser.scale
            Dictionary(
                **folded(arm.parameters, mean, scale, threshold, space),
                sparsity=arm.config.sparsity,
                info=info,
                extras={
                    "gamma": weights.gamma,
                    "mean": self.statistics.mean.float(),
                    "variance": self.statistics.variance.float(),
                    "robust_variance": self.statistics.robust_variance.float(),
                },
            ).save(self.out / arm.config.name)


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
