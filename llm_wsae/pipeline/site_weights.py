"""From a grid to the weights of a site; and how far to whiten it, where short trainings choose.

Whitening that is too weak leaves the loss to a few loud directions; whitening that is too strong
spends latents on noise. The best power differs from model to model, and at some sites none is
better than a plain dictionary. The criterion is cheap and needs no labels: the KL divergence of the
model's predictions when it computes with the reconstruction of a dictionary that saw few rows.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_wsae.artifact.artifact import differences
from llm_wsae.artifact.files import read_own_json, write_json
from llm_wsae.artifact.provenance import plain
from llm_wsae.data.shuffling import ActivationSource
from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.fidelity.evaluator import FidelityEvaluator
from llm_wsae.machine.processes import join
from llm_wsae.pipeline.request import Grid
from llm_wsae.training.arm import ArmConfig
from llm_wsae.training.config import PROCEDURAL, TrainConfig
from llm_wsae.training.trainer import train
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import LossWeights, choose_weights, weights_from_rule
from llm_wsae.weights.rules import RULES, Rule, RuleInputs

CANDIDATES = (0.25, 0.5, 0.75, 1.0)
TRIAL_ROWS = 300_000
"""Rows of each trial training: about 40 seconds for all five on two cores."""
TRIAL_TOKENS = 10_000
"""Held-out tokens on which the trials are judged, of about 40 documents or more."""
LEAST_GAIN = 0.02
"""Share by which KL must fall below that of the plain trial; less may be chance. (In the
loss, trials at two sites of SmolLM2 saw gains of 4 and 3 % where full trainings had 3 and 0 %.)"""
CHOICE = "alpha.json"
_TRIALS = ".alpha"


def weights_of(
    inputs: RuleInputs,
    grid: Grid,
    config: WeightConfig,
    *,
    chosen: float | None = None,
    own: LossWeights | None = None,
) -> list[LossWeights]:
    """The weights of a site, those from a file (``own``) last.

    ``chosen`` is the exponent that trials found, if the grid leaves one to them. The plain weights
    if nothing else is left. Raises as ``choose_weights`` does.
    """
    found: dict[str, LossWeights] = {}
    for rule in grid.rules:
        made = choose_weights(inputs, [rule], grid.exponents(rule, chosen), config=config)
        found |= {weights.name: weights for weights in made}
    if own is not None or not found:
        last = choose_weights(inputs, [] if own else [RULES["uniform"]], [], own, config)
        found |= {weights.name: weights for weights in last}
    return list(found.values())


def stand_ins(grid: Grid, config: WeightConfig, d_in: int) -> list[LossWeights]:
    """Weights with the names and forms of those that will be measured. Their values do not matter,
    except that arms which do not share a space must not seem to."""
    found: dict[str, LossWeights] = {}
    for rule in grid.rules:
        for alpha in (1.0,) if rule.is_plain else grid.exponents(rule, chosen=0.5):
            gamma = torch.eye(d_in) if rule.form(config) == "matrix" else torch.ones(d_in)
            gamma = gamma * (1 + len(found) / 1000)
            weights = LossWeights(gamma, rule, alpha, rule.settings(config))
            found.setdefault(weights.name, weights)
    return list(found.values())


@dataclass(frozen=True)
class AlphaChoice:
    """What the trials of a site found."""

    k: int
    rows: int
    """Rows of each trial training."""
    kl: dict[str, float]
    """KL of each trial in nats, by exponent; ``0`` is the plain dictionary."""
    alpha: float | None
    """The exponent of lowest KL; None if it is not at least 2 % below the plain one."""

    def text(self) -> str:
        """One line for people."""
        found = ", ".join(f"{alpha}: {kl:.3f}" for alpha, kl in self.kl.items())
        chosen = "none is worth it" if self.alpha is None else f"chosen: {self.alpha:g}"
        return f"whitening, KL of short trainings by α ({found}); {chosen}"


def choose_alpha(
    inputs: RuleInputs,
    source: ActivationSource,
    evaluator: FidelityEvaluator,
    folder: Path,
    k: int,
    training: TrainConfig,
    config: WeightConfig,
) -> AlphaChoice:
    """Train a plain TopK dictionary and one for each candidate on a part of the rows, and take the
    exponent of least KL. ``config`` says where the whitening acts.

    The choice is kept in ``folder`` and read from there the next time; the trial dictionaries are
    deleted. Under ``torchrun`` all processes make the same call: they train together, and rank 0
    judges. Raises as ``train`` and ``FidelityEvaluator.evaluate`` do, and LlmWsaeError if the
    folder holds the choice of other trials.
    """
    rule, processes = Rule.parse("whitening"), join()
    tokens = min(TRIAL_ROWS, training.tokens or TRIAL_ROWS, source.num_rows or TRIAL_ROWS)
    tokens = max(tokens, training.batch_size)  # a few rows may be read several times
    short = replace(training, tokens=tokens, tracker="none")
    with processes.together():
        asked = plain(
            {
                "source": source.identity(),
                "k": k,
                "candidates": CANDIDATES,
                "weights": rule.settings(config),
                "training": {n: v for n, v in vars(short).items() if n not in PROCEDURAL},
            }
        )
        found = processes.lead(lambda: _kept(folder / CHOICE, asked))
    if found is not None:
        return AlphaChoice(**found)
    arms = {"0": ArmConfig(weights_from_rule("uniform", 1.0, inputs), k)}
    for alpha in CANDIDATES:
        arms[f"{alpha:g}"] = ArmConfig(weights_from_rule(rule, alpha, inputs, config), k)
    trained = train(source, list(arms.values()), short, folder / _TRIALS)

    def judge() -> dict[str, Any]:
        found = evaluator.evaluate(trained).dictionaries
        kl = {alpha: found[arm.name].kl for alpha, arm in arms.items()}
        best = min(kl, key=lambda alpha: kl[alpha])
        worth_it = best != "0" and kl[best] < (1 - LEAST_GAIN) * kl["0"]
        choice = asdict(AlphaChoice(k, tokens, kl, float(best) if worth_it else None))
        write_json(folder / CHOICE, {"asked": asked, "choice": choice})
        shutil.rmtree(folder / _TRIALS)
        return choice

    with processes.together():
        return AlphaChoice(**processes.lead(judge))


def _kept(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The choice that the folder holds, if it does. Raises LlmWsaeError for one of other trials."""
    if not path.exists():
        return None
    found = read_own_json(path, "choice of an exponent", "delete it to choose again")
    if clauses := differences(found["asked"], asked, ("that choice", "this command")):
        raise LlmWsaeError(
            f"{path} was chosen for other rows or settings ({clauses}); choose another folder, or "
            "delete it"
        )
    shutil.rmtree(path.parent / _TRIALS, ignore_errors=True)  # of a run killed before it did that
    choice: dict[str, Any] = found["choice"]
    return choice
