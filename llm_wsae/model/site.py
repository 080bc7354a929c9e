"""A site: one point of the residual stream, under its TransformerLens name.

``blocks.9.hook_resid_post`` is the stream after block 9, ``_pre`` the stream before it and ``_mid``
the stream between its attention and its MLP. Nothing here needs torch.
"""

import functools
import re
from dataclasses import dataclass
from typing import Literal

from llm_wsae.errors import UsageError, either, nearest, shown

Point = Literal["pre", "mid", "post"]
HOOKS: dict[Point, str] = {  # TransformerLens' names, in the order of a forward pass
    "pre": "hook_resid_pre",
    "mid": "hook_resid_mid",
    "post": "hook_resid_post",
}
POINTS = tuple(HOOKS)
_INSIDE = re.compile(r"mlp|ffn|att|ln|norm|embed|hook_[qkvz]")  # of a block, or before them all


@functools.total_ordering
@dataclass(frozen=True)
class Site:
    """One point of the residual stream; sites sort in the order of a forward pass."""

    block: int  # index of the transformer block, from 0
    point: Point
    """``pre`` before the block, ``mid`` between attention and MLP, ``post`` after the block."""

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site of a TransformerLens name such as ``blocks.9.hook_resid_post``.

        Raises UsageError, suggesting the nearest valid name, if it is not one.
        """
        match = re.fullmatch(r"blocks\.(\d{1,6})\.(\w+)", name, re.ASCII)
        for point, hook in HOOKS.items():
            if match and match[2] == hook:
                return cls(int(match[1]), point)
        number = re.search(r"\d{1,6}", name, re.ASCII)
        known = [str(cls(int(number[0]) if number else 0, point)) for point in POINTS]
        if _INSIDE.search(name) and "resid" not in name:
            raise UsageError(
                f"{shown(name)} is not supported: it is not a site of the residual stream "
                f"({either(known)})"
            )
        likely = [own for own, point in zip(known, POINTS, strict=True) if point in name]
        if number and "resid" not in name:  # a whole block, such as model.layers.9
            likely = likely or known[-1:]
        hint = f"did you mean {either(likely)}?" if likely else nearest(name, known, limit=1)
        raise UsageError(f"{shown(name)} is not a site of the residual stream; {hint}")

    def check(self, num_blocks: int) -> None:
        """Raises UsageError if a model of ``num_blocks`` blocks has no such block."""
        if not 0 <= self.block < num_blocks:
            raise UsageError(
                f"there is no {self}: the model has {num_blocks} blocks, "
                f"{Site(0, 'pre')} to {Site(num_blocks - 1, 'post')}"
            )

    def __str__(self) -> str:
        return f"blocks.{self.block}.{HOOKS[self.point]}"

    def __lt__(self, other: "Site") -> bool:
        return (self.block, POINTS.index(self.point)) < (other.block, POINTS.index(other.point))
