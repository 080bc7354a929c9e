"""The model's predictions with other activations at a site: cross-entropy and KL divergence.

The logits of a batch are large (4096 tokens over 262,144 words: 4 GB in float32), so they never
exist. Up to the last block's output, the stream is small. From there on, a tile of rows at a time
gets its logits, on a CPU a run of the vocabulary after the other: those of the model itself, and
against them those of every variant. On a CPU each core has a tile of its own; elsewhere there is
one at a time.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from llm_wsae.errors import LlmWsaeError
from llm_wsae.machine.threads import parallel_map
from llm_wsae.model.forward import Unembedding
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.sparse.backends import cpu

_TILE_ROWS = 1024  # enough for a fast product
_TILE_NUMBERS = 2**25  # so fewer rows if all of a large vocabulary is one run
_CHUNK_NUMBERS = 2**20  # of a tile, where the kernel is missing; 4 MB stay in a CPU's cache
_CHECKED_POSITIONS = 16  # the last ones, on which all others act
_SAME_LOGITS = 0.05  # relative; half precision in another order of operations is far below


def next_token_sums(
    model: LanguageModel,
    clean: Float[Tensor, "contexts positions d_model"],
    variants: Sequence[Float[Tensor, "contexts positions d_model"]],
    ids: Integer[Tensor, "contexts positions"],
    scored: Bool[Tensor, "contexts positions-1"],
) -> tuple[Float[Tensor, " contexts"], list[tuple[Tensor, Tensor]]]:
    """Per context, Σ over scored positions of −log p(next token), for the model itself; and for
    each variant that and Σ KL(p_clean ‖ p), both [contexts], in nats, float64 on the CPU.

    ``clean`` and ``variants`` are outputs of the last block. Raises LlmWsaeError if a prediction of
    the model itself is NaN.
    """
    where = F.pad(scored, (0, 1)).flatten().nonzero()[:, 0]
    streams = [stream.flatten(0, 1) for stream in (clean, *variants)]
    target = ids.roll(-1, 1).flatten().long()
    with model.unembedding() as unembedding:

        def measure(rows: Tensor) -> Tensor:
            with torch.no_grad():
                return _measure_tile(unembedding, [s[rows] for s in streams], target[rows]).cpu()

        together = torch.get_num_threads() if model.side_by_side else 1
        width = -(-len(model.W_E) // len(unembedding.runs))
        tiles = where.split(_tile_rows(len(where), width, together)) if len(where) else ()
        found = parallel_map(measure, tiles) if together > 1 else [measure(t) for t in tiles]
    sums = torch.zeros(len(streams), 2, scored.shape[0], dtype=torch.float64)
    if found:
        sums.index_add_(2, where.cpu() // ids.shape[1], torch.cat(found, 2))
    (entropy, _), *others = sums.unbind(0)
    if bool(entropy.isnan().any()):
        raise _not_numbers(model)
    return entropy, [(one[0], one[1]) for one in others]


def _tile_rows(rows: int, width: int, together: int) -> int:
    """Of tiles of equal size, as many for each of the cores that work together."""
    most = max(1, min(_TILE_ROWS, _TILE_NUMBERS // width))
    tiles = -(-rows // (most * together)) * together
    return -(-rows // tiles)


def _measure_tile(
    unembedding: Unembedding,
    streams: Sequence[Float[Tensor, "rows d_model"]],
    target: Integer[Tensor, " rows"],
) -> Float[Tensor, "streams 2 rows"]:
    """−log p(target) and KL(p_first ‖ p) of every row in every stream, float64."""
    entered = [unembedding.enter(stream) for stream in streams]
    sums: list[list[Tensor]] = [[] for _ in streams]  # of each run
    shape = len(streams), len(target)
    of_target = torch.full(shape, torch.nan, dtype=torch.float64, device=target.device)
    first = 0  # token of the vocabulary in the run
    for run in unembedding.runs:
        clean: tuple[Tensor, Tensor] | None = None
        for number, stream in enumerate(entered):
            logits = run(stream)
            found = softmax_sums(logits, clean)
            sums[number].append(torch.stack(found).double())
            if clean is None:
                clean = logits, found[0]
            at, width = target - first, logits.shape[1]
            own = logits.gather(1, at.clamp(0, width - 1)[:, None])[:, 0].double()
            of_target[number] = torch.where((at >= 0) & (at < width), own, of_target[number])
        first += width
    return _loss_and_divergence([torch.stack(runs, 1) for runs in sums], of_target)


def _loss_and_divergence(
    sums: Sequence[Float[Tensor, "3 runs rows"]], of_target: Float[Tensor, "streams rows"]
) -> Float[Tensor, "streams 2 rows"]:
    """From the ``softmax_sums`` of each run: with r and q the logits of the model and a variant,
    KL = Σ p_clean·(r − q) + log Σ exp q − log Σ exp r. Tokens that the model excludes (r = −∞) add
    nothing; those that only the variant excludes (q = −∞) make KL infinite."""
    maxima, of_clean, _ = sums[0]
    whole = _over_runs(of_clean, maxima)
    log_sums = [one[0].amax(0) + _over_runs(one[1], one[0]).log() for one in sums]
    found = []
    for number, (log_sum, own) in enumerate(zip(log_sums, sums, strict=True)):
        apart = _over_runs(own[2], maxima) / whole + log_sum - log_sums[0]
        divergence = apart if number else torch.zeros_like(apart)
        found.append(torch.stack([log_sum - of_target[number], divergence]))
    return torch.stack(found)


def _over_runs(
    sums: Float[Tensor, "runs rows"], maxima: Float[Tensor, "runs rows"]
) -> Float[Tensor, " rows"]:
    """Sums about the maximum of each run, added up about the largest maximum."""
    # the bound keeps an infinite sum infinite
    scale = (maxima - maxima.amax(0)).clamp(min=-700).exp()
    return torch.where(maxima == -torch.inf, 0, sums * scale).sum(0)


def softmax_sums(
    logits: Float[Tensor, "rows run"], clean: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row its maximum m and Σ exp(logit − m); and with ``clean``, other logits and their
    maxima c, Σ exp(clean − c)·(clean − logit) where clean is not −∞. All [rows]."""
    if cpu.supports(logits):
        return cpu.softmax_sums(logits, clean)
    maxima, sums, differences = torch.empty(3, len(logits), device=logits.device)
    size = max(1, _CHUNK_NUMBERS // logits.shape[1])
    for chunk in (slice(at, at + size) for at in range(0, len(logits), size)):
        own = logits[chunk].float()
        torch.amax(own, 1, out=maxima[chunk])
        torch.sum((own - maxima[chunk, None]).exp_(), 1, out=sums[chunk])
        if clean is not None:
            other, shift = clean[0][chunk].float(), clean[1][chunk, None]
            p = (other - shift).exp_().clamp_(min=torch.finfo(torch.float32).tiny)  # p·∞ is ∞
            apart = (other - own).masked_fill_(other.isneginf(), 0)
            torch.linalg.vecdot(p, apart, out=differences[chunk])
    return maxima, sums, differences


def check_resumable(
    model: LanguageModel,
    ids: Integer[Tensor, "1 positions"],
    site: Site,
    hidden: Float[Tensor, "1 positions d_model"],
) -> None:
    """Raise LlmWsaeError for a model that, resumed at the site from its own activations, makes
    other predictions, since its blocks pass on more than the residual stream; or NaN."""
    full = model.logits(ids)[0, -_CHECKED_POSITIONS:].float()
    if bool(full.isnan().any()):
        raise _not_numbers(model)
    stream = model.resume_to_end(ids, site, hidden)[0]
    with torch.no_grad(), model.unembedding() as unembedding:
        found = unembedding(stream[-_CHECKED_POSITIONS:]).float()
    difference = (found - full).where(found != full, 0)  # an excluded token has −∞ in both
    if not difference.norm() <= _SAME_LOGITS * full[full.isfinite()].norm():
        raise LlmWsaeError(
            f"{model.name} makes other predictions when it is resumed at {site} from its own "
            "activations: its blocks pass on more than the residual stream, so its predictions "
            "cannot be used to evaluate dictionaries there"
        )


def _not_numbers(model: LanguageModel) -> LlmWsaeError:
    return LlmWsaeError(
        f"predictions of {model.name} are NaN: it overflows after the sites; try the model in "
        "float32 (--model-dtype float32)"
    )
