"""Finding and loading a causal language model: Hub id, local folder or ``.gguf`` file.

transformers does the loading. This module decides what a name means, suppresses the noise, and
turns every failure into one sentence. Nothing is built of a size that the weights do not have.
"""

import atexit
import contextlib
import copy
import functools
import importlib.util
import io
import math
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub as hub
import numpy as np
import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx, validate_repo_id
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from llm_wsae.errors import LlmWsaeError, UsageError, shown
from llm_wsae.machine.hardware import check_memory
from llm_wsae.outside import (
    check_revision,
    check_token,
    hub_is_unreachable,
    local_path,
    parsing,
    reason,
)

_MOST_BLOCKS = 10_000
_KERNELS = ("_attn_implementation", "_experts_implementation")
# packed weights have four, and an embedding that is also the head counts twice
_NUMBERS_PER_BYTE = 8
_MOST_PARTS = 5_000_000  # of a header; a vocabulary of 262,144 words with its merges has 3,400,000
_LIST = 9  # the type of a value


def load_model(
    model: str,
    revision: str | None,
    dtype: torch.dtype,
    download: bool = True,
    spread: bool = False,
) -> tuple[Any, Any, str, str | None]:
    """Load model and tokenizer; their name, a Hub id or that of a file or folder; and the commit on
    the Hub. The model is on the CPU, or with ``spread`` wherever accelerate puts its parts.

    Raises UsageError if the name does not lead to a causal language model, LlmWsaeError if the
    model cannot be downloaded or read.
    """
    path = local_path(model, "model")
    is_local = path.suffix == ".gguf" or path.is_dir()
    if is_local:
        source, options, commit = _local_source(model, path, revision)
    elif model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise UsageError(
            f"there is no model at {model}; give a folder with config.json and weights, a .gguf "
            "file or a Hub id such as gpt2"
        )
    else:
        source, options, commit = hub_source(model, revision, download)
    options["trust_remote_code"] = False  # otherwise transformers asks on the terminal
    # otherwise transformers fetches compiled kernels from the Hub and runs them in place of layers
    weights: dict[str, Any] = {"dtype": dtype, "use_kernels": False}
    if spread:
        weights |= {"device_map": "auto", "offload_folder": _offload_folder()}
    with parsing(f"{model} cannot be loaded as a causal language model"):
        try:
            with quiet(progress_bars=not options["local_files_only"]), _gguf_read_once():
                if path.suffix == ".gguf":
                    # first: what transformers says of a damaged file misleads
                    tensors, numbers = _gguf_sizes(path)
                weights["config"] = config = checked_config(source, options)
                causal = transformers.AutoModelForCausalLM  # named here: slow to import
                if path.suffix == ".gguf":
                    _check_numbers(config, causal, tensors, 2 * numbers, "tensors")
                    needed, cpu = numbers * dtype.itemsize, torch.device("cpu")
                    check_memory(needed, cpu, "the model", "take a smaller one")
                    if hasattr(transformers, "GgufConfig"):  # packed weights are slower
                        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
                elif is_local:
                    check_weights(config, path, causal)
                hf_model = _checked_model(model, source, options | weights)
                tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise _explained(error, model, revision) from error
    return hf_model, tokenizer, path.resolve().name if is_local else model, commit


def _checked_model(model: str, source: str, options: dict[str, Any]) -> Any:
    """The model. Raises LlmWsaeError for missing weights, which transformers draws at random;
    UsageError if it is not causal."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, **options
    )
    # its annotations do not know that loading info makes it a pair
    hf_model, report = cast(tuple[Any, dict[str, Any]], loaded)
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LlmWsaeError(
            f"the weights of {model} are incomplete: {missing[0]}{more} missing; download it "
            "again, or give a model whose weights fit its config.json"
        )
    check_causal(model, hf_model)
    return hf_model


@functools.cache
def _offload_folder() -> str:
    """For weights that fit nowhere else, until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="llm_wsae-offloaded-")
    atexit.register(folder.cleanup)
    return folder.name


def checked_config(source: str, options: dict[str, Any]) -> Any:
    """The configuration of a model, before anything of the sizes in it is built. Raises ValueError
    if it has more blocks than any model, or names an attention kernel to fetch and run."""
    config = transformers.AutoConfig.from_pretrained(source, **options)
    if (blocks := getattr(config, "num_hidden_layers", 0)) > _MOST_BLOCKS:
        raise ValueError(f"its configuration has {shown(blocks)} blocks, which is too many")
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for kernel in (getattr(part, name, None) for name in _KERNELS):
            if kernel is not None and "/" in str(kernel):
                raise ValueError(f"its configuration names code to fetch and run, {shown(kernel)}")
    return config


def check_weights(config: Any, folder: Path, kind: Any) -> None:
    """Raises ValueError if a configuration asks ``kind``, a class of transformers, for far more
    numbers than the weights in its folder hold: it would allocate them first."""
    files = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    stored = sum(path.stat().st_size for path in files)
    if stored:  # otherwise transformers says what is missing
        _check_numbers(config, kind, stored, _NUMBERS_PER_BYTE * stored, "weights")


def _check_numbers(config: Any, kind: Any, blocks: int, most: int, what: str) -> None:
    if (wanted := getattr(config, "num_hidden_layers", 0)) > blocks:
        raise ValueError(f"its {what} are too few for {wanted:,} blocks")
    with torch.device("meta"):
        built = kind.from_config(copy.deepcopy(config), trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in built.parameters())
    if wanted > most:
        raise ValueError(
            f"its configuration needs {wanted:,} numbers, but its {what} hold at most {most:,}"
        )


def check_causal(model: str, hf_model: Any) -> None:
    """Raises UsageError for encoders, which also have a class with a head over the vocabulary."""
    if hf_model.config.is_encoder_decoder:
        raise UsageError(f"{model} is an encoder-decoder model; a decoder-only one is needed")
    looks = {getattr(module, "is_causal", None) for module in hf_model.modules()} - {None}
    if looks == {False}:  # one False alone may be an image tower's
        raise UsageError(
            f"{model} is an encoder, in which tokens attend to later ones, so it predicts no next "
            "token; a decoder-only model is needed"
        )


# The arguments of from_pretrained: source and options; and the commit, if it is on the Hub.
_Source = tuple[str, dict[str, Any], str | None]


def _local_source(model: str, path: Path, revision: str | None) -> _Source:
    options: dict[str, Any] = {"local_files_only": True}
    if revision is not None:
        raise UsageError(
            f"{model} is a local model, which has no revision; omit revision {revision!r}"
        )
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"there is no file {model}")
        if importlib.util.find_spec("gguf") is None:
            raise LlmWsaeError(
                f"reading {path.name} needs the gguf package: pip install 'llm-wsae[gguf]'"
            )
        return str(path.parent), options | {"gguf_file": path.name}, None
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        way_out = f"give its file {files[0]}" if files else "give one with config.json and weights"
        raise UsageError(
            f"the folder {model} holds no config.json, so it is not a model; {way_out}"
        )
    return str(path), options, None


def hub_source(model: str, revision: str | None, download: bool = True) -> _Source:
    """A Hub id with its commit; without a network, the commit in the local cache (None if none is).
    One request decides: transformers would try for every file. Raises LlmWsaeError as
    ``load_model`` does."""
    check_revision(revision)
    check_token()
    options: dict[str, Any] = {"revision": revision, "local_files_only": False}
    try:
        if not download:
            validate_repo_id(model)  # as the request would
            raise hub_errors.OfflineModeIsEnabled
        commit = hub.HfApi().model_info(model, revision=revision, timeout=10).sha
        return model, options, commit
    except (httpx.HTTPError, hub_errors.OfflineModeIsEnabled, ValueError) as error:
        if not hub_is_unreachable(error):
            raise _explained(error, model, revision) from error
        cached = hub.try_to_load_from_cache(model, "config.json", revision=revision)
        commit = Path(cached).parent.name if isinstance(cached, str) else None
        return model, options | {"local_files_only": True}, commit


@contextlib.contextmanager
def quiet(progress_bars: bool) -> Iterator[None]:
    """Silence transformers' warnings and, except for downloads, its progress bars: all of stderr,
    since for GGUF it draws one regardless of its own switch."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    nowhere = contextlib.redirect_stderr(io.StringIO())
    try:
        with warnings.catch_warnings(), contextlib.nullcontext() if progress_bars else nowhere:
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _explained(error: Exception, model: str, revision: str | None) -> LlmWsaeError:
    """One sentence for what transformers reports in a paragraph."""
    text = " ".join(str(error).split())
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def is_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_of(hub_errors.GatedRepoError):
        return LlmWsaeError(
            f"{model} is gated: accept its licence on the Hub and log in with `hf auth login`"
        )
    if is_of(hub_errors.RevisionNotFoundError):
        return UsageError(f"{model} has no revision {revision!r} on the Hub")
    if is_of(hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        return UsageError(
            f"there is no model {model!r}: not a local folder or .gguf file, and the Hub has no "
            "such model (private ones need `hf auth login`)"
        )
    is_offline = "couldn't connect" in text or "offline mode" in text
    if is_offline or is_of(hub_errors.LocalEntryNotFoundError):
        return LlmWsaeError(
            f"{model!r} is neither a local folder or .gguf file nor in the Hub's local cache, and "
            "the Hub cannot be reached; check the name and the network"
        )
    if found := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", text):
        return UsageError(
            f"{model} is not a causal language model (its configuration is {found[1]})"
        )
    if isinstance(error, ValueError) and "custom code" in text:
        return UsageError(
            f"{model} comes with its own model code, which is not run; load it yourself and pass "
            "the live model in Python"
        )
    if isinstance(error, ImportError):
        return LlmWsaeError(f"loading {model} needs a package that is not installed: {text}")
    return LlmWsaeError(f"{model} cannot be loaded as a causal language model: {reason(error)}")


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """While open, transformers reads .gguf files in half the time, and with limits.

    It would parse a file three times and list its tensors' names for every module. gguf would cut
    every word of the vocabulary out of a mapped file, which takes three times as long as out of an
    array.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf
    from gguf import gguf_reader

    replaced: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", functools.cache(_checked(gguf.GGUFReader))),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (gguf_reader, "np", SimpleNamespace(**vars(np) | {"memmap": _as_array})),
    ]
    with contextlib.ExitStack() as restored:
        for owner, name, value in replaced:
            restored.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def _checked(reader: type) -> type:
    """gguf's reader, which raises ValueError where it would read past the end, and for more entries
    than a header has: of zeros, which take no disk, there may be any number."""

    class Checked(reader):  # type: ignore[misc]
        parts = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **named: Any) -> Any:
            self._count(1)
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends before what its header announces; download it again")
            return super()._get(offset, dtype, count, *order, **named)

        def _get_field_parts(self, offset: Any, kind: Any) -> Any:
            if kind == _LIST:
                self._count(int(self._get(offset + 4, np.uint64)[0]))
            return super()._get_field_parts(offset, kind)

        def _count(self, parts: int) -> None:
            self.parts += parts
            if self.parts > _MOST_PARTS:
                raise ValueError("its header has too many entries")

    return Checked


def _as_array(*args: Any, **options: Any) -> np.ndarray:
    return np.memmap(*args, **options).view(np.ndarray)


def _gguf_sizes(path: Path) -> tuple[int, int]:
    """How many tensors a GGUF file has, and how many numbers; to be asked within
    ``_gguf_read_once``."""
    from gguf import GGUFReader

    tensors = GGUFReader(str(path)).tensors
    if sum(int(tensor.n_bytes) for tensor in tensors) > path.stat().st_size:
        raise ValueError("its tensors do not fit into it; download it again")
    return len(tensors), sum(math.prod(tensor.shape.tolist()) for tensor in tensors)
