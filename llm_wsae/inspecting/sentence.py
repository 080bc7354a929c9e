"""Which latents fire on a given text."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from llm_wsae.data.config import PackConfig
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.vocabulary import Vocabulary
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import parsing


@dataclass(frozen=True)
class Active:
    """A latent that fires."""

    latent: int
    activation: float


@dataclass(frozen=True)
class Token:
    """One token of the text."""

    id: int
    token: str
    latents: list[Active]
    """All that fire, by descending activation; none at positions excluded from training."""


def read_sentence(model: LanguageModel, dictionary: Dictionary, text: str) -> list[Token]:
    """The tokens of a text, after the model's BOS if the dictionary was trained with it.

    Raises UsageError for a text without tokens, one that is too long for the model, or a model that
    does not fit the dictionary; LlmWsaeError for a model without a tokenizer.
    """
    model.check_site(dictionary.site)
    check_width(model, dictionary)
    ids = token_ids(model, dictionary, text)
    hidden = model.activations(torch.tensor([ids]), [dictionary.site])[dictionary.site][0].cpu()
    codes = dictionary.encode_sparse(hidden.float().to(dictionary.W_enc.device))
    values = codes.values.cpu() * _explained(model, dictionary, torch.tensor(ids), hidden)[:, None]
    vocabulary, tokens = Vocabulary(model.tokenizer), []
    for token, *pair in zip(ids, codes.indices.tolist(), values.tolist(), strict=True):
        active = [Active(*one) for one in zip(*pair, strict=True) if one[1] > 0]
        active.sort(key=lambda one: -one.activation)
        tokens.append(Token(token, vocabulary.text(token), active))
    return tokens


def token_ids(model: LanguageModel, dictionary: Dictionary, text: str) -> list[int]:
    """The tokens of a text, after the model's BOS if the dictionary was trained with it.

    Raises UsageError for a text without tokens or that is not Unicode, LlmWsaeError for a model
    without a tokenizer or with that of another.
    """
    if model.tokenizer is None:
        raise LlmWsaeError("a text cannot be read without a tokenizer; pass one with the model")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("the text holds bytes that are not UTF-8; give it in UTF-8")
    with parsing(f"the tokenizer of {model.name} cannot read the text"):
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise UsageError("the text is empty; give a sentence")
    if dictionary.info.prepend_bos is not False and model.bos_token_id is not None:
        ids = [model.bos_token_id, *ids]
    if max(ids) >= len(model.W_E):
        raise LlmWsaeError(
            f"the tokenizer returns id {max(ids)}, but {model.name} has {len(model.W_E)} "
            "embeddings; give its own tokenizer"
        )
    return ids


def check_width(model: LanguageModel, dictionary: Dictionary) -> None:
    """Raises UsageError if the model's stream is not as wide as the dictionary's rows."""
    if model.d_model != dictionary.d_in:
        raise UsageError(
            f"the dictionary reads {dictionary.d_in} dimensions, but {model.name} has "
            f"{model.d_model}; give the model that it was trained on"
        )


def _explained(
    model: LanguageModel, dictionary: Dictionary, ids: Tensor, hidden: Tensor
) -> Bool[Tensor, " positions"]:
    """The positions of the kind that the dictionary was trained on."""
    packing = PackConfig.remembered(dictionary.info.store.get("packing"))
    keep = torch.arange(len(ids)) >= packing.drop_positions
    if packing.drop_special:
        keep &= ~torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids, dtype=torch.long))
    threshold = dictionary.info.massive_threshold
    return keep if threshold is None else keep & (hidden.float().norm(dim=1) <= threshold)
