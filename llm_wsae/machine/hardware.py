"""The device to use, its faster number format and products, its memory, and numbers read without
waiting for it.

Some processors have bfloat16 instructions and still multiply float32 faster. So each kind of
product is timed in both formats, once a process, in about a tenth of a second. A difference below
5 % goes to bfloat16, which takes half of the memory.
"""

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_wsae.artifact import provenance
from llm_wsae.errors import UsageError
from llm_wsae.outside import from_environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS, _INPUTS, _OUTPUTS = 512, 576, 768  # of a product that takes a few milliseconds
_REPEATS = 3
_TIE = 1.05

Kind = Literal["model", "encoder"]


def choose_device(name: str = "auto") -> torch.device:
    """A device by name; ``auto`` takes cuda, then mps, then cpu. Processes started by ``torchrun``
    each take one of their machine's GPUs, in turn. Raises UsageError for a device that is not
    there."""
    mps = int(torch.backends.mps.is_available())
    counts = {"cuda": torch.cuda.device_count(), "mps": mps, "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    device = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        here = ", ".join(kind for kind, count in counts.items() if count)
        here += f" ({counts['cuda']} of them)" if counts["cuda"] else ""
        raise UsageError(f"there is no device {name!r} on this machine; it has {here}")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", from_environment("LOCAL_RANK", 0, 1 << 16) % counts["cuda"])
    return device


def fast_dtype(device: torch.device, kind: Kind = "model", began: Any = None) -> torch.dtype:
    """The number format in which a device is faster, at a model's layers or at the product of a
    dictionary's encoder; the reason goes to ``provenance.number_formats``. ``began``, the format in
    the record of what is resumed or read, is kept: another would change the result."""
    if device.type == "cpu":
        chosen, why = _on_cpu(kind)
    else:
        has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        chosen = torch.bfloat16 if has else torch.float32
        why = f"the device has {'' if has else 'no '}fast bfloat16"
    if began in tuple(DTYPES) and DTYPES[began] != chosen:
        chosen, why = DTYPES[began], "as recorded when this was begun"
    provenance.number_formats[kind] = f"{name_of(chosen)}: {why}"
    return chosen


def name_of(dtype: torch.dtype) -> str:
    """As records have it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _on_cpu(kind: Kind) -> tuple[torch.dtype, str]:
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.float32, "the processor has no bfloat16"
    seconds = product_seconds(kind)
    # no figures: they differ from run to run, and records of one run are to be the same
    if seconds[torch.float32] * _TIE < seconds[torch.bfloat16]:
        return torch.float32, "measured to be the faster one here"
    return torch.bfloat16, "measured to be as fast here as float32, or faster"


@cache
def product_seconds(kind: Kind) -> dict[torch.dtype, float]:
    """How long one thread computes a kind of product in both formats: the least of some repeats."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return pool.submit(_measure, kind).result()
        finally:
            torch.set_num_threads(threads)  # later threads start with this value too


@torch.inference_mode()
def _measure(kind: Kind) -> dict[torch.dtype, float]:
    products = {dtype: _product(kind, dtype) for dtype in (torch.float32, torch.bfloat16)}
    found: dict[torch.dtype, list[float]] = {dtype: [] for dtype in products}
    for _ in range(1 + _REPEATS):  # taking turns, so that both meet the same noise
        for dtype, product in products.items():
            begin = time.thread_time()
            product()
            found[dtype].append(time.thread_time() - begin)
    return {dtype: min(seconds[1:]) for dtype, seconds in found.items()}  # the first prepares


def _product(kind: Kind, dtype: torch.dtype) -> Callable[[], object]:
    """An encoder's product; or a layer's and a run of the vocabulary's, laid out where that is
    faster."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, _INPUTS, generator=draw).to(dtype)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=draw).to(dtype)
    if kind == "encoder":
        if dtype == torch.float32 and onednn_is_faster(dtype):
            return lambda: onednn_linear(weight, rows)
        return lambda: torch.mm(weight, rows.T)
    if not onednn_is_faster(dtype):
        return lambda: (F.linear(rows, weight), F.linear(rows, weight))
    laid_out = onednn_layout(weight)
    return lambda: (F.linear(rows, weight), onednn_linear(rows, laid_out))


@cache
def onednn_is_faster(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies faster on this CPU than what torch chooses: in bfloat16 that is
    oneDNN, too, but it lays the weights out anew each time; in float32 it is MKL, which uses half
    of a vector's width on AMD's processors."""
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    if dtype == torch.float32:
        return processor_name().startswith("AMD")
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_layout(weight: Tensor) -> Tensor:
    """A copy of weights [out, in] in the layout in which ``onednn_linear`` takes them at once."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows [..., in] times weights [out, in], laid out or not."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def exact_dtype(device: torch.device) -> torch.dtype:
    """For sums over many steps: float64, which mps does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class DeferredScalar:
    """A number that a device is still computing. Reading waits for the work queued before the
    request, not for work queued since."""

    def __init__(self, number: Tensor):
        self._number = number.detach().to("cpu", non_blocking=number.is_cuda)
        self._arrived = torch.cuda.Event() if number.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(number.device))

    def read(self) -> float:
        """The number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)


def processor_name(device: torch.device = torch.device("cpu")) -> str:  # noqa: B008 - a constant
    """The GPU's name; or the processor's, with the instruction sets that matter here."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        facts = dict(re.findall(r"^(.+?)\s*: *(.*)$", info.read_text(), re.MULTILINE))
        name = facts.get("model name", name)
        if "cpu family" in facts:  # virtual machines often hide the model name
            name += f" (family {facts['cpu family']}, model {facts.get('model')})"
    amx = torch.cpu._is_amx_tile_supported()
    able = {
        "AVX-512": torch.cpu._is_avx512_supported(),
        "bfloat16": torch.cpu._is_avx512_bf16_supported() and not amx,  # AMX includes it
        "AMX": amx,
    }
    return ", ".join([name, *(feature for feature, here in able.items() if here)])


def check_memory(needed: int, device: torch.device, what: str, way_out: str) -> None:
    """Raises UsageError if something needs more bytes than a device has at all."""
    there = memory_of(device)
    if needed > there:
        raise UsageError(
            f"{what} would need {needed / 2**30:,.0f} GiB of memory, but {device} has "
            f"{there / 2**30:,.0f} in all; {way_out}"
        )


def memory_of(device: torch.device) -> int:
    """All bytes of a device's memory, whoever uses them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def return_freed_memory() -> None:
    """Give freed memory back to the system. glibc keeps that of tensors below 32 MiB, in which the
    large blocks of a run's next stage find no place."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
