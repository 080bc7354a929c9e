"""The training of one site, step by step: its arms, its checkpoint, its log, its dictionaries."""

import math
from collections.abc import Sequence
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
from llm_wsae.training.arm import Arm, ArmConfig, Learnt
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
    RATE,
    SHARED_RATE,
    TrainConfig,
    default_learning_rate,
    learning_rate_factor,
)
from llm_wsae.training.export import dictionary_of
from llm_wsae.training.log import LOG, TrainingLog
from llm_wsae.training.normaliser import Normaliser, Spaces, in_spaces
from llm_wsae.training.parallel.group import ProcessGroup

MAX_DEAD_AFTER = 10_000_000
NAMES = (LOG, CHECKPOINT, MANIFEST, INFO)
"""What a folder without a training must not hold."""


class Training:
    """Several arms on the batches of one source."""

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
            arm.weights.check_for(source.d_in)
        began = group.processes.lead(lambda: recorded(out))  # it goes on as it was begun
        dtype = config.dtype
        if dtype == "auto":
            kept = None if began is None else began.get("dtype")
            dtype = group.processes.lead(lambda: name_of(fast_dtype(device, "encoder", kept)))
        fast = getattr(torch, dtype)
        self.statistics = source.statistics()
        self.statistics.check_varying()
        self.normaliser = Normaliser(self.statistics, device, fast, group.strategy)
        rows = self.num_steps * config.batch_size
        dead_after = config.dead_after or min(MAX_DEAD_AFTER, rows // 10)
        self.dead_after = max(dead_after, config.batch_size)  # what fired a step ago is not dead
        self.lengths = config.lengths
        usual = config.learning_rate or default_learning_rate(d_sae)
        self.learning_rates = {
            arm.name: config.learning_rate or usual * arm.rate(self.lengths) for arm in arms
        }
        others = {name: rate for name, rate in self.learning_rates.items() if rate != usual}
        spaces, finished = Spaces(device), is_finished(out)
        self.arms = [
            Arm(
                arm,
                source.d_in,
                d_sae,
                device,
                spaces.of(arm.weights),
                group.strategy,
                self.lengths,
            )
            for arm in ([] if finished else arms)
        ]
        """None of a training that is finished: its dictionaries are read."""
        self.reached = 0
        """Steps that are done."""
        self.last_numbers: dict[str, dict[str, float]] = {}
        self.log: TrainingLog | None = None
        self.identity: dict[str, Any] = {
            "rows": source.identity(),
            "arms": {
                arm.name: arm.identity(self.lengths)
                | ({RATE: others[arm.name]} if arm.name in others else {})
                for arm in arms
            },
            "num_steps": self.num_steps,
            "batch_size": config.batch_size,
            "d_in": source.d_in,
            "d_sae": d_sae,
            RATE: usual,
            "warmup": config.warmup,
            "decay": config.decay,
            "aux_coefficient": config.aux_coefficient,
            "dead_after": self.dead_after,
            "seed": config.shuffle_seed,
            "dtype": dtype,
        }

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
        if self.leads:
            for arm in self.arms:  # rather than when all is trained
                check_replaceable(self.out / arm.config.name)
        reached = load_checkpoint(self.out, self.arms, self.group.processes)
        self.reached, self.last_numbers = reached.step, reached.numbers
        if self.leads:
            self.log = TrainingLog(self.out, self.reached, self.config.tracker, reached.log)

    def advance(self, rows: torch.Tensor, bar: tqdm) -> None:
        """The next step, on a batch of rows; its numbers are logged when that is due."""
        self.step(self.reached, rows)
        self.reached += 1
        if self.reached % self.config.log_every == 0 or self.reached == self.num_steps:
            self.read_numbers(self.reached)
            if self.log is not None:
                self._log(self.log, bar)

    def save(self) -> None:
        """A checkpoint of the step that was reached."""
        if self.log is not None:
            self.log.sync()
        reached = Reached(self.reached, self.last_numbers, self._logged())
        save_checkpoint(self.out, self.arms, reached, self.group)

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def _logged(self) -> FileRecord | None:
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
                self.learning_rates[arm.config.name] * factor,
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

    def _log(self, log: TrainingLog, bar: tqdm) -> None:
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

    def finish(self) -> None:
        """Save the dictionaries, then the record that they are complete. Rank 0 does it."""
        self.save_dictionaries()
        logged = self._logged()
        assert logged is not None
        training = training_in(self.out)
        record = training.read()
        record.files[LOG] = logged
        for arm in self.arms:
            folder = self.out / arm.config.name
            size = (folder / WEIGHTS).stat().st_size
            record.files[f"{folder.name}/{WEIGHTS}"] = FileRecord(size, weights_checksum(folder))
        training.finish(record)
        (self.out / CHECKPOINT).unlink(missing_ok=True)

    def save_dictionaries(self) -> None:
        """The dictionaries as they are now; of an unfinished training they say after how many
        steps. Rank 0 does it, after a checkpoint."""
        settings = {k: v for k, v in self.identity.items() if k not in ("rows", "arms")}
        if self.reached < self.num_steps:
            settings["step"] = self.reached
        for arm in self.arms:
            name = arm.config.name
            dictionary = dictionary_of(
                arm,
                self.source,
                self.statistics,
                self.normaliser,
                self.last_numbers.get(name, {}),
                settings | {SHARED_RATE: settings[RATE], RATE: self.learning_rates[name]},
                self._learnt(arm),
            )
            if not all(bool(p.isfinite().all()) for p in dictionary.state_dict().values()):
                # in latents that never fire, which the loss does not show
                raise LlmWsaeError(
                    f"{name} has weights that are not finite; lower the learning rate (of llm-wsae "
                    "train) and start again in another folder"
                )
            dictionary.save(self.out / name)

    def _learnt(self, arm: Arm) -> Learnt:
        """With the latents of all processes, which have just saved them."""
        whole = len(arm.own_latents) == arm.d_sae
        return arm.learnt if whole else load_learnt(self.out, arm)
