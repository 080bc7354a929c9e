"""One arm of a training: a dictionary in the making, its optimiser and dead-latent counters."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.sparsity import JumpReLU, ReLU, Sparsity, TopK
from llm_wsae.hardware import exact_dtype
from llm_wsae.sparse.slot_capacity import SlotCapacity
from llm_wsae.training.architectures.batch_topk import RunningThreshold, batch_topk_step
from llm_wsae.training.architectures.jumprelu import LearntThreshold, jumprelu_step
from llm_wsae.training.architectures.matryoshka import matryoshka_step
from llm_wsae.training.architectures.relu import ActiveShare, relu_step
from llm_wsae.training.architectures.topk import topk_step
from llm_wsae.training.auxk import DeadFinder, auxk_gradients
from llm_wsae.training.config import Architecture
from llm_wsae.training.normaliser import Space, Spaces, inverse
from llm_wsae.training.optimiser import Optimiser
from llm_wsae.training.parallel.strategy import ALONE, Split
from llm_wsae.training.parameters import Batch, Parameters, Step, initial_parameters
from llm_wsae.weights.config import WeightConfig
from llm_wsae.weights.loss_weights import Gamma, LossWeights

_ERROR_ROWS = 512  # of a batch, brought back from a space to tell the true error


@dataclass(frozen=True)
class ArmConfig:
    """What sets one arm of a training apart from the others."""

    weights: LossWeights
    """Loss weights γ, normalised for the site."""
    k: int | None = None
    """Active latents in a row, of every architecture but ReLU; None makes a ReLU arm."""
    l1: float = 0.0
    """L1 coefficient of a ReLU arm."""
    init_seed: int = 0
    """Seed of the initial weights."""
    architecture: Architecture = "topk"
    """What keeps the active latents to k; without k it means nothing."""

    @property
    def name(self) -> str:
        """Folder name of the arm: weights, sparsity, and the seed unless it is 0."""
        prefix = "" if self.architecture == "topk" else f"{self.architecture}-"
        sparsity = f"relu-l{self.l1:g}" if self.k is None else f"{prefix}k{self.k}"
        return f"{self.weights.name}-{sparsity}" + (f"-s{self.init_seed}" if self.init_seed else "")

    def kind(self) -> dict[str, Any]:
        """The architecture and its number, for a dictionary to remember."""
        if self.k is None:
            return {"architecture": "relu", "l1": self.l1}
        return {"architecture": self.architecture, "k": self.k}

    @property
    def sparsity(self) -> Sparsity:
        """The sparsity of the finished dictionary: thresholds stand for a selection in a batch."""
        if self.k is None:
            return ReLU()
        return TopK(self.k) if self.architecture == "topk" else JumpReLU()

    @property
    def revives(self) -> bool:
        """Whether dead latents get the AuxK loss: where others keep them from being selected."""
        return self.k is not None and self.architecture != "jumprelu"

    def check(self, d_sae: int) -> None:
        """Raise UsageError if a dictionary of ``d_sae`` latents cannot have so few or so many."""
        if self.k is not None:
            TopK(self.k).check(d_sae)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on, as JSON."""
        gamma, config = self.weights.gamma.double(), self.weights.config
        total = float(gamma.sum())
        return {
            "rule": self.weights.rule.name,
            "alpha": self.weights.alpha,
            # a matrix comes out of a decomposition, whose last digits hang on the machine
            "gamma_sum": float(f"{total:.6g}") if gamma.ndim == 2 else total,
            "weights": None if config == WeightConfig() else asdict(config),
            "k": self.k,
            "l1": self.l1,
            "seed": self.init_seed,
            # TopK and ReLU were there before the name was: their trainings still go on
            "architecture": None if isinstance(self.sparsity, TopK | ReLU) else self.architecture,
        }


@dataclass
class Progress:
    """Sums over the steps since they were last read; tensors, so that reading is the only sync."""

    loss: Tensor
    squared_error: Tensor
    firings: Tensor
    rows: Tensor


class Arm:
    """Parameters, optimiser state and counters of one arm on a device."""

    def __init__(
        self,
        config: ArmConfig,
        d_in: int,
        d_sae: int,
        device: torch.device,
        space: Space | None = None,
        split: Split = ALONE,
    ):
        """``space`` may be shared with other arms; ``split`` is that of the batches."""
        config.check(d_sae)
        self.config = config
        self.space = space or Spaces(device).of(config.weights)
        """Batches are handed in there; None is the plain one."""
        self._full_gamma = config.weights.gamma.to(device, torch.float32)
        self.gamma = (
            self._full_gamma
            if self.space is None
            else torch.ones(d_in, dtype=torch.float32, device=device)
        )
        self.d_sae, own = d_sae, split.own_latents(d_sae)
        self.own_latents = own
        """Those that are here; all, unless other processes have some."""
        self._split = split
        self.parameters = initial_parameters(d_in, d_sae, config.init_seed, device, own=own)
        self.memory = _memory(config, d_sae, device, len(own))
        self._room = SlotCapacity()
        self.last_fired = torch.zeros(len(own), dtype=torch.int64, device=device)
        self._finder = DeadFinder(device)
        self._optimiser = Optimiser(self.parameters)
        self.progress = self._no_progress()

    def step(
        self, batch: Batch, rows_seen: int, learning_rate: float, aux: float, dead_after: int
    ) -> None:
        """One optimiser step. ``rows_seen`` counts all rows up to and including this batch.

        On a GPU the device always has work: what must be known of it is read when it has been told
        to do more, and once in the first step. Several processes wait for each other.
        """
        with torch.no_grad():
            batch = self._weighed(batch)
            step = self.evaluate(batch)
            if aux > 0 and self.config.revives:
                step = self._with_auxk(step, batch, rows_seen, aux, dead_after)
            if self._split.row_parts > 1:
                step = step.summed()
                own = (*step.by_weights, step.by_decoder_bias, step.firings, step.loss)
                self._split.sum_over_rows(own)
            self.last_fired.masked_fill_(step.firings > 0, rows_seen)
            if self.memory is not None:  # first, for it may ask the device
                self.memory.follow(step.for_memory, learning_rate)
            self._optimiser.step(step.by_weights, step.by_decoder_bias, learning_rate)
            self._record(step, batch)

    def anneal(self, done: float) -> None:
        """Set γ for the steps from the share ``done`` of all steps on: on its way to 1, linearly.

        Σγ²·var falls a little below Σvar on the way and is back at the end.
        """
        if share := self.config.weights.config.anneal:
            full = self._full_gamma
            one = torch.ones(len(full), dtype=full.dtype, device=full.device)
            one = one if full.ndim == 1 else one.diag()
            self.gamma = torch.lerp(full, one, min(1.0, done / share))

    def evaluate(self, batch: Batch) -> Step:
        """Loss and gradients on a batch, changing nothing."""
        batch = self._weighed(batch)
        while True:
            step = self._evaluate(batch)
            if not self._room.asked or self._split.everyone(self._room.enough()):
                return step

    def _evaluate(self, batch: Batch) -> Step:
        """``evaluate``, right if there was room for what is active."""
        encoder = self._optimiser.encoder(batch.x_fast.dtype)
        parameters = self.parameters._replace(encoder=encoder)  # in the products' number format
        given, memory, config = (parameters, batch, self.gamma), self.memory, self.config
        match memory:
            case ActiveShare():
                return relu_step(*given, config.l1, memory.share(), self._room)
            case LearntThreshold():
                return jumprelu_step(*given, config.k, memory.log, self._room)
            case RunningThreshold():
                nested = config.architecture == "matryoshka"
                step = matryoshka_step if nested else batch_topk_step
                return step(*given, config.k, memory.guess())
        return topk_step(*given, config.k)

    def _weighed(self, batch: Batch) -> Batch:
        """The batch with what its rows count under the arm's weights, if it does not say so yet."""
        if batch.row_weights is not None:
            return batch
        return batch._replace(row_weights=self.config.weights.row_weights(batch.x, batch.mask))

    def dead(self, rows_seen: int, dead_after: int) -> Tensor:
        """Which latents have not fired for ``dead_after`` rows. [d_sae] bool."""
        return rows_seen - self.last_fired > dead_after

    def _with_auxk(
        self, step: Step, batch: Batch, rows_seen: int, aux: float, dead_after: int
    ) -> Step:
        """The step with AuxK's gradients added."""
        dead = self._finder.find(self.last_fired, rows_seen, dead_after)
        more = auxk_gradients(self.parameters, batch, step.residual, dead, self.gamma, aux)
        return step._replace(by_weights=step.by_weights._replace(more=more))

    def _record(self, step: Step, batch: Batch) -> None:
        own = torch.stack([batch.mask.sum(), self._squared_error(step, batch)])
        rows, squared_error = self._split.over_rows(own)
        self.progress.loss += step.loss * rows
        self.progress.squared_error += squared_error
        self.progress.firings += self._split.over_latents(step.firings.sum())
        self.progress.rows += rows

    def _squared_error(self, step: Step, batch: Batch) -> Tensor:
        """Σ‖x − x̂‖² of the normalised rows, estimated from some of them if they are in a space."""
        if self.space is None:
            return torch.linalg.vector_norm(step.residual) ** 2
        error = torch.linalg.vector_norm(self.space.leave(step.residual[:_ERROR_ROWS])) ** 2
        return error * (batch.mask.sum() / batch.mask[:_ERROR_ROWS].sum().clamp(min=1))

    def _no_progress(self) -> Progress:
        exact = exact_dtype(self.gamma.device)
        return Progress(*(self.gamma.new_zeros((), dtype=exact) for _ in range(4)))

    def read_progress(self, rows_seen: int, dead_after: int, variance: float) -> dict[str, float]:
        """Means since the last call, then start anew. ``variance`` is E‖x − mean‖² of the rows."""
        sums, self.progress = self.progress, self._no_progress()
        rows = max(1.0, float(sums.rows))
        dead = self._split.over_latents(self.dead(rows_seen, dead_after).sum())
        return {
            "loss": float(sums.loss) / rows,
            "fvu": float(sums.squared_error) / rows / variance,
            "l0": float(sums.firings) / rows,
            "dead": float(dead) / self.d_sae,
        }

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors."""
        tensors = dict(self.parameters._asdict(), last_fired=self.last_fired)
        tensors |= self._optimiser.state()
        if self.memory is not None:
            tensors |= self.memory.state()
        tensors |= {f"progress.{name}": value for name, value in vars(self.progress).items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        self._finder = DeadFinder(self.last_fired.device)
        self.last_fired.copy_(tensors["last_fired"])
        for name, parameter in self.parameters._asdict().items():
            parameter.copy_(tensors[name])
        self._optimiser.load_state(tensors)
        if self.memory is not None:
            self.memory.load_state(tensors)
        self.progress = Progress(
            **{
                name: tensors[f"progress.{name}"].to(now.device, now.dtype)
                for name, now in vars(self.progress).items()
            }
        )


def _memory(
    config: ArmConfig, d_sae: int, device: torch.device, num_own: int
) -> ActiveShare | RunningThreshold | LearntThreshold | None:
    """What an architecture remembers from step to step, beside its parameters."""
    if config.k is None:
        return ActiveShare()
    if config.architecture == "topk":
        return None
    if config.architecture == "jumprelu":
        return LearntThreshold(config.k, d_sae, device, num_own)
    return RunningThreshold(num_own, device)


def folded(
    parameters: Parameters,
    mean: Float[Tensor, " d_in"],
    scale: float,
    threshold: Float[Tensor, " d_sae"] | None = None,
    space: Gamma | None = None,
) -> dict[str, Tensor]:
    """The dictionary's tensors with input centring, scaling and space folded in, float32.

    Training sees x' = (x − mean)/scale. With latents measured in the units of x (scale times
    larger) decoder rows keep unit norm and W_enc stays as it is; only the vectors change:
    b_enc ← scale·b_enc − mean·W_enc, b_dec ← scale·b_dec + mean, threshold ← scale·threshold.

    In a space Γ it sees x' = Γ(x − mean)/scale, so W_enc ← Γᵀ W_enc first, W_dec ← W_dec Γ⁻ᵀ and
    b_dec ← b_dec Γ⁻ᵀ. Codes are those of the training, so decoder rows have unit norm there only:
    to scale them here would change which latents are the largest.
    """
    encoder, decoder, encoder_bias, decoder_bias = (p.detach().cpu().double() for p in parameters)
    mean = mean.cpu().double()
    if space is not None:
        there, back = space.cpu().double(), inverse(space)
        if space.ndim == 1:
            there, back = there.diag(), back.diag()
        encoder = encoder @ there
        decoder, decoder_bias = decoder @ back.T, decoder_bias @ back.T
    tensors = {
        "W_enc": encoder.T.float().contiguous(),
        "W_dec": decoder.float(),
        "b_enc": (scale * encoder_bias - encoder @ mean).float(),
        "b_dec": (scale * decoder_bias + mean).float(),
    }
    if threshold is not None:
        tensors["threshold"] = (scale * threshold.cpu().double()).float()
    return tensors
