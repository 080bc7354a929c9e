"""A site: one point of a model, under its TransformerLens name; or a block's whole MLP.

``blocks.9.hook_resid_post`` is the residual stream after block 9, ``_pre`` the stream before it and
``_mid`` the stream between its attention and its MLP. ``hook_attn_out`` and ``hook_mlp_out`` are
what those add to the stream, ``mlp.hook_in`` is what the MLP reads, behind its norm. All have the
model's width. ``blocks.9.mlp`` is the site of a transcoder, which reads at one point and writes at
another; that of an autoencoder reads and writes at the same. Nothing here needs torch.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_wsae.errors import UsageError, either, nearest, shown

Point = Literal["pre", "attn_out", "mid", "mlp_in", "mlp_out", "mlp", "post"]
HOOKS: dict[Point, str] = {  # TransformerLens' names, in the order of a forward pass
    "pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "mid": "hook_resid_mid",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "mlp": "mlp",
    "post": "hook_resid_post",
}
POINTS = tuple(HOOKS)
_OF_STREAM: tuple[Point, ...] = ("pre", "mid", "post")
_INSIDE = re.compile(r"mlp|ffn|att|ln|norm|embed|hook_[qkvz]")  # of a block, or before them all


@functools.total_ordering
@dataclass(frozen=True)
class Site:
    """One point of a model, or a block's MLP; sites sort in the order of a forward pass."""

    block: int  # index of the transformer block, from 0
    point: Point
    """``pre``, ``mid``, ``post``: the stream before the block, between attention and MLP, after it.
    ``attn_out``, ``mlp_out``: what is added to it. ``mlp_in``: what the MLP reads. ``mlp``: from
    there to ``mlp_out``."""

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site of a TransformerLens name such as ``blocks.9.hook_resid_post``.

        Raises UsageError, suggesting the nearest valid name, if it is not one.
        """
        match = re.fullmatch(r"blocks\.(\d{1,6})\.([\w.]+)", name, re.ASCII)
        for point, hook in HOOKS.items():
            if match and match[2] == hook:
                return cls(int(match[1]), point)
        number = re.search(r"\d{1,6}", name, re.ASCII)
        block = int(number[0]) if number else 0
        known = [str(cls(block, point)) for point in POINTS]
        of_stream = [str(cls(block, point)) for point in _OF_STREAM]
        if _INSIDE.search(name) and "resid" not in name:
            raise UsageError(f"{shown(name)} is not supported; there are {either(known)}")
        likely = [own for own, point in zip(of_stream, _OF_STREAM, strict=True) if point in name]
        if number and "resid" not in name:  # a whole block, such as model.layers.9
            likely = likely or of_stream[-1:]
        hint = f"did you mean {either(likely)}?" if likely else nearest(name, known, limit=1)
        raise UsageError(f"{shown(name)} is not a site; {hint}")

    @property
    def reads(self) -> "Site":
        """Where its dictionaries read: at ``mlp_in`` for ``mlp``, otherwise at the site itself."""
        return Site(self.block, "mlp_in") if self.is_mlp else self

    @property
    def writes(self) -> "Site":
        """Where they write: at ``mlp_out`` for ``mlp``, otherwise at the site itself."""
        return Site(self.block, "mlp_out") if self.is_mlp else self

    @property
    def is_mlp(self) -> bool:
        """Whether it is a block's whole MLP: the site of a transcoder."""
        return self.point == "mlp"

    @property
    def is_of_stream(self) -> bool:
        """Whether it is a point of the residual stream."""
        return self.point in _OF_STREAM

    @property
    def entrance(self) -> "Site":
        """The last point of the stream before it, from which a pass can be resumed."""
        return self if self.is_of_stream else Site(self.block, "pre")

    def check(self, num_blocks: int) -> None:
        """Raises UsageError if a model of ``num_blocks`` blocks has no such block."""
        if not 0 <= self.block < num_blocks:
            raise UsageError(
                f"there is no {self}: the model has {num_blocks} blocks, "
                f"{Site(0, self.point)} to {Site(num_blocks - 1, self.point)}"
            )

    def __str__(self) -> str:
        return f"blocks.{self.block}.{HOOKS[self.point]}"

    def __lt__(self, other: "Site") -> bool:
        return (self.block, POINTS.index(self.point)) < (other.block, POINTS.index(other.point))


def sites_of(names: Sequence[str], num_blocks: int = 1) -> list[Site]:
    """The sites of their names, each once; ``blocks.*.mlp`` names one of every block. Raises
    UsageError for none or a misspelt one."""
    if not names:
        raise UsageError("name at least one site, e.g. --site blocks.8.hook_resid_post")
    found: list[Site] = []
    for name in names:
        blocks = range(num_blocks) if name.startswith("blocks.*.") else [None]
        for block in blocks:
            found.append(Site.parse(name if block is None else name.replace("*", str(block), 1)))
    return list(dict.fromkeys(found))


def points_of(sites: Sequence[Site]) -> list[Site]:
    """The points at which dictionaries of these sites read and write, each once."""
    return list(dict.fromkeys(point for site in sites for point in (site.reads, site.writes)))
