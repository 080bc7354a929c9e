"""Kills at every rename, sync and deletion: what was there is still there, and the same command
finishes with the bytes of a run that nobody disturbed."""

import functools
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
from command_line import SITE, content, harvest_more, works
from fuzzing import frozen
from hub_fixtures import REPO
from hub_server import WRITER, HubServer
from huggingface_hub import constants

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, keep_explanations
from llm_wsae.dictionary.folder import keep_measurements

KILLED = 77
USUAL = 2
"""Moments of each command; with ``--fuzz 10`` all of them."""
PLAIN, OTHER = "trained/uniform-k4", "trained/variance-a0.5-k4"
HARVEST = ("harvest", "--model", "../model", "--corpus", "../text.jsonl", "--site", SITE,
           "--context-size", 16, "--batch-tokens", 128, "--shard-tokens", 256,
           "--dtype", "float32", "--out", "store")  # fmt: skip
TRAIN = ("train", "../store", "--site", SITE, "--expansion", 2, "--batch-size", 256, "--k", 2, 4,
         "--dtype", "float32", "--tokens", 1024, "--checkpoint-seconds", 0, "--log-every", 1,
         "--rule", "uniform", "--out", "out")  # fmt: skip


class Scenario(NamedTuple):
    """A command, what lies there before it, and what of that must survive."""

    prepare: Callable[[], object]  # make what was there before, in the current folder
    work: Callable[[], object]
    there: Callable[[], Any]  # what was there before, read: the old or what replaces it
    outcome: Callable[[], Any]  # what the command leaves


def files() -> dict[str, bytes]:
    """All files of the current folder, but for locks, and what a killed writer of a single file
    leaves under a hidden name: nobody else can tell whether it still writes."""
    found = content(Path()).items()
    return {
        name: data for name, data in found if not re.search(r"\.lock$|/\.write\..*partial/", name)
    }


def trained() -> dict[str, bytes]:
    """All but how fast it was, which the log says, and the record by its checksum."""
    timed = ("/log.jsonl", "/training.json", "/train.json")
    found = {name: data for name, data in files().items() if not name.endswith(timed)}
    lines = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    return found | {"log": repr([(line["step"], line["arms"]) for line in lines]).encode()}


def save() -> None:
    """A dictionary over another one, then what is added to it later."""
    Dictionary.load(Path("..", OTHER)).save("d")
    keep_measurements(Path("d"), {"fidelity": {"fvu": 0.25}})
    keep_explanations(Path("d"), [Explanation(3, "numbers", "a model", {})])


def scenarios(hub: HubServer) -> dict[str, Scenario]:
    place = Path("out", SITE, "uniform-k4")

    def nothing() -> None: ...

    def done(*words: Any) -> Callable[[], Any]:
        return lambda: works(*words)

    def pushed() -> dict[str, bytes]:
        return {name: hub.content(REPO, name) for name in hub.repositories[REPO].files()}

    def begin_repository(first: str) -> None:
        hub.repositories.pop(REPO, None)
        forget()
        works("push", f"../{first}", REPO)
        forget()

    def forget() -> None:
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)

    few, more = (done(*HARVEST, "--tokens", tokens) for tokens in (256, 600))
    first_shard = Path("store", SITE, "00000.safetensors")
    return {
        "harvest": Scenario(nothing, more, nothing, files),
        "harvest of more": Scenario(few, more, first_shard.read_bytes, files),
        "train": Scenario(nothing, done(*TRAIN), nothing, trained),
        "save": Scenario(
            lambda: shutil.copytree(Path("..", PLAIN), "d"),
            save,
            lambda: frozen(Dictionary.load("d")),  # also one that was left aside between renames
            files,
        ),
        "push": Scenario(
            lambda: begin_repository(OTHER),
            done("push", f"../{PLAIN}", REPO),
            lambda: {name: data for name, data in pushed().items() if "/variance" in name},
            pushed,
        ),
        "pull": Scenario(
            lambda: begin_repository(PLAIN),
            done("pull", REPO, "--out", "out"),
            lambda: frozen(Dictionary.load(place)) if place.exists() else None,
            files,
        ),
    }


def test_kills(made_world, tmp_path, monkeypatch, fuzz):
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    for name in ("model", "store", "trained"):
        shutil.copytree(made_world / name, tmp_path / name)
    shutil.copy(made_world / "text.jsonl", tmp_path)
    harvest_more(tmp_path, tmp_path / "more")
    here = tmp_path / "case"
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "home", WRITER)
        for name, scenario in scenarios(hub).items():
            begin(here, scenario, monkeypatch)
            before, moments = scenario.there(), run(scenario.work, tmp_path / "moments", None)
            assert moments
            wanted, after = scenario.outcome(), scenario.there()
            chosen = range(moments)
            if fuzz.times < 10 and moments > USUAL * fuzz.times:
                chosen = random.Random(name).sample(chosen, USUAL * fuzz.times)
            for moment in chosen:
                begin(here, scenario, monkeypatch)
                if run(scenario.work, tmp_path / "moments", moment) is not None:
                    continue  # how often the Hub's client syncs depends on the time
                outcome, why = judged(scenario, (before, after), wanted)
                fuzz.count(f"kill, {name}", outcome, f"moment {moment}", why)


def judged(scenario: Scenario, there: tuple[Any, Any], wanted: Any) -> tuple[str, str | None]:
    """What came of a kill, and why."""

    def check() -> None:
        assert scenario.there() in there, "neither what was there nor what replaces it"

    if why := quietly(check):
        return "lost", why
    if why := quietly(scenario.work):
        return "different", why
    found = scenario.outcome()
    names = sorted(found.keys() | wanted.keys())
    if why := ", ".join(name for name in names if found.get(name) != wanted.get(name)):
        return "different", why
    return "harmless", None


def begin(here: Path, scenario: Scenario, monkeypatch) -> None:
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    monkeypatch.chdir(here)
    scenario.prepare()


def quietly(work: Callable[[], object]) -> str | None:
    """What goes wrong; None if nothing does."""
    with open(os.devnull, "w") as null, redirect_stderr(null):
        try:
            work()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def run(work: Callable[[], object], count: Path, last: int | None) -> int | None:
    """Do the work in a process that ends without a word at its moment ``last``; the number of its
    moments if it has none of that number."""
    child = os.fork()
    if child == 0:
        reached = [0]

        def watched(function: Callable, *given: Any, **named: Any) -> Any:
            """The function with a moment before it, and one after it."""
            moment()
            found = function(*given, **named)
            moment()
            return found

        def moment() -> None:
            if reached[0] == last:
                os._exit(KILLED)
            reached[0] += 1

        for name in ("replace", "rename", "fsync", "unlink"):
            setattr(os, name, functools.partial(watched, getattr(os, name)))
        failed = quietly(work)
        count.write_text(failed or str(reached[0]))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), code
    return None if code else int(count.read_text())
