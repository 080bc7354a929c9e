"""The command line: finds the command, parses its options, prints its result.

Results go to stdout, progress and warnings to stderr. An error is one sentence and an exit code.
``main`` also catches what the operating system refuses, and says which path and what to do. Only a
bug in the package shows a traceback.
"""

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version

from llm_wsae.artifact import provenance
from llm_wsae.artifact.files import way_out
from llm_wsae.artifact.provenance import plain
from llm_wsae.commands.dashboard import dashboard
from llm_wsae.commands.evaluate import evaluate
from llm_wsae.commands.explain import explain
from llm_wsae.commands.export import export
from llm_wsae.commands.harvest import harvest
from llm_wsae.commands.hub import list_repository, pull, push
from llm_wsae.commands.inspect import inspect
from llm_wsae.commands.options import Result
from llm_wsae.commands.parser import parse
from llm_wsae.commands.plan import plan
from llm_wsae.commands.run import run
from llm_wsae.commands.study import study
from llm_wsae.commands.theory import theory
from llm_wsae.commands.train import train
from llm_wsae.commands.verify import verify
from llm_wsae.commands.weigh import weigh
from llm_wsae.errors import LlmWsaeError, UsageError, nearest, shown
from llm_wsae.machine import processes
from llm_wsae.outside import is_panic, reason
from llm_wsae.terminal import printable, printable_json, without_secrets

COMMANDS: dict[str, Callable[..., Result]] = {
    "run": run,
    "plan": plan,
    "harvest": harvest,
    "weigh": weigh,
    "train": train,
    "evaluate": evaluate,
    "inspect": inspect,
    "dashboard": dashboard,
    "explain": explain,
    "export": export,
    "study": study,
    "theory": theory,
    "push": push,
    "pull": pull,
    "list": list_repository,
    "verify": verify,
}

TOGETHER = ("run", "harvest", "train")  # what several processes do as one
_USAGE = """usage: llm-wsae COMMAND … [--json] [--debug]

Weighted sparse autoencoders for the residual streams of real language models.

{commands}

llm-wsae COMMAND --help   show the options of a command
--json                    print one JSON object instead of text
--debug                   show the traceback of an error
--version                 print the version

Exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted, 141 output pipe closed,
143 terminated."""
_NO_MEMORY = "can't allocate memory"  # of a RuntimeError of torch


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code. Whatever a user or the system causes ends in a sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run([word for word in words if word != "--debug"])
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to resume")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads the output has seen enough
        return 128 + signal.SIGPIPE
    except (LlmWsaeError, OSError, UnicodeEncodeError, MemoryError, RuntimeError) as error:
        known = _explained(error)
        if known is None:
            raise
        if "--debug" in words:  # a server may have said anything, also the token
            for line in without_secrets(traceback.format_exc()).splitlines():
                print(printable(line), file=sys.stderr)
        _say(str(known))
        return known.exit_code
    except BaseException as error:
        if is_panic(error):
            _say(f"a library gave up ({reason(error)}); a damaged tokenizer.json can be the cause")
            return 1
        raise


def _run(words: list[str]) -> int:
    """Run one command and print its result; the exit code."""
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words:
        print(_usage(), file=sys.stderr)
        return 2
    if words[0] in ("-h", "--help", "--version"):
        with _printing():
            print(f"llm-wsae {version('llm-wsae')}" if words[0] == "--version" else _usage())
        return 0
    name, *words = words
    provenance.number_formats.clear()  # of another command in this process
    command = COMMANDS.get(name)
    if command is None:
        raise UsageError(f"there is no command {name!r}; {nearest(name, COMMANDS)}")
    if processes.count() > 1 and name not in TOGETHER:
        raise UsageError(
            f"llm-wsae {name} runs in one process, and only {', '.join(TOGETHER[:-1])} and "
            f"{TOGETHER[-1]} in several; start it without torchrun"
        )
    with _printing():  # help
        prepared = parse(name, command, words)
    facts, text = prepared()
    if processes.leads():
        with _printing():
            print(printable_json(plain(facts)) if as_json else text)
    return 0


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """Print results, which is the end of the work."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LlmWsaeError(
            f"the result cannot be printed ({error.strerror}); what the command wrote to files is "
            "complete"
        ) from error


def _explained(error: Exception) -> LlmWsaeError | None:
    """The error as a sentence of this package; None for a mistake of the package itself."""
    said = next(iter(str(error).splitlines()), "")
    if isinstance(error, LlmWsaeError):
        return error
    if isinstance(error, OSError):
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        what = error.strerror or said or type(error).__name__
        way = way_out(error, "check it, and run the same command again")
        return LlmWsaeError(": ".join([*places, f"{what[:1].lower()}{what[1:]}; {way}"]))
    if isinstance(error, UnicodeEncodeError):
        if error.object.startswith("Bearer"):  # never to be shown
            return LlmWsaeError("a token or key holds characters that cannot be sent; check it")
        return LlmWsaeError(
            f"{shown(error.object)} cannot be written as {error.encoding}; rename it in UTF-8"
        )
    # Torch's class is known by its name: no command needs torch to say so.
    on_device = type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in said
    if isinstance(error, MemoryError) or on_device:
        return LlmWsaeError(
            f"the device ran out of memory ({said}); ask for fewer or smaller dictionaries, "
            "smaller batches or a smaller model, or compute with --device cpu"
        )
    return None


def _say(sentence: str) -> None:
    """Say on stderr what went wrong: once, however many processes it ends."""
    if processes.may_speak():
        with contextlib.suppress(OSError):  # nobody listens
            print(f"llm-wsae: {printable(sentence)}", file=sys.stderr, flush=True)


def _usage() -> str:
    rows = [
        f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}"
        for name, command in COMMANDS.items()
    ]
    return _USAGE.format(commands="\n".join(rows))
