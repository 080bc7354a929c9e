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
from command_line import SITE, STREAM, content, harvest_more, works
from fuzzing import frozen
from hub_fixtures import REPO
from hub_server import WRITER, HubServer
from huggingface_hub import constants
from tiny import save_encoder

from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, keep_explanations
from llm_wsae.dictionary.folder import keep_measurements
from llm_wsae.pipeline import run as pipeline

KILLED = 77
USUAL = 2
"""Moments of each command; ``--fuzz 9`` kills more than 150 times."""
PLAIN, OTHER = "trained/uniform-k4", "trained/variance-a0.5-k4"
MODEL = ("--model", "../model")
TEXT = (*MODEL, "--corpus", "../text.jsonl")
HARVEST = ("harvest", *TEXT, "--site", SITE,
           "--context-size", 16, "--batch-tokens", 128, "--shard-tokens", 256,
           "--dtype", "float32", "--out", "store")  # fmt: skip
TRAIN = ("train", "../store", "--site", SITE, "--expansion", 2, "--batch-size", 256, "--k", 2, 4,
         "--dtype", "float32", "--tokens", 1024, "--checkpoint-seconds", 0, "--log-every", 1,
         "--rule", "uniform", "--out", "out")  # fmt: skip
SHORT = ("--train.expansion", 4, "--train.batch-size", 256, "--train.dtype", "float32")
DICTIONARY = (f"../{PLAIN}", "--store", "../store", *MODEL)
OTHERS = {
    "train on a stream": ("train", *TEXT, *STREAM, "--site", "blocks.*.mlp", "--out", "out",
                          "--checkpoint-seconds", 0),
    "weigh": ("weigh", "../store", "--site", SITE, "--rule", "whitening",
              "--out", "new.safetensors"),
    "run": ("run", *TEXT, "--site", "blocks.0.hook_resid_post", SITE, "--k", 4, *SHORT,
            "--harvest.context-size", 16, "--tokens", 1024, "--train.checkpoint-seconds", 0,
            "--eval-tokens", 60, "--out", "out"),
    "evaluate": ("evaluate", f"../{PLAIN}", *TEXT, "--tokens", 60, "--bootstraps", 9,
                 "--out", "new.json"),
    "dashboard": ("dashboard", *DICTIONARY, "--rows", 40, "--out", "new.html"),
    "export": ("export", *DICTIONARY, "--to", "neuronpedia", "--contexts", 4, "--out", "out"),
    "study": ("study", "../store", *TEXT, "--site", SITE, "--k", 4, "--seeds", 0, 1, *SHORT,
              "--train.tokens", 512, "--eval-tokens", 500, "--evaluate.bootstraps", 9,
              "--score.tokens", 500, "--score.top", 3, "--score.sample", 3, "--score.encoder",
              "../encoder", "--score.probe-tokens", 500, "--score.bootstraps", 9, "--out", "out"),
}  # fmt: skip
"""Commands before which nothing is there."""


class Scenario(NamedTuple):
    """A command, what lies there before it, and what of that must survive."""

    prepare: Callable[[], object]  # make what was there before, in the current folder
    work: Callable[[], object]
    there: Callable[[], Any]  # what was there before, read: the old or what replaces it
    outcome: Callable[[], Any]  # what the command leaves


def files() -> dict[str, bytes]:
    """All files of the current folder, but for locks, and what a killed writer of a single file, or
    a plan, leaves under a hidden name: nobody else can tell whether it still writes."""
    found = content(Path()).items()
    return {
        name: data
        for name, data in found
        if not re.search(r"\.lock$|(^|/)\.(write|plan)\..*partial/", name)
    }


def untimed() -> dict[str, bytes]:
    """All files but logs, which say how fast it was, and records with their checksums."""
    timed = ("/log.jsonl", "/training.json", "/train.json")
    return {name: data for name, data in files().items() if not name.endswith(timed)}


def trained() -> dict[str, bytes]:
    """Those, and what the log says besides."""
    lines = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    return untimed() | {"log": repr([(line["step"], line["arms"]) for line in lines]).encode()}


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
        **{n: Scenario(nothing, done(*words), nothing, untimed) for n, words in OTHERS.items()},
    }


def test_kills(made_world, tmp_path, monkeypatch, fuzz):
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    for name in ("model", "store", "trained"):
        shutil.copytree(made_world / name, tmp_path / name)
    shutil.copy(made_world / "text.jsonl", tmp_path)
    harvest_more(tmp_path, tmp_path / "more")
    save_encoder(tmp_path / "encoder")
    monkeypatch.setattr(pipeline, "plot_profile", lambda *given: given[-1].touch())  # slow
    here = tmp_path / "case"
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "home", WRITER)
        for name, scenario in scenarios(hub).items():
            begin(here, scenario, monkeypatch)
            before, moments = scenario.there(), run(scenario.work, tmp_path / "moments", None)
            assert moments
            wanted, after = scenario.outcome(), scenario.there()
            chosen = random.Random(name).sample(range(moments), min(moments, USUAL * fuzz.times))
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
