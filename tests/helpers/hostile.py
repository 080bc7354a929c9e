"""A tokenizer whose tokens would take over whatever shows them."""

from typing import Any

from llm_wsae.model.language_model import LanguageModel


class HostileTokenizer:
    """Reads as another one does, and writes these texts."""

    def __init__(self, real: Any, texts: tuple[str, ...]):
        self._real, self._texts = real, texts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, *given: Any, **options: Any) -> Any:
        return self._real(*given, **options)

    def __len__(self) -> int:
        return len(self._real)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self._texts[token % len(self._texts)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(self.convert_ids_to_tokens, ids))


def with_hostile_tokens(model: LanguageModel, *texts: str) -> LanguageModel:
    return LanguageModel(model.hf_model, HostileTokenizer(model.tokenizer, texts), model.name)
