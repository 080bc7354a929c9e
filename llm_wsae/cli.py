"""The command line: finds the command, parses its options, prints its result.

Results go to stdout, progress and warnings to stderr. An error is one sentence and an exit code.
"""

import contextlib
import functools
import io
import re
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import tyro

from llm_wsae import processes
from llm_wsae.commands.common import Result
from llm_wsae.commands.evaluate import evaluate
from llm_wsae.commands.hub import list_repository, pull, push
from llm_wsae.commands.inspect import inspect
from llm_wsae.commands.run import run
from llm_wsae.commands.store import harvest, weigh
from llm_wsae.commands.study import study
from llm_wsae.commands.theory import theory
from llm_wsae.commands.train import train
from llm_wsae.commands.verify import verify
from llm_wsae.errors import LlmWsaeError, UsageError, nearest
from llm_wsae.provenance import plain
from llm_wsae.terminal import printable, printable_json

COMMANDS: dict[str, Callable[..., Result]] = {
    "run": run,
    "harvest": harvest,
    "weigh": weigh,
    "train": train,
    "evaluate": evaluate,
    "inspect": inspect,
    "theory": theory,
    "study": study,
    "push": push,
    "pull": pull,
    "list": list_repository,
    "verify": verify,
}

TOGETHER = ("harvest", "train")  # what several processes do as one
_HELP_INDENT = " " * 9
_USAGE = """usage: llm-wsae COMMAND … [--json] [--debug]

Weighted sparse autoencoders for the residual streams of real language models.

{commands}

llm-wsae COMMAND --help shows a command's options. --json prints one JSON object instead of text;
--debug shows the traceback of an error; --version tells which llm-wsae this is.
Exit code: 0 done, 1 failed, 2 bad usage."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in words, "--debug" in words
    words = [word for word in words if word not in ("--json", "--debug")]
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"llm-wsae {version('llm-wsae')}")
        return 0
    try:
        command = COMMANDS.get(words[0])
        if command is None:
            raise UsageError(f"there is no command {words[0]!r}; {nearest(words[0], COMMANDS)}")
        if processes.count() > 1 and words[0] not in TOGETHER:
            raise UsageError(
                f"llm-wsae {words[0]} runs in one process, and only {' and '.join(TOGETHER)} in "
                "several; start it without torchrun"
            )
        facts, text = _parsed(command, words)()
        if processes.leads():
            print(printable_json(plain(facts)) if as_json else text)
        return 0
    except LlmWsaeError as error:
        if debug:
            traceback.print_exc()
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to go on where it stopped")
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not worth loading torch for
            raise
        reason = next(iter(str(error).splitlines()), "")
        _say(f"the device ran out of memory ({reason}); ask for fewer or smaller dictionaries, "
             "smaller batches or a smaller model, or compute with --device cpu")  # fmt: skip
        return 1


def _say(sentence: str) -> None:
    """Say on stderr what went wrong: once, however many processes it ends."""
    if processes.may_speak():
        print(f"llm-wsae: {printable(sentence)}", file=sys.stderr, flush=True)


def _parsed(command: Callable[..., Result], words: list[str]) -> Callable[[], Result]:
    """The command with the options that the words give. Raises UsageError for bad ones."""

    @functools.wraps(command)
    def prepared(*args: Any, **options: Any) -> Callable[[], Result]:
        return functools.partial(command, *args, **options)

    name = f"llm-wsae {words[0]}"
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(prepared, prog=name, args=words[1:])
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise UsageError(f"{_sentence(complaint.getvalue())}; see {name} --help") from None


def _sentence(box: str) -> str:
    """What the parser draws in a box (of letters, where the terminal has no lines), as one line.

    Without its title, the help texts of options, and where to find help.
    """
    lines = [line.strip("│╭╮╰╯") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    told = [line for line in lines if not line.startswith(_HELP_INDENT)]
    sections = re.split(r"[─-]{20,}", " ".join(told))
    said = [" ".join(section.split()).rstrip(".") for section in sections]
    if "╭" not in box:
        said = said[1:]
    said = [part for part in said if not part.startswith(("Argument helptext", "For full"))]
    return "; ".join(part[:1].lower() + part[1:] for part in said)


def _usage() -> str:
    rows = [f"  {name:<10}{_first_sentence(command)}" for name, command in COMMANDS.items()]
    return _USAGE.format(commands="\n".join(rows))


def _first_sentence(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").split("\n")[0]
