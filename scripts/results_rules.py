"""Four further ideas beside whitening, each with the control that would refute it.

    bash scripts/reproduce.sh rules

- ``participation``: γ from the decoder and the firings of the dictionary that is being trained,
  made anew every 50 steps and annealed. No first dictionary is needed. Refuted if annealed variance
  with as many effective dimensions finds as much.
- ``error``: theorem 4's gap is an expectation under the error C_e = Cov(z − r) of the dictionary's
  own round trip. Every 50 steps, the least change of γ² for which tr[(WᵀΓ²W − I) C_e] = 0, between
  ¼ and 4. Control: codes shuffled within each latent.
- ``tied``: the encoder is the decoder behind Σ^(−p), so that a latent answers its own direction
  with slope 1 and everything else least: theorem 5's filter, which a loss cannot reach. Controls:
  no whitening (p = 0), and random directions. ``learnt slope``: the same filter, but each latent
  learns how steep it is.
  Both beside an encoder of its own, too: plain, with four times the rows.
- ``norm``: BatchTopK picks by pre-activations of rows divided by their norm to the power β, so that
  long rows don't take the latents of short ones. Control: norms of other rows.

First on planted data, where all is known: 256 features in 64 dimensions, over a background whose
spectrum falls as a stream's does. Then by features planted into the streams of two models, after
block 9. ``EXPECTED`` was written down before the first dictionary of either was trained, except
what is expected of ``learnt slope``, an idea that came later: on planted data and on SmolLM2 after
its first seed there (``AFTER_ONE_SEED``), on Gemma after that. Of some powers nothing had been
expected in writing; they were trained once more, with fresh seeds and controls of their own
(``EXPECTED_AGAIN``). The package holds none of them: what does not beat whitening is recorded here
only.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import results_free_lengths as free_lengths
import results_recovery as recovery
import torch
from benchmarks import README, write_result
from results_archive import pack, unpack
from results_archive import read as archived
from results_baselines import raw_dimensions
from torch import Tensor

from llm_wsae import Dictionary, Site, TrainConfig, train
from llm_wsae.files import write_json
from llm_wsae.planting.plants import Plants
from llm_wsae.planting.recovery import measure_recovery
from llm_wsae.provenance import plain
from llm_wsae.sparse.codes import Codes, RaggedCodes
from llm_wsae.sparse.operations import encode_topk
from llm_wsae.statistics.moments import Statistics
from llm_wsae.statistics.second_moment import SecondMoment
from llm_wsae.studies.curve import Value
from llm_wsae.studies.inference import estimates
from llm_wsae.terminal import markdown
from llm_wsae.training import one_site
from llm_wsae.training.architectures.batch_topk import BatchTopK
from llm_wsae.training.arm import Arm, ArmConfig
from llm_wsae.training.parameters import Batch, Parameters, Step, squared
from llm_wsae.weights.choosing import weights_from_rule
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.inputs import RuleInputs
from llm_wsae.weights.loss_weights import LossWeights, annealed, effective_dimensions
from llm_wsae.weights.matrix_rules import rotated, spectrum
from llm_wsae.weights.scores import participation

RUN = README.parent / "runs/rules"
ARCHIVE = Path(__file__).parent / "results/rules.jsonl.gz"
WHITENING = ARCHIVE.with_name("whitening.jsonl.gz")
PLANTED, MODELS = "planted", ("smollm2", "gemma")
SEEDS = {PLANTED: (0, 1, 2), "smollm2": (0, 1, 2), "gemma": (0, 1, 2)}
AGAIN = (3, 4, 5)  # fresh seeds, of ``TRAINED_AGAIN``
EVERY = 50  # steps between new weights
ANNEAL = 0.6


class Remembering(Arm):
    """An arm that keeps the codes of its last batch."""

    variance: ClassVar[Tensor]
    """Of each dimension of the normalised rows."""
    dimensions: ClassVar[list[float]] = []
    """Effective dimensions of the loss after each new γ."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._steps = 0

    def evaluate(self, batch: Batch) -> Step:
        step = super().evaluate(batch)
        self._codes: RaggedCodes = step.by_weights.codes
        return step

    def _use(self, gamma: Tensor) -> None:
        self.gamma, self.metric = gamma, squared(gamma)

    def _set_gamma(self, gamma: Tensor) -> None:
        """γ that leaves the weighted variance as it is."""
        gamma = gamma.double()
        share = gamma.square() * self.variance
        self._full_gamma = (gamma * (self.variance.sum() / share.sum()).sqrt()).float()
        self._use(self._full_gamma)
        self.dimensions.append(float(share.sum().square() / share.square().sum()))


class Participating(Remembering):
    """γ = participation^½ of the dictionary as it is, annealed."""

    def step(self, batch: Batch, *given: Any) -> None:
        super().step(batch, *given)
        squares = self._codes.values.double().square()
        energy = torch.bincount(self._codes.indices, squares, self.d_sae)
        self._energy = energy if self._steps % EVERY == 0 else self._energy + energy
        self._steps += 1
        if self._steps % EVERY == 0:
            self._set_gamma(participation(self.parameters.decoder, self._energy).sqrt())

    def anneal(self, done: float) -> None:
        self._use(annealed(self._full_gamma, done, ANNEAL))


class ErrorWeighted(Remembering):
    """γ² = 1 + c·q with the least c for which the gap under the round trip's error is 0."""

    shuffled: ClassVar[bool] = False

    def step(self, batch: Batch, *given: Any) -> None:
        super().step(batch, *given)
        self._steps += 1
        if self._steps % EVERY == 0:
            codes, k = self._codes, int(self.config.level)
            dense = torch.zeros(codes.num_rows, self.d_sae)
            rows = torch.repeat_interleave(torch.arange(codes.num_rows), codes.offsets.diff())
            dense[rows, codes.indices] = codes.values
            if self.shuffled:
                draw = torch.Generator().manual_seed(self._steps)
                order = torch.rand(dense.shape, generator=draw).argsort(0)
                dense = dense.gather(0, order)
            encoder, decoder, bias, decoder_bias = self.parameters
            again = encode_topk(dense @ decoder + decoder_bias, encoder, bias, k)
            missing = dense.scatter_add(1, again.indices, -again.values)
            q = (missing @ decoder).double().square().mean(0)
            excess = missing.double().square().sum(1).mean() - q.sum()
            self._set_gamma((1 + excess / q.square().sum() * q).clamp(0.25, 4).sqrt())


class Tied(Arm):
    """The encoder is the decoder times a matrix, with slope 1 along each latent's own direction, or
    one that is learnt."""

    matrix: ClassVar[Tensor]
    learns_slope: ClassVar[bool] = False

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self._tie()

    def _tie(self) -> None:
        decoder, encoder = self.parameters.decoder, self.parameters.encoder
        filters = decoder @ self.matrix
        filters /= (filters * decoder).sum(1, keepdim=True)
        if self.learns_slope:  # the part of the optimiser's step that leaves the filter as it is
            along = (encoder * filters).sum(1, keepdim=True)
            filters *= along / filters.square().sum(1, keepdim=True)
        encoder.copy_(filters)

    def step(self, *given: Any) -> None:
        super().step(*given)
        self._tie()
        self._optimiser.round_encoder()


class NormFree:
    """BatchTopK picks by rows divided by ‖x‖^β, times the mean of ‖x‖^β."""

    beta: ClassVar[float] = 0.0
    permuted: ClassVar[bool] = False

    @classmethod
    def divided(cls, x: Tensor) -> Tensor:
        """The rows that latents are picked by."""
        factors = x.norm(dim=1).clamp(min=1e-6) ** cls.beta
        if cls.permuted:
            draw = torch.Generator().manual_seed(len(x))
            factors = factors[torch.randperm(len(x), generator=draw)]
        return x * (factors.mean() / factors)[:, None]


class DividingDictionary(Dictionary):
    """A finished ``NormFree`` dictionary: latents are picked by divided rows, and answer to the
    rows themselves."""

    mean: Tensor
    kind: type[NormFree]

    def encode_sparse(self, x: Tensor) -> Codes:
        divided = self.mean + self.kind.divided(x.float() - self.mean)
        picked = super().encode_sparse(divided)
        own = x.float() @ self.W_enc + self.b_enc
        values = own.gather(1, picked.indices).clamp(min=0) * (picked.values > 0)
        return Codes(picked.indices, values)


@dataclass(frozen=True)
class Idea:
    """One way to train."""

    name: str
    rule: str = "uniform"
    alpha: float = 1.0
    place: str = "loss"
    architecture: str = "topk"
    change: type[Arm] | type[NormFree] | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    """Class attributes of ``change``."""
    power: float | None = None
    """Of Σ^(−p), for ``Tied``."""
    random_directions: bool = False
    as_today: bool = False
    """Trained as ``results_free_lengths.py`` does, in a model's stream alone."""
    only_planted: bool = False
    """Not in a model's stream, where ``results_baselines.py`` or ``results_whitening.py`` measures
    it."""
    rows: int = 1
    """How many times the usual number."""

    def is_made(self, key: str, seed: int) -> bool:
        """Whether it is trained at a place."""
        if seed in AGAIN:
            made = (*TRAINED_AGAIN, *(BASELINES if key == PLANTED else ()))
            return self.name in made
        if self.name in CONTROLS_AGAIN or (key != PLANTED and self.name == HALFWAY_LEARNT):
            return False
        return not (self.as_today if key == PLANTED else self.only_planted)


WHITENED = "whitening"
HALF_RANDOM = {f"half random: {one}": f"frozen-{one}" for one in ("decoder", "encoder")}
RAW = "raw dimensions"
BASELINES = (*HALF_RANDOM, RAW)
TODAY = "learnt slope, p = 1, free lengths, two million rows"
HALFWAY_LEARNT = "learnt slope, p = 1/2"
FOUR_TIMES, WHITENED_FOUR_TIMES = (f"{name}, four times the rows" for name in ("plain", WHITENED))
CONTROLS_AGAIN = ("tied, p = 1: random directions", "norm, β = 1/2: other rows")
TRAINED_AGAIN = (WHITENED, "tied, p = 1", "norm, β = 1/2", HALFWAY_LEARNT, *CONTROLS_AGAIN)
IDEAS = (
    Idea("plain"),
    Idea(WHITENED, "whitening", 0.5, "mixed"),
    Idea("participation", change=Participating),
    Idea("participation: variance", "robust-variance"),
    Idea("error", change=ErrorWeighted),
    Idea("error: shuffled", change=ErrorWeighted, settings=(("shuffled", True),)),
    Idea("tied, p = 1/2", change=Tied, power=0.5),
    Idea("tied, p = 1", change=Tied, power=1.0),
    Idea("tied: p = 0", change=Tied, power=0.0),
    Idea("tied: random directions", change=Tied, power=0.5, random_directions=True),
    Idea("batch-topk", architecture="batch-topk"),
    Idea("norm, β = 1/2", architecture="batch-topk", change=NormFree, settings=(("beta", 0.5),)),
    Idea("norm, β = 1", architecture="batch-topk", change=NormFree, settings=(("beta", 1.0),)),
    Idea(
        "norm: other rows",
        architecture="batch-topk",
        change=NormFree,
        settings=(("beta", 1.0), ("permuted", True)),
    ),
    *(
        Idea(name, change=Tied, settings=(("learns_slope", True),), power=power)
        for name, power in (
            ("learnt slope, p = 1", 1.0),
            ("learnt slope, p = 1/2", 0.5),
            ("learnt slope: p = 0", 0.0),
        )
    ),
    Idea(
        TODAY,
        change=Tied,
        settings=(("learns_slope", True),),
        power=1.0,
        as_today=True,
    ),
    *(
        Idea(name, architecture=architecture, only_planted=True)
        for name, architecture in HALF_RANDOM.items()
    ),
    Idea(FOUR_TIMES, rows=4, only_planted=True),
    Idea(CONTROLS_AGAIN[0], change=Tied, power=1.0, random_directions=True),
    Idea(
        CONTROLS_AGAIN[1],
        architecture="batch-topk",
        change=NormFree,
        settings=(("beta", 0.5), ("permuted", True)),
    ),
    Idea(WHITENED_FOUR_TIMES, "whitening", 0.5, "mixed", rows=4, only_planted=True),
    Idea(RAW, only_planted=True),
)
"""In this order: a control may need to know what became of the idea before it."""
BESIDE = {
    "participation": ("participation: variance",),
    "error": ("error: shuffled",),
    "tied, p = 1/2": ("tied: p = 0", "tied: random directions", FOUR_TIMES),
    "tied, p = 1": ("tied: p = 0", "tied: random directions", FOUR_TIMES),
    "learnt slope, p = 1": ("learnt slope: p = 0",),
    "learnt slope, p = 1/2": ("learnt slope: p = 0",),
    "norm, β = 1/2": ("batch-topk", "norm: other rows"),
    "norm, β = 1": ("batch-topk", "norm: other rows"),
}
"""The controls of each idea."""
BESIDE_AGAIN = {"tied, p = 1": CONTROLS_AGAIN[:1], "norm, β = 1/2": CONTROLS_AGAIN[1:]}


# What recovery is expected to be, relative to another idea's: (place, idea, other, least, most).
EXPECTED: tuple[tuple[str, str, str, float, float], ...] = (
    (PLANTED, WHITENED, "plain", 0.1, inf),
    (PLANTED, "participation", "participation: variance", -1, 0.05),
    (PLANTED, "participation", WHITENED, -1, 0),
    (PLANTED, "error", "plain", -0.05, 0.1),
    (PLANTED, "error", "error: shuffled", -0.05, 0.05),
    (PLANTED, "tied, p = 1/2", "tied: p = 0", 0.1, inf),
    (PLANTED, "tied, p = 1/2", "plain", 0, inf),
    (PLANTED, "tied, p = 1/2", WHITENED, -1, 0),
    (PLANTED, "norm, β = 1", "batch-topk", -0.1, 0.1),
    *(
        (model, idea, WHITENED, -1, 0)
        for model in MODELS
        for idea in ("participation", "error", "tied, p = 1/2", "norm, β = 1")
    ),
    # see AFTER_ONE_SEED
    (PLANTED, "learnt slope, p = 1", WHITENED, 1, inf),
    (PLANTED, "learnt slope, p = 1", "tied, p = 1", -1, 0),
    ("smollm2", "learnt slope, p = 1", WHITENED, 0.2, inf),
    ("smollm2", "learnt slope, p = 1", "learnt slope: p = 0", 0.2, inf),
    # after that, before the first of these
    ("gemma", "learnt slope, p = 1", WHITENED, -1, 0),
    ("gemma", "learnt slope, p = 1", "learnt slope: p = 0", 0.2, inf),
    *(
        (model, idea, control, -0.1, 0.1)
        for model in MODELS
        for idea, control in (
            ("participation", "participation: variance"),
            ("error", "error: shuffled"),
        )
    ),
)


EXPECTED += tuple(  # what is recovered without learning it; written down last
    (PLANTED, idea, "plain", -1, -0.5) for idea in BASELINES
)
EXPECTED += ((PLANTED, "tied, p = 1/2", FOUR_TIMES, 1, inf),)  # before this control was trained
EXPECTED += ((PLANTED, WHITENED_FOUR_TIMES, FOUR_TIMES, 0.1, inf),)  # once that was known
EXPECTED_AGAIN: tuple[tuple[str, str, str, float, float], ...] = tuple(
    (place, idea, other, low, high)
    for place, bounds in {
        PLANTED: ((1, inf), (0.5, inf), (0, inf), (0.5, inf), (0, inf)),
        "smollm2": ((-0.25, 0.15), (0.3, inf), (-0.65, -0.35), (0.15, inf), (0, inf)),
        "gemma": ((-0.45, -0.1), (1, inf), (-1, -0.5), (0.15, inf), (0, inf)),
    }.items()
    for (idea, other), (low, high) in zip(
        (
            ("tied, p = 1", WHITENED),
            ("tied, p = 1", CONTROLS_AGAIN[0]),
            ("norm, β = 1/2", WHITENED),
            ("norm, β = 1/2", CONTROLS_AGAIN[1]),
            (HALFWAY_LEARNT, WHITENED),
        ),
        bounds,
        strict=True,
    )
)
"""Of fresh seeds; written down when seeds 0 to 2 were known, of ``learnt slope`` with p = ½ on
planted data alone."""
AFTER_ONE_SEED = {(PLANTED, "learnt slope, p = 1"), ("smollm2", "learnt slope, p = 1")}
"""Place and idea of which something was expected only when its first seed was known."""


# Of the learnt slope as dictionaries are trained today, beside those of results_free_lengths.py:
# (place, measure, other, least, most). Written down when it had recovered more than whitening with
# rows of length 1 in both streams.
EXPECTED_TODAY = tuple(
    (model, measure, other, low, high)
    for model, bounds in (
        ("smollm2", (("recovered", WHITENED, 0.1, inf), ("kl", WHITENED, 0.25, inf))),
        ("gemma", (("recovered", WHITENED, 0.05, inf), ("kl", WHITENED, 0.05, inf))),
    )
    for measure, other, low, high in bounds
)


class PlantedRows:
    """An ActivationSource in memory: features over a background, and all that is known of them."""

    d_in, features, num_rows, heldout_rows = 64, 256, 300_000, 60_000
    site = Site.parse("blocks.0.hook_resid_post")

    def __init__(self, seed: int):
        draw = np.random.default_rng((17, seed))
        directions = torch.from_numpy(draw.standard_normal((self.features, self.d_in)))
        directions = (directions / directions.norm(dim=1, keepdim=True)).float()
        probability = np.exp(draw.uniform(np.log(1e-3), np.log(3e-2), self.features))
        relative = np.tile([0.5, 0.8, 1.2], self.features)[: self.features]
        spectrum_ = np.arange(1, self.d_in + 1) ** -1.5
        spread = np.sqrt(spectrum_ / spectrum_.sum())
        axes = np.linalg.qr(draw.standard_normal((self.d_in, self.d_in)))[0]
        count = self.num_rows + self.heldout_rows
        background = draw.standard_normal((count, self.d_in), dtype=np.float32)
        background = background @ (spread[:, None] * axes).astype(np.float32)
        strength = relative * float(np.median(np.linalg.norm(background, axis=1)))
        fires = draw.random((count, self.features), dtype=np.float32) < probability
        value = strength * np.exp(0.3 * draw.standard_normal((count, self.features)))
        self.truth = torch.from_numpy(fires * value).float()
        self.rows = torch.from_numpy(background) + self.truth @ directions
        self.plants = Plants(
            directions,
            torch.from_numpy(strength),
            tuple(relative.tolist()),
            torch.from_numpy(probability),
            torch.full((self.features,), -1),
            ("random",) * self.features,
            seed,
        )
        self._seed = seed
        usual = self.rows[:20_000]
        self._statistics = Statistics(self.d_in, 100).update(usual, torch.arange(20_000) % 100)

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
        number = start
        while True:
            draw = torch.Generator().manual_seed(100_000 * seed + number)
            yield self.rows[torch.randint(self.num_rows, (batch_size,), generator=draw)]
            number += 1

    def statistics(self) -> Statistics:
        return self._statistics

    def second_moment(self) -> SecondMoment:
        return SecondMoment(self.d_in).update(self.rows[: self.num_rows])

    def identity(self) -> dict[str, Any]:
        return {"planted": self._seed}

    def heldout(self) -> Iterator[tuple[Tensor, Any]]:
        """Rows that are not trained on, with the firings of the features in them."""
        for begin in range(self.num_rows, len(self.rows), 5000):
            truth = self.truth[begin : begin + 5000]
            row, plant = truth.nonzero(as_tuple=True)
            firings = mock.Mock(row=row, plant=plant, strength=truth[row, plant].numpy())
            yield self.rows[begin : begin + 5000], firings


@contextmanager
def changed(idea: Idea, inputs: RuleInputs, seed: int) -> Iterator[None]:
    """Trainings in the block are the idea's."""
    with ExitStack() as patches:
        kind = idea.change
        for name, value in idea.settings:
            patches.enter_context(mock.patch.object(kind, name, value))
        if kind is not None and issubclass(kind, Arm):
            patches.enter_context(mock.patch.object(one_site, "Arm", kind))
        if kind is not None and issubclass(kind, NormFree):
            patches.enter_context(mock.patch.object(BatchTopK, "codes", _codes_of(kind)))
        if idea.power is not None:
            values, vectors = spectrum(inputs.covariance)
            matrix = (vectors * values**-idea.power) @ vectors.T
            matrix = rotated(matrix, seed) if idea.random_directions else matrix
            matrix = (matrix / matrix.diagonal().mean()).float()
            patches.enter_context(mock.patch.object(Tied, "matrix", matrix, create=True))
        yield


def _codes_of(kind: type[NormFree]) -> Callable[..., RaggedCodes]:
    usual = BatchTopK.codes

    def codes(self: BatchTopK, parameters: Parameters, batch: Batch) -> RaggedCodes:
        divided = kind.divided(batch.x).to(batch.x_fast.dtype)
        return usual(self, parameters, batch._replace(x_fast=divided))

    return codes


def weights_of(idea: Idea, inputs: RuleInputs, seed: int) -> LossWeights:
    """The weights that the training begins with."""
    if idea.rule != "robust-variance":
        return weights_from_rule(idea.rule, idea.alpha, inputs, WeightConfig(place=idea.place))
    # as many effective dimensions as the participation weights had on average
    wanted = float(np.mean(Remembering.dimensions))
    config = WeightConfig(place="loss", anneal=ANNEAL)
    plain_ones = effective_dimensions(weights_from_rule("uniform", 1.0, inputs), inputs.statistics)
    low, high = (0.0, 2.0) if wanted < plain_ones else (-0.5, 0.0)
    for _ in range(40):  # more effective dimensions the smaller α is
        middle = (low + high) / 2
        found = weights_from_rule("robust-variance", middle or 1e-9, inputs, config)
        few = effective_dimensions(found, inputs.statistics) < wanted
        low, high = (low, middle) if few else (middle, high)
    return found


@dataclass(frozen=True)
class Place:
    """Where dictionaries are trained, and how."""

    source: Any
    inputs: RuleInputs
    config: TrainConfig
    k: int
    judge: Any = None
    """Of fidelity."""


def measure(key: str, path: str | None, ideas: Sequence[Idea]) -> None:
    """Train and measure what has no result yet."""
    opened = None
    for seed in (*SEEDS[key], *AGAIN):
        ours = [idea for idea in ideas if idea.is_made(key, seed)]
        missing = {idea.name for idea in ours if not _result(key, idea, seed).exists()}
        if not missing:
            continue
        if key == PLANTED:
            source = PlantedRows(seed)
            inputs = RuleInputs(source.statistics(), second_moment=source.second_moment())
            how = TrainConfig(
                tokens=600_000, batch_size=1024, device="cpu", dtype="float32", lengths="unit"
            )
            place = Place(source, inputs, replace(how, shuffle_seed=seed), k=8)
        else:
            opened = opened or recovery.open_site(key, path)
            how = TrainConfig(tokens=recovery.ROWS, shuffle_seed=seed, lengths="unit")
            place = Place(opened.source, opened.inputs, how, recovery.K, opened.evaluator)
        statistics = place.inputs.statistics
        Remembering.variance = statistics.robust_variance / statistics.robust_variance.mean()
        Remembering.dimensions = []
        for idea in ours:
            # the control of participation needs to know its effective dimensions
            known = idea.name not in missing
            if known and not (idea.change is Participating and missing & {*BESIDE[idea.name]}):
                continue
            found = _measured(key, place, idea, seed)
            if not known:
                write_json(_result(key, idea, seed), plain(found))
        print(f"{key}: seed {seed} measured", flush=True)


def _measured(key: str, place: Place, idea: Idea, seed: int) -> dict[str, Any]:
    weights = weights_of(idea, place.inputs, seed)  # of raw dimensions, whose loss is plain
    arm = ArmConfig(weights, place.k, init_seed=seed, architecture=idea.architecture)
    folder = RUN / "trained" / f"{key}-{IDEAS.index(idea)}-s{seed}"
    how = place.config
    how = replace(how, tokens=idea.rows * how.tokens)
    if idea.as_today:
        how = replace(how, tokens=free_lengths.ROWS, lengths="free")
    with torch.no_grad(), changed(idea, place.inputs, seed):
        if idea.name == RAW:
            dictionary = raw_dimensions(place.inputs, place.source.site, place.k)
        else:
            dictionary = train(place.source, [arm], how, folder)[arm.name]
        if idea.change is not None and issubclass(idea.change, NormFree):
            dictionary.__class__ = DividingDictionary
            dictionary.kind = idea.change
            dictionary.mean = place.inputs.statistics.usual_sample.double().mean(0).float()
        found = measure_recovery(dictionary, place.source)
        rows = torch.cat([rows for rows, _ in place.source.heldout()][:4]).float()
        codes = dictionary.encode_sparse(rows)
        error = (rows - dictionary.decode(codes)).square().sum()
        record = {
            "place": key,
            "idea": idea.name,
            "seed": seed,
            "alpha": weights.alpha,
            # of the loss that it begins with: weights that change in training begin as plain ones
            "dimensions": effective_dimensions(weights, place.inputs.statistics),
            "recovered": found.means()["recovered"],
            "f1": found.means()["f1"],
            "cosine": found.means()["cosine"],
            "dead": found.dead,
            "fvu": float(error / (rows - rows.mean(0)).square().sum()),
            "l0": float((codes.values > 0).sum(1).float().mean()),
            "plants": found.to_dict()["plants"]["recovered"],
        }
        if place.judge is not None:
            summary = place.judge.evaluate({"d": dictionary}).dictionaries["d"].summary()
            record |= {"kl": summary["kl"], "ce": summary["ce_recovered"], "fvu": summary["fvu"]}
    return record


def _result(key: str, idea: Idea, seed: int) -> Path:
    return RUN / "results" / f"{key}.{IDEAS.index(idea)}.s{seed}.json"


def read(key: str) -> list[dict[str, Any]]:
    """The measured dictionaries of a place."""
    return [json.loads(p.read_text()) for p in sorted(RUN.glob(f"results/{key}.*.json"))]


def mean(records: Sequence[dict[str, Any]], idea: str, measure: str) -> float:
    """Over the seeds of an idea."""
    return float(np.mean([r[measure] for r in records if r["idea"] == idea]))


def beside(records: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> dict[Any, Any]:
    """(idea, other) → the difference of what they recover, over seeds and features."""
    known = {(r["idea"], r["seed"]): r for r in records}
    found: dict[tuple[str, str], dict[int, Value]] = {}
    for pair in pairs:
        for seed in {r["seed"] for r in records}:
            ours, theirs = (known.get((name, seed)) for name in pair)
            if ours and theirs:
                values = [_value(ours), _value(theirs)]
                difference = Value.mixture(list(zip((1.0, -1.0), values, strict=True)))
                found.setdefault(pair, {})[seed] = difference
    return estimates(found)


def _value(record: dict[str, Any]) -> Value:
    items = {str(n): float(v) for n, v in enumerate(record["plants"]) if v is not None}
    return Value(sum(items.values()) / len(items), 0.0, items)


def tables() -> Iterator[str]:
    """A table for each place, and what was expected."""
    outcomes = [["place", "expected", "measured", ""]]
    names = sorted((one.name for one in IDEAS), key=lambda name: name in BASELINES)

    def expect(
        title: str, words: str, low: float, high: float, of: Sequence[dict[str, Any]],
        idea: str, other: str, measure_: str,
    ) -> None:  # fmt: skip
        cells = ["not measured", "–"]
        if {idea, other} <= {r["idea"] for r in of}:
            share = mean(of, idea, measure_) / mean(of, other, measure_) - 1
            cells = [f"{100 * share:+.0f} %", "yes" if low <= share <= high else "**no**"]
        outcomes.append([title, f"{words}: {_bounds(low, high)}", *cells])

    for key in (PLANTED, *MODELS):
        every = [record for record in read(key) if record["idea"] != TODAY]
        records = [record for record in every if record["seed"] in SEEDS[key]]
        again = [record for record in every if record["seed"] in AGAIN]
        title = "planted data" if key == PLANTED else recovery.PLACES[key].title
        baselines = {} if key == PLANTED else recovery.means_of_baselines(key, recovery.ROWS)
        if records:
            yield f"{title[0].upper()}{title[1:]}, {len({r['seed'] for r in records})} seeds:"
            records += [] if key == PLANTED else _four_times(key)
            yield _table(records, names, BESIDE, baselines)
            yield from _matched(records)
        if again:
            yield f"The same with fresh seeds, {AGAIN[0]} to {AGAIN[-1]}:"
            yield _table(again, names, BESIDE_AGAIN, baselines)
        for place, idea, other, low, high in EXPECTED:
            if place == key:
                late = " (written after its first seed)" if (place, idea) in AFTER_ONE_SEED else ""
                words = f"{idea} beside {other}, recovered plants{late}"
                expect(title, words, low, high, records, idea, other, "recovered")
        for place, idea, other, low, high in EXPECTED_AGAIN:
            if place == key:
                words = f"fresh seeds: {idea} beside {other}, recovered plants"
                expect(title, words, low, high, again, idea, other, "recovered")
    for key in MODELS:
        records = [record for record in read(key) if record["idea"] == TODAY]
        seeds = {record["seed"] for record in records}
        title = f"{recovery.PLACES[key].title}, as dictionaries are trained today"
        if seeds:
            records = [one for one in _as_today(key) if one["seed"] in seeds] + records
            yield f"{title}, {len(seeds)} seeds:"
            baselines = recovery.means_of_baselines(key, free_lengths.ROWS)
            yield _table(records, [*AS_TODAY.values(), TODAY], {}, baselines)
        for place, measure_, other, low, high in EXPECTED_TODAY:
            if place == key:
                what = {"recovered": "recovered plants", "kl": "KL"}[measure_]
                words = f"learnt slope beside {other}, {what}"
                expect(title, words, low, high, records, TODAY, other, measure_)
    yield markdown(outcomes)


def _matched(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Effective dimensions of the weights that change: the control's, which has as many."""
    plain_ones, control = (
        [r["dimensions"] for r in records if r["idea"] == idea]
        for idea in ("plain", *BESIDE["participation"])
    )
    if control:
        yield (
            f"Effective dimensions: plain {np.mean(plain_ones):.1f}; `participation`, on average "
            f"over its training, {min(control):.1f} to {max(control):.1f} by seed, and its control "
            "as many."
        )


AS_TODAY = {
    "uniform-k32": "plain",
    "whitening-a0.5-k32": WHITENED,
    "variance-a-0.5-k32": "inverse variance",
}
"""Dictionaries of ``results_free_lengths.py`` that stand beside the last idea, by label."""


def _as_today(key: str) -> Iterator[dict[str, Any]]:
    """Their records, as those of ideas."""
    for name, record in archived(free_lengths.ARCHIVE).items():
        if name.startswith(f"results/{key}.") and record["label"] in AS_TODAY:
            yield recovery.numbers(record) | {
                "idea": AS_TODAY[record["label"]],
                "seed": record["seed"],
                "plants": record["planted"]["plants"]["recovered"],
                "l0": record["fidelity"]["l0"],
            }


def _four_times(key: str) -> list[dict[str, Any]]:
    """Dictionaries of ``results_whitening.py`` with four times the rows, as an idea's."""
    setting = f"{4 * recovery.ROWS:,} rows"
    ideas = {"uniform-k32": FOUR_TIMES, "whitening-a0.5-mixed-k32": WHITENED_FOUR_TIMES}
    return [
        record["numbers"]
        | {"idea": ideas[record["label"]], "seed": record["seed"], "plants": record["recovered"]}
        for name, record in archived(WHITENING).items()
        if name.startswith(f"results/length.{key}.")
        and record["setting"] == setting
        and record["label"] in ideas
    ]


def _table(
    records: Sequence[dict[str, Any]],
    names: Sequence[str],
    controls_of: Mapping[str, Sequence[str]],
    baselines: recovery.Means,
) -> str:
    """Means over seeds, in the order of the names, beside whitening and each idea's controls; below
    them what is recovered without learning it."""
    pairs = [(name, WHITENED) for name in names if name not in (WHITENED, *BASELINES)]
    pairs += [(idea, other) for idea, others in controls_of.items() for other in others]
    found = beside(records, pairs)
    rows = [["", "seeds", "recovered", "F1", "FVU", "KL", "L0", "dead %", "beside whitening",
             "beside its controls"]]  # fmt: skip
    for idea in names:
        if not (seeds := {r["seed"] for r in records if r["idea"] == idea}):
            continue
        own = [mean(records, idea, name) for name in ("recovered", "f1", "fvu")]
        controls = "; ".join(
            recovery.text_of(found.get((idea, other))) for other in controls_of.get(idea, ())
        )
        rows.append(
            [
                idea,
                str(len(seeds)),
                *(f"{one:.3f}" for one in own),
                f"{mean(records, idea, 'kl'):.3f}" if "kl" in records[0] else "–",
                f"{mean(records, idea, 'l0'):.1f}",
                f"{100 * mean(records, idea, 'dead'):.0f}",
                recovery.text_of(found.get((idea, WHITENED))),
                controls or "–",
            ]
        )
    for label, of in baselines.items():
        numbers = [f"{of[name]:.3f}" for name in ("recovered", "f1", "fvu", "kl")]
        rows.append([f"`{label}`", "–", *numbers, "–", f"{100 * of['dead']:.0f}", "–", "–"])
    return markdown(rows)


def _bounds(low: float, high: float) -> str:
    if low <= -1:
        return f"at most {100 * high:+.0f} %"
    return (
        f"at least {100 * low:+.0f} %"
        if high == inf
        else f"{100 * low:+.0f} to {100 * high:+.0f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key in MODELS:
        parser.add_argument(f"--{key}", help="the model, if it is to be measured")
    parser.add_argument("--places", nargs="+", choices=SEEDS, default=list(SEEDS))
    names = [idea.name for idea in IDEAS]
    parser.add_argument("--ideas", nargs="+", choices=names, default=names)
    asked = parser.parse_args()
    if ARCHIVE.exists():
        unpack(ARCHIVE, RUN)
    for key in asked.places:
        path = getattr(asked, key, None)
        if key == PLANTED or path:
            measure(key, path, [idea for idea in IDEAS if idea.name in asked.ideas])
            pack(RUN, ARCHIVE)
    write_result("rules", "\n\n".join(tables()))


if __name__ == "__main__":
    main()
