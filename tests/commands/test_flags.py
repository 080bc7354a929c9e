"""The options of every command are a promise: scripts depend on them.

``flags.txt`` lists them in the order of the help. After a deliberate change, write it again:
``python tests/commands/test_flags.py > tests/commands/flags.txt``. An option that was renamed keeps
its old spelling, which does what the new one does and says so once.
"""

import re
import subprocess
import sys
from pathlib import Path

from command_line import TRAIN, call, content, works

from llm_wsae.cli import COMMANDS
from llm_wsae.commands.parser import RENAMED, in_new_spelling, options_of, parse


def flags() -> str:
    blocks = [[name, *(f"  {f}" for f in options_of(name, COMMANDS[name]))] for name in COMMANDS]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def test_flags_are_those_that_were_promised():
    assert flags() == Path(__file__).with_name("flags.txt").read_text()


def test_old_spellings_name_options_that_exist():
    for name, renamed in RENAMED.items():
        options = options_of(name, COMMANDS[name])
        assert set(renamed.values()) <= set(options) and not set(renamed) & set(options)


NEEDED = {
    "run": "--model m --corpus c --site s",
    "train": "store --site s --out o",
    "evaluate": "dictionary --model m --corpus c --out o --monosemantic",
    "study": "store --model m --corpus c --site s --out o",
}
OLD_AND_NEW = {
    ("run", "--seeds 3 4"): "--init-seeds 3 4",
    ("run", "--context-size 64"): "--harvest.context-size 64",
    ("run", "--context_size=64"): "--harvest.context-size 64",
    ("run", "--expansion 32"): "--train.expansion 32",
    ("run", "--train-tokens 9999"): "--train.tokens 9999",
    ("train", "--seeds 3 4"): "--init-seeds 3 4",
    ("train", "--seed 3"): "--shuffle-seed 3",
    ("evaluate", "--monosemantic-tokens 99"): "--score.tokens 99",
    ("evaluate", "--encoder e"): "--score.encoder e",
    ("evaluate", "--labels a b"): "--score.labels a b",
    ("study", "--expansion 32"): "--train.expansion 32",
    ("study", "--train-tokens 9999"): "--train.tokens 9999",
    ("study", "--score-tokens 99"): "--score.tokens 99",
    ("study", "--encoder e"): "--score.encoder e",
    ("study", "--labels a b"): "--score.labels a b",
}
SHORT = {  # spellings that are here to stay
    ("run", "--tokens 77 --eval-tokens 88"): "--harvest.tokens 77 --evaluate.tokens 88",
    ("study", "--eval-tokens 88"): "--evaluate.tokens 88",
}


def parsed(name: str, words: str) -> dict:
    given = in_new_spelling(name, [*NEEDED[name].split(), *words.split()])
    call = parse(name, COMMANDS[name], given)
    return {"positional": call.args, **call.keywords}


def test_old_spellings_mean_the_new_ones(capsys):
    for (name, old), new in OLD_AND_NEW.items():
        expected = parsed(name, new)
        assert capsys.readouterr().err == ""
        assert parsed(name, old) == expected != parsed(name, ""), old
        told, option = capsys.readouterr().err, re.split("[ =]", old)[0]
        assert told == f"deprecated: {option} is now {new.split()[0]}\n"


def test_short_spellings_stay(capsys):
    for (name, short), long in SHORT.items():
        assert parsed(name, short) == parsed(name, long) != parsed(name, "")
    assert capsys.readouterr().err == ""


def test_all_that_is_old_in_a_command_is_said_on_one_line(made_world, tmp_path):
    words = ("train", made_world / "store", *TRAIN, "--k", 4)
    new = works(*words, "--init-seeds", 7, "--shuffle-seed", 3, "--out", tmp_path / "new")
    old = works(*words, "--seeds", 7, "--seed", 3, "--out", tmp_path / "old")
    assert "deprecated" not in new.err and old.err.count("deprecated: ") == 1
    assert "deprecated: --seeds is now --init-seeds, --seed is now --shuffle-seed\n" in old.err
    weights = "uniform-k4-s7/sae_weights.safetensors"
    assert content(tmp_path / "old")[weights] == content(tmp_path / "new")[weights]


def test_a_bad_value_is_said_of_the_option_that_is_there_now():
    result = call("run", "--model", "m", "--corpus", "c", "--site", "s", "--train-tokens", 5)
    assert result.code == 2
    told, sentence = result.err.splitlines()
    assert told == "deprecated: --train-tokens is now --train.tokens"
    assert sentence.startswith("llm-wsae: --train: tokens (5) must be at least one batch")


def test_the_old_module_still_starts_the_command_line():
    command = [sys.executable, "-m", "llm_wsae.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("llm-wsae ") and done.stderr == ""


if __name__ == "__main__":
    print(flags(), end="")
