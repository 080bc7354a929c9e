"""From the words of a command to a call that is ready to be made, or one sentence about them.

The parser (tyro) draws its complaints in a box of several lines. Its hook for errors tells them
apart, so each becomes one sentence here. The hook is private to tyro: where a release has none, or
a complaint that is unknown here, the box is shown as it is.
"""

import contextlib
import functools
import inspect
import io
import re
from collections.abc import Callable
from typing import Any

import tyro

from llm_wsae.commands.options import Result
from llm_wsae.errors import UsageError, nearest, shown
from llm_wsae.terminal import printable

_OPTION = re.compile(r"--[a-z][a-z0-9.-]*")
_on_parse_error = getattr(getattr(tyro, "_errors", None), "on_parse_error", contextlib.nullcontext)


def parse(name: str, command: Callable[..., Result], words: list[str]) -> Callable[[], Result]:
    """The command with the options that the words give.

    Raises UsageError for bad ones, and SystemExit once help is printed.
    """
    for before, word in zip([name, *words], words, strict=False):
        _check_word(word, before)
    _check_once(words, name, command)

    @functools.wraps(command)
    def prepared(*args: Any, **options: Any) -> Callable[[], Result]:
        return functools.partial(command, *args, **options)

    def refuse(event: Any) -> None:
        with contextlib.suppress(AttributeError):  # an event of another release
            if sentence := _sentence(event, name, command):
                raise UsageError(f"{sentence}; see llm-wsae {name} --help")

    asked = inspect.signature(command).parameters.get("request")
    with _on_parse_error(refuse):
        if asked is None:
            return tyro.cli(prepared, prog=f"llm-wsae {name}", args=words)
        about = inspect.getdoc(command)
        request = tyro.cli(asked.annotation, prog=f"llm-wsae {name}", args=words, description=about)
    return functools.partial(command, request)


def _check_word(word: str, before: str) -> None:
    """Raises UsageError for a word that no option can mean: as a path, an empty one would be the
    current folder, and one that is not UTF-8 could not be written into any record; no file's name
    holds a NUL."""
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
    if "\0" in word:
        raise UsageError(f"{shown(word)} holds a NUL character, which no name can")


def _check_once(words: list[str], name: str, command: Callable[..., Result]) -> None:
    """Raises UsageError for an option that is given twice: the parser would keep the last alone."""
    options = words[: words.index("--")] if "--" in words else words
    given = [word.partition("=")[0].replace("_", "-") for word in options if word[:2] == "--"]
    if len(given) < 2:
        return
    for line in _help_lines(name, command):
        spellings = _OPTION.findall(line)
        if len(found := [option for option in given if option in spellings]) > 1:
            several = f"its values together: {found[-1]} A B" if " [" in line else "it once"
            named = " or ".join(dict.fromkeys(found))
            raise UsageError(f"{named} is given twice; give {several}")


def options_of(name: str, command: Callable[..., Result]) -> list[str]:
    """The options of a command, in the order of its help."""
    found = [option for line in _help_lines(name, command) for option in _OPTION.findall(line)]
    return list(dict.fromkeys(found))


def _help_lines(name: str, command: Callable[..., Result]) -> list[str]:
    """The lines of a command's help that name an option: its spellings, and its values, which are
    in brackets if it takes several."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        parse(name, command, ["--help"])
    return re.findall(r"^[^\w-]*(--[a-z].*)$", text.getvalue(), re.MULTILINE)


def _sentence(event: Any, name: str, command: Callable[..., Result]) -> str | None:
    """What the parser complains of; None if it is not known here."""
    match type(event).__name__:
        case "UnrecognizedArgs":
            return _unknown(event.tokens, name, command)
        case "MissingArgs" if event.unrecognized_tokens:  # more likely misspelt than forgotten
            return _unknown(event.unrecognized_tokens, name, command)
        case "MissingArgs":
            return f"missing {', '.join(_name(one.arg) for one in event.missing_arguments)}"
        case "InvalidChoice":
            hint = nearest(event.value, event.choices, limit=1)
            return f"{_name(event.argument)} cannot be {event.value!r} ({hint})"
        case "BadValue" if event.reason == "too_few_values":
            return f"{_name(event.argument)} needs a value"
        case "InstantiationFailure" if event.argument is not None:
            if _name(event.argument) == "--alpha" and "auto" in str(event.message):
                return "--alpha auto is for `run` and `plan` alone; give a number"
            *_, last = str(event.message).splitlines()  # of several types: that of the value
            message = re.sub(r"^- <class '\w+'>: ", "", last)
            return f"{_name(event.argument)}: {message[:1].lower()}{message[1:]}"
    return None


def _unknown(tokens: list[str], name: str, command: Callable[..., Result]) -> str:
    """About words that no option takes."""
    option = next((token.partition("=")[0] for token in tokens if token.startswith("-")), None)
    if option is None:
        return f"{tokens[0]!r} is one argument too many"
    return f"there is no option {option} ({nearest(option, options_of(name, command), limit=1)})"


def _name(argument: Any) -> str:
    """The option as one types it, or the place of an argument without a name."""
    if argument.is_positional():
        return str(argument.lowered.metavar)
    return str(argument.lowered.name_or_flags[-1])
