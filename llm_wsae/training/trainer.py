"""Several dictionaries in one pass over the same batches: each further arm costs only its own step,
and arms differ only in their configuration. Several sites of a stream also share the forward pass;
each of them is a ``Training`` of its own."""

import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.files import remove_partials
from llm_wsae.artifact.provenance import command_line, versions
from llm_wsae.data.rows import ActivationSource, SiteRows, source_of, target_of
from llm_wsae.data.store import MANIFEST
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.folder import INFO, WEIGHTS, check_replaceable
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.machine.hardware import (
    check_memory,
    choose_device,
    fast_dtype,
    name_of,
    return_freed_memory,
)
from llm_wsae.machine.processes import Processes, join, progress
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site, points_of
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.architecture import CPU, Batch
from llm_wsae.training.arm import PAIR_BYTES, Arm, ArmConfig, Pull
from llm_wsae.training.checkpoint import (
    CHECKPOINT,
    LOG,
    Reached,
    TrainingLog,
    is_finished,
    load_checkpoint,
    recorded,
    save_checkpoint,
    training_in,
)
from llm_wsae.training.config import (
    FINISH_RATE,
    PROCEDURAL,
    RATE,
    SHARED_RATE,
    TrainConfig,
    check_skip,
    default_learning_rate,
    learning_rate_factor,
)
from llm_wsae.training.finishing import Finish, Replaced, Text
from llm_wsae.training.normaliser import Normaliser, Space, folded
from llm_wsae.training.strategy import SINGLE, Strategy, strategy_of

_MAX_DEAD_AFTER = 10_000_000
_NAMES = (LOG, CHECKPOINT, MANIFEST, INFO)  # what a folder without a training must not hold
_BY_OTHER_NAMES = ("tokens", "lengths", "shuffle_seed")  # in the record: num_steps, by arm, seed
_CONTINUE, _SAVE, _STOP, _FAIL = range(4)  # what a process may want; the largest one wins


class Interrupted(LlmWsaeError):
    """A signal stopped the training after a checkpoint. The exit code is what a shell reports:
    130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, sentence: str, number: int):
        super().__init__(sentence)
        self.exit_code = 128 + number


def train(
    source: ActivationSource | Tensor | np.ndarray,
    arms: Sequence[ArmConfig],
    config: TrainConfig,
    out: Path,
    model: LanguageModel | None = None,
) -> dict[str, Dictionary]:
    """Train every arm on the source's rows and save one dictionary folder each under ``out``;
    returns the dictionaries by arm name. Rows of one's own, [rows, d_in], are a source, too (see
    ``ArrayRows``). A finish (``TrainConfig.finish``) needs the ``model`` of a store.

    The same call resumes a run that was stopped or killed from its last checkpoint, and on the CPU
    ends with the same bits as an uninterrupted run. A finished run is only loaded. Under
    ``torchrun`` all processes make the same call, with a folder that all can reach.

    Raises UsageError for impossible settings, LlmWsaeError when ``out`` belongs to another training
    or is being written, and Interrupted after Ctrl-C or SIGTERM. When the source fails, a
    checkpoint and the dictionaries as they are then are saved.
    """
    source = source_of(source)
    places = (0, 1) if source.site.is_mlp else (0,)
    return _train([(source, arms, Path(out))], source.batches, config, [places], model)[0]


def train_sites(
    rows: SiteRows,
    arms: Mapping[Site, Sequence[ArmConfig]],
    config: TrainConfig,
    out: Path,
    model: LanguageModel | None = None,
) -> dict[Site, dict[str, Dictionary]]:
    """Train the arms of several sites: of a stream in step, since one forward pass gives the rows
    of all; of a store one after the other. Each site has its own folder under ``out``, named after
    it, as ``train`` would fill it; ``model`` as there."""
    jobs = [(rows.source(site), own, Path(out) / str(site)) for site, own in arms.items()]
    if rows.in_step:
        points = points_of(list(arms))
        batches = functools.partial(rows.batches, points)
        places = [[points.index(point) for point in points_of([site])] for site in arms]
        trained = _train(jobs, batches, config, places, model)
    else:
        trained = [train(source, own, config, folder, model) for source, own, folder in jobs]
    return dict(zip(arms, trained, strict=True))


def check_arms(arms: Sequence[ArmConfig], d_in: int, config: TrainConfig) -> None:
    """Raise UsageError if there are none, two of the same name, or one that cannot be trained so,
    whatever its weights are."""
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
        if (config.skip or config.finish) and not arm.kind.has_one_error:
            asked = "skip" if config.skip else "finish"
            raise UsageError(f"the architecture {arm.architecture} takes no {asked}")


def check_room(widths: Sequence[int], config: TrainConfig, parts: int = 1) -> None:
    """Raises UsageError if arms for rows of these widths, one for each, need more memory together
    than the device has; ``parts`` devices share the latents."""
    needed = sum(config.expansion * d_in**2 for d_in in widths) * PAIR_BYTES // parts
    what = f"training {config.expansion * sum(widths):,} latents"
    way_out = "lower the expansion, or train fewer dictionaries at once"
    check_memory(needed, choose_device(config.device), what, way_out)


def check_out(out: Path) -> None:
    """Raises LlmWsaeError, before any folder is made, for one that holds something else."""
    training_in(out).check_place(*_NAMES)


def origin_of(source: ActivationSource, statistics: Statistics) -> dict[str, Any]:
    """What the info of a dictionary says of the rows it was made from."""
    provenance = source.identity()
    asked = provenance.get("packing", {}).get("prepend_bos")
    return {
        "site": str(source.site),
        "context_size": statistics.context_size,
        # Packing asks for a BOS, which not every tokenizer has; sources of others say no more.
        "prepend_bos": getattr(source, "prepends_bos", asked),
        "massive_threshold": statistics.massive_threshold,
        "model": provenance.get("model", {}),
        "corpus": provenance.get("corpus", {}),
        "store": provenance,
    }


class Training:
    """Several arms on the batches of one source: their steps, checkpoints, log, dictionaries."""

    def __init__(
        self,
        source: ActivationSource,
        arms: Sequence[ArmConfig],
        config: TrainConfig,
        out: Path,
        device: torch.device,
        strategy: Strategy = SINGLE,
        places: Sequence[int] = (0,),
    ):
        """``places`` say which rows of a batch of several sites are its own: what it reads and, for
        transcoders, what it writes."""
        self.source, self.config, self.out = source, config, out
        self.strategy, self.processes, self.places = strategy, strategy.processes, places
        self.num_steps = _num_steps(source, config)
        self.finish_from = self.num_steps - round(config.finish * self.num_steps)
        """The step with which a finish begins."""
        d_in, d_sae = source.d_in, config.expansion * source.d_in
        for arm in arms:
            arm.weights.check_for(d_in)
        dtype = self.processes.lead(lambda: self._dtype(device))
        self.statistics = target_of(source).statistics()
        self.statistics.check_varying()
        read, written = source.statistics(), None
        if source.site.is_mlp:
            read.check_varying()
            written = self.statistics
        fast = getattr(torch, dtype)
        self.normaliser = Normaliser(read, device, fast, strategy, written)
        rows = self.num_steps * config.batch_size
        dead_after = config.dead_after or min(_MAX_DEAD_AFTER, rows // 10)
        self.dead_after = max(dead_after, config.batch_size)  # what fired a step ago is not dead
        usual = config.learning_rate or default_learning_rate(d_sae)
        self.rates = {
            arm.name: config.learning_rate or usual * arm.rate(config.lengths) for arm in arms
        }
        self._settings = asdict(config)
        for name in (*PROCEDURAL, *_BY_OTHER_NAMES):
            del self._settings[name]
        self._settings |= {
            "num_steps": self.num_steps,
            "d_in": d_in,
            "d_sae": d_sae,
            RATE: usual,
            "dead_after": self.dead_after,
            "seed": config.shuffle_seed,
            "dtype": dtype,
        }
        of_arms = {arm.name: arm.identity(config.lengths) for arm in arms}
        for name, rate in self.rates.items():
            if rate != usual:
                of_arms[name][RATE] = rate
        self.identity = {"rows": source.identity(), "arms": of_arms, **self._settings}
        self.arms: list[Arm] = []  # none of a training that is finished: its dictionaries are read
        spaces: dict[int, Space | None] = {}  # arms of the same weights share their rows there
        for arm in [] if is_finished(out) else arms:
            space = spaces.get(id(arm.weights))
            kind = dict(skip=config.skip, is_transcoder=source.site.is_mlp)
            made = Arm(arm, d_in, d_sae, device, space, strategy, config.lengths, **kind)
            spaces[id(arm.weights)] = made.space
            self.arms.append(made)
        self.reached = 0  # steps that are done
        self._numbers: dict[str, dict[str, float]] = {}
        self._log: TrainingLog | None = None

    def is_finished(self) -> bool:
        """Begin or resume; whether nothing is left to do. Raises LlmWsaeError if the folder holds
        another training."""
        remove_partials(self.out)
        complete = training_in(self.out).begin(self.identity, *_NAMES).complete
        if complete:
            (self.out / CHECKPOINT).unlink(missing_ok=True)  # of a run killed at the very end
        return complete

    def begin(self, opened: ExitStack) -> None:
        """Take up the checkpoint, if there is one, and open the log, which ``opened`` closes."""
        if self.processes.leads:
            for arm in self.arms:  # rather than when all is trained
                check_replaceable(self.out / arm.config.name)
        self.reached, self._numbers, written = load_checkpoint(self.out, self.arms, self.processes)
        self.processes.check_agreed({"step": self.reached}, "checkpoints")
        if self.processes.leads:
            self._log = TrainingLog(self.out, self.reached, self.config.tracker, written)
            opened.callback(self._log.close)

    def step(self, rows: Sequence[Tensor]) -> None:
        """A step of every arm, on the rows of a batch at each point of the site."""
        batch, config = self.normaliser.batch(*rows), self.config
        factor = learning_rate_factor(self.reached, self.finish_from, config.warmup, config.decay)
        there = self._enter(batch)
        for arm in self.arms:
            self._step(arm, there[arm.space], factor, config.aux_coefficient)

    def finish_step(self, finish: Finish, text: Text) -> None:
        """A step of every arm in a finish, on the rows of some contexts."""
        site = self.source.site
        rows = [text.rows(point) for point in points_of([site])]
        batch, units = self.normaliser.batch(*rows), self.normaliser.y
        left = self.num_steps - self.reached
        factor = FINISH_RATE * left / (self.num_steps - self.finish_from)
        there, usual = self._enter(batch), batch.mask.bool()
        made = [units.leave(arm.reconstruct(there[arm.space])) for arm in self.arms]
        found = finish.pulls(text, [Replaced(site, own, usual) for own in made])
        for arm, (kl, gradient) in zip(self.arms, found, strict=True):
            pull = Pull(kl.to(batch.x), gradient.to(batch.x) * units.scale)
            self._step(arm, there[arm.space], factor, 0, pull)

    def _enter(self, batch: Batch) -> dict[Space | None, Batch]:
        """A batch in the space of every arm."""
        return {arm.space: arm.space.enter(batch) if arm.space else batch for arm in self.arms}

    def _step(
        self, arm: Arm, batch: Batch, factor: float, aux: float, pull: Pull | None = None
    ) -> None:
        arm.anneal(self.reached / self.num_steps)
        seen, rate = (self.reached + 1) * self.config.batch_size, self.rates[arm.config.name]
        arm.step(batch, seen, rate * factor, aux, self.dead_after, pull)

    def read_numbers(self) -> None:
        """The numbers of every arm since the last call; waits until the device has them."""
        rows = self.reached * self.config.batch_size
        variance = self.normaliser.y.variance / self.normaliser.y.scale**2
        self._numbers = {
            arm.config.name: arm.read_progress(rows, self.dead_after, variance) for arm in self.arms
        }
        for name, numbers in self._numbers.items():
            if not math.isfinite(numbers["loss"]):
                raise _not_finite(f"the loss of {name} is {numbers['loss']} at step {self.reached}")

    def end_step(self, bar: tqdm) -> None:
        """One more is done. If that is due, log the numbers."""
        self.reached += 1
        step, size = self.reached, self.config.batch_size
        if step % self.config.log_every and step != self.num_steps:
            return
        self.read_numbers()
        if self._log is None:
            return
        done, elapsed = step * size - bar.initial, bar.format_dict["elapsed"]
        speed = done / elapsed if elapsed else 0.0
        left = (self.num_steps - step) * size / speed if speed else 0.0
        numbers = self._numbers
        self._log.write(step, step * size, numbers, tokens_per_second=speed, seconds_left=left)
        first = next(iter(numbers.values()))
        bar.set_postfix_str(
            f"loss {first['loss']:.3g} FVU {first['fvu']:.3f} L0 {first['l0']:.0f} "
            f"dead {first['dead']:.1%}" + f" (first of {len(numbers)})" * (len(numbers) > 1)
        )

    def save(self) -> None:
        """A checkpoint of the step that was reached."""
        written = None if self._log is None else self._log.synced()
        reached = Reached(self.reached, self._numbers, written)
        save_checkpoint(self.out, self.arms, reached, self.strategy)

    def finish(self) -> None:
        """Save the dictionaries, then the record that they are complete. Rank 0 does it."""
        self.save_dictionaries()
        weights = [f"{arm.config.name}/{WEIGHTS}" for arm in self.arms]
        training = training_in(self.out)
        training.finish(training.read(), [LOG, *weights])
        (self.out / CHECKPOINT).unlink(missing_ok=True)

    def save_dictionaries(self) -> None:
        """As they are now, of an unfinished training too. Rank 0 does it, after a checkpoint."""
        for arm in self.arms:
            dictionary = self._dictionary(arm)
            if not all(bool(p.isfinite().all()) for p in dictionary.state_dict().values()):
                # in latents that never fire, which the loss does not show
                raise _not_finite(f"{arm.config.name} has weights that are not finite")
            dictionary.save(self.out / arm.config.name)

    def _dictionary(self, arm: Arm) -> Dictionary:
        """In the model's own units, with its provenance."""
        if self.strategy.shares_latents:  # those of all processes are in the checkpoint
            d_in, lengths, skip = self.source.d_in, self.config.lengths, self.config.skip
            arm = Arm(arm.config, d_in, arm.d_sae, CPU, lengths=lengths, skip=skip)
            load_checkpoint(self.out, [arm], Processes())
        config, weights, statistics = arm.config, arm.config.weights, self.statistics
        training = {
            **self._settings,
            SHARED_RATE: self._settings[RATE],
            RATE: self.rates[config.name],
            "architecture": config.architecture,
            config.kind.setting: config.level,
            "lengths": arm.lengths,
            "command": command_line(),
            "versions": versions(),
        }
        if self.reached < self.num_steps:
            training["step"] = self.reached
        info = DictionaryInfo(
            name=config.name,
            rule=weights.rule.name,
            alpha=weights.alpha,
            weights=asdict(weights.config),
            seed=config.init_seed,
            **origin_of(self.source, statistics),
            metrics={"training": self._numbers.get(config.name, {})},
            training=training,
        )
        units, architecture = self.normaliser, arm.architecture
        through = None if arm.skip is None else arm.skip.weight
        space = weights.gamma if weights.config.in_space else None
        measured = ("mean", "variance", "robust_variance")
        return Dictionary(
            **folded(arm.parameters, units.x, units.y, architecture.thresholds(), space, through),
            sparsity=architecture.sparsity,
            info=info,
            extras={"gamma": weights.gamma}
            | {name: getattr(statistics, name).float() for name in measured},
        )

    def _dtype(self, device: torch.device) -> str:
        """The number format of the products; a training goes on in that in which it was begun."""
        if self.config.dtype != "auto":
            return self.config.dtype
        began = recorded(self.out) or {}
        return name_of(fast_dtype(device, "encoder", began.get("dtype")))


_Batches = Callable[[int, int, int, tuple[int, int]], Iterator[Any]]


def _train(
    jobs: Sequence[tuple[ActivationSource, Sequence[ArmConfig], Path]],
    batches: _Batches,
    config: TrainConfig,
    places: Sequence[Sequence[int]],
    model: LanguageModel | None,
) -> list[dict[str, Dictionary]]:
    """``places`` says which rows of a batch are those of each job."""
    for source, arms, out in jobs:
        check_arms(arms, source.d_in, config)
        check_skip([source.site], config)
        if source.site.is_mlp and target_of(source) is source:
            raise UsageError(
                f"a transcoder of {source.site} needs what the MLP reads and what it writes; take "
                "them from a store or stream, or a source of your own with a target"
            )
        check_out(out)
    processes, device = join(), choose_device(config.device)
    with processes.together():
        with strategy_of(processes, device, config.shard) as strategy:
            # before the lock: a refused request leaves no folder
            unfinished = [job for job in jobs if not is_finished(job[2])]
            widths = [source.d_in for source, arms, _ in unfinished for _ in arms]
            check_room(widths, config, strategy.latent_parts)
            finish = _finish([source for source, *_ in unfinished], config, model, processes)
            trainings = [
                Training(source, arms, config, out, device, strategy, own)
                for (source, arms, out), own in zip(jobs, places, strict=True)
            ]
            for one in trainings:
                processes.check_agreed({**one.identity, "shard": config.shard}, "settings")
            with ExitStack() as locks:
                for one in trainings:
                    locks.enter_context(processes.folder_lock(one.out, "training"))
                done = processes.lead(lambda: [one.is_finished() for one in trainings])
                missing = [one for one, is_done in zip(trainings, done, strict=True) if not is_done]
                if missing:
                    return_freed_memory()  # by the stages before, for the rows
                    _Steps(missing, finish).take(batches)
                    for one in missing:
                        processes.lead(one.finish)
                    return_freed_memory()
        return [{arm.name: _load(out / arm.name) for arm in arms} for _, arms, out in jobs]


class _Steps:
    """All steps of these sites, from their checkpoints to the end or to a signal. A site whose
    checkpoint is newer than that of another waits for it."""

    def __init__(self, trainings: Sequence[Training], finish: Finish | None):
        first, self._finish = trainings[0], finish
        self._trainings, self._config, self._num_steps = trainings, first.config, first.num_steps
        self._strategy, self._processes = first.strategy, first.processes
        self._began = self._done = 0
        self._failure: LlmWsaeError | None = None  # of the rows of the next step
        self._saved_at = time.monotonic()
        self._stopped: list[int] = []

    def take(self, batches: _Batches) -> None:
        """Raises Interrupted after a signal, and what the rows of a process failed with."""
        config, strategy, size = self._config, self._strategy, self._config.batch_size
        with ExitStack() as opened:
            for training in self._trainings:
                training.begin(opened)
            self._began = self._done = min(training.reached for training in self._trainings)
            rows = batches(size, config.shuffle_seed, self._done, strategy.row_part)
            if (close := getattr(rows, "close", None)) is not None:
                opened.callback(close)  # ends a thread that reads ahead
            arms = sum(len(training.arms) for training in self._trainings)
            what = f"train {arms} dictionaries" if arms > 1 else "train the dictionary"
            total = self._num_steps * size
            with (
                _stop_signals() as self._stopped,
                progress(what, total, "tok", self._done * size) as bar,
            ):
                while True:
                    batch = self._next(rows)
                    # before the step, so that no process begins one that another cannot take
                    wanted = strategy.agree(self._want())
                    if wanted >= _SAVE:
                        self._save()
                    if wanted >= _STOP or self._done == self._num_steps:
                        break
                    there = [one for one in self._trainings if one.reached == self._done]
                    if batch is None:
                        self._finish_step(there)
                    else:
                        for training in there:
                            training.step([batch[place] for place in training.places])
                    for training in there:
                        training.end_step(bar)
                    self._done += 1
                    bar.update(size)
            self._end(wanted)

    def _finish_step(self, trainings: Sequence[Training]) -> None:
        assert self._finish is not None
        for text in self._finish.batch(self._done - trainings[0].finish_from):
            for training in trainings:
                training.finish_step(self._finish, text)

    def _next(self, rows: Iterator[Any]) -> tuple[Tensor, ...] | None:
        """The rows of the next step, of each site; nothing if there is none, or on a failure; None
        in a finish, which takes its own."""
        if self._done == self._num_steps:
            return ()
        if self._done >= self._trainings[0].finish_from:
            if (close := getattr(rows, "close", None)) is not None:
                close()  # a stream must not use the model meanwhile
            return None
        try:
            batch = next(rows)
        except LlmWsaeError as error:
            self._failure = error
            return ()
        except Exception:  # whatever it is, what was trained is kept
            if self._processes.size == 1:  # others would not come to save
                self._save()
            raise
        return batch if isinstance(batch, tuple) else (batch,)

    def _want(self) -> int:
        if self._failure is not None:
            return _FAIL
        if self._done == self._began:  # there is nothing to save
            return _CONTINUE
        if self._stopped:
            return _STOP
        due = time.monotonic() - self._saved_at > self._config.checkpoint_seconds
        return _SAVE if due and self._processes.leads else _CONTINUE

    def _save(self) -> None:
        if self._done:
            for training in self._trainings:
                training.save()
            self._saved_at = time.monotonic()

    def _end(self, wanted: int) -> None:
        out, size, failure = self._trainings[0].out, self._config.batch_size, self._failure
        where = out if len(self._trainings) == 1 else out.parent
        came = f"stopped after step {self._done} of {self._num_steps}"
        if wanted == _FAIL:
            if self._done:
                for training in self._trainings:
                    self._processes.lead(training.save_dictionaries)
            if failure is None:
                self._processes.meet()  # raises the sentence of the process that failed
            assert failure is not None
            if not self._done:
                raise failure
            raise LlmWsaeError(
                f"{failure} ({came}, {self._done * size:,} of {self._num_steps * size:,} rows; the "
                f"dictionaries so far are in {where}, and the same command goes on from there)"
            ) from failure
        if wanted == _STOP:
            raise Interrupted(
                f"{came}, saved in {where}; run the same command again to resume",
                self._stopped[0] if self._stopped else signal.SIGTERM,  # that of another process
            )
        if self._strategy.shares_latents:
            self._save()  # from which rank 0 takes the latents of all


def _finish(
    sources: Sequence[ActivationSource],
    config: TrainConfig,
    model: LanguageModel | None,
    processes: Processes,
) -> Finish | None:
    """The finish that is asked for, of trainings that are not finished."""
    if not config.finish or not sources:
        return None
    if processes.size > 1:
        raise UsageError("a finish through the model takes one process; start it without torchrun")
    rows = round(config.finish * _num_steps(sources[0], config)) * config.batch_size
    return Finish(sources, model, rows, config.batch_size, config.shuffle_seed)


def _load(folder: Path) -> Dictionary:
    if not folder.is_dir():
        raise LlmWsaeError(
            f"{folder} is missing; to train it again, delete {training_in(folder.parent).path} and "
            f"{LOG} beside it, and run the same command again"
        )
    return Dictionary.load(folder)


def _num_steps(source: ActivationSource, config: TrainConfig) -> int:
    tokens = config.tokens if config.tokens is not None else source.num_rows
    if tokens is None:
        raise UsageError("a stream has no end: set the number of tokens to train on")
    if tokens < config.batch_size:
        raise UsageError(
            f"{tokens} rows are fewer than one batch of {config.batch_size}; "
            "take more rows (harvest more tokens) or lower the batch size"
        )
    return tokens // config.batch_size


def _not_finite(what: str) -> LlmWsaeError:
    return LlmWsaeError(
        f"{what}; lower the learning rate (of llm-wsae train) and start again in another folder"
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are collected, so that no step is cut short; a second one interrupts."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals cannot be caught there
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
