"""Untrained and half-trained baselines, beside which the numbers of trained dictionaries are read.

Measures of interpretability are high for random dictionaries, too (Korznikov et al. 2026, arXiv
2602.14111). Two more baselines, in which one half is trained, are architectures: ``frozen-decoder``
and ``frozen-encoder``.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.info import DictionaryInfo
from llm_wsae.dictionary.sparsity import TopK
from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.evaluation.checks import check_fit
from llm_wsae.evaluation.heldout import ActivationCache, Context, stacked
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.statistics.moments import MASSIVE_RATIO, Statistics

_ROWS = 8192  # on which means, deviations and numbers of active latents are measured
_BATCH_TOKENS = 4096
RAW, _RANDOM = "raw dimensions", "frozen random"
HALF_RANDOM = {"frozen-decoder": "frozen decoder", "frozen-encoder": "frozen encoder"}
"""Names of the half-trained baselines in tables, by their architecture."""


def half_random_beside(one: Dictionary, among: Mapping[str, Dictionary]) -> dict[str, str]:
    """What the half-random dictionaries of its site are called → their names; of several, that of
    its own k."""
    found: dict[str, str] = {}
    for name, other in among.items():
        training = other.info.training
        label = HALF_RANDOM.get(str(training.get("architecture")))
        if label is None or other.site != one.site:
            continue
        if label not in found or training.get("k") == one.info.training.get("k"):
            found[label] = name
    return found


def frozen_random(
    like: Dictionary, mean: Float[Tensor, " d_in"], l0: float, seed: int
) -> Dictionary:
    """A dictionary of the same shape with random unit decoder rows, its encoder their transpose,
    centred at ``mean``, with as many active latents in a row as ``l0``, rounded."""
    draw = torch.Generator().manual_seed(seed)
    decoder = normalize(torch.randn(like.d_sae, like.d_in, generator=draw), dim=1)
    return _made(_info(like, _RANDOM), decoder, decoder, mean, l0).to(like.W_enc.device)


def raw_dimensions(info: DictionaryInfo, statistics: Statistics, l0: float) -> Dictionary:
    """``signed_dimensions`` of the rows that the ``statistics`` are of."""
    deviation, mean = statistics.robust_variance.sqrt(), statistics.usual_sample.mean(0)
    return signed_dimensions(info, deviation, mean, l0)


def with_raw_dimensions(
    dictionaries: Mapping[str, Dictionary], statistics: Statistics, l0: float
) -> dict[str, Dictionary]:
    """A site's dictionaries, and beside them the dimensions of its activations."""
    like = next(iter(dictionaries.values()))
    return {**dictionaries, RAW: raw_dimensions(_info(like, RAW), statistics, l0)}


def signed_dimensions(
    info: DictionaryInfo, deviation: Float[Tensor, " d_in"], mean: Float[Tensor, " d_in"], l0: float
) -> Dictionary:
    """A dictionary with two latents for each dimension, one for either sign. A latent is the row's
    distance from the ``mean`` in standard deviations, if that is among the ``l0`` largest."""
    axes = torch.eye(len(deviation), dtype=torch.float64)
    signed = torch.cat([axes, -axes])
    scale = torch.cat([deviation, deviation]).double()[:, None].clamp(min=1e-6)
    return _made(info, signed / scale, signed * scale, mean, l0)


def _made(
    info: DictionaryInfo, encoder: Tensor, decoder: Tensor, mean: Tensor, l0: float
) -> Dictionary:
    """``encoder`` and ``decoder`` have a row for each latent."""
    mean = mean.to("cpu", encoder.dtype)
    return Dictionary(
        W_enc=encoder.T.float().contiguous(),
        W_dec=decoder.float(),
        b_enc=-(encoder @ mean).float(),
        b_dec=mean.float(),
        sparsity=TopK(min(max(1, round(l0)), len(decoder))),
        info=info,
    )


def skip_alone(transcoder: Dictionary) -> Dictionary:
    """A transcoder's affine skip and bias, with a latent that never fires."""
    nothing = torch.zeros(1, transcoder.d_in)
    alone = Dictionary(
        W_enc=nothing.T.contiguous(),
        W_dec=nothing,
        b_enc=torch.zeros(1),
        b_dec=transcoder.b_dec.detach().cpu(),
        sparsity=TopK(1),
        info=_info(transcoder, f"skip alone of {transcoder.info.name}"),
        W_skip=None if transcoder.W_skip is None else transcoder.W_skip.detach().cpu(),
    )
    return alone.to(transcoder.W_enc.device)


def _info(like: Dictionary, name: str) -> DictionaryInfo:
    return DictionaryInfo(like.info.site, name, massive_threshold=like.info.massive_threshold)


@torch.no_grad()
def baselines_of(
    dictionaries: Mapping[str, Dictionary], model: LanguageModel, contexts: Sequence[Context]
) -> dict[str, Dictionary]:
    """The dimensions and a random dictionary for each site, as sparse as the site's first one. Of
    transcoders, for which dimensions are no baseline, what their skips do alone. Raises UsageError
    if one of the ``dictionaries`` does not fit the model, LlmWsaeError if its threshold leaves no
    row to measure on."""
    check_fit(dictionaries, model, "evaluate")
    found = {
        f"skip alone of {name}": skip_alone(one)
        for name, one in dictionaries.items()
        if one.W_skip is not None
    }
    autoencoders = [one for one in dictionaries.values() if not one.site.is_mlp]
    first = {one.site: one for one in reversed(autoencoders)}
    if not first:
        return found
    ids, keep, _ = stacked(contexts[: max(1, _ROWS // len(contexts[0].ids))])
    read = list(ActivationCache(model, ids, keep, _BATCH_TOKENS).rows(sorted(first)))
    for site, like in sorted(first.items()):
        rows = torch.cat([batch.activations[site] for batch in read]).float().cpu()
        norms, threshold = rows.norm(dim=1), like.info.massive_threshold
        rows = rows[norms <= (MASSIVE_RATIO * norms.median() if threshold is None else threshold)]
        if len(rows) < 2:
            raise LlmWsaeError(
                f"nearly every row at {site} is longer than the massive_threshold of "
                f"{like.info.name}, {shown(threshold)}, so nothing can be measured; its wsae.json "
                "is wrong, or it is for another model"
            )
        mean, deviation = rows.double().mean(0), rows.double().std(0)
        codes = like.encode_sparse(rows.to(like.W_enc.device))
        l0 = float((codes.values > 0).sum() / len(rows))
        where = "" if len(first) == 1 else f", {site}"
        raw = signed_dimensions(_info(like, RAW), deviation, mean, l0)
        found[f"{RAW}{where}"] = raw.to(like.W_enc.device)
        found[f"{_RANDOM}{where}"] = frozen_random(like, mean, l0, seed=0)
    return found
