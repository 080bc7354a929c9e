"""The options of every command are a promise: scripts depend on them.

``flags.txt`` lists them in the order of the help. After a deliberate change, write it again:
``python tests/commands/test_flags.py > tests/commands/flags.txt``.
"""

from pathlib import Path

from llm_wsae.cli import COMMANDS, options_of, parse


def flags() -> str:
    blocks = [[name, *(f"  {f}" for f in options_of(name))] for name in COMMANDS]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def test_flags_are_those_that_were_promised():
    assert flags() == Path(__file__).with_name("flags.txt").read_text()


NEEDED = {
    "run": "--model m --corpus c --site blocks.1.hook_resid_post",
    "study": "store --model m --corpus c --site s --out o",
}
SHORT = {
    ("run", "--tokens 7777 --eval-tokens 88"): "--harvest.tokens 7777 --evaluate.tokens 88",
    ("study", "--eval-tokens 88"): "--evaluate.tokens 88",
}


def parsed(name: str, words: str) -> object:
    """The request that the words make."""
    return parse(name, [*NEEDED[name].split(), *words.split()]).args


def test_short_spellings_stay(capsys):
    for (name, short), long in SHORT.items():
        assert parsed(name, short) == parsed(name, long) != parsed(name, "")
    assert capsys.readouterr().err == ""


if __name__ == "__main__":
    print(flags(), end="")
