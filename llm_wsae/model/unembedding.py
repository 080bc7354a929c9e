"""From rows of the last block's output to logits, and products with weights laid out for a CPU.

The model's own norm, head and soft caps treat every position and, behind the head, every token of
the vocabulary by itself. So they may be applied to chosen rows only, and on a CPU to a run of
tokens at a time, whose weights and logits stay in the cache.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llm_wsae.machine.hardware import memory_of, onednn_is_faster, onednn_layout, onednn_linear
from llm_wsae.model.forward import Blocks, replace_forward
from llm_wsae.model.site import Site
from llm_wsae.model.spread import device_of, is_spread

RUN = 2048  # tokens of the vocabulary in a run
_SAME_LOGITS = 1e-2  # relative; products of other shapes round otherwise
_MANY = 256  # rows; with fewer, a copy is not worth making
_SHARE = 8  # copies take at most one part of this many of the memory


class PrepackedWeights:
    """Copies of the weights of linear layers in the layout in which oneDNN multiplies, where a text
    is read many times. It is opened and closed while no pass is running; the weights must not
    change in between. Products are the same, to rounding at most."""

    def __init__(self, hf_model: Any):
        self._hf_model = hf_model
        self._copies: dict[tuple[nn.Linear, int | None, int | None], Tensor] | None = None
        self._patches = contextlib.ExitStack()
        self._openers = 0

    def open(self) -> None:
        """Passes without gradients multiply with copies, made when first needed, where oneDNN is
        faster with them and all of them take little of the memory."""
        self._openers += 1
        device = device_of(self._hf_model)
        if self._openers > 1 or device.type != "cpu" or is_spread(self._hf_model):
            return
        linear = [one for one in self._hf_model.modules() if type(one) is nn.Linear]
        layers = [one for one in linear if onednn_is_faster(one.weight.dtype)]
        size = sum(one.weight.nbytes for one in layers)
        if not layers or size * _SHARE > memory_of(device):
            return
        self._copies = {}
        for layer in layers:
            replace_forward(self._patches, layer, functools.partial(self.product, layer))

    def close(self) -> None:
        """Once for each time that it was opened; the last one frees the copies."""
        self._openers -= 1
        if not self._openers:
            self._patches.close()
            self._copies = None

    def product(self, layer: nn.Linear, rows: Tensor, part: slice = slice(None)) -> Tensor:
        """A linear layer, or a part of its outputs: rows [..., in], result [..., outputs]."""
        weight, bias = layer.weight[part], None if layer.bias is None else layer.bias[part]
        copies, many = self._copies, rows.shape[:-1].numel() >= _MANY
        pays = many and onednn_is_faster(weight.dtype) and not torch.is_grad_enabled()
        if copies is None or not pays:
            return F.linear(rows, weight, bias)
        key = layer, part.start, part.stop
        if key not in copies:
            copies[key] = onednn_layout(weight)
        return onednn_linear(rows, copies[key], bias)


class Unembedding(NamedTuple):
    """What makes logits, in two steps, in any thread if the model is ``side_by_side``."""

    enter: Callable[[Float[Tensor, "rows d_model"]], Tensor]
    """From rows of the last block's output to what the runs take; for as many rows."""
    runs: list[Callable[[Tensor], Float[Tensor, "rows run"]]]
    """The logits of each run of the vocabulary, in its order."""

    def __call__(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """The logits of the whole vocabulary."""
        entered = self.enter(rows)
        return torch.cat([run(entered) for run in self.runs], 1)


class Head:
    """What follows the blocks of a Hugging Face model."""

    def __init__(self, hf_model: Any, blocks: Blocks, weights: PrepackedWeights, d_model: int):
        self._hf_model, self._blocks = hf_model, blocks
        self._weights, self._d_model = weights, d_model
        self._divides: bool | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[Unembedding]:
        """While open, what it yields makes logits."""
        given = threading.local()

        def enter(rows: Tensor) -> Tensor:
            given.rows = rows[:, None]
            return _no_ids(rows)

        last = Site(len(self._blocks) - 1, "post")
        with self._blocks.entering(last, lambda: given.rows):
            whole = Unembedding(
                lambda rows: rows, [lambda rows: self._blocks.run(enter(rows)).logits[:, 0]]
            )
            with contextlib.ExitStack() as patches:
                divided = self._divided(patches, enter)
                if divided is not None and self._divides is None:
                    rows = torch.randn(2, self._d_model, generator=torch.Generator().manual_seed(0))
                    self._divides = _agree(divided, whole, rows.to(self._hf_model.dtype))
                yield divided if divided is not None and self._divides else whole

    def _divided(
        self, patches: contextlib.ExitStack, enter: Callable[[Tensor], Tensor]
    ) -> Unembedding | None:
        """Run by run; None if the head is no plain product or the model may not compute side by
        side.

        The model's own forward makes a run: its trunk answers with what it made of the rows in the
        first step, and its head multiplies with a part of its weights.
        """
        model: Any = self._hf_model
        head, trunk = model.get_output_embeddings(), model.base_model
        is_plain = type(head) is nn.Linear and trunk is not model
        if not is_plain or not self._blocks.side_by_side:
            return None
        asked = threading.local()  # in the thread of a run: what has entered, and its part
        own_trunk = trunk.forward

        def trunk_forward(*args: Any, **kwargs: Any) -> Any:
            entered = getattr(asked, "entered", None)
            return own_trunk(*args, **kwargs) if entered is None else entered

        def head_forward(hidden: Tensor) -> Tensor:
            return self._weights.product(head, hidden, getattr(asked, "part", slice(None)))

        replace_forward(patches, trunk, trunk_forward)
        replace_forward(patches, head, head_forward)

        def enter_trunk(rows: Tensor) -> Any:
            return trunk(input_ids=enter(rows), use_cache=False, return_dict=True)

        def run(part: slice, entered: Any) -> Tensor:
            asked.entered, asked.part = entered, part
            try:
                logits: Tensor = self._blocks.run(_no_ids(entered.last_hidden_state)).logits[:, 0]
            finally:
                del asked.entered, asked.part
            return logits

        bounds = [*range(0, head.out_features, RUN), head.out_features]
        parts = [slice(*ends) for ends in pairwise(bounds)]
        return Unembedding(enter_trunk, [functools.partial(run, part) for part in parts])


def _no_ids(rows: Tensor) -> Tensor:
    """Ids that nothing reads: contexts of one position each."""
    return torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)


def _agree(divided: Unembedding, whole: Unembedding, rows: Tensor) -> bool:
    """Whether runs make the logits of the whole: not if what is behind the head is about certain
    tokens."""
    try:
        found, wanted = divided(rows).float(), whole(rows).float()
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return False
    if found.shape != wanted.shape:
        return False
    apart = (found - wanted).where(found != wanted, 0)  # −∞ in both
    return bool(apart.norm() <= _SAME_LOGITS * wanted[wanted.isfinite()].norm())
