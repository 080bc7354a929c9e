"""Two processes on one dictionary: what either kept is there in the end, and what is read is whole.

A case decides what each does and in which order; the machine, how they meet.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Fuzz, begun
from small_dictionaries import make_dictionary

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, keep_explanations, read_explanations
from llm_wsae.dictionary.folder import keep_measurements, read_folder
from llm_wsae.errors import LlmWsaeError

REPLACED = "was replaced by another one"
MEMORY = 24 << 30  # bytes of addresses; torch alone takes several


def process(
    folder: Path, who: int, steps: list[str], weights: str, mine: Dictionary, other: Dictionary
) -> Callable[[], dict[str, Any]]:
    """Does the steps; gives what it kept since it last saved, and whether it met another one."""

    def work() -> dict[str, Any]:
        kept: dict[str, Any] = {"measured": [], "explained": [], "replaced": False}
        for number, step in enumerate(steps):
            name = 100 * who + number
            try:
                if step == "measure":
                    keep_measurements(folder, {f"group {name}": {"n": name}}, weights)
                    kept["measured"].append(f"group {name}")
                elif step == "explain":
                    said = [Explanation(name, f"text {name}", "m", {})]
                    keep_explanations(folder, said, weights)
                    kept["explained"].append(name)
                elif step == "read":  # as push does before it sends anything
                    read_folder(folder)
                    read_explanations(folder)
                    Dictionary.load(folder)
                else:
                    (mine if step == "save" else other).save(folder)
                    kept["measured"] = []
            except (LlmWsaeError, OSError) as error:
                if step == "read":  # which may be refused while the folder is replaced
                    continue
                if REPLACED not in str(error):
                    raise
                kept["replaced"] = True
        return kept

    return work


@pytest.mark.parametrize("part", range(4))
def test_two_writers(part, tmp_path, fuzz: Fuzz):
    mine = make_dictionary("plain-k4")
    other = make_dictionary("plain-k4")
    other.b_dec.data += 1
    folder, kind = tmp_path / "dictionary", f"two processes {part}"
    for number, draw in fuzz.cases(kind, 5 if fuzz.times == 1 else 25):
        mine.save(folder)
        (folder / "explanations.jsonl").unlink(missing_ok=True)
        weights = Dictionary.load(folder).weights_sha256
        steps = [draw.choices(("measure", "explain", "read"), k=draw.randint(2, 5)) for _ in "ab"]
        saves = draw.choice((None, None, "save", "other"))
        if saves:
            steps[0].insert(draw.randrange(len(steps[0])), saves)
        works = [process(folder, who, own, weights, mine, other) for who, own in enumerate(steps)]
        found = [wait() for wait in [begun(work, MEMORY) for work in works]]  # at once
        outcome, why = judge(folder, found, saves)
        fuzz.count(kind, outcome, f"{number}: {steps}", why)
    assert [path.name for path in tmp_path.iterdir()] == ["dictionary"]


def judge(folder: Path, found: list[Any], saves: str | None) -> tuple[str, object]:
    """A save resets the measurements of before, and one of other weights all that was said."""
    try:
        Dictionary.load(folder)
        metrics, said = read_folder(folder).info.metrics, read_explanations(folder)
    except LlmWsaeError as error:
        return "lost", error
    measured = found[0]["measured"] + ([] if saves else found[1]["measured"])
    explained = found[0]["explained"] + found[1]["explained"] if saves != "other" else []
    if saves == "other":
        measured = []
    if gone := [*(set(measured) - metrics.keys()), *(set(explained) - said.keys())]:
        return "lost", gone
    replaced = any(one["replaced"] for one in found)
    if replaced and saves != "other":
        return "different", "it was not replaced"
    return ("refused" if replaced else "harmless"), ""
