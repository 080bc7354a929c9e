"""One arm of a training: a dictionary being trained, its optimiser, and how its dead latents are
found and revived. ``make_arms`` gives all arms that a user asks for."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.errors import UsageError
from llm_wsae.machine.hardware import exact_dtype
from llm_wsae.outside import check_numbers
from llm_wsae.sparse.codes import (
    Gradients,
    Latents,
    Product,
    RawRows,
    SparseGradients,
    SubsetGradients,
)
from llm_wsae.sparse.operations import adam, adam_vector, dead_gradients, encode_dead
from llm_wsae.training.architecture import (
    Architecture,
    Batch,
    Parameters,
    Step,
    error_weights,
    squared,
    times,
)
from llm_wsae.training.architectures import architecture_names, find_architecture
from llm_wsae.training.config import SPACE_RATE, ArchitectureName, Lengths
from llm_wsae.training.normaliser import Space
from llm_wsae.training.strategy import SINGLE, Strategy
from llm_wsae.weights.loss_weights import Gamma, LossWeights

PAIR_BYTES = 2 * 3 * 4
"""Of a weight of the encoder and one of the decoder: each in float32, with its two moments."""
INITIAL_LENGTH = 0.1  # of free v and e; SAELens' value
_ERROR_ROWS = 512  # of a batch, transformed back from a space to estimate the true error
_TILE_BYTES = 16 * 2**20  # of a tile's rows × dead latents, which are held twice
_FEWEST_ROWS, _MOST_ROWS = 256, 1024
_MULTIPLE = 64  # of it, with zeros, is the number of latents in products on a CPU
_SEARCHES_PER_DEATH = 16  # on a GPU: searches in the time after which a latent counts as dead


@dataclass(frozen=True)
class ArmConfig:
    """What distinguishes one arm of a training from the others. Raises UsageError for an unknown
    architecture, or one whose ``k`` or ``l1`` is not as it should be."""

    weights: LossWeights
    """Loss weights γ, normalised for the site."""
    k: int | None = None
    """Active latents in a row, in every one or on average; not for ReLU."""
    l1: float = 0.0
    """L1 coefficient, for ReLU only."""
    init_seed: int = 0
    """Seed of the initial weights."""
    architecture: ArchitectureName = "topk"
    """One of ``architecture_names()``."""

    def __post_init__(self) -> None:
        check_numbers(self, l1=0)
        takes_k = self.kind.setting == "k"
        if takes_k == (self.k is None) or (takes_k and self.l1):
            needs = "k and no L1 coefficient" if takes_k else "an L1 coefficient and no k"
            raise UsageError(f"the architecture {self.architecture} needs {needs}")

    @property
    def kind(self) -> type[Architecture]:
        """The class of the architecture."""
        return find_architecture(self.architecture)

    @property
    def level(self) -> int | float:
        """``k`` or ``l1``, whichever sets the sparsity."""
        return getattr(self, self.kind.setting)

    @property
    def name(self) -> str:
        """Folder name of the arm: weights, sparsity, and the seed unless it is 0."""
        seed = f"-s{self.init_seed}" if self.init_seed else ""
        return f"{self.weights.name}-{self.kind.label(self.level)}{seed}"

    def lengths(self, asked: Lengths) -> Literal["free", "unit"]:
        """Those of the decoder rows in training. Raises UsageError if they cannot be free."""
        if asked == "free" and not self.kind.has_free_lengths:
            free = [n for n in architecture_names() if find_architecture(n).has_free_lengths]
            which = f"these have: {', '.join(free)}"
            raise UsageError(f"the architecture {self.architecture} has no free lengths; {which}")
        return "free" if asked != "unit" and self.kind.has_free_lengths else "unit"

    def rate(self, lengths: Lengths) -> float:
        """How many times the usual learning rate, if none is asked for."""
        is_free = self.lengths(lengths) == "free"
        return SPACE_RATE if self.weights.config.in_space and is_free else 1.0

    def check(self, d_sae: int) -> None:
        """Raise UsageError if a dictionary of ``d_sae`` latents cannot have k active ones."""
        if self.k is not None:
            TopK(self.k).check(d_sae)

    def identity(self, lengths: Lengths = "auto") -> dict[str, Any]:
        """What a checkpoint must agree on, as JSON."""
        return {
            "rule": self.weights.rule.name,
            "alpha": self.weights.alpha,
            "gamma_sum": float(self.weights.gamma.double().sum()),
            "weights": asdict(self.weights.config),
            "k": self.k,
            "l1": self.l1,
            "seed": self.init_seed,
            "architecture": self.architecture,
            "lengths": self.lengths(lengths),
        }


class DeadLatents(NamedTuple):
    """Latents that have not fired for long, as indices among this process's latents."""

    indices: Int[Tensor, " some"]  # the dead ones, and possibly some that are not dead
    dead: Bool[Tensor, " some"] | None = None  # which of them are dead; None if all


class DeadFinder:
    """Finds the dead latents of one arm. A GPU is asked for their number only now and then, since
    that means waiting. The search then includes latents that may die before the next one, and a
    mask says which are dead in a step."""

    def __init__(self, device: torch.device):
        self._waits = device.type != "cpu"
        self._found = torch.empty(0, dtype=torch.int64, device=device)
        self._until = -1  # ``_found`` has all dead latents until this many rows have been seen

    def find(
        self, last_fired: Int[Tensor, " latents"], rows_seen: int, dead_after: int
    ) -> DeadLatents:
        """The latents that have not fired for ``dead_after`` rows."""
        if not self._waits:
            return DeadLatents((rows_seen - last_fired > dead_after).nonzero().flatten())
        if rows_seen > self._until:
            self._until = rows_seen + dead_after // _SEARCHES_PER_DEATH
            self._found = (self._until - last_fired > dead_after).nonzero().flatten()
        return DeadLatents(self._found, rows_seen - last_fired[self._found] > dead_after)


def auxk_gradients(
    parameters: Parameters,
    batch: Batch,
    residual: Float[Tensor, "batch d_in"],
    latents: DeadLatents,
    metric: Gamma,
    coefficient: float,
    strategy: Strategy = SINGLE,
) -> SubsetGradients | None:
    """AuxK (Gao et al. 2024, §A.2): dead latents learn to explain what the others leave over.

    Gradients of coefficient · ‖Γ(e − ê)‖² / ‖Γe‖² by the weights of ``latents``; None if none is
    dead. e = x − x̂ is a constant here, and ê has no bias: b_dec is already part of x̂. In each row
    the d_in / 2 dead latents with the largest pre-activations take part, or more where they tie:
    too many for sparse products to be faster. ``metric`` is what ``squared`` gives of Γ.
    """
    indices, exact, fast = latents.indices, residual.dtype, batch.x_fast.dtype
    num_dead = len(indices)
    if strategy.shares_latents:
        num_dead = int(strategy.sum_over_latents(torch.tensor(num_dead)))
    if num_dead == 0:
        return None
    # For every new shape of a product oneDNN generates code, and keeps about a quarter of a
    # megabyte for good. Zeros round the number up; they change no result.
    multiple = _MULTIPLE if residual.device.type == "cpu" else 1
    spare = -len(indices) % multiple
    encoder, decoder, bias = (_filled(part[indices].to(fast), spare) for part in parameters[:3])
    dead = None if latents.dead is None else _filled(latents.dead, spare)
    k_aux = min(num_dead, max(1, batch.x.shape[1] // 2))
    held = (num_dead + -num_dead % multiple) * fast.itemsize
    size = min(_MOST_ROWS, max(_FEWEST_ROWS, _TILE_BYTES // held))
    tiles = [slice(start, start + size) for start in range(0, len(residual), size)]
    unexplained = residual.new_zeros(())
    for rows in tiles:
        errors = (times(residual[rows], metric) * residual[rows]).sum(1)
        unexplained += errors @ batch.mask[rows]
    by_error = metric * (2 * coefficient / strategy.sum_over_rows(unexplained).clamp(min=1e-12))
    zeros = (torch.zeros_like(part, dtype=exact) for part in (encoder, decoder, bias))
    sums = SubsetGradients(indices, *zeros)
    for rows in tiles:
        x, mask = batch.x_fast[rows], batch.mask[rows, None]
        largest = encode_dead(Product(x, encoder, bias), dead, k_aux)
        active = strategy.keep_largest(largest, k_aux)
        # residual is x̂ − x = −e, so ê − e = active · decoder + residual
        decoded = strategy.sum_over_latents((active @ decoder).to(exact))
        error = decoded.add_(residual[rows]).mul_(mask)
        dead_gradients(active, x, decoder, times(error, by_error).to(fast), sums)
    return SubsetGradients(indices, *(part[: len(indices)] for part in sums[1:]))


def _filled(part: Tensor, spare: int) -> Tensor:
    """The tensor with ``spare`` rows of zeros appended."""
    return torch.cat([part, part.new_zeros(spare, *part.shape[1:])]) if spare else part


def initial_parameters(
    d_in: int,
    d_sae: int,
    seed: int,
    device: torch.device,
    own: range | None = None,
    is_transcoder: bool = False,
) -> Parameters:
    """Random unit decoder rows, the encoder equal to them, biases 0; only of the latents ``own``,
    which are the same whatever others there are. A transcoder, whose output is no copy of its
    input, has an encoder drawn by itself: fewer latents die."""
    generator, own = torch.Generator().manual_seed(seed), own or range(d_sae)

    def drawn() -> Tensor:
        rows = torch.randn(d_sae, d_in, generator=generator)[own.start : own.stop]
        return rows / rows.norm(dim=1, keepdim=True)

    decoder = drawn()
    encoder = drawn() if is_transcoder else decoder.clone()
    biases = (torch.zeros(size, device=device) for size in (len(own), d_in))
    return Parameters(encoder.to(device), decoder.to(device), *biases)


class Optimiser:
    """Adam for one arm, float32. Decoder rows have norm 1, or lengths of their own while they
    train, as SAELens' do. Then Adam moves raw rows v and e, and a raw bias b. With L the length of
    v, the latent has the decoder row v/L, the encoder row L·e and the bias L·b; only these are seen
    elsewhere."""

    def __init__(self, parameters: Parameters, free_lengths: bool = False):
        """With free lengths it weakens the encoder, in place."""
        self._parameters = parameters
        self._means = Parameters(*map(torch.zeros_like, parameters))
        self._squares = Parameters(*map(torch.zeros_like, parameters))
        self._steps = 0
        self._encoder_fast: Tensor | None = None
        self._lengths: Tensor | None = None
        if free_lengths:
            self._lengths = torch.full_like(parameters.encoder_bias, INITIAL_LENGTH)
            parameters.encoder.mul_(INITIAL_LENGTH**2)

    def encoder(self, dtype: torch.dtype) -> Float[Tensor, "d_sae d_in"]:
        """The encoder in the dtype of the products; float32 is the master itself."""
        encoder = self._parameters.encoder
        if dtype == encoder.dtype:
            return encoder
        if self._encoder_fast is None or self._encoder_fast.dtype != dtype:
            self._encoder_fast = encoder.to(dtype)
        return self._encoder_fast

    def round_encoder(self) -> None:
        """Take in that the encoder was changed by other means than a step."""
        if self._encoder_fast is not None:
            self._encoder_fast.copy_(self._parameters.encoder)

    def step(
        self,
        by_weights: SparseGradients | Gradients,
        by_decoder_bias: Float[Tensor, " d_in"],
        learning_rate: float,
    ) -> None:
        """Update the parameters in place; decoder rows have norm 1 again afterwards."""
        self._steps += 1
        bias, now = self._parameters.encoder_bias, (self._steps, learning_rate)
        weights = (*self._parameters[:2], *self._means[:2], *self._squares[:2])
        latents = Latents(*weights, self._encoder_fast)
        raw = before = None
        if self._lengths is not None:
            raw, before = RawRows(self._lengths, bias), self._lengths.clone()
        by_bias = adam(latents, by_weights, *now, raw)
        if before is not None:
            bias.div_(before)
            by_bias = by_bias * before
        for index, gradient in ((2, by_bias), (3, by_decoder_bias)):
            moments = self._means[index], self._squares[index]
            adam_vector(self._parameters[index], gradient, *moments, *now)
        if self._lengths is not None:
            bias.mul_(self._lengths)

    def state(self) -> dict[str, Tensor]:
        """The moments and the number of steps, named as in torch.optim.Adam, and the lengths L."""
        steps = torch.tensor(float(self._steps))
        return self._held() | {f"{name}.step": steps.clone() for name in Parameters._fields}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``, after the parameters themselves have been restored."""
        for name, held in self._held().items():
            held.copy_(tensors[name])
        self._steps = int(tensors["encoder.step"])
        self._encoder_fast = None

    def _held(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {} if self._lengths is None else {"decoder.length": self._lengths}
        for name, mean, square in zip(Parameters._fields, self._means, self._squares, strict=True):
            held |= {f"{name}.exp_avg": mean, f"{name}.exp_avg_sq": square}
        return held


class Pull(NamedTuple):
    """A loss of reconstructions, and its gradient by them as normalised rows."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, "batch d_in"]


class Skip:
    """The affine skip of a transcoder, W_skip [d_in, d_in], started at zero (Paulo, Shabalin &
    Belrose 2025, arXiv 2501.18823), with its Adam. The latents learn what it leaves over."""

    def __init__(self, d_in: int, device: torch.device):
        zeros = (torch.zeros(d_in, d_in, device=device) for _ in range(3))
        self.weight, self._mean, self._square = zeros
        self._steps = 0

    def rest(self, batch: Batch) -> Batch:
        """The batch with what is left for the latents as its target."""
        through = (batch.x_fast @ self.weight.T.to(batch.x_fast.dtype)).to(batch.y.dtype)
        return batch._replace(target=batch.y - through)

    def gradient(self, step: Step, batch: Batch, metric: Gamma) -> Float[Tensor, "d_in d_in"]:
        """Of the loss of a step, over the rows that are here."""
        by_output = times(step.residual, error_weights(batch.num_rows, metric))
        return (by_output.to(batch.x_fast.dtype).T @ batch.x_fast).to(step.residual.dtype)

    def step(self, gradient: Float[Tensor, "d_in d_in"], learning_rate: float) -> None:
        """One step of Adam."""
        self._steps += 1
        adam_vector(self.weight, gradient, self._mean, self._square, self._steps, learning_rate)

    def state(self) -> dict[str, Tensor]:
        """What a resumed training needs."""
        return self._held() | {"skip.step": torch.tensor(float(self._steps))}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        for name, held in self._held().items():
            held.copy_(tensors[name])
        self._steps = int(tensors["skip.step"])

    def _held(self) -> dict[str, Tensor]:
        moments = {"skip.exp_avg": self._mean, "skip.exp_avg_sq": self._square}
        return {"skip.weight": self.weight, **moments}


class Arm:
    """Parameters, optimiser state and counters of one arm on a device."""

    def __init__(
        self,
        config: ArmConfig,
        d_in: int,
        d_sae: int,
        device: torch.device,
        space: Space | None = None,
        strategy: Strategy = SINGLE,
        lengths: Lengths = "auto",
        skip: bool = False,
        is_transcoder: bool = False,
    ):
        """``space`` may be shared with other arms of the same weights; ``skip``: whether a
        transcoder has an affine skip."""
        config.check(d_sae)
        weights = config.weights
        if weights.config.in_space and space is None:
            space = Space(weights.gamma, device)
        self.config, self.d_sae, self.space = config, d_sae, space
        self._full_gamma = weights.gamma.to(device, torch.float32)
        if space is not None:
            self._full_gamma = torch.ones(d_in, dtype=torch.float32, device=device)
        self.gamma = self._full_gamma
        self.metric = squared(self.gamma)
        self.own_latents = strategy.own_latents(d_sae)
        """The latents that are here: all, unless other processes hold some."""
        self._strategy = strategy
        own, seed = self.own_latents, config.init_seed
        self.parameters = initial_parameters(d_in, d_sae, seed, device, own, is_transcoder)
        self.architecture = config.kind(config.level, d_sae, device, strategy)
        self.architecture.tie(self.parameters)
        self.last_fired = torch.zeros(len(own), dtype=torch.int64, device=device)
        self._finder = DeadFinder(device)
        self.lengths = config.lengths(lengths)
        self._optimiser = Optimiser(self.parameters, self.lengths == "free")
        self.skip = Skip(d_in, device) if skip else None
        self._sums = self._no_sums()

    def step(
        self,
        batch: Batch,
        rows_seen: int,
        learning_rate: float,
        aux: float,
        dead_after: int,
        pull: Pull | None = None,
    ) -> None:
        """One optimiser step. ``rows_seen`` counts all rows up to and including this batch; ``aux``
        is the coefficient of AuxK's loss, 0 for none, and ``dead_after`` how many rows without
        firing make a latent dead; ``pull``: of a further loss, which counts as much as the error.
        """
        strategy, architecture = self._strategy, self.architecture
        with torch.no_grad():
            batch = batch if self.skip is None else self.skip.rest(batch)
            step = measured = self.evaluate(batch)
            if pull is not None:
                batch = self._pulled(batch, step.residual, pull)
                step = self.evaluate(batch)
            by_skip = None if self.skip is None else self.skip.gradient(step, batch, self.metric)
            if aux > 0 and architecture.revives_dead:
                dead = self._finder.find(self.last_fired, rows_seen, dead_after)
                residual, metric = step.residual, self.metric
                more = auxk_gradients(self.parameters, batch, residual, dead, metric, aux, strategy)
                assert isinstance(step.by_weights, SparseGradients)
                step = step._replace(by_weights=step.by_weights._replace(more=more))
            if strategy.shares_rows:
                sums = step.summed()
                step = step._replace(by_weights=sums)
                shared = [*sums, step.by_decoder_bias, step.firings, step.loss]
                strategy.sum_over_rows_(shared if by_skip is None else [*shared, by_skip])
            step = architecture.through_tie(step, self.parameters)
            self.last_fired.masked_fill_(step.firings > 0, rows_seen)
            # before the optimiser: it may ask the device for a number, which the optimiser's work
            # then hides
            architecture.follow(step.observed, learning_rate)
            self._optimiser.step(step.by_weights, step.by_decoder_bias, learning_rate)
            if self.skip is not None and by_skip is not None:
                self.skip.step(by_skip, learning_rate)
            if architecture.tie(self.parameters):
                self._optimiser.round_encoder()
            self._record(measured if pull is not None else step, batch)

    def anneal(self, done: float) -> None:
        """Move γ linearly towards 1, if it is annealed; ``done`` is the share of steps taken."""
        if share := self.config.weights.config.anneal:
            one = torch.ones_like(self._full_gamma)
            if one.ndim == 2:
                one = torch.eye(len(one), device=one.device)
            self.gamma = torch.lerp(self._full_gamma, one, min(1.0, done / share))
            self.metric = squared(self.gamma)

    def evaluate(self, batch: Batch) -> Step:
        """Loss and gradients on a batch, changing nothing."""
        encoder = self._optimiser.encoder(batch.x_fast.dtype)
        parameters = self.parameters._replace(encoder=encoder)  # in the products' number format
        return self.architecture.step(parameters, batch, self.metric)

    def reconstruct(self, batch: Batch) -> Float[Tensor, "batch d_in"]:
        """What the rows of a batch become, as normalised rows; masked ones mean nothing."""
        with torch.no_grad():
            rest = batch if self.skip is None else self.skip.rest(batch)
            found = self.evaluate(rest).residual + batch.y
            return found if self.space is None else self.space.leave(found)

    def _pulled(self, batch: Batch, residual: Tensor, pull: Pull) -> Batch:
        """With such targets that the gradient of the error by ŷ is that of the error and of the
        other loss, scaled to the error's size: 2Γ²(ŷ − y′)/nd = 2Γ²(ŷ − y)/nd + c·g."""
        gradient = pull.gradient if self.space is None else self.space.pull(pull.gradient)
        weights = error_weights(batch.num_rows, self.metric)
        error = (times(residual, weights) * residual).sum() / 2
        wanted = gradient * (error / pull.loss.clamp(min=1e-9))
        shift = wanted / weights if weights.ndim == 1 else torch.linalg.solve(weights, wanted.T).T
        return batch._replace(target=batch.y - shift)

    def dead(self, rows_seen: int, dead_after: int) -> Tensor:
        """Which latents have not fired for ``dead_after`` rows. [d_sae] bool."""
        return rows_seen - self.last_fired > dead_after

    def _record(self, step: Step, batch: Batch) -> None:
        rows = batch.mask.sum()
        if self.space is None:
            squared_error = torch.linalg.vector_norm(step.residual) ** 2
        else:  # of the normalised rows, estimated from some of them
            error = torch.linalg.vector_norm(self.space.leave(step.residual[:_ERROR_ROWS])) ** 2
            squared_error = error * (rows / batch.mask[:_ERROR_ROWS].sum().clamp(min=1))
        rows, squared_error = self._strategy.sum_over_rows(torch.stack([rows, squared_error]))
        self._sums["loss"] += step.loss * rows
        self._sums["squared_error"] += squared_error
        self._sums["firings"] += self._strategy.sum_over_latents(step.firings.sum())
        self._sums["rows"] += rows

    def _no_sums(self) -> dict[str, Tensor]:
        """Sums over the steps since they were last read, on the device."""
        exact, names = exact_dtype(self.gamma.device), ("loss", "squared_error", "firings", "rows")
        return {name: self.gamma.new_zeros((), dtype=exact) for name in names}

    def read_progress(self, rows_seen: int, dead_after: int, variance: float) -> dict[str, float]:
        """Means since the last call; resets the sums. ``variance`` is E‖x − mean‖² of the rows."""
        sums = {name: float(value) for name, value in self._sums.items()}
        self._sums, rows = self._no_sums(), max(1.0, sums["rows"])
        dead = self._strategy.sum_over_latents(self.dead(rows_seen, dead_after).sum())
        return {
            "loss": sums["loss"] / rows,
            "fvu": sums["squared_error"] / rows / variance,
            "l0": sums["firings"] / rows,
            "dead": float(dead) / self.d_sae,
        }

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed training needs, as tensors."""
        skip = {} if self.skip is None else self.skip.state()
        return self._held() | self._optimiser.state() | self.architecture.state() | skip

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        self._finder = DeadFinder(self.last_fired.device)
        for name, held in self._held().items():
            held.copy_(tensors[name])
        self._optimiser.load_state(tensors)
        self.architecture.load_state(tensors)
        if self.skip is not None:
            self.skip.load_state(tensors)

    def _held(self) -> dict[str, Tensor]:
        sums = {f"progress.{name}": value for name, value in self._sums.items()}
        return {**self.parameters._asdict(), "last_fired": self.last_fired, **sums}


def make_arms(
    weights: Iterable[LossWeights],
    ks: Sequence[int],
    l1s: Sequence[float] = (),
    init_seeds: Sequence[int] = (0,),
    architectures: Sequence[ArchitectureName] = ("topk",),
) -> list[ArmConfig]:
    """Every combination of weights, architectures, their sparsities and seeds; baselines come last,
    and are plain where there are plain weights. ``relu`` need not be listed when there are ``l1s``.
    Raises UsageError for ``relu`` without L1 coefficients, or a negative one."""
    with_l1 = [name for name in architectures if find_architecture(name).setting == "l1"]
    if l1s and not with_l1:
        architectures = (*architectures, "relu")
    elif with_l1 and not l1s:
        raise UsageError(f"the architecture {with_l1[0]} needs at least one L1 coefficient (--l1)")
    weights, arms = list(weights), []
    has_plain = any(w.rule.is_plain for w in weights)
    for seed, w, name in product(init_seeds, weights, architectures):
        kind = find_architecture(name)
        if kind.is_baseline and has_plain and not w.rule.is_plain:
            continue
        if kind.setting == "k":
            arms += [ArmConfig(w, k=k, init_seed=seed, architecture=name) for k in ks]
        else:
            arms += [ArmConfig(w, l1=l1, init_seed=seed, architecture=name) for l1 in l1s]
    return sorted(arms, key=lambda arm: arm.kind.is_baseline)
