"""The folder of a study: the names of its files, and the report that they give.

study.json              what all its dictionaries share; a command with other settings is refused
first/                  plain dictionaries of which some rules take their weights, one of each seed
training/               dictionaries in training, one group of one seed at a time
dictionaries/<name>/    trained dictionaries, and the raw dimensions
results/<name>.json     measured dictionaries; none is measured twice
consistency.json        how alike the kept dictionaries of different seeds are
explained.json          what a language model makes of their latents, if it was asked
looks.json              the k and seeds that each report covered
answers/                its answers (``explaining.endpoint``)
report.json, report.md, report.html, curve.png, differences.png
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_wsae.errors import LlmWsaeError
from llm_wsae.files import AGAIN, read_own_json, write_json
from llm_wsae.studies import consistency
from llm_wsae.studies.plan import RAW_NAME
from llm_wsae.studies.report import StudyReport
from llm_wsae.studies.results import Result, read_result, with_explained
from llm_wsae.studies.stopping import Look, k_added, look_at

BASIS, FIRST, TRAINING, DICTIONARIES, RESULTS, CONSISTENCY, EXPLAINED, LOOKS = (
    "study.json",
    "first",
    "training",
    "dictionaries",
    "results",
    "consistency.json",
    "explained.json",
    "looks.json",
)


def read_report(folder: Path) -> StudyReport:
    """The report on a study, from its files. Raises LlmWsaeError if one of them is damaged."""
    basis = read_basis(folder)
    agreements = consistency.read(folder / CONSISTENCY)
    explained = read_explained(folder)
    if explained:
        basis["explained"] = explained["settings"]
    basis["k_added"] = k_added(read_looks(folder))
    results = with_explained(read_results(folder), explained.get("dictionaries", {}))
    return StudyReport.of(basis["rows"]["site"], basis, results, agreements)


def read_results(folder: Path) -> list[Result]:
    """Every measured dictionary, by name. Raises LlmWsaeError if a file is damaged."""
    return [read_result(path) for path in sorted((folder / RESULTS).glob("*.json"))]


def read_explained(folder: Path) -> dict[str, Any]:
    """``settings`` of the questions and the scores of ``dictionaries``; empty if nothing was asked.

    Raises LlmWsaeError if the file is damaged.
    """
    path = folder / EXPLAINED
    found = read_own_json(path, "explanations of a study") if path.exists() else {}
    if found and not {"settings", "dictionaries"} <= set(found):
        raise LlmWsaeError(f"{path} is not the explanations of a study; delete it to ask again")
    return found


def read_looks(folder: Path) -> list[Look]:
    """What each report on the study covered; none of those made before this was kept.

    Raises LlmWsaeError if the file is damaged.
    """
    path = folder / LOOKS
    found = read_own_json(path, "looks at a study").get("looks") if path.exists() else []
    try:
        return [
            {
                label: {name: list(map(int, own[name])) for name in ("ks", "seeds")}
                for label, own in look.items()
            }
            for look in found
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LlmWsaeError(f"{path} does not say what reports covered; {AGAIN}") from error


def keep_look(folder: Path) -> None:
    """Write down what a report on the study covers now, if none did before."""
    looks, now = read_looks(folder), look_at(read_results(folder))
    if now not in looks:
        write_json(folder / LOOKS, {"looks": [*looks, now]})


def read_basis(folder: Path) -> dict[str, Any]:
    """What all dictionaries of a study share. Raises LlmWsaeError if the file is damaged."""
    path = folder / BASIS
    basis = read_own_json(path, "description of a study")
    try:
        # archived studies are of TopK without plants, whose decoder rows had unit length, and
        # detection was over all genres and documents
        training = {"architecture": "topk", "lengths": "unit"} | basis["training"]
        old = {"planted": {}, "measures": {"detection": 1}}
        return old | basis | {"training": training}
    except (AttributeError, KeyError, TypeError) as error:
        raise LlmWsaeError(f"{path} is not the description of a study; {AGAIN}") from error


def k_of_baselines(folder: Path) -> int | None:
    """The k of the baselines that are there, finished or begun: the raw dimensions are saved before
    the others are trained. The least, should there be several."""
    places = (f"{RESULTS}/{RAW_NAME}*.json", f"{DICTIONARIES}/{RAW_NAME}*")
    names = [path.name for place in places for path in folder.glob(place)]
    ks = [name.removeprefix(RAW_NAME).removesuffix(".json") for name in names]
    return min((int(k) for k in ks if k.isdecimal()), default=None)


def check_basis(folder: Path, basis: Mapping[str, Any]) -> None:
    """Raise LlmWsaeError if the folder holds a study with other settings."""
    if not (folder / BASIS).exists():
        return
    found = read_basis(folder)
    for part, settings in basis.items():
        own = found.get(part)
        if _what_counts(own) == _what_counts(settings):
            continue
        names = [k for k in settings if not isinstance(own, dict) or own.get(k) != settings[k]]
        raise LlmWsaeError(
            f"the study in {folder} has other settings of {part} ({', '.join(names) or 'more'}), "
            "so its dictionaries cannot be compared with these; choose another folder"
        )


def _what_counts(settings: Any) -> Any:
    """Without how many tokens go through the model at once, which changes no result."""
    if not isinstance(settings, dict):
        return settings
    return {name: value for name, value in settings.items() if name != "batch_tokens"}
