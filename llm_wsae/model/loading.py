"""Finding and loading a causal language model: Hub id, local folder or ``.gguf`` file.

transformers does the loading. This module decides what a name means, suppresses the noise, and
turns every failure into one sentence. Local files are loaded with ``local_files_only``, so that no
one waits for a network that is not needed, and without changing the process's environment.
"""

import atexit
import contextlib
import functools
import importlib.util
import io
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import huggingface_hub as hub
import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx, validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llm_wsae.errors import LlmWsaeError, UsageError, shown
from llm_wsae.machine.hardware import check_memory
from llm_wsae.model.folder_checks import check_numbers_of, check_tokenizer, check_weights
from llm_wsae.model.gguf_reading import gguf_read_once
from llm_wsae.outside import (
    check_revision,
    check_token,
    gguf_sizes,
    hub_is_unreachable,
    local_path,
    parsing,
    reason,
)

_LARGEST = 2**31  # of any number in a configuration
# How many parts a model may have; sizes, such as vocab_size_per_layer_input, do not count any.
_MOST = {re.compile("(layer|head)s?$"): 10_000, re.compile("experts?$"): 2**16}
_KERNELS = ("_attn_implementation", "_experts_implementation")


@dataclass(frozen=True)
class Loaded:
    """A model of transformers and its name."""

    hf_model: Any
    """The Hugging Face causal language model, on the CPU unless it is spread."""
    tokenizer: Any
    """Its tokenizer."""
    name: str
    """Hub id, or the bare name of the file or folder, independent of its location."""
    revision: str | None
    """Commit hash on the Hub; None for local files."""


def load_model(
    model: str,
    revision: str | None,
    dtype: torch.dtype,
    download: bool = True,
    spread: bool = False,
) -> Loaded:
    """Load model and tokenizer by Hub id, local folder or ``.gguf`` file.

    Without ``download``, a model of the Hub is read from the local cache. With ``spread``,
    accelerate puts its parts on all accelerators, then in memory, then on the disk.

    Raises UsageError if the name does not lead to a causal language model, LlmWsaeError if the
    model cannot be downloaded or read.
    """
    path = local_path(model, "model")
    if path.suffix == ".gguf" or path.is_dir():
        if revision is not None:
            raise UsageError(
                f"{model} is a local model, which has no revision; omit revision {revision!r}"
            )
        source, options, commit = _local_source(model, path)
        name = path.resolve().name
    elif _looks_like_path(model):
        raise UsageError(
            f"there is no model at {model}; give a folder with config.json and weights, a .gguf "
            "file or a Hub id such as gpt2"
        )
    else:
        source, options, commit = hub_source(model, revision, download)
        name = model
    options["trust_remote_code"] = False  # otherwise transformers asks on the terminal
    weights = _dense_weights() if "gguf_file" in options else {}
    if spread:
        weights |= {"device_map": "auto", "offload_folder": _offload_folder()}
    with parsing(f"{model} cannot be loaded as a causal language model"):
        try:
            with quiet(progress_bars=not options["local_files_only"]), gguf_read_once():
                stored = gguf_sizes(path) if "gguf_file" in options else None
                config = checked_config(source, options)
                if stored is not None:
                    tensors, numbers = stored
                    check_numbers_of(config, AutoModelForCausalLM, tensors, 2 * numbers, "tensors")
                    needed = numbers * dtype.itemsize
                    check_memory(needed, torch.device("cpu"), "the model", "take a smaller one")
                elif path.is_dir():
                    check_weights(config, path, AutoModelForCausalLM)
                check_tokenizer(source, options)
                loaded = AutoModelForCausalLM.from_pretrained(
                    source,
                    config=config,
                    dtype=dtype,
                    output_loading_info=True,
                    **options,
                    **weights,
                )
                # its annotations do not know that loading info makes it a pair
                hf_model, report = cast(tuple[Any, dict[str, Any]], loaded)
                _check_complete(model, report)
                check_causal(model, hf_model)
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise _explained(error, model, revision) from error
    return Loaded(hf_model=hf_model, tokenizer=tokenizer, name=name, revision=commit)


@functools.cache
def _offload_folder() -> str:
    """For weights that fit neither into accelerators nor into memory, until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="llm_wsae-offloaded-")
    atexit.register(folder.cleanup)
    return folder.name


def checked_config(source: str, options: dict[str, Any]) -> Any:
    """The configuration of a model, before anything of the sizes in it is built.

    Raises ValueError for sizes that no model has, and for a configuration that names code to
    fetch: transformers would run an attention kernel from the Hub where it can.
    """
    config = AutoConfig.from_pretrained(source, **options)
    for name, value in _entries(config.to_dict()):
        most = next((m for part, m in _MOST.items() if part.search(name)), _LARGEST)
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(f"its configuration has {name} = {shown(value)}, which is too large")
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for kernel in (getattr(part, name, None) for name in _KERNELS):
            if kernel is not None and "/" in str(kernel):
                raise ValueError(f"its configuration names code to fetch and run, {shown(kernel)}")
    return config


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a JSON object, however deep, with its name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _entries(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item, name)
    else:
        yield name, value


def _check_complete(model: str, report: dict[str, Any]) -> None:
    """Raises LlmWsaeError for missing weights, which transformers fills with random numbers."""
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LlmWsaeError(
            f"the weights of {model} are incomplete: {missing[0]}{more} missing; download it "
            "again, or give a model whose weights fit its config.json"
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


def _local_source(model: str, path: Path) -> _Source:
    options: dict[str, Any] = {"local_files_only": True}
    if path.suffix != ".gguf":
        _check_folder(model, path)
        return str(path), options, None
    _check_gguf(model, path)
    return str(path.parent), options | {"gguf_file": path.name}, None


def hub_source(model: str, revision: str | None, download: bool = True) -> _Source:
    """A Hub id with its commit; without a network, the commit in the local cache (None if none is).

    One request decides: transformers would try for every file, a minute in all, before it used the
    cache. Raises LlmWsaeError as ``load_model`` does.
    """
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


def _check_folder(model: str, path: Path) -> None:
    if (path / "config.json").is_file():
        return
    files = sorted(file.name for file in path.glob("*.gguf"))
    raise UsageError(
        f"the folder {model} holds no config.json, so it is not a model; "
        + (f"give its file {path / files[0]}" if files else "give one with config.json and weights")
    )


def _check_gguf(model: str, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"there is no file {model}")
    if importlib.util.find_spec("gguf") is None:
        raise LlmWsaeError(
            f"reading {path.name} needs the gguf package: pip install 'llm-wsae[gguf]'"
        )


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model


def _dense_weights() -> dict[str, Any]:
    """Request ordinary dense Linear modules where transformers can keep GGUF weights packed.

    Packed weights are multiplied in float32 by a downloaded kernel, which is slower than bfloat16.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextlib.contextmanager
def quiet(progress_bars: bool) -> Iterator[None]:
    """Silence transformers' warnings and, for local files, its progress bars.

    Downloads keep their bars: the user waits for them.
    """
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not progress_bars:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as silence:
            warnings.simplefilter("ignore")
            if not progress_bars:
                # transformers draws one bar (GGUF) regardless of its own switch.
                silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _explained(error: Exception, model: str, revision: str | None) -> LlmWsaeError:
    """One sentence for what transformers reports in a paragraph."""
    chain = _chain(error)
    text = " ".join(str(error).split())
    if any(isinstance(e, hub_errors.GatedRepoError) for e in chain):
        return LlmWsaeError(
            f"{model} is gated: accept its licence on the Hub and log in with `hf auth login`"
        )
    if any(isinstance(e, hub_errors.RevisionNotFoundError) for e in chain):
        return UsageError(f"{model} has no revision {revision!r} on the Hub")
    unknown = (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError)
    if any(isinstance(e, unknown) for e in chain) or "Repo id must" in text:
        return UsageError(
            f"there is no model {model!r}: not a local folder or .gguf file, and the Hub has no "
            "such model (private ones need `hf auth login`)"
        )
    if any(isinstance(e, hub_errors.LocalEntryNotFoundError) for e in chain) or (
        "couldn't connect" in text or "offline mode" in text
    ):
        return LlmWsaeError(
            f"{model!r} is neither a local folder or .gguf file nor in the Hub's local cache, and "
            "the Hub cannot be reached; check the name and the network"
        )
    if "Unrecognized configuration class" in text:
        return UsageError(
            f"{model} is not a causal language model (its configuration is "
            f"{_between(text, 'configuration class ', ' for')})"
        )
    if isinstance(error, ValueError) and "custom code" in text:
        return UsageError(
            f"{model} comes with its own model code, which is not run; load it yourself and pass "
            "the live model in Python"
        )
    if isinstance(error, ImportError):
        return LlmWsaeError(f"loading {model} needs a package that is not installed: {text}")
    return LlmWsaeError(f"{model} cannot be loaded as a causal language model: {reason(error)}")


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and its causes."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _between(text: str, before: str, after: str) -> str:
    dotted = text.split(before, 1)[-1].split(after, 1)[0]
    return dotted.strip("<>'").split(".")[-1].rstrip("'>")
