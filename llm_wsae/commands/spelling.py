"""Words of a command that cannot be right: which option was meant, and what its value must be."""

import difflib
from collections.abc import Collection
from contextlib import suppress

from llm_wsae.errors import either, nearest

_ELSEWHERE = {  # our options, and what other tools call them
    "site": "hook hook-layer hook-name hook-point hookpoint hookpoints layer layers submodule",
    "corpus": "data dataset dataset-name dataset-path hf-dataset text-file",
    "model": "hf-model llm model-id model-name model-name-or-path model-path",
    "out": "checkpoint-path o output output-dir output-path save-dir save-path",
    "tokens": "epochs max-tokens n-tokens num-steps num-tokens steps total-training-tokens "
    "train-tokens training-tokens",
    "learning-rate": "lr",
    "warmup": "lr-warm-up-steps lr-warmup-steps warmup-steps",
    "batch-size": "batch-size bs train-batch-size train-batch-size-tokens",
    "batch-tokens": "batch-size",
    "init-seeds": "random-seed seed seeds",
    "seeds": "init-seeds random-seed seed",
    "expansion": "d-sae dict-size expansion-factor n-latents num-latents width",
    "context-size": "context-length ctx-len ctx-length max-length seq-len sequence-length",
    "k": "l0 num-active top-k topk",
    "l1": "l1-coeff l1-coefficient l1-lambda l1-penalty",
    "architecture": "activation arch sae-type",
    "tracker": "log-to-wandb use-wandb wandb wandb-project",
    "dtype": "dtype precision",
    "model-dtype": "dtype precision torch-dtype",
    "latent": "feature features latents neuron",
}
_VALUES = {"gpu": "cuda", "yes": "True", "on": "True", "no": "False", "off": "False"}


def own_word(value: str) -> str:
    """Our word for a value that is called so elsewhere; any other value as it is."""
    return _VALUES.get(value.lower(), value)


def meant(option: str, known: Collection[str]) -> str:
    """A clause that suggests what to type instead of an option that a command does not have.
    ``known`` are its options, and the names of its arguments without one."""
    if option == "--store":
        text = "; the text is --corpus" if "--corpus" in known else ""
        return "name stores without it, first" if "STORE…" in known else f"it reads no store{text}"
    prefix, dot, last = option.lstrip("-").replace("_", "-").rpartition(".")
    for ours in (*(own for own, theirs in _ELSEWHERE.items() if last in theirs.split()), last):
        here = [name for name in (f"--{prefix}{dot}{ours}", f"--{ours}") if name in known]
        if found := here[:1] or [name for name in known if name.endswith(f".{ours}")]:
            return f"did you mean {either(found)}?"
    options = {name.lstrip("-"): name for name in known if name.startswith("--")}
    close = difflib.get_close_matches(option.lstrip("-"), options, n=1, cutoff=0.65)
    return f"did you mean {options[close[0]]!r}?" if close else nearest("", options.values())


def needed(option: str, words: list[str], kind: str) -> str:
    """A sentence about a value that is no number. ``kind`` is what help shows for the option: INT,
    FLOAT, {auto}|FLOAT, or one of these several times. ``words`` are those of the command."""
    choices = kind.partition("{")[2].partition("}")[0]
    what = "number" if "FLOAT" in kind else "whole number"
    what = f"{what}s" if kind.startswith("[") else f"a {what}"
    wrong = [word for word in _values(option, words) if word != choices and not _fits(word, kind)]
    more = f" or {choices}" if choices else ""
    sentence = f"{option} takes {what}{more}, not {wrong[0] if wrong else ''!r}"
    with suppress(IndexError, ValueError, OverflowError):
        if float(wrong[0]) == int(float(wrong[0])):  # 1e6
            return f"{sentence}; write {int(float(wrong[0]))}"
    return sentence


def _values(option: str, words: list[str]) -> list[str]:
    """The words that are given to an option."""
    found, name = [], ""
    for word in words:
        own, equals, value = word.partition("=") if word.startswith("--") else (name, "=", word)
        name = own.replace("_", "-")
        found += [value] if equals and name == option else []
    return found


def _fits(word: str, kind: str) -> bool:
    try:
        return (float if "FLOAT" in kind else int)(word) is not None
    except ValueError:
        return False
