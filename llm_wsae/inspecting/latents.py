"""Single latents: what a person looks at to guess what they represent."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import UsageError
from llm_wsae.inspecting.firings import Firing, firings
from llm_wsae.inspecting.readout import Readout
from llm_wsae.inspecting.vocabulary import Marked, Vocabulary

_BEFORE, _AFTER = 24, 12  # tokens shown around the marked one


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
    found = None if store is None else firings(store, dictionary, numbers, top)
    vocabulary = vocabulary or Vocabulary(None)
    neighbours, writes = _neighbours(dictionary, numbers, top), written(dictionary, numbers, top)
    effective = dimensions_written(dictionary.W_dec[numbers]).tolist()
    logits = None if readout is None else readout.logits(dictionary.W_dec[numbers])
    views = []
    for place, latent in enumerate(numbers.tolist()):
        firing = None if found is None else found[place]
        line = None if logits is None else logits[place]
        views.append(
            Latent(
                latent=latent,
                neighbours=neighbours[place],
                dimensions=writes[place],
                effective_dimensions=effective[place],
                promotes=None if line is None else _words(line, vocabulary, top, True),
                suppresses=None if line is None else _words(line, vocabulary, top, False),
                firing=firing,
                examples=[]
                if firing is None or store is None
                else _examples(store, vocabulary, firing),
            )
        )
    return views


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


def _neighbours(dictionary: Dictionary, latents: Tensor, top: int) -> list[list[Neighbour]]:
    decoder = torch.nn.functional.normalize(dictionary.W_dec, dim=1)
    cosine = decoder[latents] @ decoder.T
    cosine.scatter_(1, latents[:, None], -torch.inf)  # itself
    best = cosine.topk(min(top, dictionary.d_sae - 1), dim=1)
    return [
        [Neighbour(*pair) for pair in zip(indices, values, strict=True)]
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


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
        lists.append(
            [
                Written(
                    i, float(row[i]), float(share[i]), None if gamma is None else gamma[i].item()
                )
                for i in share.topk(min(top, len(row))).indices.tolist()
            ]
        )
    return lists


def _words(logits: Tensor, vocabulary: Vocabulary, top: int, largest: bool) -> list[Word]:
    best = logits.topk(min(top, len(logits)), largest=largest)
    return [
        Word(token, vocabulary.text(token), value)
        for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _examples(store: ActivationStore, vocabulary: Vocabulary, firing: Firing) -> list[Example]:
    where = store.locate(torch.tensor(firing.rows, dtype=torch.long))
    examples = []
    for number, (row, value) in enumerate(zip(firing.rows, firing.values, strict=True)):
        context, at = int(where.context[number]), int(where.position[number])
        shard, place = store.place_of_context(context)
        contexts = store.contexts(shard)
        first, stop = max(0, at - _BEFORE), min(store.context_size, at + _AFTER + 1)
        own = contexts.document[place] == contexts.document[place, at]
        while not own[first]:
            first += 1
        while not own[stop - 1]:
            stop -= 1
        header = contexts.headers.get(int(where.document[number]), {})
        ids = contexts.ids[place, first:stop].tolist()
        text = vocabulary.marked(ids, at - first)
        examples.append(Example(row, header.get("name"), value, text))
    return examples
