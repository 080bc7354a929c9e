"""Models that accelerate has spread over several devices, memory and disk.

Its hooks fetch weights before a module's forward and drop them behind it, so most of the parameters
are without values (on the device ``meta``) most of the time.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HOOK = "_hf_hook"  # accelerate's, on a module
_BRIDGED = "._original_component."  # in names, where a TransformerLens bridge wraps a module


def is_spread(hf_model: nn.Module) -> bool:
    """Whether accelerate moves weights or inputs of the model while it computes."""
    return any(hasattr(module, HOOK) for module in hf_model.modules())


def device_of(hf_model: Any) -> torch.device:
    """Where the model takes its input."""
    if not is_spread(hf_model):
        return hf_model.device
    for module in hf_model.modules():
        device = getattr(getattr(module, HOOK, None), "execution_device", None)
        if device is not None and str(device) != "meta":
            return torch.device(device)
    return torch.device("cpu")


def parameters(hf_model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every parameter, wherever it is kept, in the order of a model on one
    device and in no bridge; tied ones once. The values are there until the next one is asked
    for."""
    own = dict(hf_model.named_parameters())
    if not is_spread(hf_model) and not any(_BRIDGED in name for name in own):
        yield from own.items()
        return
    with torch.device("meta"):  # knows which weights are tied
        skeleton = type(hf_model)(hf_model.config)
    for name, _ in skeleton.named_parameters():
        path, _, last = name.rpartition(".")
        with fetched(hf_model.get_submodule(path)) as module:  # a bridge looks into what it wraps
            yield name, getattr(module, last)


@contextlib.contextmanager
def fetched(module: nn.Module) -> Iterator[nn.Module]:
    """The module with the values of its own parameters."""
    if not hasattr(module, HOOK):
        yield module
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield module


def weight_of(module: nn.Module) -> Tensor:
    """The values of its weight, also where they are fetched for this alone."""
    with fetched(module):
        weight: Tensor = module.get_parameter("weight").detach()
        return weight.clone() if hasattr(module, HOOK) else weight
