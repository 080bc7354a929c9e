"""From a trained arm to a dictionary in the model's own units, with its provenance."""

import dataclasses
from typing import Any

from jaxtyping import Float
from torch import Tensor

from llm_wsae.artifact.provenance import command_line, versions
from llm_wsae.data.shuffling import ActivationSource
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.statistics.moments import Statistics
from llm_wsae.training.arm import Arm, Learnt
from llm_wsae.training.normaliser import Normaliser, inverse
from llm_wsae.training.parameters import Parameters
from llm_wsae.weights.loss_weights import Gamma


def dictionary_of(
    arm: Arm,
    source: ActivationSource,
    statistics: Statistics,
    normaliser: Normaliser,
    numbers: dict[str, float],
    settings: dict[str, Any],
    learnt: Learnt | None = None,
) -> Dictionary:
    """The dictionary in the model's own units, of an arm.

    ``numbers`` were last logged for it; ``settings`` are those of the training; ``learnt`` is what
    it learnt with all latents, if it does not hold all.
    """
    parameters, architecture = arm.learnt if learnt is None else learnt
    weights = arm.config.weights
    info = DictionaryInfo(
        name=arm.config.name,
        rule=weights.rule.name,
        alpha=weights.alpha,
        weights=dataclasses.asdict(weights.config),
        seed=arm.config.init_seed,
        **origin_of(source, statistics),
        metrics={"training": numbers},
        training={
            **settings,
            **arm.config.settings(),
            "lengths": arm.lengths,
            "command": command_line(),
            "versions": versions(),
        },
    )
    threshold = architecture.thresholds()
    space = weights.gamma if weights.config.in_space else None
    return Dictionary(
        **folded(parameters, normaliser.mean, normaliser.scale, threshold, space),
        sparsity=architecture.sparsity,
        info=info,
        extras={
            "gamma": weights.gamma,
            "mean": statistics.mean.float(),
            "variance": statistics.variance.float(),
            "robust_variance": statistics.robust_variance.float(),
        },
    )


def origin_of(source: ActivationSource, statistics: Statistics) -> dict[str, Any]:
    """What the info of a dictionary says of the rows it was made from."""
    provenance = source.identity()
    packing = provenance.get("packing", {})
    return {
        "site": str(source.site),
        "context_size": statistics.context_size,
        # Packing asks for a BOS, which not every tokenizer has; sources of others say no more.
        "prepend_bos": getattr(source, "prepends_bos", packing.get("prepend_bos")),
        "massive_threshold": statistics.massive_threshold,
        "model": provenance.get("model", {}),
        "corpus": provenance.get("corpus", {}),
        "store": provenance,
    }


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
    b_dec ← b_dec Γ⁻ᵀ. Codes stay those of the training: rescaling decoder rows here would change
    which latents are the largest. So they have unit norm in the space.
    """
    encoder, decoder, encoder_bias, decoder_bias = (p.detach().cpu().double() for p in parameters)
    mean = mean.cpu().double()
    if space is not None:
        into, back = space.cpu().double(), inverse(space)
        if space.ndim == 1:
            into, back = into.diag(), back.diag()
        encoder = encoder @ into
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
