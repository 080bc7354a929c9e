"""``explain``: a language model explains latents, and is scored on recognising them by it."""

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llm_wsae.artifact.files import read_json, write_json
from llm_wsae.artifact.outputs import check_file
from llm_wsae.artifact.provenance import command_line, plain, versions
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import keep_explanations, read_explanations
from llm_wsae.dictionary.folder import change_measurements, check_keeps_measurements, names_of
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.evaluation.heldout import Encoder
from llm_wsae.explaining.endpoint import Endpoint
from llm_wsae.explaining.examples import choose
from llm_wsae.explaining.protocol import (
    WINDOW,
    Examined,
    ExplainConfig,
    LatentTexts,
    Question,
    Text,
    examine,
)
from llm_wsae.explaining.report import DictionaryExplained, Explained
from llm_wsae.inspecting.sentence import check_width
from llm_wsae.inspecting.vocabulary import Vocabulary
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder
from llm_wsae.outside import mapping

REPORT = "report.json"
_CHARACTERS = 4  # of a token, about


@dataclass(frozen=True)
class Price:
    """What a run costs at most."""

    questions: int
    tokens_in: int
    """About, at four characters a token."""
    tokens_out: int
    """About; ``questions`` × ``answer_tokens`` at most."""
    money: float | None
    """At the prices of the configuration; None without them."""

    def __str__(self) -> str:
        digits = ",.2f" if (self.money or 0) >= 1 else ".2g"
        money = "" if self.money is None else f", about {self.money:{digits}} at the given prices"
        return (
            f"at most {self.questions:,} questions: about {self.tokens_in:,} tokens in and "
            f"{self.tokens_out:,} out{money}"
        )


def price_of(config: ExplainConfig, latents: int) -> Price:
    """What explaining ``latents`` latents costs, by asking about one with texts of usual length."""
    text, totals = "word" * WINDOW, np.zeros(3, dtype=np.int64)
    one = Text(text, f"<<{text}>>", f"<<{text}>>")

    def ask(question: Question, about: str) -> str:
        read = (len(question.system) + len(question.user)) // _CHARACTERS
        totals[:] += (1, read, question.answer_tokens)
        return json.dumps({"explanation": text})

    silent = {"random": [text] * config.negatives}
    examine(
        LatentTexts(0, [one] * config.examples, [one] * config.positives, silent), ask, config, ""
    )
    questions, tokens_in, tokens_out = (totals * latents).tolist()
    money = None
    if config.price_in is not None and config.price_out is not None:
        money = (tokens_in * config.price_in + tokens_out * config.price_out) / 1e6
    return Price(questions, tokens_in, tokens_out, money)


def explain(
    dictionaries: Sequence[Path | str] | Mapping[str, Path | str],
    store: ActivationStore | Path | str,
    model: LanguageModel | str,
    endpoint: str,
    explainer: str,
    out: Path | str,
    config: ExplainConfig = ExplainConfig(),  # noqa: B008 - frozen
    *,
    encoder: Encoder | None = None,
) -> Explained:
    """Have a language model explain latents, and score how well it recognises them by that.

    This may cost money: ``price_of`` says how much. The explanations are kept in the dictionaries'
    folders.

    Args:
        dictionaries: Folders of dictionaries that this package saved; or by the names to show.
        store: Activation store of their site.
        model: The model that made the store, or what ``LanguageModel.load`` takes.
        endpoint: Address of an OpenAI-compatible endpoint, up to ``/v1``. The key is read from
            ``LLM_WSAE_API_KEY`` in the environment, for OpenAI's own also from ``OPENAI_API_KEY``.
        explainer: Name of the language model there, which explains and judges.
        out: Folder of the answers. A run with the same folder pays for no answer twice.
        config: Which latents are explained, from how many texts, and how they are judged.
        encoder: Sentence encoder to use in place of ``config.encoder``.

    Raises:
        UsageError: The request cannot be right: no dictionary, a folder that is not this
            package's, an address or key that cannot be one.
        LlmWsaeError: A folder cannot be read or belongs to another model, no latent is active in
            enough documents, or the endpoint refuses or fails.
    """
    folders = check_folders(dictionaries)
    check_file(Path(out) / REPORT, _is_report)
    store = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
    model = model if isinstance(model, LanguageModel) else LanguageModel.load(model)
    store.check_model(model.identity())
    vocabulary, done = Vocabulary(model.tokenizer), dict[str, DictionaryExplained]()
    with Endpoint(endpoint, explainer, Path(out), config.answer_tokens, config.schema) as asked:
        alike = f"the sentence encoder {config.encoder}"
        if encoder is None and (encoder := _encoder(config)) is None:
            alike = "the rare tokens that they share"
        for name, folder in folders.items():
            dictionary = Dictionary.load(folder)
            check_width(model, dictionary)
            latents, eligible = choose(store, dictionary, vocabulary, config, encoder)
            one = DictionaryExplained.of(
                _examine_all(latents, asked, config, name),
                explainer,
                config.seed,
                folder=folder,
                d_sae=dictionary.d_sae,
                eligible=eligible,
                alike=alike,
            )
            keep_explanations(folder, one.latents, dictionary.weights_sha256)
            change_measurements(folder, one.card_numbers, dictionary.weights_sha256)
            done[name] = one
    result = Explained(done, asked.tally, Path(out), store.text_size())
    settings = plain({"endpoint": endpoint, "explainer": explainer, "config": config})
    record = {"command": command_line(), **settings, "versions": versions()}
    write_json(Path(out) / REPORT, record | result.to_dict())
    return result


def _is_report(path: Path) -> bool:
    """Whether ``explain`` wrote the file."""
    try:
        return {"endpoint", "explainer"} <= mapping(read_json(path, "report")).keys()
    except LlmWsaeError:
        return False


def check_folders(
    dictionaries: Sequence[Path | str] | Mapping[str, Path | str],
) -> dict[str, Path]:
    """The folders by name. Raises UsageError if there is none, or explanations cannot be kept in
    one; LlmWsaeError if it holds those of another dictionary."""
    if isinstance(dictionaries, Mapping) and dictionaries:
        named = {name: Path(folder) for name, folder in dictionaries.items()}
    else:
        named = names_of(map(Path, dictionaries))
    for folder in named.values():
        check_keeps_measurements(folder)
        read_explanations(folder)
    return named


def _encoder(config: ExplainConfig) -> SentenceEncoder | None:
    """The sentence encoder; None, and a note, if the default one is missing."""
    try:
        return SentenceEncoder.load(config.encoder)
    except UsageError:
        raise
    except LlmWsaeError as error:
        said = f"{error}; until then, texts that share rare tokens count as alike"
        print(f"llm-wsae: {said}", file=sys.stderr)
        return None


def _examine_all(
    latents: Sequence[LatentTexts], endpoint: Endpoint, config: ExplainConfig, name: str
) -> list[Examined]:
    with (
        tqdm(total=len(latents), desc=f"explain {name}", unit="latent") as bar,
        ThreadPoolExecutor(config.parallel) as pool,
    ):
        jobs = [pool.submit(examine, texts, endpoint.ask, config, name) for texts in latents]
        try:
            for job in as_completed(jobs):
                job.result()
                bar.update()
        except BaseException:  # Ctrl-C too: what is on its way is still kept
            endpoint.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [job.result() for job in jobs]
