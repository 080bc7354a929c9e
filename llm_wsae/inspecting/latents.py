"""Single latents: what a person looks at to guess what they represent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import UsageError
from llm_wsae.inspecting.firings import Firing, firings
from llm_wsae.inspecting.readout import Readout, top_words
from llm_wsae.inspecting.vocabulary import Marked, Vocabulary

_BEFORE, _AFTER = 24, 12  # tokens shown around the marked one
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Word:
    """A token that a latent promotes or suppresses."""

    id: int
    token: str
    logit: float
    """What the latent's direction adds to the token's logit, minus the mean over tokens (see
    ``Readout.logits``)."""


@dataclass(frozen=True)
class Neighbour:
    """Another latent."""

    latent: int
    cosine: float
    """Of the two decoder directions."""


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
    latents: Sequence[int],
    *,
    store: ActivationStore | None = None,
    vocabulary: Vocabulary | None = None,
    readout: Readout | None = None,
    top: int = 10,
) -> list[Latent]:
    """Look at latents, with ``top`` of everything.

    ``store`` adds density and top contexts, ``vocabulary`` their text, ``readout`` the tokens that
    latents promote.

    Raises UsageError for a latent that the dictionary does not have, and as ``firings`` does.
    """
    dictionary = dictionary.on_cpu()  # as the rows of a store are
    numbers = check_latents(dictionary, latents)
    if len(numbers) == 0:
        return []
    found: Sequence[Firing | None] = [None] * len(numbers)
    if store is not None:
        found = firings(store, dictionary, numbers, top)
    vocabulary = vocabulary or Vocabulary(None)
    decoder = dictionary.W_dec[numbers]
    logits = None if readout is None else readout.logits(decoder)
    near, cosines = nearest(decoder, dictionary.W_dec, top, numbers)
    writes, effective = written(dictionary, numbers, top), dimensions_written(decoder).tolist()

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
        for place, (latent, firing) in enumerate(zip(numbers.tolist(), found, strict=True))
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
    for start in range(0, len(ours), _ROWS_AT_ONCE):
        cosine = normalize(ours[start : start + _ROWS_AT_ONCE], dim=1) @ normal.T
        if own is not None:
            cosine.scatter_(1, own[start : start + _ROWS_AT_ONCE, None], -torch.inf)
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
