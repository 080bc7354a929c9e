"""From the judge's answers to scores of latents, means of dictionaries, and a table.

The scores of a latent have intervals over its examples, those of a dictionary over its latents. A
rank correlation says whether the judge orders latents as detection without a language model does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from llm_wsae.artifact.provenance import plain
from llm_wsae.dictionary.explanations import Explanation, Score
from llm_wsae.evaluation.monosemanticity.report import Mean, mean_of
from llm_wsae.explaining.endpoint import ANSWERS, Tally
from llm_wsae.explaining.protocol import SCORES, Examined, Trial
from llm_wsae.outside import mapping
from llm_wsae.statistics.documents import TextSize
from llm_wsae.statistics.uncertainty import LEVEL, Bootstrap, Interval
from llm_wsae.terminal import aligned

_BOOTSTRAPS = 1000
_FEWEST = 5  # latents of a rank correlation


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over latents."""

    value: float
    interval: Interval
    """95 %, by Fisher's transformation with the variance of Bonett and Wright (2000)."""
    latents: int


@dataclass(frozen=True)
class DictionaryExplained:
    """What was said of one dictionary's latents."""

    folder: Path
    d_sae: int
    eligible: int
    """Latents that are active in enough documents."""
    alike: str
    """What says which texts are alike."""
    latents: list[Explanation]
    means: dict[str, Mean]
    """By score, over the latents that have it."""
    recognised: dict[str, float]
    """Of the texts in which a latent is silent, by how they were chosen: the share that detection
    said so of."""
    own_detection: Mean | None
    """Detection without a language model on the same texts; None without a sentence encoder."""
    agreement: dict[str, Correlation]
    """By score: its rank correlation with that detection, where it is defined."""
    questions: int
    unread: int
    """Questions whose answers have another form than was asked for."""
    failed: int
    """Questions without an answer."""

    @classmethod
    def of(
        cls, examined: Sequence[Examined], explainer: str, seed: int, **known: Any
    ) -> "DictionaryExplained":
        """Score what was answered; ``seed`` is that of the resamplings, ``known`` are the first
        fields."""
        latents = []
        for one in examined:
            scores = {name: score_of(name, trials, seed) for name, trials in one.trials.items()}
            there = {name: score for name, score in scores.items() if score is not None}
            latents.append(Explanation(one.texts.latent, one.explanation, explainer, there))
        bootstrap = Bootstrap(len(latents), _BOOTSTRAPS, seed)

        def mean(column: Sequence[float | None]) -> Mean:
            values = [np.nan if value is None else value for value in column]
            return mean_of(torch.tensor(values, dtype=torch.float64), bootstrap, len(values))

        own = [one.texts.detection for one in examined]
        columns = {
            name: [one.scores[name].value if name in one.scores else None for one in latents]
            for name in SCORES
            if any(name in one.trials for one in examined)
        }
        agreement = {name: rank_correlation(column, own) for name, column in columns.items()}
        own_mean = mean(own)
        return cls(
            **known,
            latents=latents,
            means={name: mean(column) for name, column in columns.items()},
            recognised=_recognised(examined),
            own_detection=own_mean if own_mean.count else None,
            agreement={name: found for name, found in agreement.items() if found is not None},
            questions=sum(one.questions for one in examined),
            unread=sum(one.unread for one in examined),
            failed=sum(one.failed for one in examined),
        )

    def card_numbers(self, older: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What is kept in the dictionary's description, JSON-able; empty if nothing was scored.

        ``older`` is what is kept there now. Of it stay the scores by the same explainer that this
        run did not measure again."""
        scores = {
            name: {"value": mean.mean, "interval": mean.interval}
            for name, mean in self.means.items()
            if mean.count
        }
        if not scores:
            return {}
        numbers: dict[str, Any] = {
            "explainer": self.latents[0].explainer,
            "latents": len(self.latents),
            "questions": self.questions,
            "unread": self.unread,
            "failed": self.failed,
        }
        known = mapping(older.get("explanations"))
        if known.get("explainer") == numbers["explainer"]:
            numbers |= {name: known[name] for name in SCORES if name in known}
        return {"explanations": plain({**numbers, **scores})}

    def notes(self) -> list[str]:
        """What the table has no columns for."""
        lines = [
            f"{self.eligible:,} of {self.d_sae:,} latents are active in enough documents to be "
            "explained and judged"
        ]
        if self.recognised:
            shares = ", ".join(f"{kind} {share:.2f}" for kind, share in self.recognised.items())
            lines.append(f"silent texts recognised: {shares} (hard: alike by {self.alike})")
        if self.own_detection is not None:
            found = ", ".join(
                f"{name} {c.value:.2f} [{c.interval[0]:.2f}, {c.interval[1]:.2f}]"
                for name, c in self.agreement.items()
            )
            lines.append(
                f"detection without a language model on these texts: {_text(self.own_detection)}; "
                f"its rank correlation over latents: {found or 'not defined'}"
            )
        return lines


@dataclass(frozen=True)
class Explained:
    """What ``explain`` found."""

    dictionaries: dict[str, DictionaryExplained]
    """By name."""
    tally: Tally
    """What was asked in this run."""
    out: Path
    text: TextSize
    """Of the store whose texts were shown."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a number that does not exist is null."""
        return plain(self)

    def table(self) -> str:
        """A table for people, with what it means below it."""
        rows = [["dictionary", "latents", *SCORES, "not readable", "no answer"]]
        lines = [f"{name.ljust(11)}{meaning}" for name, meaning in SCORES.items()]
        for name, one in self.dictionaries.items():
            cells = [_text(one.means.get(score)) for score in SCORES]
            unread = f"{one.unread:,} of {one.questions:,}"
            rows.append([name, str(len(one.latents)), *cells, unread, f"{one.failed:,}"])
            lines += ["", name, *(f"  {note}" for note in one.notes())]
        tally = self.tally
        lines += [
            "",
            f"texts are from {self.text.text('the store')}",
            *(f"note: {warning}" for warning in self.text.warnings()),
            f"asked {tally.asked:,} questions ({tally.tokens_in:,} tokens in, "
            f"{tally.tokens_out:,} out); {tally.known:,} were answered before",
        ]
        if tally.failed:
            lines.append(
                f"{tally.failed:,} have no answer ({tally.why}); the same command asks them again"
            )
        return "\n".join([aligned(rows), "", *lines, f"answers  {self.out / ANSWERS}"])


def score_of(name: str, trials: Sequence[Trial], seed: int) -> Score | None:
    """Accuracy in finding intruders; for the other scores balanced accuracy, the mean over texts
    whose answer is yes and those whose is no. Of the trials with an answer, with its interval over
    trials; None if a side has no answer, as where a latent is silent in no text."""
    read = [trial for trial in trials if trial.answer is not None]
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


def rank_correlation(
    one: Sequence[float | None], other: Sequence[float | None]
) -> Correlation | None:
    """Of two scores, over the latents that have both; None if a score is the same for all of them,
    or they are fewer than 5."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if len(pairs) < _FEWEST or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return None
    value = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    error = np.sqrt((1 + value**2 / 2) / (len(pairs) - 3))
    centre = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    low, high = np.tanh(centre + np.array(stats.norm.interval(LEVEL)) * error).tolist()
    return Correlation(value, (low, high), len(pairs))


def _recognised(examined: Sequence[Examined]) -> dict[str, float]:
    silent: dict[str, list[bool]] = {}
    for one in examined:
        for trial in one.trials.get("detection", []):
            if not trial.truth and trial.answer is not None:
                silent.setdefault(trial.kind, []).append(not trial.answer)
    return {kind: float(np.mean(said)) for kind, said in sorted(silent.items())}


def _text(mean: Mean | None) -> str:
    if mean is None or not mean.count:
        return "–"
    return f"{mean.mean:.3f} [{mean.interval[0]:.3f}, {mean.interval[1]:.3f}]"
