"""What every command shares: the type of a result, loading a model, reading names, the cost."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from llm_wsae.errors import UsageError
from llm_wsae.model.site import Site
from llm_wsae.processes import leads
from llm_wsae.terminal import printable

T = TypeVar("T")
# A configuration whose fields are options, each with a value: --drop-special False.
Config = Annotated[T, tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # an option without a value: --private
Device = Literal["auto", "cuda", "mps", "cpu"]
ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
Result = tuple[dict[str, Any], str]  # the JSON object, the text for people


def load_model(model: str, revision: str | None, device: str, dtype: str) -> Any:
    """Load a model, saying so on stderr."""
    from llm_wsae.model.language_model import LanguageModel

    if leads():
        print(f"loading {printable(model)}", file=sys.stderr)
    return LanguageModel.load(model, revision=revision, device=device, dtype=dtype)


def check_counts(**counts: int) -> None:
    """Raises UsageError, naming the option, for a number of tokens below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {count}, but must be at least 1")


def sites_of(names: tuple[str, ...]) -> list[Site]:
    """The sites of their names. Raises UsageError if there is none or one is misspelt."""
    if not names:
        raise UsageError("name at least one site, e.g. --site blocks.8.hook_resid_post")
    return [Site.parse(name) for name in names]


def label_of(path: Path, paths: tuple[Path, ...]) -> str:
    """The folder's name, or as much of the path as tells it from the others."""
    same = [p for p in paths if p.name == path.name]
    return path.name if len(same) == 1 else str(path)


def cost(started: float) -> str:
    """Time since ``started`` (a ``time.monotonic``) and peak memory, in words."""
    from llm_wsae.hardware import peak_memory_bytes

    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    peak = peak_memory_bytes() / 2**30
    return f"took {minutes} min {seconds:02} s, peak memory {peak:.1f} GiB"
