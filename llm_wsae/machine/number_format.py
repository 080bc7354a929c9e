"""Which number format a device multiplies faster.

Some processors have bfloat16 instructions and still multiply float32 faster. So each kind of
product is timed in both formats, once a process, in about a tenth of a second of one thread. A
difference below 5 % goes to bfloat16, which takes half of the memory.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_wsae.artifact import provenance
from llm_wsae.machine.hardware import onednn_is_faster, onednn_layout, onednn_linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Kind = Literal["model", "encoder"]
Seconds = dict[torch.dtype, float]

_PRODUCTS: dict[Kind, tuple[str, ...]] = {
    "model": ("layers", "unembedding"),
    "encoder": ("encoder",),
}
_ROWS, _INPUTS, _OUTPUTS = 512, 576, 768  # a few milliseconds
_REPEATS = 3
_TIE = 1.05


def fast_dtype(device: torch.device, kind: Kind = "model", began: Any = None) -> torch.dtype:
    """The number format in which a device is faster, at a model's layers and unembedding or at the
    product of a dictionary's encoder; the reason goes to ``provenance.number_formats``.

    ``began`` is the format in the record of what is resumed or read, if any: it is kept, since
    another one would change the result.
    """
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
    """The faster format, and why."""
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.float32, "the processor has no bfloat16"
    half, single = (
        [product_seconds()[name][dtype] for name in _PRODUCTS[kind]]
        for dtype in (torch.bfloat16, torch.float32)
    )
    # no figures: they differ from run to run, and records of one run are to be the same
    if sum(single) * _TIE < sum(half):
        return torch.float32, "measured to be the faster one here"
    return torch.bfloat16, "measured to be as fast here as float32, or faster"


@cache
def product_seconds() -> dict[str, Seconds]:
    """How long one thread computes each product in both formats: the least of some repeats, between
    which the products take turns."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return pool.submit(_measure).result()
        finally:
            torch.set_num_threads(threads)  # later threads start with this value too


@torch.inference_mode()
def _measure() -> dict[str, Seconds]:
    found: dict[str, Seconds] = {name: {} for names in _PRODUCTS.values() for name in names}
    products = [(dtype, _products(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    for repeat in range(1 + _REPEATS):
        for dtype, of_kinds in products:
            for name, product in of_kinds.items():
                begin = time.thread_time()
                product()
                seconds = time.thread_time() - begin
                if repeat:  # the first one prepares
                    found[name][dtype] = min(seconds, found[name].get(dtype, seconds))
    return found


def _products(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Rows times a layer's weights; times a run of the vocabulary, laid out for it in bfloat16; and
    an encoder's latents times rows."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, _INPUTS, generator=draw).to(dtype)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=draw).to(dtype)
    laid_out = onednn_layout(weight) if onednn_is_faster(dtype) else None
    return {
        "layers": lambda: F.linear(rows, weight),
        "unembedding": lambda: (
            F.linear(rows, weight) if laid_out is None else onednn_linear(rows, laid_out)
        ),
        "encoder": lambda: (
            onednn_linear(weight, rows)
            if dtype == torch.float32 and onednn_is_faster(dtype)
            else torch.mm(weight, rows.T)
        ),
    }
