"""The options of every command are a promise: scripts depend on them.

``flags.txt`` lists them in the order of the help. After a deliberate change, write it again:
``python tests/commands/test_flags.py > tests/commands/flags.txt``.
"""

import subprocess
import sys
from pathlib import Path

from llm_wsae.cli import COMMANDS
from llm_wsae.commands.parser import options_of, parse


def flags() -> str:
    blocks = [[name, *(f"  {f}" for f in options_of(name, COMMANDS[name]))] for name in COMMANDS]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def test_flags_are_those_that_were_promised():
    assert flags() == Path(__file__).with_name("flags.txt").read_text()


NEEDED = {
    "run": "--model m --corpus c --site s",
    "study": "store --model m --corpus c --site s --out o",
}
SHORT = {
    ("run", "--tokens 77 --eval-tokens 88"): "--harvest.tokens 77 --evaluate.tokens 88",
    ("study", "--eval-tokens 88"): "--evaluate.tokens 88",
}


def parsed(name: str, words: str) -> dict:
    call = parse(name, COMMANDS[name], [*NEEDED[name].split(), *words.split()])
    return {"positional": call.args, **call.keywords}


def test_short_spellings_stay(capsys):
    for (name, short), long in SHORT.items():
        assert parsed(name, short) == parsed(name, long) != parsed(name, "")
    assert capsys.readouterr().err == ""


def test_the_old_module_still_starts_the_command_line():
    command = [sys.executable, "-m", "llm_wsae.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("llm-wsae ") and done.stderr == ""


if __name__ == "__main__":
    print(flags(), end="")
