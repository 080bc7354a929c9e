"""The command line, called in process, and a small world for it: models, texts, all in a folder."""

import contextlib
import io
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import tiny_model, write_jsonl

from llm_wsae.cli import main

SITE = "blocks.1.hook_resid_post"
HARVEST = ("--site", SITE, "--context-size", 16, "--tokens", 5000, "--batch-tokens", 512,
           "--shard-tokens", 1024)  # fmt: skip
TRAIN = ("--site", SITE, "--expansion", 4, "--batch-size", 256, "--dtype", "float32")
STREAM = ("--context-size", 16, "--batch-tokens", 512, "--buffer-tokens", 2048,
          "--statistics-tokens", 2048, "--expansion", 4, "--batch-size", 256, "--dtype", "float32",
          "--tokens", 2048, "--k", 4, "--rule", "uniform", "sensitivity",
          "--alpha", 0.5)  # fmt: skip
PAIR = ("--rule", "uniform", "variance", "--alpha", 0.5)  # a plain and a weighted dictionary


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of stdout, which must be one JSON object."""
        value = json.loads(self.out, parse_constant=lambda name: 1 / 0)
        assert isinstance(value, dict)
        return value


def asked(words: Iterable[Any]) -> list[str]:
    """The words of a command, without those of an option that is given again: a test changes what
    others share by adding to it."""
    options: dict[str, list[str]] = {"": []}
    for word in map(str, words):
        option = word.partition("=")[0] if word[:2] == "--" else ""
        if option:
            options.pop(option, None)
            options[option] = []
        list(options.values())[-1].append(word)
    return [word for own in options.values() for word in own]


def call(*words: Any) -> Result:
    """Run one command, as ``asked``; a word may be a path or a number."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(asked(words))
        except SystemExit as leaving:  # the parser's own help and usage errors
            code = leaving.code
    return Result(code, out.getvalue(), err.getvalue())


def works(*words: Any) -> Result:
    result = call(*words)
    assert result.code == 0, result.err
    return result


def refused(words: Iterable[Any], said: str) -> None:
    """A command says something on stderr, and nothing else, and ends with 1 or 2."""
    result = call(*words)
    assert result.code in (1, 2) and said in result.err and result.out == "", (said, result)


def cases(table: str, **stands_for: Iterable[Any]) -> list[tuple[list[Any], list[str]]]:
    """Commands and what is said of them, from a table: a command, and below it what is said, in
    pieces between which there is a " … ". A word of a command may stand for several."""
    lines = [line.strip() for line in table.strip().splitlines()]
    words = [
        [word for own in shlex.split(command) for word in stands_for.get(own, [own])]
        for command in lines[::2]
    ]
    return list(zip(words, (said.split(" … ") for said in lines[1::2]), strict=True))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def nobody(*paths: Path) -> Iterator[None]:
    """Without access to some files and folders, also for the root of a container."""
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o500 if path.is_dir() and os.geteuid() == 0 else 0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def save_model(folder: Path, seed: int = 0, width: int = 16) -> Path:
    model = tiny_model(seed, width)
    model.hf_model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def harvest_more(world: Path, out: Path) -> None:
    """A store of another text that fits the one of the world."""
    text = out.with_name("more.jsonl")
    write_jsonl(text, [50] * 60)
    works("harvest", "--model", world / "model", "--corpus", text, *HARVEST, "--tokens", 2000,
          "--dtype", "float32", "--out", out)  # fmt: skip


def make_world(folder: Path) -> Path:
    """``model``, ``text.jsonl``, and from them ``store`` and two dictionaries in ``trained``."""
    save_model(folder / "model")
    write_jsonl(folder / "text.jsonl", [7 * i % 50 + 20 for i in range(400)])
    works("harvest", "--model", folder / "model", "--corpus", folder / "text.jsonl", *HARVEST,
          "--dtype", "float32", "--out", folder / "store")  # fmt: skip
    few = ("--lengths", "unit")  # some ten steps: free lengths would not have grown yet
    works("train", folder / "store", *TRAIN, *PAIR, "--k", 4, *few, "--out", folder / "trained")
    return folder
