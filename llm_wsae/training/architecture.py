"""What an architecture decides; the files in ``architectures/`` are the architectures.

An arm holds one object of its architecture. The object computes the step and remembers what the
next step needs, such as a running threshold.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.sparsity import Sparsity
from llm_wsae.training.parallel.strategy import SINGLE, Strategy
from llm_wsae.training.parameters import Batch, Parameters, Step
from llm_wsae.weights.loss_weights import Gamma

CPU = torch.device("cpu")


class Architecture(ABC):
    """The architecture of one arm, with its memory between steps."""

    name: ClassVar[str]
    """As on the command line: the name of its file, with hyphens."""
    setting: ClassVar[Literal["k", "l1"]] = "k"
    """The field of ArmConfig that sets its sparsity."""
    revives_dead: ClassVar[bool] = True
    """Whether dead latents get the AuxK loss. They need it where other latents crowd them out."""

    def __init__(
        self,
        level: int | float,
        d_sae: int,
        device: torch.device = CPU,
        strategy: Strategy = SINGLE,
    ):
        """``level`` is the value of ``setting``; ``strategy`` says which latents are here."""
        self.level = level
        self.d_sae = d_sae
        self.num_latents = len(strategy.own_latents(d_sae))
        self.strategy = strategy

    @property
    def k(self) -> int:
        """Active latents in a row, in every one or on average."""
        return int(self.level)

    @classmethod
    def label(cls, level: int | float) -> str:
        """What the name of an arm says of it."""
        return f"{cls.name}-k{level}"

    @classmethod
    def recorded_name(cls) -> str | None:
        """What a checkpoint calls it."""
        return cls.name

    @property
    @abstractmethod
    def sparsity(self) -> Sparsity:
        """The sparsity of the finished dictionary, which must not look at the batch."""

    @abstractmethod
    def step(self, parameters: Parameters, batch: Batch, gamma: Gamma) -> Step:
        """The loss on a batch and its gradients; changes nothing.

        The encoder may be rounded to the number format of ``batch.x_fast``.
        """

    def follow(self, observed: Tensor, learning_rate: float) -> None:  # noqa: B027 - optional
        """Take in what a step observed (``Step.observed``, if anything), once it counts."""

    def thresholds(self) -> Float[Tensor, " latents"] | None:
        """The finished dictionary's thresholds in normalised units, None if it has none."""
        return None

    def state(self) -> dict[str, Tensor]:
        """The memory, for a checkpoint. A tensor with one entry a latent holds those that are
        here; any other is a single number."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 - optional
        """The inverse of ``state``; ``tensors`` holds the whole arm's state."""
