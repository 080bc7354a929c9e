"""The planted experiments: which weights help when the truth is known.

One unit of work is one experiment on one seed: plant the data, compute every rule, train every arm
(the arms are one batch of small matrix products), hold each dictionary against the truth. A unit
that is done is a file, and is not done again; so a run goes on where it stopped, and more seeds or
experiments add to what is there.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import folder_lock, read_json, remove_partials, write_json, write_text
from llm_wsae.record import plain
from llm_wsae.statistics.moments import Statistics
from llm_wsae.theory.config import EXPERIMENTS, Experiment, TheoryConfig
from llm_wsae.theory.figures import plot_changes, plot_closed_form, plot_correlations
from llm_wsae.theory.positions import closed_form_facts
from llm_wsae.theory.recovery import Recovery, measure
from llm_wsae.theory.regimes import REGIMES
from llm_wsae.theory.rules import ARMS, NEED_DICTIONARY, PLAIN, RULES, Evidence, score, weights
from llm_wsae.theory.summary import TheoryReport, summarise
from llm_wsae.theory.superposition import Planted
from llm_wsae.theory.tied import Schedule, encode_tied, train_tied

# Streams of random numbers of one seed.
_DATA, _SAMPLE, _TRAIN, _TEST, _CONTROL = range(5)
_STREAMS = 8


def run_theory(config: TheoryConfig, out: Path) -> TheoryReport:
    """Run (or finish) the planted experiments and write report and figures into ``out``.

    Written: ``theory.json``, ``theory.md``, three figures, and under ``units/`` one file for each
    experiment and seed.

    Raises LlmWsaeError when the folder holds units of another configuration, cannot be written, or
    is in use.
    """
    out = Path(out)
    with folder_lock(out, "planted experiments"):
        remove_partials(out)
        units = _finish_units(config, out)
        closed_form = closed_form_facts(config.rows)
        report = summarise(units, closed_form, config)
        write_json(out / "theory.json", report.to_dict())
        write_text(out / "theory.md", report.markdown())
        plot_correlations(report, out / "correlations.png")
        plot_changes(report, out / "changes.png")
        plot_closed_form(closed_form, out / "closed_form.png")
    return report


def run_unit(experiment: Experiment, seed: int, config: TheoryConfig) -> dict[str, Any]:
    """One experiment on one seed: the rules' rank correlations with the truth and, for every arm,
    what its dictionary recovered. JSON-able."""
    data = REGIMES[experiment.regime](experiment.sparsity, _generator(seed, _DATA))
    k = max(1, int(data.mean_active / 2 + 0.5))
    schedule = Schedule(
        num_latents=data.num_features + config.spare_latents,
        k=k,
        steps=config.steps,
        batch=config.batch_size,
        learning_rate=experiment.learning_rate,
    )
    sample = data.observe(data.features(config.rows, _generator(seed, _SAMPLE)))
    statistics = Statistics(len(data.mixing), 1, sample_rows=config.rows)
    statistics.update(sample, torch.zeros(len(sample), dtype=torch.int64))
    evidence = Evidence(statistics, data, seed * _STREAMS + _CONTROL)
    x = data.features(config.rows, _generator(seed, _TEST))
    train = _Trainer(data, schedule, x, seed)

    early = [name for name, arm in ARMS.items() if arm.rule not in NEED_DICTIONARY]
    recovered, dictionaries = train(early, evidence)
    first = dictionaries[early.index(PLAIN)]
    energy = encode_tied(first, sample, k).square().mean(0)
    evidence = replace(evidence, decoder=first, energy=energy)
    late = [name for name in ARMS if name not in early]
    recovered |= train(late, evidence)[0]
    return {
        "facts": {
            "n": data.num_features,
            "n_p": len(data.mixing),
            "latents": schedule.num_latents,
            "k": k,
            "mean_active": data.mean_active,
        },
        "correlations": {rule: _correlation(rule, evidence) for rule in RULES},
        "arms": {name: asdict(recovered[name]) for name in ARMS},
    }


@dataclass(frozen=True)
class _Trainer:
    """Trains and measures arms of one unit."""

    data: Planted
    schedule: Schedule
    x: Tensor
    """Fresh true features to measure on, rows × n."""
    seed: int

    def __call__(self, names: list[str], evidence: Evidence) -> tuple[dict[str, Recovery], Tensor]:
        arms = [ARMS[name] for name in names]
        gamma = torch.stack([weights(arm, evidence) for arm in arms])
        as_space = torch.tensor([arm.space for arm in arms])[:, None]
        factors = torch.where(as_space, gamma, 1.0)
        w = train_tied(
            self.data,
            torch.where(as_space, 1.0, gamma),
            torch.tensor([arm.annealed for arm in arms]),
            factors,
            self.schedule,
            self.seed * _STREAMS + _TRAIN,
        )
        observed = self.data.observe(self.x)
        found = {}
        for name, one, factor in zip(names, w, factors, strict=True):
            codes = encode_tied(one, observed * factor, self.schedule.k)
            found[name] = measure(one / factor, codes, self.data.mixing, self.x)
        return found, w


def _finish_units(config: TheoryConfig, out: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Every unit by experiment and seed, from its file or computed now."""
    settings = {
        name: getattr(config, name) for name in ("steps", "batch_size", "spare_latents", "rows")
    }
    done: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in config.experiments}
    missing: list[tuple[str, int, Path]] = []
    for name in config.experiments:
        for seed in range(config.first_seed, config.first_seed + config.seeds):
            path = out / "units" / f"{name}-seed{seed}.json"
            identity = {"experiment": plain(EXPERIMENTS[name]), **settings, "arms": list(ARMS)}
            if path.exists():
                done[name][seed] = _read_unit(path, identity)
            else:
                missing.append((name, seed, path))

    def compute(name: str, seed: int, path: Path) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            unit = run_unit(EXPERIMENTS[name], seed, config)
            identity = {"experiment": plain(EXPERIMENTS[name]), **settings}
            write_json(path, plain({**identity, "seed": seed, **unit}))
            return plain(unit)

        return work

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a unit's products are too small to share; units run side by side
    try:
        with ThreadPoolExecutor(config.workers or _cores()) as pool:
            running = {pool.submit(compute(*task)): task for task in missing}
            bar = tqdm(total=len(missing), desc="planted experiments", unit="unit", disable=None)
            try:
                for future in as_completed(running):
                    name, seed, _ = running[future]
                    done[name][seed] = future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                bar.close()
    finally:
        torch.set_num_threads(threads)
    return {name: dict(sorted(found.items())) for name, found in done.items()}


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_unit(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    unit = read_json(path, "result of a planted experiment")
    for key, wanted in identity.items():
        found = list(unit.get("arms", {})) if key == "arms" else unit.get(key)
        if found != wanted:
            raise LlmWsaeError(
                f"{path} was computed with another {key.replace('_', ' ')} ({found}, now {wanted});"
                " choose another folder, or delete that file"
            )
    return unit


def _correlation(rule: str, evidence: Evidence) -> float | None:
    """Spearman's ρ with the true monosemanticity; None where either is constant."""
    truth, guess = evidence.truth.monosemanticity, score(rule, evidence)
    if bool((guess == guess[0]).all()) or bool((truth == truth[0]).all()):
        return None
    return float(spearmanr(truth.numpy(), guess.numpy()).statistic)


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * _STREAMS + stream)
