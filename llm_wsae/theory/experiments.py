"""The planted experiments: which weights help when the truth is known.

One unit of work is one experiment on one seed: plant the data, compute every rule, train every arm
(all arms in one batch of small matrix products), compare each dictionary with the truth. What the
closed form says about a mixture, from W_p alone and without any training, is a unit too.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from llm_wsae.files import folder_lock, remove_partials, write_json, write_text
from llm_wsae.outputs import check_folder
from llm_wsae.provenance import versions
from llm_wsae.sparse.backends.reference import EPSILON
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment
from llm_wsae.theory.arm_trainer import ArmTrainer
from llm_wsae.theory.closed_form import (
    check_assumptions,
    loss_gap,
    losses,
    relative_error,
    sae_loss,
    sparsity_for_error,
    truth_loss,
)
from llm_wsae.theory.config import EXPERIMENTS, SWEEPS, Experiment, TheoryConfig
from llm_wsae.theory.figures import (
    plot_changes,
    plot_closed_form,
    plot_correlations,
)
from llm_wsae.theory.jobs import REPORT, UNITS, Check, Unit, finish
from llm_wsae.theory.optimum import best_scalar, gap_norms, least_gap_weights
from llm_wsae.theory.report import TheoryReport, summarise
from llm_wsae.theory.rules import ARMS, PLAIN, RULES, Known, fisher, score
from llm_wsae.theory.superposition import (
    REGIMES,
    Planted,
    Stream,
    features_from_uniform,
    generator,
    number,
)
from llm_wsae.theory.sweep_figures import plot_sweep
from llm_wsae.theory.sweeps import LEARNING_RATE, run_point
from llm_wsae.theory.tied import Schedule, encode_tied
from llm_wsae.theory.untrained import UNTRAINED, untrained
from llm_wsae.weights import scores
from llm_wsae.weights.rules import Rule

MARKDOWN = "theory.md"
FIGURES = ("closed_form.png", "correlations.png", "changes.png")
SWEEP_FIGURES = {name: f"{name.replace('-', '_')}.png" for name in SWEEPS}
# Each mixture with the sparsity at which a toy model's W_p is trained; the other two ignore it.
MIXTURES: dict[str, float] = {"digon": 0.5, "mixed": 0.5, "toy-40": 0.9, "toy-200": 0.95}
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
GAP_WEIGHTS = ("gap", "variance-a-0.5", "variance-a0.5", "variance")  # beside the optimum
BOUND = 0.05  # of E‖x‖², for "the sparsity that is needed"


def run_theory(config: TheoryConfig, out: Path) -> TheoryReport:
    """Run (or finish) the planted experiments and write report and figures into ``out``.

    Written: ``theory.json``, ``theory.md``, the ``figures`` of the report, and under ``units/`` one
    file for the closed form of each mixture and for each seed of each experiment and each point of
    a sweep; existing ones are not recomputed.

    Raises LlmWsaeError when the folder holds units of another configuration, cannot be written, or
    is in use.
    """
    out = Path(out)
    names = (REPORT, MARKDOWN, *FIGURES, *SWEEP_FIGURES.values())
    check_folder(out, names, is_ours=(out / UNITS).is_dir())
    with folder_lock(out, "planted experiments"):
        remove_partials(out, UNITS)
        planted = [name for name in config.experiments if name in EXPERIMENTS]
        points = [
            (name, label)
            for name in config.experiments
            if name in SWEEPS
            for label in SWEEPS[name].points
        ]
        units: dict[tuple[str | int, ...], Unit] = {
            (name,): _closed_form_unit(name, config, out) for name in MIXTURES
        }
        for name in planted:
            for seed in config.seeds:
                units[name, seed] = _planted_unit(name, seed, config, out)
                units["untrained", name, seed] = _untrained_unit(name, seed, config, out)
        for name, label in points:
            for seed in config.seeds:
                units[name, label, seed] = _sweep_unit(name, label, seed, config, out)
                units["untrained", name, label, seed] = _untrained_at(
                    name, label, seed, config, out
                )
        results = finish(list(units.values()), config.workers, "planted experiments")
        found = dict(zip(units, results, strict=True))
        report = summarise(
            closed_form={name: found[name,] for name in MIXTURES},
            units={name: [found[name, seed] for seed in config.seeds] for name in planted},
            without={
                name: [found["untrained", name, seed] for seed in config.seeds] for name in planted
            },
            sweep_units={at: [found[*at, seed] for seed in config.seeds] for at in points},
            sweep_without={
                at: [found["untrained", *at, seed] for seed in config.seeds] for at in points
            },
            config=config,
        )
        facts = {"command": "theory", "versions": versions(), **report.to_dict()}
        write_json(out / REPORT, facts)
        write_text(out / MARKDOWN, report.markdown())
        for name, plot in _plots(report).items():
            plot(out / name)
    return report


def figures(report: TheoryReport) -> tuple[str, ...]:
    """File names of the figures that belong to a report."""
    return tuple(_plots(report))


def _plots(report: TheoryReport) -> dict[str, Callable[[Path], None]]:
    plots: dict[str, Callable[[Path], None]] = {}
    plots[FIGURES[0]] = partial(plot_closed_form, report.closed_form)
    if report.arms:
        plots[FIGURES[1]] = partial(plot_correlations, report)
        plots[FIGURES[2]] = partial(plot_changes, report)
    for name, points in report.sweeps.items():
        plots[SWEEP_FIGURES[name]] = partial(plot_sweep, SWEEPS[name], points)
    return plots


def run_unit(
    experiment: Experiment, seed: int, config: TheoryConfig, check: Check = lambda: None
) -> dict[str, Any]:
    """One experiment on one seed: the rules' rank correlations with the truth and, for every arm,
    how much its dictionary recovers. JSON-able."""
    data, k = _planted(experiment, seed)
    schedule = Schedule(
        num_latents=data.num_features + config.spare_latents,
        k=k,
        steps=config.steps,
        batch=config.batch_size,
        learning_rate=experiment.learning_rate,
    )
    seen = data.features(config.rows, generator(seed, Stream.SAMPLE))
    sample = data.observe(seen)
    statistics = Statistics(len(data.mixing), 1, sample_rows=config.rows)
    statistics.update(sample, torch.zeros(len(sample), dtype=torch.int64))
    known = Known(
        statistics,
        second_moment=SecondMoment(len(data.mixing)).update(sample),
        fisher=fisher(data, sample),
        truth=data,
        draw=number(seed, Stream.CONTROL),
    )
    x = data.features(config.rows, generator(seed, Stream.TEST))
    train = ArmTrainer(data, schedule, x, seed, check)

    early = [name for name, arm in ARMS.items() if not arm.needs_dictionary]
    recovered, dictionaries = train(early, known)
    first = dictionaries[PLAIN]
    energy = encode_tied(first, sample, k).square().mean(0)
    used = energy > 0  # dead latents still have their initial directions
    known = replace(known, decoder=first[used], energy=energy[used])
    late = [name for name in ARMS if name not in early]
    recovered |= train(late, known)[0]
    return {
        "facts": {
            "n": data.num_features,
            "n_p": len(data.mixing),
            "latents": schedule.num_latents,
            "k": k,
            "mean_active": data.mean_active,
        },
        "correlations": {name: _correlation(rule, known) for name, rule in RULES.items()},
        "arms": {name: asdict(recovered[name]) for name in ARMS},
    }


def _planted(experiment: Experiment, seed: int) -> tuple[Planted, int]:
    """The data of an experiment, and how many latents are kept in a row."""
    data = REGIMES[experiment.regime](experiment.sparsity, generator(seed, Stream.DATA))
    return data, max(1, int(data.mean_active / 2 + 0.5))


def _planted_unit(name: str, seed: int, config: TheoryConfig, out: Path) -> Unit:
    identity = _planted_identity(name, seed, config) | {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "epsilon": EPSILON,
        "annealed_over": Schedule.anneal,
        "arms": list(ARMS),
        "rules": list(RULES),
    }
    compute = partial(run_unit, EXPERIMENTS[name], seed, config)
    return Unit(out / UNITS / f"{name}-seed{seed}.json", identity, compute)


def _untrained_unit(name: str, seed: int, config: TheoryConfig, out: Path) -> Unit:
    def plant() -> tuple[Planted, int, int]:
        data, k = _planted(EXPERIMENTS[name], seed)
        return data, data.num_features + config.spare_latents, k

    return _untrained(name, _planted_identity(name, seed, config), plant, out)


def _untrained(
    name: str,
    identity: dict[str, Any],
    plant: Callable[[], tuple[Planted, int, int]],
    out: Path,
) -> Unit:
    """``plant`` returns the data, and the latents and k of a dictionary of it."""
    seed, rows = identity["seed"], identity["rows"]

    def compute(check: Check) -> dict[str, Any]:
        return untrained(*plant(), rows, seed)

    identity = identity | {"dictionaries": list(UNTRAINED)}
    return Unit(out / UNITS / f"untrained-{name}-seed{seed}.json", identity, compute)


def _planted_identity(name: str, seed: int, config: TheoryConfig) -> dict[str, Any]:
    """On what the data depends, and the size of a dictionary of it."""
    return {
        "experiment": EXPERIMENTS[name],
        "seed": seed,
        "spare_latents": config.spare_latents,
        "rows": config.rows,
    }


def _sweep_unit(name: str, label: str, seed: int, config: TheoryConfig, out: Path) -> Unit:
    sweep = SWEEPS[name]
    point = sweep.points[label]
    identity = {
        "point": point,
        "seed": seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "rows": config.rows,
        "learning_rate": LEARNING_RATE,
        "epsilon": EPSILON,
        "arms": sweep.arms,
    }
    compute = partial(run_point, point, sweep.arms, seed, config)
    return Unit(out / UNITS / f"{name}-{label}-seed{seed}.json", identity, compute)


def _untrained_at(name: str, label: str, seed: int, config: TheoryConfig, out: Path) -> Unit:
    point = SWEEPS[name].points[label]

    def plant() -> tuple[Planted, int, int]:
        data = REGIMES[point.regime](point.sparsity, generator(seed, Stream.DATA))
        return data, point.latents, point.kept

    identity = {"point": point, "seed": seed, "rows": config.rows}
    return _untrained(f"{name}-{label}", identity, plant, out)


def _closed_form_unit(name: str, config: TheoryConfig, out: Path) -> Unit:
    seed = config.seeds[0]
    identity = {
        "seed": seed,
        "rows": config.rows,
        "mixture_sparsity": MIXTURES[name],
        "bound": BOUND,
        "sparsities": SPARSITIES,
        "gap_weights": GAP_WEIGHTS,
    }
    return Unit(
        out / UNITS / f"closed-form-{name}-seed{seed}.json",
        identity,
        lambda check: closed_form_facts(name, config.rows, seed),
    )


def _correlation(rule: Rule, known: Known) -> float | None:
    """Spearman's ρ with the true monosemanticity; None where either is constant."""
    truth, guess = known.truth.monosemanticity, score(rule, known)
    if bool((guess == guess[0]).all()) or bool((truth == truth[0]).all()):
        return None
    return float(spearmanr(truth.numpy(), guess.numpy()).statistic)


def gap_weights(mixing: Tensor) -> dict[str, Tensor]:
    """The diagonal weights γ whose ‖W_pᵀΓ²W_p − I‖ is shown, by the names of their arms.

    For features of equal variance, σ_i² = Σ_j W_ij²; a dimension that no feature reaches has
    weight 0.
    """
    variance = mixing.square().sum(1)
    reached = variance > 0
    inverse = torch.where(reached, torch.where(reached, variance, 1.0).rsqrt(), 0.0)
    found = (scores.gap(mixing.T), inverse, variance.sqrt(), variance)
    return dict(zip(GAP_WEIGHTS, found, strict=True))


def closed_form_facts(name: str, rows: int, seed: int) -> dict[str, Any]:
    """For one of the ``MIXTURES``: whether the assumptions hold, what is lost at each sparsity, and
    how much of the gap between the losses a diagonal Γ can close.

    Features are uniform on (0, 1] with equal probability; W_p is that of the experiments with this
    seed and sparsity. JSON-able.
    """
    mixing = REGIMES[name](MIXTURES[name], generator(seed, Stream.DATA)).mixing.double()
    draw = generator(seed, Stream.SAMPLE)
    n = mixing.shape[1]
    assumed = check_assumptions(mixing)
    gamma, optimum = scores.gap(mixing.T), least_gap_weights(mixing)
    scalar = best_scalar(mixing) * torch.ones(len(mixing), dtype=torch.float64)
    uniform = torch.rand(rows, n, generator=draw, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64)
    by_sparsity = []
    for sparsity in SPARSITIES:
        x = features_from_uniform(uniform, ones * (1 - sparsity), ones)
        lost = losses(mixing, x)
        by_sparsity.append(
            {
                "sparsity": sparsity,
                "relative_error": float(relative_error(mixing, x)),
                "sae_loss": float(sae_loss(mixing.T, x @ mixing.T)),
                "truth_loss": float(truth_loss(mixing, x)),
                "gap": float(loss_gap(mixing, x)),
                "gap_weighted": float(loss_gap(mixing, x, gamma)),
                "gap_best_scalar": float(loss_gap(mixing, x, scalar)),
                "gap_whitening": float(loss_gap(mixing, x, optimum)),
                "shrunk": float(lost.shrunk.nanmean()),
                "vanished": float(lost.vanished.nanmean()),
            }
        )
    return {
        "n": n,
        "n_p": len(mixing),
        "assumptions_hold": assumed.hold,
        "only_digons": assumed.only_digons,
        "possible": assumed.possible,
        "num_nonzero": assumed.num_nonzero,
        "largest_interference": assumed.largest_interference,
        "largest_norm_error": assumed.largest_norm_error,
        "gap_norms": gap_norms(mixing, gap_weights(mixing)),
        "bound": BOUND,
        "sparsity_needed": sparsity_for_error(mixing, BOUND, draw, rows),
        "by_sparsity": by_sparsity,
    }
