"""From documents to contexts: packed token ids, every position of which leads back to its text.

Documents give their text in sections of about two contexts, taking turns (``data.corpus``). The
tokens of all sections, each followed by the tokenizer's end-of-sequence token, form one stream,
which is cut into pieces of equal length. Each piece, after a beginning-of-sequence token, is a
context. A place in the stream is a cursor (section, offset in it). Packing from a cursor gives
exactly the contexts that packing from the beginning gives there, so that a stopped run can resume.

A conversation is one section, which the tokenizer's chat template turns into tokens, with the marks
of the roles. These are special tokens, which give no row unless they are asked for.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int32

from llm_wsae.artifact.files import load_tensors, save_tensors
from llm_wsae.data.config import PackConfig
from llm_wsae.data.corpus import Corpus, Section
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.outside import parsing

NO_DOCUMENT = -1
_SECTION, _DOCUMENT, _OFFSET = 1, 2, 3  # rows of a stream of tokens
_SECTIONS_AT_ONCE, _CHARACTERS_AT_ONCE = 64, 1 << 19  # which are tokenised together
_SAMPLED_DOCUMENTS, _SAMPLED_CHARACTERS = 32, 1000  # whose length in tokens is measured


class Cursor(NamedTuple):
    """A place in the token stream of a corpus: a token's number in a section."""

    section: int
    offset: int


BEGINNING = Cursor(0, 0)


class Context(NamedTuple):
    """One context."""

    ids: Int32[np.ndarray, " positions"]
    keep: Bool[np.ndarray, " positions"]  # whether the position gives a row
    document: Int32[np.ndarray, " positions"]  # by their first sections; -1 for none
    offset: Int32[np.ndarray, " positions"]  # number of the token in its section; -1 for none


class Contexts(NamedTuple):
    """Consecutive contexts; ``first`` and ``next`` are where they begin in the corpus, and where
    the next one does."""

    ids: Int32[np.ndarray, "contexts positions"]
    keep: Bool[np.ndarray, "contexts positions"]
    document: Int32[np.ndarray, "contexts positions"]
    offset: Int32[np.ndarray, "contexts positions"]
    first: Cursor
    next: Cursor
    headers: dict[int, dict[str, Any]]  # name and labels of every document in them

    def each(self) -> Iterator[Context]:
        """The contexts one by one."""
        return map(Context._make, zip(*self[:4], strict=True))


class Packer:
    """Turns a corpus into contexts for one tokenizer."""

    def __init__(
        self, tokenizer: Any, bos_token_id: int | None, vocab_size: int, config: PackConfig
    ):
        """``vocab_size`` is the model's number of embeddings; larger ids are an error."""
        if tokenizer is None:
            raise LlmWsaeError("text cannot be read without a tokenizer; pass one with the model")
        self._tokenizer, self._vocab_size, self._config = tokenizer, vocab_size, config
        self._bos = bos_token_id if config.prepend_bos else None
        self._separator = tokenizer.eos_token_id
        self._padding = self._separator if self._separator is not None else 0
        self._special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int32)
        self._one_each = config.one_document_per_context
        self.content_size = config.context_size - (self._bos is not None)
        """Positions of a context that text can fill."""

    @classmethod
    def for_model(cls, model: Any, config: PackConfig) -> "Packer":
        """A packer for a LanguageModel. Raises UsageError for contexts that are too long for it."""
        if model.max_context is not None and config.context_size > model.max_context:
            raise UsageError(
                f"contexts of {config.context_size} tokens are too long for {model.name}, "
                f"which reads at most {model.max_context}"
            )
        embedding = model.hf_model.get_input_embeddings()
        return cls(model.tokenizer, model.bos_token_id, embedding.weight.shape[0], config)

    def contexts(self, corpus: Corpus) -> Iterator[Context]:
        """The contexts of a corpus one by one."""
        for block in self.blocks(corpus, 64):
            yield from block.each()

    def blocks(
        self, corpus: Corpus, block_size: int, start: Cursor = BEGINNING, limit: int | None = None
    ) -> Iterator[Contexts]:
        """The contexts of a corpus from a cursor on, ``block_size`` at a time, at most ``limit``.
        Tokens at its end that fill no context are dropped. Raises LlmWsaeError if the tokenizer
        returns an id that the model does not have, or the corpus cannot be read."""
        left = sys.maxsize if limit is None else limit
        parts: list[np.ndarray] = []
        pending = 0
        headers: dict[int, dict[str, Any]] = {}
        for sections, tokens in self._tokenised(corpus, start):
            for section, ids in zip(sections, tokens, strict=True):
                if len(ids) or not self._one_each:
                    parts.append(self._stream(section, ids, start))
                    pending += parts[-1].shape[1]
                    headers[section.document] = {"name": section.name, "labels": section.labels}
            if pending < min(block_size, left) * self.content_size:
                continue
            stream = np.concatenate(parts, axis=1)
            while pending >= (length := min(block_size, left) * self.content_size):
                if not left:
                    return
                block = self._cut(stream[:, :length], start, headers)
                yield block
                start, stream, pending = block.next, stream[:, length:], pending - length
                left -= len(block.ids)
            parts = [stream]
            headers = {i: headers[i] for i in np.unique(stream[_DOCUMENT]).tolist() if i in headers}
        rest = pending // self.content_size * self.content_size
        if rest:
            yield self._cut(np.concatenate(parts, axis=1)[:, :rest], start, headers)

    def _tokenised(
        self, corpus: Corpus, start: Cursor
    ) -> Iterator[tuple[list[Section], list[list[int]]]]:
        sections: list[Section] = []
        length, size = 0, None if self._one_each else self._two_contexts
        for section in corpus.sections(size, start.section):
            sections.append(section)
            length += len(section.text)
            if len(sections) >= _SECTIONS_AT_ONCE or length >= _CHARACTERS_AT_ONCE:
                yield sections, self._ids(sections)
                sections, length = [], 0
        if sections:
            yield sections, self._ids(sections)

    def _ids(self, sections: Sequence[Section]) -> list[list[int]]:
        plain = iter(self._encoded([one.text for one in sections if not one.is_chat]))
        return [self._of_chat(one) if one.is_chat else next(plain) for one in sections]

    def _of_chat(self, section: Section) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise LlmWsaeError(
                f"{section.name} is a conversation, but the model's tokenizer has no chat "
                "template; take an instruct model, or name a column of text with --text-column"
            )
        with parsing(f"the chat template cannot read {section.name}"):
            messages = json.loads(section.text)
            return self._tokenizer.apply_chat_template(messages, return_dict=False)

    def _two_contexts(self, texts: Sequence[str]) -> int:
        """Characters that fill just less than two contexts, from a sample."""
        sample = [text[:_SAMPLED_CHARACTERS] for text in texts[:_SAMPLED_DOCUMENTS]]
        tokens = sum(map(len, self._encoded(sample)))
        return max(1, 7 * self.content_size * sum(map(len, sample)) // max(1, 4 * tokens))

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        with parsing("the tokenizer cannot read the text"):  # e.g. with an endless expression
            return self._tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,  # documents may be longer than the model's context
            )["input_ids"]

    def _stream(self, section: Section, tokens: list[int], start: Cursor) -> np.ndarray:
        """A section's part of the stream, from the cursor on: ids, section, document, offset and
        whether they are separators, [5, tokens]."""
        length = len(tokens)
        if self._separator is not None and not self._one_each:
            tokens = [*tokens, self._separator]
        ids = np.asarray(tokens, dtype=np.int32)
        offset = np.arange(len(ids), dtype=np.int32)
        index, document = (np.full_like(offset, n) for n in (section.index, section.document))
        stream = np.stack([ids, index, document, offset, offset >= length])
        if not self._one_each:
            return stream[:, start.offset if section.index == start.section else 0 :]
        # padded on the right, where causal attention never sees it
        stream = stream[:, : self.content_size]
        lack = self.content_size - stream.shape[1]
        padding = np.array([self._padding, NO_DOCUMENT, NO_DOCUMENT, NO_DOCUMENT, True], np.int32)
        return np.concatenate([stream, padding[:, None].repeat(lack, axis=1)], axis=1)

    def _cut(
        self, stream: np.ndarray, first: Cursor, headers: dict[int, dict[str, Any]]
    ) -> Contexts:
        """Whole contexts of a stream whose length is a multiple of ``content_size``."""
        if self._one_each:
            following = Cursor(int(stream[_SECTION].max()) + 1, 0)
        else:
            following = Cursor(int(stream[_SECTION, -1]), int(stream[_OFFSET, -1]) + 1)
        stream = stream.reshape(len(stream), -1, self.content_size)
        if self._bos is not None:
            begin = np.array([self._bos, NO_DOCUMENT, NO_DOCUMENT, NO_DOCUMENT, False], np.int32)
            begins = begin[:, None, None].repeat(stream.shape[1], axis=1)
            stream = np.concatenate([begins, stream], axis=2)
        ids, _, document, offset, separator = stream
        if (largest := int(ids.max())) >= self._vocab_size:
            raise LlmWsaeError(
                f"the tokenizer returns the id {largest}, but the model has {self._vocab_size} "
                "embeddings; give its own tokenizer"
            )
        document, offset = (
            np.where(separator, np.int32(NO_DOCUMENT), a) for a in (document, offset)
        )
        keep = np.ones(ids.shape, dtype=bool)
        keep[:, : self._config.drop_positions] = False
        if self._one_each:
            keep &= separator == 0  # the only separators are padding
        if self._config.drop_special:
            keep &= (separator == 0) & ~np.isin(ids, self._special)
        present = np.unique(document[document >= 0]).tolist()
        return Contexts(
            ids, keep, document, offset, first, following, {i: headers[i] for i in present}
        )


_FIELDS = ("ids", "keep", "document", "offset")


def save_contexts(path: Path, batches: Sequence[Contexts]) -> None:
    """Write consecutive batches of contexts as one file."""
    tensors = {
        name: torch.from_numpy(np.concatenate([getattr(batch, name) for batch in batches]))
        for name in _FIELDS
    }
    headers = {number: own for batch in batches for number, own in batch.headers.items()}
    # One string: the order in which safetensors writes several differs between runs.
    text = json.dumps({str(number): headers[number] for number in sorted(headers)})
    save_tensors(path, tensors, metadata={"documents": text})


def load_contexts(path: Path, first: Sequence[int], following: Sequence[int]) -> Contexts:
    """Read such a file; the cursors come from the manifest."""
    tensors, metadata = load_tensors(path, "tokens of a shard")
    headers = {int(number): own for number, own in json.loads(metadata["documents"]).items()}
    ids, keep, document, offset = (tensors[name].numpy() for name in _FIELDS)
    return Contexts(ids, keep, document, offset, Cursor(*first), Cursor(*following), headers)
