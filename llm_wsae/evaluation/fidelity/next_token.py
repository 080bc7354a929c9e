"""The model's predictions with other activations at a site: cross-entropy and KL divergence.

The logits of a batch are large (4096 tokens over 262,144 words: 4 GB in float32), so they never
exist. Up to the last block's output, the stream is small. From there on, a tile of rows at a time
gets its logits: once those of the model itself, which give log p, and after them those of every
variant. On a CPU each core has a tile of its own; elsewhere there is one at a time. (Liger's fused
kernels of cross-entropy and divergence are for GPUs and make gradients, which nobody needs here.)
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.evaluation.activations import ActivationCache
from llm_wsae.model.forward import parallel_map
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.sparse.backends import cpu

# Rows of one tile: enough for a fast product. In memory are their logits by the model itself and by
# one variant, for each core; where the kernel is missing also the former twice in float32.
_TILE_ROWS = 192
_TILE_NUMBERS = 2**25  # and fewer rows for a large vocabulary: 64 MB in half precision
# Numbers in one chunk of a tile, where the kernel is missing. 4 MB stay in a CPU's cache from one
# operation to the next.
_CHUNK_NUMBERS = 2**20


def scored_positions(
    keep: Bool[Tensor, "contexts positions"],
) -> Bool[Tensor, "contexts positions-1"]:
    """Which positions' predictions count.

    Position t counts if it is not before the context's first kept position and the token that it
    predicts, t + 1, is kept. So the first positions, which no dictionary is trained on and which
    are never replaced, are not scored, nor are predictions of special tokens or padding. Other
    positions that are not kept are scored: a replacement before them affects their prediction.
    """
    begun = keep.cumsum(1) > 0
    return begun[:, :-1] & keep[:, 1:]


def next_token_sums(
    model: LanguageModel,
    clean: Float[Tensor, "contexts positions d_model"],
    variants: Sequence[Float[Tensor, "contexts positions d_model"]],
    ids: Integer[Tensor, "contexts positions"],
    scored: Bool[Tensor, "contexts positions-1"],
) -> tuple[Float[Tensor, " contexts"], list[tuple[Tensor, Tensor]]]:
    """Per context, Σ over scored positions of −log p(next token), for the model itself; and for
    each variant that and Σ KL(p_clean ‖ p), both [contexts], in nats.

    ``clean`` and ``variants`` are outputs of the last block. Exponentials are float32; sums are
    float64, on the CPU. Raises LlmWsaeError if a prediction of the model itself is NaN.
    """
    where = F.pad(scored, (0, 1)).flatten().nonzero()[:, 0]
    streams = [stream.flatten(0, 1) for stream in (clean, *variants)]
    target = ids.roll(-1, 1).flatten().long()
    with model.unembedding() as logits:

        def measure(rows: Tensor) -> Tensor:
            with torch.no_grad():
                found = _measure_tile(logits, [s[rows] for s in streams], target[rows])
                return found.cpu().double()

        together = torch.get_num_threads() if model.side_by_side else 1
        tiles = where.split(_tile_rows(len(where), len(model.W_E), together)) if len(where) else ()
        found = parallel_map(measure, tiles) if together > 1 else [measure(t) for t in tiles]
    sums = torch.zeros(len(streams), 2, scored.shape[0], dtype=torch.float64)
    if found:
        sums.index_add_(2, where.cpu() // ids.shape[1], torch.cat(found, 2))
    (entropy, _), *others = sums.unbind(0)
    if bool(entropy.isnan().any()):
        raise _not_numbers(model)
    return entropy, [(one[0], one[1]) for one in others]


def _tile_rows(rows: int, vocab: int, together: int) -> int:
    """Rows of a tile: tiles of equal size, and as many for each of the cores that work together."""
    most = max(1, min(_TILE_ROWS, _TILE_NUMBERS // vocab))
    tiles = -(-rows // (most * together)) * together
    return -(-rows // tiles)


def _measure_tile(
    logits: Callable[[Tensor], Tensor],
    streams: Sequence[Float[Tensor, "rows d_model"]],
    target: Integer[Tensor, " rows"],
) -> Float[Tensor, "streams 2 rows"]:
    """−log p(target) and KL(p_first ‖ p) of every row in every stream."""
    clean = logits(streams[0])
    sums = _compiled if cpu.supports(clean) else _in_torch
    found, compared = sums(clean, target)
    others = [compared(logits(stream)) for stream in streams[1:]]
    return torch.stack([torch.stack([found, torch.zeros_like(found)]), *others])


Compared = Callable[[Float[Tensor, "rows vocab"]], Float[Tensor, "2 rows"]]


def _compiled(
    clean: Float[Tensor, "rows vocab"], target: Integer[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Compared]:
    """−log p(target), and a function that gives the same and KL(p ‖ q) of other logits.

    With r and q the logits of p and q, KL = Σ p·(r − q) + log Σ exp q − log Σ exp r. Tokens that a
    model excludes (r = −∞) add nothing; those that it excludes only now (q = −∞) make KL infinite.
    """

    def log_sum(maxima: Tensor, sums: Tensor) -> Tensor:
        return maxima.double() + sums.log()

    def of_target(values: Tensor) -> Tensor:
        return values.gather(1, target[:, None])[:, 0].double()

    clean_maxima, clean_sums, _ = cpu.softmax_sums(clean)
    clean_log_sum = log_sum(clean_maxima, clean_sums)

    def compared(own: Tensor) -> Tensor:
        maxima, sums, differences = cpu.softmax_sums(own, (clean, clean_maxima))
        own_log_sum = log_sum(maxima, sums)
        divergence = differences / clean_sums + own_log_sum - clean_log_sum
        return torch.stack([own_log_sum - of_target(own), divergence])

    return clean_log_sum - of_target(clean), compared


def _in_torch(
    clean: Float[Tensor, "rows vocab"], target: Integer[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Compared]:
    """The same in float32, by operations that every device has."""
    log_p = clean.log_softmax(1, dtype=torch.float32)
    excluded = log_p.isneginf()
    p = log_p.exp().clamp_(min=torch.finfo(torch.float32).tiny)  # of other tokens p·∞ is ∞, not NaN
    size = max(1, _CHUNK_NUMBERS // clean.shape[1])
    chunks = [slice(at, at + size) for at in range(0, len(target), size)]

    def compared(own: Tensor) -> Tensor:
        found = log_p.new_empty(2, len(target))
        for chunk in chunks:
            log_q = own[chunk].log_softmax(1, dtype=torch.float32)
            torch.neg(log_q.gather(1, target[chunk, None])[:, 0], out=found[0, chunk])
            difference = torch.sub(log_p[chunk], log_q, out=log_q).masked_fill_(excluded[chunk], 0)
            torch.linalg.vecdot(p[chunk], difference, out=found[1, chunk])
        return found

    return -log_p.gather(1, target[:, None])[:, 0], compared


_CHECKED_POSITIONS = 16  # the last ones, on which all others act
_SAME_LOGITS = 0.05  # relative; half precision in another order of operations is far below


def clean_stream(
    model: LanguageModel,
    cache: ActivationCache,
    number: int,
    last: Site,
    activations: Mapping[Site, Tensor],
) -> Float[Tensor, "contexts positions d_model"]:
    """The last block's output for a batch, resumed from its activations at ``last``, and kept.

    Every variant is resumed in the same way, so a perfect reconstruction gives the same numbers.
    """
    end = Site(model.num_blocks - 1, "post")
    known = cache.kept(number, end)
    if known is not None:
        return known
    ids = cache.batches[number][0]
    stream = model.resume_to_end(ids, last, activations[last])
    cache.keep(number, end, stream)
    return stream


def check_resumable(
    model: LanguageModel,
    ids: Integer[Tensor, "1 positions"],
    activations: Mapping[Site, Float[Tensor, "1 positions d_model"]],
) -> None:
    """Raise LlmWsaeError for a model that, resumed from its own activations at one of the sites, is
    not the model as it is, since its blocks pass on more than the residual stream; or whose
    predictions are NaN."""
    full = model.logits(ids)[0, -_CHECKED_POSITIONS:].float()
    if bool(full.isnan().any()):
        raise _not_numbers(model)
    for site, hidden in sorted(activations.items(), reverse=True):
        stream = model.resume_to_end(ids, site, hidden)[0]
        with torch.no_grad(), model.unembedding() as logits:
            found = logits(stream[-_CHECKED_POSITIONS:]).float()
        difference = (found - full).where(found != full, 0)  # an excluded token has −∞ in both
        if not difference.norm() <= _SAME_LOGITS * full[full.isfinite()].norm():
            raise LlmWsaeError(
                f"{model.name} makes other predictions when it is resumed at {site} from its own "
                "activations: its blocks pass on more than the residual stream, so its predictions "
                "cannot be used to evaluate dictionaries there"
            )


def _not_numbers(model: LanguageModel) -> LlmWsaeError:
    return LlmWsaeError(
        f"predictions of {model.name} are NaN: it overflows behind the sites; try the model in "
        "float32 (--model-dtype float32)"
    )
