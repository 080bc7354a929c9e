"""What help shows at first: an example, and the options that everybody needs. Also completion."""

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence

Groups = list[tuple[str, list[tuple[str, str]]]]
"""Titles, and below each its options: as one types them, with their values, and what they mean."""

_TEXT = "--model gpt2 --corpus HuggingFaceFW/fineweb:sample-10BT"
_SITE = "--site blocks.8.hook_resid_post"
_ONE, _OTHER = "runs/trained/uniform-k32", "runs/trained/whitening-a0.5-k32"
_STORE = "--store runs/store --model gpt2"
EXAMPLES = {
    "run": f"{_TEXT} {_SITE} --out runs/gpt2",
    "plan": f"{_TEXT} {_SITE}",
    "harvest": f"{_TEXT} {_SITE} --out runs/store",
    "weigh": f"runs/store {_SITE} --rule whitening --out runs/whitened.safetensors",
    "train": f"runs/store {_SITE} --rule uniform whitening --k 32 --out runs/trained",
    "evaluate": f"{_ONE} {_OTHER} {_TEXT} --out runs/report.json",
    "inspect": f"{_ONE} --latent 123 {_STORE}",
    "steer": f'{_ONE} --latent 123 --text "The weather today" {_STORE}',
    "dashboard": f"{_ONE} {_OTHER} {_STORE} --out runs/page.html",
    "explain": f"{_ONE} {_STORE} --endpoint http://127.0.0.1:8000/v1 --explainer NAME "
    "--out runs/explained",
    "export": f"{_ONE} {_STORE} --to neuronpedia --out runs/neuronpedia",
    "study": f"runs/store {_TEXT} {_SITE} --rule whitening --out runs/study",
    "theory": "--out runs/toy",
    "push": f"{_ONE} {_OTHER} user/gpt2-wsae",
    "pull": "user/gpt2-wsae --out dictionaries",
    "list": "user/gpt2-wsae",
    "verify": "runs/store",
}
_COMMON = (
    "--model --corpus --site --out --tokens --eval-tokens --stream --device --rule --alpha --k "
    "--expansion --train.expansion --weights --dictionary --seeds --plant --monosemantic --keep "
    "--store --latent --text --strength --sweep --latents --rows --live --yes --config"
)
_FEW = 10  # options, that are all shown
_WIDTH = 100
_COMPLETION = """\
_llm_wsae() {{
  local known
  case "$COMP_CWORD,${{COMP_WORDS[1]}}" in
    1,*) known="{commands}" ;;
{options}
  esac
  COMPREPLY=($(compgen -W "$known" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _llm_wsae llm-wsae"""


def groups(text: str) -> Groups:
    """The options of a command, from the boxes of the parser's help."""
    found: Groups = []
    for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines():
        if line.startswith("╭"):
            found.append((line.strip("╭╮─ "), []))
        if not line.startswith("│"):
            continue
        (title, rows), shown = found[-1], line.strip("│").rstrip()[1:]
        name, _, meaning = shown.partition("  ")
        if shown.startswith("-") or (shown[:1].strip() and title == "positional arguments"):
            rows.append((name, meaning.strip()))
        elif shown.startswith(" ") and rows:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {shown.strip()}".strip())
    return [(title, [row for row in rows if row[0][:2] != "-h"]) for title, rows in found]


def short_help(name: str, about: str, found: Groups) -> str:
    """The help of a command without the options that few need; the required ones stand first."""
    rows = [row for _, rows in found for row in rows]
    needed = [row for row in rows if row[0][0] != "-" or row[1].endswith("(required)")]
    common = {*_COMMON.split()}
    rest = [row for row in rows if len(rows) <= _FEW or common & {*flags(row[0])}]
    shown = list(dict.fromkeys(needed + rest))
    width = max(40, min(_WIDTH, shutil.get_terminal_size().columns))
    usage = f"usage: llm-wsae {name} {' '.join(short(row[0]) for row in needed)} [OPTIONS]"
    lines = [usage, "", about, "", "example:", _example(name, width), "", "options:"]
    for option, meaning in shown:
        text = textwrap.fill(meaning, width - 6, break_on_hyphens=False)
        lines += [f"  {short(option)}", textwrap.indent(text, 6 * " ")]
    return "\n".join([*lines, "", f"all {len(rows)} options: llm-wsae {name} --help-all"])


def _example(name: str, width: int) -> str:
    """The command of the example; its lines end before an option."""
    words = re.sub(" (?!--)", "\0", f"llm-wsae {name} {EXAMPLES[name]}")
    lines = textwrap.wrap(words, width - 6, break_long_words=False, break_on_hyphens=False)
    return "  " + " \\\n    ".join(lines).replace("\0", " ")


def flags(option: str) -> list[str]:
    """The spellings of an option, without its values."""
    return [part.partition(" ")[0] for part in option.split(", ")]


def short(option: str) -> str:
    """An option in its first spelling; ``[INT [INT ...]]`` becomes ``INT …``."""
    return re.sub(r"\[(\S+) \[.*\]\]?$", r"\1 …", option.partition(", --")[0])


def completion(shell: str, options: Mapping[str, Sequence[str]]) -> str:
    """A script for bash or zsh that completes the commands, and the ``options`` of each."""
    cases = [f'    *,{name}) known="{" ".join(own)}" ;;' for name, own in options.items()]
    script = _COMPLETION.format(commands=" ".join(options), options="\n".join(cases))
    start = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"
    return start * (shell == "zsh") + script
