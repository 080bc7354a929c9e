"""The settings of a training. Free of torch, so that the command line can show them at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.outside import SHARE, check_choices, check_numbers
from llm_wsae.training.architectures import architecture_names

if TYPE_CHECKING:
    ArchitectureName = str
else:
    ArchitectureName = Literal[architecture_names()]

BESIDE_BASELINES: tuple[ArchitectureName, ...] = ("topk", "frozen-decoder", "frozen-encoder")
"""What a run trains unless it is told otherwise: half-random dictionaries stand beside the others,
since what those win should be more."""
Lengths = Literal["auto", "free", "unit"]
"""Of decoder rows, while they are trained: any (``optimiser``), or 1."""
Shard = Literal["rows", "latents"]
"""What is distributed over the processes of one training."""


PROCEDURAL = ("device", "shard", "checkpoint_seconds", "log_every", "tracker")
"""Settings that change how a training proceeds, not what comes out."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings shared by all arms of one training."""

    expansion: int = 8
    """Latents per dimension: d_sae = expansion × d_in."""
    tokens: int | None = None
    """Total number of rows to train on; the default is one pass over the store."""
    batch_size: int = 2048
    """Rows per step."""
    learning_rate: float | None = None
    """Peak learning rate of Adam; the default is 3e-3 · √(4608 / d_sae), at most 4e-3.
    Twice that for dictionaries of free lengths with --place space."""
    skip: bool = False
    """Give transcoders an affine skip from what they read to what they write."""
    lengths: Lengths = "auto"
    """Lengths of decoder rows in training; finished ones have length 1.
    auto: free for topk, batch-topk and matryoshka."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = 0.5
    """Share of the steps, at the end, over which it falls to 0."""
    finish: float = 0.0
    """Share of the rows, the last ones, on which dictionaries also learn to keep the model's
    predictions: by KL through the rest of the model, as much as by their own error."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss that revives dead latents (Gao et al. 2024); 0 turns it off."""
    dead_after: int | None = None
    """Rows without firing, at least a batch, after which a latent counts as dead.
    The default is a tenth of the rows, at most 10 million."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    log_every: int = 10
    """Steps between two lines of the log."""
    shuffle_seed: int = 0
    """Seed of the order of the rows, which all arms share."""
    device: str = "auto"
    """Device to train on: cuda, mps, cpu, or auto (the model's, if there is one). Without a store,
    train also takes spread, which divides the model among all devices, memory and disk."""
    shard: Shard = "rows"
    """What is distributed over several processes: the rows of each batch, or the latents.
    Latents are for a dictionary that does not fit one device."""
    dtype: str = "auto"
    """Number format of the matrix products: bfloat16, float32, or auto for the faster one.
    Weights and optimiser state are always float32."""
    tracker: str = "none"
    """Where the log also goes: none, tensorboard or wandb (each an extra of this package)."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            expansion=1,
            batch_size=1,
            aux_coefficient=0,
            log_every=1,
            dead_after=1,
            checkpoint_seconds=0,
            warmup=SHARE,
            decay=SHARE,
            finish=SHARE,
        )
        if self.tokens is not None and self.tokens < self.batch_size:
            raise UsageError(
                f"tokens ({self.tokens}) must be at least one batch ({self.batch_size} rows)"
            )
        if self.finish == 1:
            raise UsageError("finish is the share of the last rows: it must be below 1")
        if self.warmup + self.decay > 1:
            raise UsageError("warmup and decay are shares of the steps: together at most 1")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise UsageError(f"learning-rate must be a number above 0, not {self.learning_rate}")
        check_choices(
            self,
            lengths=get_args(Lengths),
            shard=get_args(Shard),
            dtype=("auto", "bfloat16", "float32"),
            tracker=("none", "tensorboard", "wandb"),
        )


FINISH_RATE = 0.01
"""Learning rate at the beginning of a finish, as a share of the peak before it; it falls to 0. Ten
times as much raises KL instead of lowering it."""
RATE, SHARED_RATE = "learning_rate", "shared_learning_rate"
"""In the record of a dictionary: its own, and the one that the other arms had."""
SPACE_RATE = 2.0
"""How many times the usual learning rate suits dictionaries of free lengths in a space, in whose
coordinates Adam makes its steps; measured in docs/log.md."""


def check_skip(sites: Iterable[Site], config: TrainConfig) -> None:
    """Raise UsageError if the settings ask for a skip where there is none."""
    for site in sites:
        if config.skip and not site.is_mlp:
            raise UsageError(
                f"a skip is for transcoders, as of blocks.{site.block}.mlp, not for {site}"
            )


def default_learning_rate(d_sae: int) -> float:
    """Falls as 1/√d_sae (Gao et al. 2024, §A.3), from a value tuned at d_sae = 4608."""
    return min(4e-3, 3e-3 * (4608 / d_sae) ** 0.5)


def learning_rate_factor(step: int, num_steps: int, warmup: float, decay: float) -> float:
    """The trapezoid: linear rise over ``warmup``, flat, linear fall to 0 over ``decay``."""
    rise = (step + 1) / max(1.0, warmup * num_steps)
    fall = (num_steps - step) / max(1.0, decay * num_steps)
    return min(1.0, rise, fall)
