"""Loss weights for SAELens' own training: its classes, with ‖Γ(x − x̂)‖² in place of ‖x − x̂‖².

    from llm_wsae.saelens import WeightedTopKTrainingSAEConfig

    sae = WeightedTopKTrainingSAEConfig(
        d_in=576, d_sae=4608, k=32, weights_file="weights.safetensors"
    )
    LanguageModelSAETrainingRunner(LanguageModelSAERunnerConfig(sae=sae, ...)).run()

``llm-wsae weigh`` writes the file. Importing a class, or ``register``, makes all of them known to
SAELens (as ``wsae_topk`` and so on), which finally saves a dictionary of one of its ordinary
architectures; ``Dictionary.load`` reads it together with the rule.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.weights.loss_weights import Gamma, LossWeights

KINDS = ("BatchTopK", "JumpReLU", "MatryoshkaBatchTopK", "Standard", "TopK")
__all__ = ["register"]
__all__ += [f"Weighted{kind}TrainingSAE" for kind in KINDS]
__all__ += [f"Weighted{kind}TrainingSAEConfig" for kind in KINDS]


def register() -> list[str]:
    """Register the weighted architectures with SAELens, once. Returns their names there. Raises
    LlmWsaeError if SAELens is not installed."""
    return _training().ARCHITECTURES


def __getattr__(name: str) -> Any:
    """Import a class when it is first named (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_training(), name)


def _training() -> Any:
    if find_spec("sae_lens") is None:
        raise LlmWsaeError(
            "the weighted training classes extend those of SAELens, which is not installed; "
            "install sae-lens"
        )
    return import_module(f"{__name__}.training")


def read_weights(path: str, d_in: int) -> LossWeights:
    """The weights of a file, for rows of ``d_in`` dimensions. Raises UsageError for weights that
    SAELens' training cannot use, LlmWsaeError for a file that cannot be read or does not fit."""
    if not path:
        raise UsageError("weights_file is not given; make one with llm-wsae weigh")
    weights = LossWeights.load(Path(path))
    weights.check_for(d_in)
    if weights.config.in_space:
        raise UsageError(
            f"{path} is for training in a weighted space, but SAELens trains on the rows as they "
            "are; make the weights with place loss"
        )
    if weights.config.anneal:
        raise UsageError(
            f"{path} has weights that move to 1 during training, which SAELens does not support; "
            "make them without anneal"
        )
    return weights


def squared_error(
    x_hat: Float[Tensor, "*rows d_in"], x: Float[Tensor, "*rows d_in"], gamma: Gamma
) -> Float[Tensor, "*rows d_in"]:
    """(Γ(x̂ − x))² by dimension: summed over a row ‖Γ(x − x̂)‖² (Cui et al. 2026, theorem 5)."""
    error = x_hat - x
    gamma = gamma.to(error.dtype)
    return (error @ gamma.T if gamma.ndim == 2 else error * gamma) ** 2
