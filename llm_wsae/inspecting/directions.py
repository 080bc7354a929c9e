"""Latents as directions of the residual stream: which are near, what they write to, and what they
promote in the model's vocabulary (the logit lens). And whether a dictionary fits a store or model.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.model.forward import get_module
from llm_wsae.model.language_model import LanguageModel

_ROWS_AT_ONCE, _WORDS_AT_ONCE = 1024, 1 << 14
_LOST = "�"  # what decoding returns for part of a character
_SPACE = "▁"  # SentencePiece's, which decoding drops in front of a lone token


@dataclass(frozen=True)
class Written:
    """A dimension that a latent writes to."""

    dimension: int
    decoder: float  # the latent's decoder weight there
    share: float  # of the squared length of its decoder direction
    gamma: float | None
    """The loss weight γ of the dimension in training (the norm of its column if γ is a matrix);
    None if it is not known."""


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
    """(Σw²)²/Σw⁴ over the weights w of each row (float64): how many dimensions it writes to."""
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


class Readout:
    """From the stream to the vocabulary: final norm and unembedding."""

    def __init__(self, model: LanguageModel):
        path = model.paths.ln_final
        self._norm: nn.Module | None = get_module(model.hf_model, path) if path else None
        self._dtype, self._device = model.dtype, model.device
        words = model.W_U.shape[1] if model.tokenizer is None else len(model.tokenizer)
        self._W_U = model.W_U[:, :words]  # models have embeddings that no token uses

    @torch.no_grad()
    def logits(
        self, directions: Float[Tensor, "latents d_model"]
    ) -> Float[Tensor, "latents words"]:
        """What each direction adds to the logits of all tokens, minus the mean over tokens.

        Only the direction goes through the final norm, at a root mean square of 1 (without the
        norm's bias): the real norm divides by the length of the complete stream, which scales all
        tokens equally. Blocks between the site and the end are skipped.
        """
        x = directions.to(self._device, torch.float32)
        x = (x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)).to(self._dtype)
        if self._norm is not None:
            x = self._norm(x) - self._norm(torch.zeros_like(x))
        return self._over_words(x.float())

    @torch.no_grad()
    def effects(
        self, directions: Float[Tensor, "latents d_model"]
    ) -> Float[Tensor, "latents words"]:
        """What each direction, at length 1, adds to the logits if the final norm does not divide:
        its product with TransformerLens' ``W_U`` after ``fold_ln`` and ``center_unembed``, which
        SAEDashboard shows."""
        x = normalize(directions.to(self._device, torch.float32), dim=1)
        scale, centres = self._folded
        if centres:
            x = x - x.mean(1, keepdim=True)
        return self._over_words(x * scale)

    @functools.cached_property
    def _folded(self) -> tuple[Tensor, bool]:
        """The weights of the final norm [d_model], and whether it subtracts a row's mean.

        Norms keep them in different ways (Gemma's is 1 + weight), so they are found by what the
        norm does to a row with mean 0 and variance 1, and to a constant one.
        """
        ones = torch.ones(1, len(self._W_U), device=self._device)
        if self._norm is None:
            return ones[0], False
        signs = ones.clone()
        signs[:, 1::2] = -1
        norm = copy.deepcopy(self._norm).float()
        nothing = norm(torch.zeros_like(ones))
        scale = (norm(signs) - nothing) * signs
        return scale[0], bool((norm(ones) - nothing).abs().max() < 1e-3 * scale.abs().max())

    def _over_words(self, x: Tensor) -> Tensor:
        parts = self._W_U.split(_WORDS_AT_ONCE, dim=1)
        logits = torch.cat([x @ part.float() for part in parts], 1)
        return (logits - logits.mean(1, keepdim=True)).cpu()


def top_words(
    logits: Float[Tensor, " words"], count: int, largest: bool = True
) -> list[tuple[int, float]]:
    """The tokens with the largest logits (or the smallest), and these."""
    best = logits.topk(min(count, len(logits)), largest=largest)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


class Vocabulary:
    """Token ids as text, or as numbers without a tokenizer."""

    def __init__(self, tokenizer: Any | None):
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """A single token, including its leading space."""
        name = self._tokenizer and self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return f"<{token}>"
        if name.startswith(_SPACE):
            return str(name.replace(_SPACE, " "))
        text = self._tokenizer.decode([token])  # type: ignore[union-attr]
        return str(name if _LOST in text else text)

    def pieces(self, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
        """The text of some ids, cut in front of the tokens at the places ``cuts``."""
        pieces, before = [], ""
        for first, stop in pairwise([0, *cuts, len(ids)]):
            # In context a token may decode differently than alone, so growing runs are decoded.
            grown = "" if self._tokenizer is None else self._tokenizer.decode(list(ids[:stop]))
            grown = grown.rstrip(_LOST)
            if grown.startswith(before) and grown != before:
                pieces.append(grown[len(before) :])
            else:  # no tokenizer, or part of a character
                pieces.append("".join(map(self.text, ids[first:stop])))
            before = grown
        return pieces


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


def check_width(model: LanguageModel, dictionary: Dictionary) -> None:
    """Raises UsageError if the model's stream is not as wide as the dictionary's rows."""
    if model.d_model != dictionary.d_in:
        raise UsageError(
            f"the dictionary reads {dictionary.d_in} dimensions, but {model.name} has "
            f"{model.d_model}; give the model that it was trained on"
        )


def not_massive(dictionary: Dictionary, x: Float[Tensor, "rows d_in"]) -> Bool[Tensor, " rows"]:
    """Which rows are not massive activations; a transcoder's threshold is of what it writes."""
    threshold = dictionary.info.massive_threshold
    if threshold is None or dictionary.site.is_mlp:
        return torch.ones(len(x), dtype=torch.bool)
    return x.norm(dim=1) <= threshold
