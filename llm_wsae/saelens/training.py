"""SAELens' training classes with a weighted error; importing this registers them.

Each is SAELens' class with the mixin ``_Weighted``, which replaces every squared error that the
class sums. Penalties (L1, L0) are unchanged. With γ = 1 nothing differs from SAELens, which does
not exclude massive activations; where they are first tokens, ``seqpos_slice=(1,)`` does.
"""

from dataclasses import dataclass
from typing import Any

import sae_lens
from sae_lens.registry import get_sae_class
from sae_lens.saes.topk_sae import act_times_W_dec, calculate_topk_aux_acts
from torch import Tensor

from llm_wsae.dictionary.formats.saelens import OURS, PREFIX
from llm_wsae.errors import UsageError
from llm_wsae.saelens import KINDS, read_weights, squared_error

_AFFINE = ("none", "expected_average_only_in")  # one scale for all rows only scales the loss


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


ARCHITECTURES: list[str] = []  # names under which SAELens knows them


def _define(kind: str) -> None:
    """Define the two classes of a kind in this module, and register them."""
    theirs = f"{kind}TrainingSAE"
    mixin = _WeightedTopK if "TopK" in kind else _Weighted
    sae, config = (
        type(f"Weighted{name}", (own, getattr(sae_lens, name)), {"__module__": __name__})
        for name, own in ((theirs, mixin), (f"{theirs}Config", _WeightsFile))
    )
    sae.__doc__ = f"SAELens' {theirs}, weighted."
    config.__doc__ = f"SAELens' {theirs}Config, and a weights file."
    globals().update({sae.__name__: sae, config.__name__: dataclass(config)})
    name = config.architecture()  # type: ignore[attr-defined]
    sae_lens.register_sae_training_class(name, sae, config)
    ARCHITECTURES.append(name)
    plain = name.removeprefix(PREFIX)
    if plain in ("standard", "topk", "jumprelu"):  # the others become JumpReLU in the end
        sae_lens.register_sae_class(name, *get_sae_class(plain))


for _kind in KINDS:
    _define(_kind)
