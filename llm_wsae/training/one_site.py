"""The training of one site, step by step: its arms, its checkpoint, its log, its dictionaries."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llm_wsae.artifact.artifact import FileRecord
from llm_wsae.artifact.files import remove_partials
from llm_wsae.data.manifest import MANIFEST
from llm_wsae.data.shuffling import ActivationSource
from llm_wsae.dictionary.folder import INFO, WEIGHTS, check_replaceable, weights_checksum
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine.number_format import fast_dtype, name_of
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.checkpoint import (
    CHECKPOINT,
    Reached,
    is_finished,
    load_checkpoint,
    load_learnt,
    recorded,
    save_checkpoint,
    training_in,
)
from llm_wsae.training.config import (
    PROCEDURAL,
    RATE,
    SHARED_RATE,
    TrainConfig,
    default_learning_rate,
    learning_rate_factor,
)
from llm_wsae.training.export import dictionary_of
from llm_wsae.training.log import LOG, TrainingLog
from llm_wsae.training.normaliser import Normaliser, Space, in_spaces
from llm_wsae.training.parallel.strategy import SINGLE, Strategy

MAX_DEAD_AFTER = 10_000_000
NAMES = (LOG, CHECKPOINT, MANIFEST, INFO)
"""What a folder without a training must not hold."""
_BY_OTHER_NAMES = ("tokens", "lengths", "shuffle_seed")  # in the record: num_steps, by arm, seed


class Training:
    """Several arms on the batches of one source."""

    def __init__(
        self,
        source: ActivationSource,
        arms: Sequence[ArmConfig],
        config: TrainConfig,
        out: Path,
        device: torch.device,
        strategy: Strategy = SINGLE,
        place: int = 0,
    ):
        """``place`` says which rows of a batch of several sites are its own."""
        self.source, self.config, self.out = source, config, out
        self.strategy, self.processes, self.place = strategy, strategy.processes, place
        self.num_steps = _num_steps(source, config)
        d_in, d_sae = source.d_in, config.expansion * source.d_in
        for arm in arms:
            arm.check(d_sae)
            arm.weights.check_for(d_in)
        dtype = self.processes.lead(lambda: self._dtype(device))
        self.statistics = source.statistics()
        self.statistics.check_varying()
        self.normaliser = Normaliser(self.statistics, device, getattr(torch, dtype), strategy)
        rows = self.num_steps * config.batch_size
        dead_after = config.dead_after or min(MAX_DEAD_AFTER, rows // 10)
        self.dead_after = max(dead_after, config.batch_size)  # what fired a step ago is not dead
        usual = config.learning_rate or default_learning_rate(d_sae)
        self.learning_rates = {
            arm.name: config.learning_rate or usual * arm.rate(config.lengths) for arm in arms
        }
        left_out = (*PROCEDURAL, *_BY_OTHER_NAMES)
        self._settings = {k: v for k, v in asdict(config).items() if k not in left_out} | {
            "num_steps": self.num_steps,
            "d_in": d_in,
            "d_sae": d_sae,
            RATE: usual,
            "dead_after": self.dead_after,
            "seed": config.shuffle_seed,
            "dtype": dtype,
        }
        self.identity: dict[str, Any] = {
            "rows": source.identity(),
            "arms": {
                arm.name: arm.identity(config.lengths)
                | ({RATE: own} if (own := self.learning_rates[arm.name]) != usual else {})
                for arm in arms
            },
            **self._settings,
        }
        self.arms: list[Arm] = []
        """None of a training that is finished: its dictionaries are read."""
        for arm in [] if is_finished(out) else arms:
            space = Space.of(arm.weights, device, [one.space for one in self.arms])
            self.arms.append(Arm(arm, d_in, d_sae, device, space, strategy, config.lengths))
        self.reached = 0
        """Steps that are done."""
        self.last_numbers: dict[str, dict[str, float]] = {}
        self._log: TrainingLog | None = None

    def is_finished(self) -> bool:
        """Begin or resume; whether nothing is left to do. Raises LlmWsaeError if the folder holds
        another training."""
        remove_partials(self.out)
        record = training_in(self.out).begin(self.identity, *NAMES)
        if record.complete:
            (self.out / CHECKPOINT).unlink(missing_ok=True)  # of a run killed at the very end
        return record.complete

    def begin(self) -> None:
        """Take up the checkpoint, if there is one, and open the log."""
        if self.processes.leads:
            for arm in self.arms:  # rather than when all is trained
                check_replaceable(self.out / arm.config.name)
        reached = load_checkpoint(self.out, self.arms, self.processes)
        self.reached, self.last_numbers = reached.step, reached.numbers
        if self.processes.leads:
            self._log = TrainingLog(self.out, self.reached, self.config.tracker, reached.log)

    def advance(self, rows: torch.Tensor, bar: tqdm) -> None:
        """The next step, on a batch of rows; its numbers are logged when that is due."""
        self.step(self.reached, rows)
        self.reached += 1
        if self.reached % self.config.log_every == 0 or self.reached == self.num_steps:
            self.read_numbers(self.reached)
            if self._log is not None:
                self._write_log(self._log, bar)

    def step(self, step: int, rows: torch.Tensor) -> None:
        """Step number ``step`` of every arm, on a batch of rows."""
        config = self.config
        batch = self.normaliser.batch(rows)
        factor = learning_rate_factor(step, self.num_steps, config.warmup, config.decay)
        own_batches = in_spaces(batch, [arm.space for arm in self.arms])
        for arm, own in zip(self.arms, own_batches, strict=True):
            arm.anneal(step / self.num_steps)
            rows_seen = (step + 1) * config.batch_size
            rate = self.learning_rates[arm.config.name] * factor
            arm.step(own, rows_seen, rate, config.aux_coefficient, self.dead_after)

    def read_numbers(self, step: int) -> None:
        """The numbers of every arm since the last call; waits until the device has them."""
        rows = step * self.config.batch_size
        variance = self.normaliser.variance / self.normaliser.scale**2
        self.last_numbers = {
            arm.config.name: arm.read_progress(rows, self.dead_after, variance) for arm in self.arms
        }
        for name, numbers in self.last_numbers.items():
            if not math.isfinite(numbers["loss"]):
                raise _not_finite(f"the loss of {name} is {numbers['loss']} at step {step}")

    def save(self) -> None:
        """A checkpoint of the step that was reached."""
        if self._log is not None:
            self._log.sync()
        written = None if self._log is None else self._log.written
        reached = Reached(self.reached, self.last_numbers, written)
        save_checkpoint(self.out, self.arms, reached, self.strategy)

    def finish(self) -> None:
        """Save the dictionaries, then the record that they are complete. Rank 0 does it."""
        self.save_dictionaries()
        assert self._log is not None
        training = training_in(self.out)
        record = training.read()
        record.files[LOG] = self._log.written
        for arm in self.arms:
            folder = self.out / arm.config.name
            size = (folder / WEIGHTS).stat().st_size
            record.files[f"{folder.name}/{WEIGHTS}"] = FileRecord(size, weights_checksum(folder))
        training.finish(record)
        (self.out / CHECKPOINT).unlink(missing_ok=True)

    def save_dictionaries(self) -> None:
        """The dictionaries as they are now; of an unfinished training they say after how many
        steps. Rank 0 does it, after a checkpoint."""
        settings = {**self._settings, SHARED_RATE: self._settings[RATE]}
        if self.reached < self.num_steps:
            settings["step"] = self.reached
        for arm in self.arms:
            name, whole = arm.config.name, len(arm.own_latents) == arm.d_sae
            dictionary = dictionary_of(
                arm,
                self.source,
                self.statistics,
                self.normaliser,
                self.last_numbers.get(name, {}),
                {**settings, RATE: self.learning_rates[name]},
                arm.learnt if whole else load_learnt(self.out, arm),
            )
            if not all(bool(p.isfinite().all()) for p in dictionary.state_dict().values()):
                # in latents that never fire, which the loss does not show
                raise _not_finite(f"{name} has weights that are not finite")
            dictionary.save(self.out / name)

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()

    def _dtype(self, device: torch.device) -> str:
        """The number format of the products; a training goes on in that in which it was begun."""
        if self.config.dtype != "auto":
            return self.config.dtype
        began = recorded(self.out) or {}
        return name_of(fast_dtype(device, "encoder", began.get("dtype")))

    def _write_log(self, log: TrainingLog, bar: tqdm) -> None:
        numbers, size, step = self.last_numbers, self.config.batch_size, self.reached
        done, elapsed = step * size - bar.initial, bar.format_dict["elapsed"]
        speed = done / elapsed if elapsed else 0.0
        left = (self.num_steps - step) * size / speed if speed else 0.0
        log.write(step, step * size, numbers, tokens_per_second=speed, seconds_left=left)
        first = next(iter(numbers.values()))
        bar.set_postfix_str(
            f"loss {first['loss']:.3g} FVU {first['fvu']:.3f} L0 {first['l0']:.0f} "
            f"dead {first['dead']:.1%}"
            + (f" (first of {len(numbers)})" if len(numbers) > 1 else "")
        )


def _num_steps(source: ActivationSource, config: TrainConfig) -> int:
    tokens = config.tokens if config.tokens is not None else source.num_rows
    if tokens is None:
        raise UsageError("a stream has no end: set the number of tokens to train on")
    if tokens < config.batch_size:
        raise UsageError(
            f"{tokens} rows are fewer than one batch of {config.batch_size}; "
            "harvest more tokens or lower the batch size"
        )
    return tokens // config.batch_size


def _not_finite(what: str) -> LlmWsaeError:
    return LlmWsaeError(
        f"{what}; lower the learning rate (of llm-wsae train) and start again in another folder"
    )
