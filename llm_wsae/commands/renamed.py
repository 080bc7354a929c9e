"""Old spellings of options: they still work, and say on stderr what they are called now."""

from llm_wsae.commands.common import note

RENAMED: dict[str, dict[str, str]] = {
    "run": {
        "--seeds": "--init-seeds",
        "--context-size": "--harvest.context-size",
        "--expansion": "--train.expansion",
        "--train-tokens": "--train.tokens",
    },
    "train": {"--seeds": "--init-seeds", "--seed": "--shuffle-seed"},
    "evaluate": {
        "--monosemantic-tokens": "--score.tokens",
        "--encoder": "--score.encoder",
        "--labels": "--score.labels",
    },
    "study": {
        "--expansion": "--train.expansion",
        "--train-tokens": "--train.tokens",
        "--score-tokens": "--score.tokens",
        "--encoder": "--score.encoder",
        "--labels": "--score.labels",
    },
}


def in_new_spelling(command: str, words: list[str]) -> list[str]:
    """The words of a command as they are spelt now."""
    new: list[str] = []
    used: dict[str, str] = {}
    for word in words:
        option, equals, value = word.partition("=")
        name = RENAMED.get(command, {}).get(option.replace("_", "-"))
        if name is not None:
            used[option] = name
        new.append(word if name is None else f"{name}{equals}{value}")
    if used:
        pairs = ", ".join(f"{old} is now {name}" for old, name in used.items())
        note(f"deprecated: {pairs}")
    return new
