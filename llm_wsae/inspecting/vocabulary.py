"""The model's vocabulary: tokens as text, one by one or a run of them cut into pieces; and what a
direction of the residual stream means in it, the logit lens.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.module_paths import get_module

_WORDS_AT_ONCE = 1 << 14
_LOST = "�"  # what decoding returns for part of a character
_SPACE = "▁"  # SentencePiece's, which decoding drops in front of a lone token


@dataclass(frozen=True)
class Marked:
    """A run of text split at one of its tokens."""

    before: str
    token: str
    after: str


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

    def marked(self, ids: Sequence[int], at: int) -> Marked:
        """The text of some ids around one of them."""
        return Marked(*self.pieces(ids, [at, at + 1]))

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


class Readout:
    """From the stream to the vocabulary: final norm and unembedding."""

    def __init__(self, model: LanguageModel):
        path = model.paths.ln_final
        self._norm: nn.Module | None = get_module(model.hf_model, path) if path else None
        self._W_U = model.W_U
        self._dtype, self._device = model.dtype, model.device
        words = len(model.tokenizer) if model.tokenizer is not None else self._W_U.shape[1]
        self._words = min(words, self._W_U.shape[1])  # models have embeddings that no token uses

    @torch.no_grad()
    def logits(
        self, directions: Float[Tensor, "latents d_model"]
    ) -> Float[Tensor, "latents words"]:
        """What each direction adds to the logits of all tokens, minus the mean over tokens.

        Only the direction goes through the final norm, at a root mean square of 1 (without the
        norm's bias): the real norm divides by the length of the complete stream, which scales all
        tokens equally. Blocks between the site and the end are skipped (the "logit lens").
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
        x = nn.functional.normalize(directions.to(self._device, torch.float32), dim=1)
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
        parts = self._W_U[:, : self._words].split(_WORDS_AT_ONCE, dim=1)
        logits = torch.cat([x @ part.float() for part in parts], 1)
        return (logits - logits.mean(1, keepdim=True)).cpu()


def top_words(
    logits: Float[Tensor, " words"], count: int, largest: bool = True
) -> list[tuple[int, float]]:
    """The tokens with the largest logits (or the smallest), and these."""
    best = logits.topk(min(count, len(logits)), largest=largest)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
