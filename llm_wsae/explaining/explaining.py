"""``explain``: a language model explains latents, and is scored on recognising them by it.

The scores of a latent have intervals over its examples, those of a dictionary over its latents.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from llm_wsae.artifact.artifact import check_file, is_record_of
from llm_wsae.artifact.files import write_json
from llm_wsae.artifact.provenance import plain, versions
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import (
    Explanation,
    Score,
    keep_explanations,
    read_explanations,
)
from llm_wsae.dictionary.folder import check_keeps_measurements, keep_measurements, names_of
from llm_wsae.evaluation.heldout import Encoder
from llm_wsae.evaluation.monosemanticity.evaluator import Mean, mean_of
from llm_wsae.explaining.endpoint import ANSWERS, Endpoint, Tally
from llm_wsae.explaining.examples import choose
from llm_wsae.explaining.protocol import (
    SCORES,
    WINDOW,
    Examined,
    ExplainConfig,
    LatentTexts,
    Question,
    Text,
    Trial,
    examine,
)
from llm_wsae.inspecting.directions import Vocabulary, check_width
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.sentence_encoder import SentenceEncoder
from llm_wsae.outside import mapping
from llm_wsae.statistics.uncertainty import LEVEL, Bootstrap, Interval, TextSize
from llm_wsae.terminal import Table

REPORT = "report.json"
_CHARACTERS = 4  # of a token, about
_BOOTSTRAPS = 1000
_IN_WORDS = ("detection", "fuzzing")  # scores whose answers are yes or no
_FEWEST = 5  # latents of a rank correlation


@dataclass(frozen=True)
class Price:
    """What a run costs at most; about, at four characters a token."""

    questions: int
    tokens_in: int
    tokens_out: int
    money: float | None  # at the prices of the configuration

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
    texts = LatentTexts(0, [one] * config.examples, [one] * config.positives, silent)
    examine(texts, ask, config, "")
    questions, tokens_in, tokens_out = (totals * latents).tolist()
    money = None
    if config.price_in is not None and config.price_out is not None:
        money = (tokens_in * config.price_in + tokens_out * config.price_out) / 1e6
    return Price(questions, tokens_in, tokens_out, money)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over latents."""

    value: float
    interval: Interval  # 95 %, by Fisher's transformation, with Bonett and Wright's variance (2000)
    latents: int


@dataclass(frozen=True)
class DictionaryExplained:
    """What was said of one dictionary's latents."""

    folder: Path
    d_sae: int
    eligible: int  # latents that are active in enough documents
    latents: list[Explanation]
    means: dict[str, Mean]  # by score, over the latents that have it
    recognised: dict[str, float]  # by kind of silent text: the share that detection tells as such
    yes: float | None  # share of yes among the judge's answers in detection and fuzzing
    own_detection: Mean  # detection without a language model on the same texts
    agreement: dict[str, Correlation]  # by score: its rank correlation with own_detection
    questions: int
    unread: int  # questions whose answers have another form than was asked for
    failed: int  # questions without an answer

    def card_numbers(self, older: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What is kept in the dictionary's description, JSON-able; empty if nothing was scored. Of
        the ``older`` numbers, scores by the same explainer stay that were not measured again."""
        scores = {
            name: {"value": mean.mean, "interval": mean.interval}
            for name, mean in self.means.items()
            if mean.count
        }
        if not scores:
            return {}
        explainer, known = self.latents[0].explainer, mapping(older.get("explanations"))
        numbers: dict[str, Any] = {"explainer": explainer, "latents": len(self.latents)}
        numbers |= {name: getattr(self, name) for name in ("questions", "unread", "failed")}
        if known.get("explainer") == explainer:
            numbers |= {name: known[name] for name in SCORES if name in known}
        return {"explanations": plain({**numbers, **scores})}

    def notes(self) -> Iterator[str]:
        """What the table has no columns for."""
        yield (
            f"{self.eligible:,} of {self.d_sae:,} latents are active in enough documents to be "
            "explained and judged"
        )
        if self.yes in (0, 1):
            yield (
                f"the judge says {'yes' if self.yes else 'no'} to every text, so detection and "
                "fuzzing tell nothing of the latents; --scores graded asks it for a probability"
            )
        if self.recognised:
            shares = ", ".join(f"{kind} {share:.2f}" for kind, share in self.recognised.items())
            yield f"silent texts recognised: {shares}"
        found = ", ".join(
            f"{name} {c.value:.2f} [{c.interval[0]:.2f}, {c.interval[1]:.2f}]"
            for name, c in self.agreement.items()
        )
        yield (
            f"detection without a language model on these texts: {_text(self.own_detection)}; "
            f"its rank correlation over latents: {found or 'not defined'}"
        )


@dataclass(frozen=True)
class Explained:
    """What ``explain`` found."""

    dictionaries: dict[str, DictionaryExplained]  # by name
    tally: Tally  # what was asked in this run
    out: Path
    text: TextSize  # of the store whose texts were shown

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a number that does not exist is null."""
        return plain(self)

    def table(self) -> str:
        """A table for people, with what it means below it."""
        rows = [["dictionary", "latents", *SCORES, "not readable", "no answer"]]
        words = []
        for name, one in self.dictionaries.items():
            cells = [_text(one.means.get(score)) for score in SCORES]
            unread = f"{one.unread:,} of {one.questions:,}"
            rows.append([name, str(len(one.latents)), *cells, unread, f"{one.failed:,}"])
            words += [name, *(f"  {note}" for note in one.notes()), ""]
        tally = self.tally
        words += [
            f"texts are from {self.text.text('the store')}",
            *(f"note: {warning}" for warning in self.text.warnings()),
            f"asked {tally.asked:,} questions ({tally.tokens_in:,} tokens in, "
            f"{tally.tokens_out:,} out); {tally.known:,} were answered before",
        ]
        if tally.failed:
            words.append(
                f"{tally.failed:,} have no answer ({tally.why}); the same command asks them again"
            )
        words.append(f"answers  {self.out / ANSWERS}")
        return Table(rows, meanings=SCORES, words=words).text()


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

    This may cost money: ``price_of`` says how much. ``dictionaries`` are folders that this package
    saved, or these by the names to show; the explanations are kept in them. ``store`` is of their
    site; ``model`` made it, or is what ``LanguageModel.load`` takes. ``endpoint`` is the address of
    an OpenAI-compatible endpoint, up to ``/v1``, whose key is read from ``LLM_WSAE_API_KEY`` in the
    environment (for OpenAI's own also from ``OPENAI_API_KEY``); ``explainer`` is the model there. A
    run with the same folder ``out`` pays for no answer twice. ``encoder`` replaces that of
    ``config``.

    Raises UsageError for no dictionary, another tool's, or an address or key that cannot be one;
    LlmWsaeError for what cannot be read or does not belong together, if no latent is active in
    enough documents, or if the endpoint refuses or fails.
    """
    folders = check_folders(dictionaries)
    check_file(Path(out) / REPORT, is_record_of("explain"))
    store = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
    model = model if isinstance(model, LanguageModel) else LanguageModel.load(model)
    store.check_model(model.identity())
    encoder = SentenceEncoder.load(config.encoder) if encoder is None else encoder
    vocabulary, done = Vocabulary(model.tokenizer), dict[str, DictionaryExplained]()
    with Endpoint(endpoint, explainer, Path(out), config.answer_tokens, config.schema) as asked:
        for name, folder in folders.items():
            dictionary = Dictionary.load(folder)
            check_width(model, dictionary)
            latents, eligible = choose(store, dictionary, vocabulary, config, encoder)
            examined = _examine_all(latents, asked, config, name)
            facts = {"folder": folder, "d_sae": dictionary.d_sae, "eligible": eligible}
            one = _scored(examined, explainer, config.seed, facts)
            keep_explanations(folder, one.latents, dictionary.weights_sha256)
            keep_measurements(folder, one.card_numbers, dictionary.weights_sha256)
            done[name] = one
    result = Explained(done, asked.tally, Path(out), store.text_size())
    asked_for = {"command": "explain", "endpoint": endpoint, "explainer": explainer}
    made = {"config": plain(config), "versions": versions()}
    write_json(Path(out) / REPORT, {**asked_for, **made, **result.to_dict()})
    return result


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


def _examine_all(
    latents: Sequence[LatentTexts], endpoint: Endpoint, config: ExplainConfig, name: str
) -> list[Examined]:
    with ThreadPoolExecutor(config.parallel) as pool:
        jobs = [pool.submit(examine, texts, endpoint.ask, config, name) for texts in latents]
        ready = as_completed(jobs)
        try:
            for job in tqdm(ready, desc=f"explain {name}", total=len(jobs), unit="latent"):
                job.result()
        except BaseException:  # Ctrl-C too: what is on its way is still kept
            endpoint.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [job.result() for job in jobs]


def _scored(
    examined: Sequence[Examined], explainer: str, seed: int, facts: dict[str, Any]
) -> DictionaryExplained:
    """Score what was answered; ``seed`` is that of the resamplings."""
    latents = []
    for one in examined:
        found = ((name, score_of(name, trials, seed)) for name, trials in one.trials.items())
        scores = {name: score for name, score in found if score is not None}
        latents.append(Explanation(one.texts.latent, one.explanation, explainer, scores))
    columns = {
        name: [one.scores[name].value if name in one.scores else np.nan for one in latents]
        for name in SCORES
        if name in examined[0].trials
    }
    own = [one.texts.detection for one in examined]
    agreement = {name: rank_correlation(column, own) for name, column in columns.items()}
    silent: dict[str, list[bool]] = {}
    for one in examined:
        for trial in one.trials.get("detection", []):
            if not trial.truth and trial.answer is not None:
                silent.setdefault(trial.kind, []).append(not trial.answer)
    words = [t.answer for one in examined for n in _IN_WORDS for t in one.trials.get(n, [])]
    said = [answer for answer in words if answer is not None]
    bootstrap = Bootstrap(len(latents), _BOOTSTRAPS, seed)

    def mean(column: Sequence[float]) -> Mean:
        return mean_of(torch.tensor(column, dtype=torch.float64), bootstrap, len(column))

    return DictionaryExplained(
        **facts,
        latents=latents,
        means={name: mean(column) for name, column in columns.items()},
        recognised={kind: float(np.mean(said)) for kind, said in sorted(silent.items())},
        yes=float(np.mean(said)) if said else None,
        own_detection=mean(own),
        agreement={name: found for name, found in agreement.items() if found is not None},
        questions=sum(one.questions for one in examined),
        unread=sum(one.unread for one in examined),
        failed=sum(one.failed for one in examined),
    )


def score_of(name: str, trials: Sequence[Trial], seed: int) -> Score | None:
    """Of the trials with an answer: accuracy in finding intruders, the area under the ROC curve of
    graded answers, else balanced accuracy, with its interval over trials; None if a side has no
    answer, as where a latent is silent in no text."""
    read = [trial for trial in trials if trial.answer is not None]
    if name == "graded":
        return _area(read, len(trials), seed)
    sides = (True,) if name == "intruder" else (True, False)
    sums: dict[str, np.ndarray] = {}
    for side in sides:
        own = np.array([trial.truth == side for trial in read], dtype=float)
        sums[f"all {side}"] = own
        sums[f"right {side}"] = own * [trial.answer == trial.truth for trial in read]
        if not own.any():
            return None

    def accuracy(drawn: Mapping[str, Any]) -> Any:
        return sum(drawn[f"right {side}"] / drawn[f"all {side}"] for side in sides) / len(sides)

    value = float(accuracy({name: column.sum() for name, column in sums.items()}))
    interval = Bootstrap(len(read), _BOOTSTRAPS, seed).interval(accuracy, sums)
    return Score(value, interval, len(trials), len(read))


def _area(read: Sequence[Trial], asked: int, seed: int) -> Score | None:
    """The probability that a text with the latent is graded higher than one without it."""
    yes, no = (
        np.array([trial.answer for trial in read if trial.truth == side], dtype=float)
        for side in (True, False)
    )
    if not (len(yes) and len(no)):
        return None
    won = (yes[:, None] > no) + (yes[:, None] == no) / 2
    draw = np.random.default_rng(seed)
    rows, columns = (draw.integers(n, size=(_BOOTSTRAPS, n)) for n in won.shape)
    areas = won[rows[:, :, None], columns[:, None]].mean((1, 2))
    low, high = np.quantile(areas, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return Score(float(won.mean()), (low, high), asked, len(read))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> Correlation | None:
    """Of two scores, over the latents that have both (the others are NaN); None if a score is the
    same for all of them, or they are fewer than 5."""
    both = np.array([one, other], dtype=np.float64)
    both = both[:, ~np.isnan(both).any(0)]
    count = both.shape[1]
    if count < _FEWEST or (np.ptp(both, axis=1) == 0).any():
        return None
    value = float(stats.spearmanr(*both).statistic)
    error = np.sqrt((1 + value**2 / 2) / (count - 3))
    centre = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    low, high = np.tanh(centre + np.array(stats.norm.interval(LEVEL)) * error).tolist()
    return Correlation(value, (low, high), count)


def _text(mean: Mean | None) -> str:
    if mean is None or not mean.count:
        return "–"
    return f"{mean.mean:.3f} [{mean.interval[0]:.3f}, {mean.interval[1]:.3f}]"
