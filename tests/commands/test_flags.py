"""The options of every command are a promise: scripts depend on them.

``flags.txt`` lists them in the order of the help. After a deliberate change, write it again:
``python tests/commands/test_flags.py > tests/commands/flags.txt``.
"""

from pathlib import Path

from llm_wsae.cli import COMMANDS
from llm_wsae.commands.parser import RENAMED, options_of


def flags() -> str:
    blocks = [[name, *(f"  {f}" for f in options_of(name, COMMANDS[name]))] for name in COMMANDS]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def test_flags_are_those_that_were_promised():
    assert flags() == Path(__file__).with_name("flags.txt").read_text()


def test_old_spellings_name_options_that_exist():
    for name, renamed in RENAMED.items():
        options = options_of(name, COMMANDS[name])
        assert set(renamed.values()) <= set(options) and not set(renamed) & set(options)


if __name__ == "__main__":
    print(flags(), end="")
