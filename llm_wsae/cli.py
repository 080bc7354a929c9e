"""The command line: finds the command, parses its options, prints its result.

Results go to stdout, progress and warnings to stderr. An error is one sentence and an exit code;
only a bug in the package shows a traceback. The parser (tyro) draws its complaints in a box; its
private hook for errors makes sentences of them, and where a release has none the box is shown.
"""

import contextlib
import functools
import inspect
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from llm_wsae.artifact import provenance
from llm_wsae.artifact.files import way_out
from llm_wsae.commands import Result, hub, looking, making
from llm_wsae.commands.helping import Groups, completion, flags, groups, short_help
from llm_wsae.commands.spelling import meant, needed, own_word
from llm_wsae.errors import LlmWsaeError, UsageError, nearest, shown
from llm_wsae.machine import processes
from llm_wsae.outside import is_panic, reason
from llm_wsae.pipeline.request import read_request
from llm_wsae.terminal import printable, printable_json, without_secrets

COMMANDS: dict[str, Callable[[Any], Result]] = {
    "run": making.run,
    "plan": making.plan,
    "harvest": making.harvest,
    "weigh": making.weigh,
    "train": making.train,
    "evaluate": looking.evaluate,
    "inspect": looking.inspect,
    "steer": looking.steer,
    "dashboard": looking.dashboard,
    "explain": looking.explain,
    "export": looking.export,
    "study": making.study,
    "theory": making.theory,
    "push": hub.push,
    "pull": hub.pull,
    "list": hub.list_repository,
    "verify": looking.verify,
}

_TOGETHER = ("run", "harvest", "train")  # what several processes do as one
_USAGE = """usage: llm-wsae COMMAND … [--json] [--debug]

Weighted sparse autoencoders for the residual streams of real language models.

{commands}

llm-wsae COMMAND --help   show an example, and the options that everybody needs
--completion bash         print a script that completes commands and options; or zsh
--json                    print one JSON object instead of text
--debug                   show the traceback of an error
--version                 print the version

Exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted, 141 output pipe closed,
143 terminated."""
_NO_MEMORY = "can't allocate memory"  # of a RuntimeError of torch
_RECORDED = {name: name for name in ("run", "harvest", "weigh", "train", "study")} | {"plan": "run"}
_ALIASES = {"--tokens": "--harvest.tokens", "--eval-tokens": "--evaluate.tokens"}
_OPTIONS = ConstructorRegistry()
_BELOW_FIELD = r'^    {}: .*\n    """((?s:.*?))"""'
_on_parse_error = getattr(getattr(tyro, "_errors", None), "on_parse_error", contextlib.nullcontext)


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
    except BaseException as error:
        if known := _explained(error):
            if "--debug" in words:  # a server may have said anything, also the token
                for line in without_secrets(traceback.format_exc()).splitlines():
                    print(printable(line), file=sys.stderr)
            _say(str(known))
            return known.exit_code
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
    if words[0] == "--completion":
        if words[1:] not in (["bash"], ["zsh"]):
            raise UsageError("--completion takes the name of a shell, bash or zsh")
        with _printing():
            print(completion(words[1], {command: options_of(command) for command in COMMANDS}))
        return 0
    name, *words = words
    provenance.number_formats.clear()  # of another command in this process
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; {nearest(name, COMMANDS)}")
    if processes.count() > 1 and name not in _TOGETHER:
        raise UsageError(
            f"llm-wsae {name} runs in one process, and only {', '.join(_TOGETHER[:-1])} and "
            f"{_TOGETHER[-1]} in several; start it without torchrun"
        )
    with _printing():  # help
        prepared = parse(name, words)
    facts, text = prepared()
    if processes.leads():
        with _printing():
            print(printable_json(provenance.plain(facts)) if as_json else text)
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


def _explained(error: BaseException) -> LlmWsaeError | None:
    """The error as a sentence of this package; None for a mistake of the package itself."""
    said = next(iter(str(error).splitlines()), "")
    if isinstance(error, LlmWsaeError):
        return error
    # Torch's class is known by its name: no command needs torch to say so.
    on_device = isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in said
    )
    if is_panic(error):
        text = f"a library gave up ({reason(error)}); a damaged tokenizer.json can be the cause"
    elif isinstance(error, OSError):
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        what = error.strerror or said or type(error).__name__
        way = way_out(error, "check it, and run the same command again")
        text = ": ".join([*places, f"{what[:1].lower()}{what[1:]}; {way}"])
    elif isinstance(error, UnicodeEncodeError):  # not shown: it may be a token
        text = f"a name, token or key cannot be written as {error.encoding}; write it in UTF-8"
    elif isinstance(error, MemoryError) or on_device:
        text = (
            f"the device ran out of memory ({said}); ask for fewer or smaller dictionaries, "
            "smaller batches or a smaller model, or compute with --device cpu"
        )
    else:
        return None
    return LlmWsaeError(text)


def _say(sentence: str) -> None:
    """Say on stderr what went wrong: once, however many processes it ends."""
    if processes.may_speak():
        with contextlib.suppress(OSError):  # nobody listens
            print(f"llm-wsae: {printable(sentence)}", file=sys.stderr, flush=True)


def _usage() -> str:
    rows = [f"  {n:<10}{(made.__doc__ or '').splitlines()[0]}" for n, made in COMMANDS.items()]
    return _USAGE.format(commands="\n".join(rows))


def parse(name: str, words: list[str]) -> Callable[[], Result]:
    """A command with the options of these words. Raises UsageError for bad ones, and SystemExit
    once help is printed."""
    if {"-h", "--help"} & {*words}:
        print(short_help(name, inspect.getdoc(COMMANDS[name]) or "", help_of(name)))
        raise SystemExit(0)
    words, model = _with_record(name, words)
    for before, word in zip([name, *words], words, strict=False):
        _check_word(word, before)
    _check_once(words)
    command = COMMANDS[name]
    (request,) = inspect.signature(command).parameters.values()
    about = inspect.getdoc(command) or ""
    if record := _RECORDED.get(name):
        about += "\n\n" + ": ".join(_config(record))

    def refuse(event: Any) -> None:
        with contextlib.suppress(AttributeError):  # an event of another release
            if sentence := _sentence(event, name, words):
                raise UsageError(f"{sentence}; see llm-wsae {name} --help")

    with _on_parse_error(refuse):
        given: Any = tyro.cli(
            request.annotation,
            prog=f"llm-wsae {name}",
            description=about,
            args=["--help" if word == "--help-all" else word for word in words],
            config=[tyro.conf.DisallowNone],
            registry=_OPTIONS,
        )
    return functools.partial(_called, command, given, model)


def _config(record: str) -> tuple[str, str]:
    """The option that the parser does not know, and what it means."""
    meaning = f"JSON record of an earlier `{record}`, whose options hold where none are given here."
    return "--config FILE", meaning


def _called(command: Callable[[Any], Result], request: Any, recorded_model: str | None) -> Result:
    try:
        return command(request)
    except LlmWsaeError as error:
        names = {recorded_model, repr(recorded_model)} if recorded_model else set()
        if names.isdisjoint(re.split(r"[\s;,]+", str(error))):
            raise
        hint = "the record holds only the model's name, so say where it is with --model"
        raise type(error)(f"{error}; {hint}") from error


def _with_record(name: str, words: list[str]) -> tuple[list[str], str | None]:
    """The words of a command, with those options of the record that --config names which they lack;
    also the model, if it is one of these."""
    at = next((i for i, word in enumerate(words) if word.partition("=")[0] == "--config"), None)
    if at is None or name not in _RECORDED:
        return words, None
    _, equals, path = words[at].partition("=")
    path = path if equals else "".join(words[at + 1 : at + 2])
    if not path or path.startswith("-"):
        raise UsageError("--config needs a record, such as runs/gpt2/run.json")
    words = words[:at] + words[at + 1 + (not equals) :]
    recorded = read_request(Path(path), _RECORDED[name])
    for option in recorded.keys() & {_spelt(word) for word in words}:
        del recorded[option]
    stores = recorded.pop("--stores", [])
    if not words or words[0].startswith("-"):
        words = [*map(str, stores), *words]
    for option, value in recorded.items():
        words += _typed(option, value, name, path)
    return words, recorded.get("--model")


def _typed(option: str, value: Any, name: str, path: str) -> list[str]:
    """An option of a record as one would type it."""
    values = [str(one) for one in (value if isinstance(value, list) else [value])]
    options = {flag: one for _, rows in help_of(name) for one, _ in rows for flag in flags(one)}
    if option not in options or any(one.startswith("--") for one in values):
        raise UsageError(
            f"{path} holds {shown(' '.join([option, *values]))}, which {name} does not take; give "
            "its other options on the command line"
        )
    if options[option] == option:  # without a value
        return [option] if value is True else []
    return [option, *values]


@_OPTIONS.struct_rule
def _options(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Fields of a dataclass. (The parser's own rule ends a line of help where a docstring does, and
    shows a default that is nothing.)"""
    if not is_dataclass(info.type):
        return None
    given = vars(info.default) if is_dataclass(info.default) else {}
    specs = []
    for field in fields(info.type):
        notes = getattr(field.type, "__metadata__", ())
        made = next((note for note in notes if isinstance(note, type)), None)  # by ``named``
        own = tyro.conf.arg(constructor=made, help_behavior_hint=_default)
        option: Any = Annotated[made or field.type, *notes, own]
        default = given.get(field.name, field.default)
        default = MISSING_NONPROP if field.default is MISSING else default
        about = functools.partial(_meaning, info.type, field.name)
        specs.append(StructFieldSpec(field.name, option, default, about))
    return StructConstructorSpec(info.type, tuple(specs))


def _default(value: str) -> str:
    return "" if value in ("", "None") else f"(default: {value})"


def _meaning(of: type, name: str) -> str | None:
    """What is said of a field, below it."""
    for owner in of.__mro__:
        if said := re.search(_BELOW_FIELD.format(name), _source(owner), re.MULTILINE):
            return " ".join(said[1].split())
    return None


@functools.cache
def _source(of: type) -> str:
    try:
        return inspect.getsource(of)
    except (OSError, TypeError):  # made by ``named``, or of Python itself
        return ""


def _check_word(word: str, before: str) -> None:
    """Raises UsageError for a word that no option can mean: an empty path would be the current
    folder, and one that is not UTF-8 fits into no record."""
    option, equals, value = word.partition("=")
    if not word or (equals and not value and option.startswith("-")):
        option = option or (before if before.startswith("-") else "an argument")
        raise UsageError(f"{option} is empty; give it a value or omit it (this folder is .)")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{printable(word)} holds bytes that are not UTF-8; a file of such a name can be "
            "renamed, or linked to"
        ) from None


def _check_once(words: list[str]) -> None:
    """Raises UsageError for an option that is given twice: the parser would keep the last alone."""
    options = words[: words.index("--")] if "--" in words else words
    given: dict[str, str] = {}
    for option in [word.partition("=")[0] for word in options if word.startswith("--")]:
        name = _spelt(option)
        if name in given:
            both = " or ".join(dict.fromkeys((given[name], option)))
            raise UsageError(
                f"{both} is given twice; give it once, several values together: {option} A B"
            )
        given[name] = option


def _spelt(word: str) -> str:
    """The name of an option that is given like this."""
    spelling = word.partition("=")[0].replace("_", "-")
    return _ALIASES.get(spelling, spelling)


@functools.cache
def help_of(name: str) -> Groups:
    """All options of a command, in the order of its help."""
    text = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # where there is no UTF-8, no boxes
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "120"  # narrow enough for the parser to draw one column
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            parse(name, ["--help-all"])
    finally:
        os.environ.pop("COLUMNS")
        os.environ |= {} if before is None else {"COLUMNS": before}
    text.seek(0)
    found = groups(text.read())
    if record := _RECORDED.get(name):
        next(rows for title, rows in found if title == "options").append(_config(record))
    return found


def options_of(name: str) -> list[str]:
    """The options of a command, in the order of its help."""
    return [word for word in _words_of(name) if word.startswith("--")]


def _words_of(name: str) -> list[str]:
    """The options of a command, and the names of its arguments without one, such as STORE…."""
    return [flag for _, rows in help_of(name) for option, _ in rows for flag in flags(option)]


def _sentence(event: Any, name: str, words: list[str]) -> str | None:
    """What the parser complains of; None if it is not known here."""
    match type(event).__name__:
        case "UnrecognizedArgs":
            return _unknown(event.tokens, name, words)
        case "MissingArgs" if event.unrecognized_tokens:  # more likely misspelt than forgotten
            return _unknown(event.unrecognized_tokens, name, words)
        case "MissingArgs":
            return f"missing {', '.join(_name(one.arg, words) for one in event.missing_arguments)}"
        case "InvalidChoice":
            hint = nearest(own_word(event.value), event.choices, limit=1)
            return f"{_name(event.argument, words)} cannot be {event.value!r} ({hint})"
        case "BadValue" if event.reason == "too_few_values":
            return f"{_name(event.argument, words)} needs a value"
        case "InstantiationFailure" if event.argument is not None:
            option, kind = _name(event.argument, words), str(event.argument.lowered.metavar)
            if option == "--alpha" and "auto" in str(event.message) and "auto" not in kind:
                return "--alpha auto is for `run` and `plan` alone; give a number"
            return needed(option, words, kind)
    return None


def _unknown(tokens: list[str], name: str, words: list[str]) -> str:
    option = next((token.partition("=")[0] for token in tokens if token.startswith("-")), None)
    if option is not None:
        return f"there is no option {option} ({meant(option, _words_of(name))})"
    before = words[: words.index(tokens[0])] if tokens[0] in words else []
    after = [f" after {word}" for word in before if word.startswith("--")][-1:]
    return f"{tokens[0]!r} is one argument too many{''.join(after)}"


def _name(argument: Any, words: list[str]) -> str:
    """The option as it was typed, or the place of an argument without a name."""
    lowered = argument.lowered
    if argument.is_positional():
        return str(lowered.metavar)
    typed = {word.partition("=")[0].replace("_", "-") for word in words}
    flags = lowered.name_or_flags
    return str(next((flag for flag in flags if flag in typed), flags[-1]))
