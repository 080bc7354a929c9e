"""Loss weights for SAELens' own training: its classes, with ‖Γ(x − x̂)‖² in place of ‖x − x̂‖².

    from llm_wsae.saelens import WeightedTopKTrainingSAEConfig

    sae = WeightedTopKTrainingSAEConfig(
        d_in=576, d_sae=4608, k=32, weights_file="weights.safetensors"
    )
    LanguageModelSAETrainingRunner(LanguageModelSAERunnerConfig(sae=sae, ...)).run()

``llm-wsae weigh`` writes the file. Importing a class, or ``register``, makes all of them known to
SAELens (as ``wsae_topk`` and so on), which finally saves a dictionary of one of its ordinary
architectures; ``Dictionary.load`` reads it together with the rule.

Each is SAELens' class with the mixin ``_Weighted``, which replaces every squared error that the
class sums. Penalties (L1, L0) are unchanged. With γ = 1 nothing differs from SAELens, which does
not exclude massive activations; where they are first tokens, ``seqpos_slice=(1,)`` does.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from llm_wsae.dictionary.formats.saelens import OURS, PREFIX
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.weights.loss_weights import Gamma, LossWeights

KINDS = ("BatchTopK", "JumpReLU", "MatryoshkaBatchTopK", "Standard", "TopK")
__all__ = ["register"]
__all__ += [f"Weighted{kind}TrainingSAE" for kind in KINDS]
__all__ += [f"Weighted{kind}TrainingSAEConfig" for kind in KINDS]
_AFFINE = ("none", "expected_average_only_in")  # one scale for all rows only scales the loss
_registered: list[str] = []  # names under which SAELens knows the classes


def register() -> list[str]:
    """Register the weighted architectures with SAELens, once. Returns their names there. Raises
    LlmWsaeError if SAELens is not installed."""
    if find_spec("sae_lens") is None:
        raise LlmWsaeError(
            "the weighted training classes extend those of SAELens, which is not installed; "
            "install sae-lens"
        )
    if not _registered:
        _registered.extend(map(_define, KINDS))
    return _registered


def __getattr__(name: str) -> Any:
    """Define the classes when one is first named (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return globals()[name]


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


@dataclass(kw_only=True)
class _WeightsFile:
    """What the configurations add to those of SAELens."""

    weights_file: str = ""
    """The weights γ or Γ: a file that ``llm-wsae weigh`` wrote."""

    @classmethod
    def architecture(cls) -> str:
        return PREFIX + super().architecture()  # type: ignore[misc]


class _Weighted:
    """What the training classes add to those of SAELens."""

    gamma: Tensor

    def __init__(self, cfg: Any, use_error_term: bool = False):
        if cfg.normalize_activations not in _AFFINE:
            raise UsageError(
                "the weights are for the model's dimensions, so normalize_activations must be one "
                f"of {', '.join(_AFFINE)}, not {cfg.normalize_activations}"
            )
        weights = read_weights(cfg.weights_file, cfg.d_in)
        super().__init__(cfg, use_error_term)  # type: ignore[call-arg]
        cfg.metadata[OURS] = {"rule": weights.rule.name, "alpha": weights.alpha}
        device = "cpu" if cfg.device == "meta" else cfg.device  # SAELens loads by way of meta
        self.register_buffer("gamma", weights.gamma.to(device), persistent=False)  # type: ignore
        self.mse_loss_fn = self._squared_error

    def _squared_error(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return squared_error(x_hat, x, self.gamma)


class _WeightedTopK(_Weighted):
    """TopK's auxiliary loss is another squared error."""

    def calculate_topk_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        """The dead latents reconstruct the residual (Gao et al. 2024, §A.2), weighted alike."""
        from sae_lens.saes.topk_sae import act_times_W_dec, calculate_topk_aux_acts

        num_dead = 0 if dead_neuron_mask is None else int(dead_neuron_mask.sum())
        if num_dead == 0:
            return sae_out.new_zeros(())
        most = sae_in.shape[-1] // 2
        latents = calculate_topk_aux_acts(min(most, num_dead), hidden_pre, dead_neuron_mask)
        rescaled = self.cfg.rescale_acts_by_decoder_norm  # type: ignore[attr-defined]
        made = act_times_W_dec(latents, self.W_dec, rescaled)  # type: ignore[attr-defined]
        error = self._squared_error(made, (sae_in - sae_out).detach()).sum(-1).mean()
        share = min(num_dead / most, 1.0)
        return self.cfg.aux_loss_coefficient * share * error  # type: ignore[attr-defined]

    def calculate_matryoshka_aux_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of Matryoshka's. Raises UsageError: its errors are not weighted."""
        raise UsageError("use_matryoshka_aux_loss has no weighted form; leave it False")


def _define(kind: str) -> str:
    """Define the two classes of a kind in this module, and register them; their name in SAELens."""
    import sae_lens
    from sae_lens.registry import get_sae_class

    theirs = f"{kind}TrainingSAE"
    mixin = _WeightedTopK if "TopK" in kind else _Weighted
    sae, config = (
        type(f"Weighted{name}", (own, getattr(sae_lens, name)), {"__module__": __name__})
        for name, own in ((theirs, mixin), (f"{theirs}Config", _WeightsFile))
    )
    sae.__doc__ = f"SAELens' {theirs}, weighted."
    config.__doc__ = f"SAELens' {theirs}Config, and a weights file."
    globals().update({sae.__name__: sae, config.__name__: dataclass(config)})
    name: str = config.architecture()  # type: ignore[attr-defined]
    sae_lens.register_sae_training_class(name, sae, config)
    plain = name.removeprefix(PREFIX)
    if plain in ("standard", "topk", "jumprelu"):  # the others become JumpReLU in the end
        sae_lens.register_sae_class(name, *get_sae_class(plain))
    return name
