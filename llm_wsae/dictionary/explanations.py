"""What a language model said about latents: ``explanations.jsonl`` beside a dictionary's weights.

The first line holds the checksums of the weights, so that labels are never shown beside another
dictionary, of the other lines, one for each explained latent, and its own. The file may come from
the Hub, so types are checked, and a text is only ever shown escaped.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm_wsae.artifact.files import Damaged, check_line, json_line, write_text
from llm_wsae.dictionary.folder import (
    EXPLANATIONS,
    check_keeps_measurements,
    weights_checksum,
    writing,
)
from llm_wsae.errors import LlmWsaeError
from llm_wsae.outside import mapping, pair, parsing, typed

_FORMAT, _FORMAT_VERSION = "llm-wsae explanations", 1
_LINES = "lines_sha256"
_WAY_OUT = "delete it to continue without explanations"
_LONGEST = 400  # characters of an explanation


@dataclass(frozen=True)
class Score:
    """How well an explanation, or a latent's contexts alone, let a judge tell examples apart."""

    value: float
    """Balanced accuracy (chance: 0.5); of ``intruder`` accuracy (0.2), of ``graded`` area (0.5)."""
    interval: tuple[float, float]  # 95 %, over examples
    asked: int  # examples that were put to the judge
    answered: int  # those of them with an answer that could be read


@dataclass(frozen=True)
class Explanation:
    """What is known of one latent."""

    latent: int
    text: str | None  # the explanation; None if the explainer gave none that could be read
    explainer: str  # name of the language model
    scores: Mapping[str, Score]  # detection, fuzzing, intruder and graded, if they were measured


def read_explanations(folder: Path) -> dict[int, Explanation]:
    """The explanations in a dictionary's folder, by latent; empty if it has none. Raises
    LlmWsaeError if the file is damaged or belongs to another dictionary."""
    path = Path(folder) / EXPLANATIONS
    if not path.is_file():
        return {}
    with parsing(f"{path} is damaged and cannot be used ({_WAY_OUT})"):
        first, _, rest = path.read_bytes().decode("utf-8").partition("\n")
        head = mapping(check_line(first))
        if (head.get("format"), head.get("format_version")) != (_FORMAT, _FORMAT_VERSION):
            raise LlmWsaeError(
                f"{path} does not hold explanations as this version writes them; update llm-wsae, "
                f"or {_WAY_OUT}"
            )
        if head.get("weights_sha256") != weights_checksum(Path(folder)):
            raise LlmWsaeError(
                f"{path} explains the latents of another dictionary; move it to where it belongs, "
                "or delete it"
            )
        if head.get(_LINES) != _sha256(rest):
            raise Damaged
        found = [_explanation(json.loads(line)) for line in rest.split("\n") if line]
    return {one.latent: one for one in found}


def _explanation(line: dict[str, Any]) -> Explanation:
    scores = {
        name: Score(**{**score, "interval": pair(score["interval"])})
        for name, score in line["scores"].items()
    }
    one = typed(Explanation(**{**line, "scores": scores}))
    if one.latent < 0:
        raise ValueError(f"there is no latent {one.latent}")
    return replace(one, text=one.text[:_LONGEST] if one.text else None)


def keep_explanations(
    folder: Path, found: Iterable[Explanation], weights: str | None = None
) -> None:
    """Store explanations in a dictionary's folder; older ones of other latents stay, as does what
    newer ones lack. ``weights`` is ``Dictionary.weights_sha256`` of what was explained. Raises as
    ``check_keeps_measurements`` and ``read_explanations`` do, and if the file cannot be written."""
    with writing(folder):
        check_keeps_measurements(folder, weights)
        known = read_explanations(folder)
        for one in found:
            known[one.latent] = _joined(known.get(one.latent), one)
        rows = [asdict(known[latent]) for latent in sorted(known)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        head = {"format": _FORMAT, "format_version": _FORMAT_VERSION}
        head |= {"weights_sha256": weights_checksum(folder), _LINES: _sha256(lines)}
        write_text(Path(folder) / EXPLANATIONS, json_line(head) + lines)


def _joined(old: Explanation | None, new: Explanation) -> Explanation:
    """The newer of two, with what it lacks: it has no text if only other scores were asked for."""
    if old is None:
        return new
    if old.explainer != new.explainer:
        return old if new.text is None and old.text is not None else new
    if old.text is not None and new.text is not None and old.text != new.text:
        return new
    return replace(new, text=new.text or old.text, scores={**old.scores, **new.scores})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
