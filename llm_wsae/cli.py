"""The command line: finds the command, parses its options, prints its result.

Results go to stdout, progress and warnings to stderr. An error is one sentence and an exit code.
"""

import signal
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from llm_wsae import processes
from llm_wsae.commands.dashboard import dashboard
from llm_wsae.commands.evaluate import evaluate
from llm_wsae.commands.export import export
from llm_wsae.commands.harvest import harvest
from llm_wsae.commands.inspect import inspect
from llm_wsae.commands.list import list_repository
from llm_wsae.commands.options import Result
from llm_wsae.commands.parser import in_new_spelling, parse
from llm_wsae.commands.pull import pull
from llm_wsae.commands.push import push
from llm_wsae.commands.run import run
from llm_wsae.commands.study import study
from llm_wsae.commands.theory import theory
from llm_wsae.commands.train import train
from llm_wsae.commands.verify import verify
from llm_wsae.commands.weigh import weigh
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
    "dashboard": dashboard,
    "export": export,
    "study": study,
    "theory": theory,
    "push": push,
    "pull": pull,
    "list": list_repository,
    "verify": verify,
}

TOGETHER = ("harvest", "train")  # what several processes do as one
_USAGE = """usage: llm-wsae COMMAND … [--json] [--debug]

Weighted sparse autoencoders for the residual streams of real language models.

{commands}

llm-wsae COMMAND --help   show the options of a command
--json                    print one JSON object instead of text
--debug                   show the traceback of an error
--version                 print the version

Exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted, 143 terminated."""


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
    name, *words = words
    try:
        command = COMMANDS.get(name)
        if command is None:
            raise UsageError(f"there is no command {name!r}; {nearest(name, COMMANDS)}")
        if processes.count() > 1 and name not in TOGETHER:
            raise UsageError(
                f"llm-wsae {name} runs in one process, and only {' and '.join(TOGETHER)} in "
                "several; start it without torchrun"
            )
        facts, text = parse(name, command, in_new_spelling(name, words))()
        if processes.leads():
            print(printable_json(plain(facts)) if as_json else text)
        return 0
    except LlmWsaeError as error:
        if debug:
            traceback.print_exc()
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to resume")
        return 128 + signal.SIGINT
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


def _usage() -> str:
    rows = [f"  {name:<10}{_first_sentence(command)}" for name, command in COMMANDS.items()]
    return _USAGE.format(commands="\n".join(rows))


def _first_sentence(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").split("\n")[0]


if __name__ == "__main__":  # how torchrun lines were written before python -m llm_wsae
    sys.exit(main())
