"""Single latents: what a person looks at to guess what they represent.

``firings`` finds where given latents fire in an activation store; no model is needed. It is one
pass over the rows. A latent's pre-activation costs one column of the encoder, so it is computed for
every row, and the rows where it is largest are candidates. Whether a candidate fires may depend on
all other latents (TopK). So the complete dictionary encodes the candidates, best first, until
enough contexts are found. It also encodes evenly spread rows, from which the density is estimated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from llm_wsae.data.store import ActivationStore, RowReader
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.vocabulary import Marked, Readout, Vocabulary, top_words
from llm_wsae.model.language_model import LanguageModel

CANDIDATES = 4096
"""The most rows per latent that are encoded in search of its top contexts."""
SAMPLE_ROWS = 1 << 15
"""The fewest rows that the density is estimated from (or all rows of a smaller store)."""
_ROWS_OF_STORE, _ROWS_OF_DECODER = 1 << 14, 1024  # at once
_LOOK_AT = 64
_BEFORE, _AFTER = 24, 12  # tokens shown around the marked one


@dataclass(frozen=True)
class Firing:
    """What one latent does in a store."""

    density: float
    """Fraction of the rows looked at on which it fires."""
    rows_looked_at: int
    """Number of rows, evenly spread over the store, without massive activations."""
    mean_activation: float | None
    """Mean over those rows on which it fires; None if it never does."""
    rows: list[int]
    """Rows of its largest activations, each in a different context, in descending order."""
    values: list[float]
    """Its activations on these rows."""
    searched_all: bool
    """False if its candidates ran out before enough contexts were found: more may exist."""


@dataclass(frozen=True)
class Word:
    """A token that a latent promotes or suppresses."""

    id: int
    token: str
    logit: float
    """As ``Readout.logits`` gives it."""


@dataclass(frozen=True)
class Neighbour:
    """Another latent, and the cosine of the two decoder directions."""

    latent: int
    cosine: float


@dataclass(frozen=True)
class Written:
    """A dimension that a latent writes to."""

    dimension: int
    decoder: float
    """The latent's decoder weight there."""
    share: float
    """Of the squared length of its decoder direction."""
    gamma: float | None
    """The loss weight γ of the dimension in training (the norm of its column if γ is a matrix);
    None if it is not known."""


@dataclass(frozen=True)
class Example:
    """A place in the store's text where a latent fires."""

    row: int
    """Number of the row in the store."""
    document: str | None
    """Name of its document."""
    activation: float
    text: Marked


@dataclass(frozen=True)
class Latent:
    """One latent of a dictionary."""

    latent: int
    neighbours: list[Neighbour]
    """By descending cosine."""
    dimensions: list[Written]
    """By descending share."""
    effective_dimensions: float
    """(Σw²)²/Σw⁴ over all decoder weights w: how many dimensions it writes to."""
    promotes: list[Word] | None
    """Tokens by descending logit; None without a model."""
    suppresses: list[Word] | None
    """Tokens by ascending logit; None without a model."""
    firing: Firing | None
    """None without a store."""
    examples: list[Example]
    """Its top contexts, one of each context of the store."""


def look_at(
    dictionary: Dictionary,
    latents: Int[Tensor, " latents"],
    store: ActivationStore | None,
    model: LanguageModel | None,
    top: int,
) -> list[Latent]:
    """The latents of a dictionary on the CPU, with ``top`` of everything.

    The store, which must fit (``check_store``), adds density and top contexts; the model, the
    contexts' text and the tokens that latents promote. Raises as ``firings`` does.
    """
    found: Sequence[Firing | None] = [None] * len(latents)
    if store is not None:
        found = firings(store, dictionary, latents, top)
    vocabulary = Vocabulary(None if model is None else model.tokenizer)
    decoder = dictionary.W_dec[latents]
    logits = None if model is None else Readout(model).logits(decoder)
    near, cosines = nearest(decoder, dictionary.W_dec, top, latents)
    writes, effective = written(dictionary, latents, top), dimensions_written(decoder).tolist()

    def words(place: int, largest: bool) -> list[Word] | None:
        if logits is None:
            return None
        best = top_words(logits[place], top, largest)
        return [Word(token, vocabulary.text(token), value) for token, value in best]

    return [
        Latent(
            latent=latent,
            neighbours=list(map(Neighbour, near[place].tolist(), cosines[place].tolist())),
            dimensions=writes[place],
            effective_dimensions=effective[place],
            promotes=words(place, largest=True),
            suppresses=words(place, largest=False),
            firing=firing,
            examples=_examples(store, vocabulary, firing) if store and firing else [],
        )
        for place, (latent, firing) in enumerate(zip(latents.tolist(), found, strict=True))
    ]


def check_latents(dictionary: Dictionary, latents: Sequence[int]) -> Tensor:
    """The latents, each once, in the order given [latents].

    Raises UsageError for one that the dictionary does not have.
    """
    for latent in latents:
        if not 0 <= latent < dictionary.d_sae:
            raise UsageError(
                f"there is no latent {latent}; {dictionary.info.name} has latents 0 to "
                f"{dictionary.d_sae - 1}"
            )
    return torch.tensor(list(dict.fromkeys(latents)), dtype=torch.long)


def nearest(
    ours: Float[Tensor, "rows d_in"],
    theirs: Float[Tensor, "d_sae d_in"],
    count: int,
    own: Int[Tensor, " rows"] | None = None,
) -> tuple[Int[Tensor, "rows count"], Float[Tensor, "rows count"]]:
    """For each of our decoder rows, the ``count`` of theirs with the largest cosine, and that.

    ``own`` is the place of each of our rows among theirs, if it is one of them: none is near
    itself.
    """
    normal = normalize(theirs, dim=1)
    count = min(count, len(theirs) - (own is not None))
    indices, cosines = [], []
    for start in range(0, len(ours), _ROWS_OF_DECODER):
        cosine = normalize(ours[start : start + _ROWS_OF_DECODER], dim=1) @ normal.T
        if own is not None:
            cosine.scatter_(1, own[start : start + _ROWS_OF_DECODER, None], -torch.inf)
        best = cosine.topk(count, dim=1)
        indices.append(best.indices)
        cosines.append(best.values)
    return torch.cat(indices), torch.cat(cosines)


def dimensions_written(decoder: Float[Tensor, "rows d_in"]) -> Float[Tensor, " rows"]:
    """(Σw²)²/Σw⁴ over the weights w of each row (float64)."""
    squares = decoder.double().square()
    return squares.sum(1) ** 2 / squares.square().sum(1).clamp(min=1e-300)


def written(
    dictionary: Dictionary, latents: Int[Tensor, " latents"], top: int
) -> list[list[Written]]:
    """The ``top`` dimensions that each latent writes to, by descending share."""
    gamma = dictionary.extras.get("gamma")
    if gamma is not None and gamma.ndim == 2:
        gamma = gamma.norm(dim=0)
    lists = []
    for row in dictionary.W_dec[latents]:
        share = row.square() / row.square().sum().clamp(min=1e-30)
        largest = share.topk(min(top, len(row))).indices.tolist()
        gammas = [None if gamma is None else gamma[i].item() for i in largest]
        values = zip(largest, row[largest].tolist(), share[largest].tolist(), gammas, strict=True)
        lists.append([Written(*one) for one in values])
    return lists


def _examples(store: ActivationStore, vocabulary: Vocabulary, firing: Firing) -> list[Example]:
    where = store.locate(torch.tensor(firing.rows, dtype=torch.long))
    examples = []
    for number, (row, value) in enumerate(zip(firing.rows, firing.values, strict=True)):
        at = int(where.position[number])
        shard, place = store.place_of_context(int(where.context[number]))
        contexts = store.contexts(shard)
        first, stop = max(0, at - _BEFORE), at + _AFTER + 1
        own = contexts.document[place, first:stop] == contexts.document[place, at]
        first, last = first + np.flatnonzero(own)[[0, -1]]
        ids = contexts.ids[place, first : last + 1].tolist()
        name = contexts.headers.get(int(where.document[number]), {}).get("name")
        examples.append(Example(row, name, value, vocabulary.marked(ids, int(at - first))))
    return examples


def firings(
    store: ActivationStore,
    dictionary: Dictionary,
    latents: Int[Tensor, " latents"],
    top: int,
    *,
    candidates: int = CANDIDATES,
    sample_rows: int = SAMPLE_ROWS,
) -> list[Firing]:
    """Density and ``top`` contexts of each latent, at most ``candidates`` rows of which are encoded
    in search of them; the density is estimated from ``sample_rows`` rows, or almost twice as many.

    The store must fit (``check_store``). Raises UsageError if it does not have the dictionary's
    site, LlmWsaeError if its rows cannot be read.
    """
    reader, stride = store.reader(dictionary.site), max(1, store.num_rows // sample_rows)
    column = latents.new_full((dictionary.d_sae,), len(latents))
    column[latents] = torch.arange(len(latents))
    looked_at, sums = 0, torch.zeros(2, len(latents) + 1)  # the last is for all other latents
    best, row = torch.empty(0, len(latents)), torch.empty(0, len(latents)).long()
    starts = range(0, store.num_rows, _ROWS_OF_STORE)
    for start in tqdm(starts, desc="rows of the store", unit="tile", leave=False):
        x = reader.rows(start, min(start + _ROWS_OF_STORE, store.num_rows)).float()
        usable = not_massive(dictionary, x)
        pre = torch.addmm(dictionary.b_enc[latents], x, dictionary.W_enc[:, latents])
        pre = pre.where(usable[:, None] & (pre > 0), -torch.inf)
        highest, place = pre.topk(min(candidates, len(pre)), dim=0)
        best, row = torch.cat([best, highest]), torch.cat([row, place + start])
        best, place = best.topk(min(candidates, len(best)), dim=0)
        row = row.gather(0, place)

        spread = slice(-start % stride, None, stride)
        sample = x[spread][usable[spread]]
        codes = dictionary.encode_sparse(sample)
        values, at = codes.values.flatten(), column[codes.indices].flatten()
        looked_at += len(sample)
        sums.index_add_(1, at, torch.stack([(values > 0).float(), values]))
    found = []
    for number, latent in enumerate(latents.tolist()):
        rows = row[:, number][best[:, number] > 0]
        contexts = _top_contexts(store, reader, dictionary, latent, rows, top)
        count, total = sums[:, number].tolist()
        found.append(
            Firing(
                density=count / max(looked_at, 1),
                rows_looked_at=looked_at,
                mean_activation=total / count if count else None,
                rows=[one for one, _ in contexts],
                values=[value for _, value in contexts],
                searched_all=len(contexts) == top or len(rows) < candidates,
            )
        )
    return found


def _top_contexts(
    store: ActivationStore,
    reader: RowReader,
    dictionary: Dictionary,
    latent: int,
    candidates: Int[Tensor, " rows"],
    top: int,
) -> list[tuple[int, float]]:
    """The first candidates on which the latent fires, each of another context, with its
    activations."""
    found: dict[int, tuple[int, float]] = {}  # by context
    for part in candidates.split(_LOOK_AT):
        x = torch.empty(len(part), store.d_in, dtype=reader.dtype)
        for row, place in zip(part.tolist(), x[:, None], strict=True):
            reader.read(row, place)
        codes = dictionary.encode_sparse(x.float())
        value = (codes.values * (codes.indices == latent)).sum(1)
        context = store.locate(part).context
        for one in torch.where(value > 0)[0].tolist():
            if len(found) < top:
                found.setdefault(int(context[one]), (int(part[one]), float(value[one])))
        if len(found) == top:
            break
    return list(found.values())


def check_store(store: ActivationStore, dictionary: Dictionary) -> None:
    """Raises LlmWsaeError if the store's rows cannot be the dictionary's."""
    if store.d_in != dictionary.d_in:
        raise LlmWsaeError(
            f"the store {store.folder} has rows of {store.d_in} dimensions, but the dictionary "
            f"reads {dictionary.d_in}; give the store of the model that it was trained on"
        )
    if dictionary.info.is_of_other_weights(store.manifest.model):
        raise LlmWsaeError(
            f"the store {store.folder} was made by {store.manifest.model.get('name')}, but the "
            f"dictionary was trained on {dictionary.info.model.get('name')} (other weights)"
        )


def not_massive(dictionary: Dictionary, x: Float[Tensor, "rows d_in"]) -> Bool[Tensor, " rows"]:
    """Which rows are not massive activations."""
    threshold = dictionary.info.massive_threshold
    if threshold is None:
        return torch.ones(len(x), dtype=torch.bool)
    return x.norm(dim=1) <= threshold
