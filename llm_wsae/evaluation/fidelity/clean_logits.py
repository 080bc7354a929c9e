"""The model's own predictions, computed from the activations at a site."""

from collections.abc import Mapping

from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.activation_cache import ActivationCache
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site

_SAME_LOGITS = 0.05  # relative; half precision in another order of operations is far below


def clean_logits(
    model: LanguageModel,
    cache: ActivationCache,
    number: int,
    last: Site,
    activations: Mapping[Site, Tensor],
) -> Tensor:
    """Logits [contexts, positions, vocab] of a batch, resumed from its activations at ``last``.

    Every variant is resumed in the same way, so a perfect reconstruction gives the same numbers.
    The output of the last block is cached too. Raises LlmWsaeError for a model whose blocks pass on
    more than the residual stream.
    """
    ids, end = cache.batches[number][0], Site(model.num_blocks - 1, "post")
    known = cache.kept(number, end)
    if known is not None:
        return model.resume(ids, end, known)
    seen: dict[Site, Tensor] = {}  # the last visit counts: a model's first one is a trial
    with model.visiting({end: lambda hidden: seen.update({end: hidden})}):
        logits = model.resume(ids, last, activations[last])
    if number == 0:
        _check_clean(model, ids, last, logits)
    if seen[end].dtype == model.dtype:  # a wider stream would be rounded on its way back
        cache.keep(number, end, seen[end])
    return logits


def _check_clean(model: LanguageModel, ids: Tensor, site: Site, logits: Tensor) -> None:
    """Raise LlmWsaeError if the model, resumed at the site, is not the model as it is."""
    full = model.logits(ids).float()
    if not (logits.float() - full).norm() <= _SAME_LOGITS * full.norm():
        raise LlmWsaeError(
            f"{model.name} makes other predictions when it is resumed at {site} from its own "
            "activations: its blocks pass on more than the residual stream, so its predictions "
            "cannot be used to evaluate dictionaries there"
        )
