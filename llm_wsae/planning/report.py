"""The plan of a run, as a table for people and as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llm_wsae.errors import LlmWsaeError
from llm_wsae.terminal import aligned

Times = Literal["measured", "estimated", "not measured"]
Advice = Literal["store", "stream"]

_LONG = 500_000  # tokens; of a shorter run little is measured


@dataclass(frozen=True)
class Plan:
    """What a run takes. Sizes are in bytes, times in seconds."""

    model: str
    sites: list[str]
    device: str
    tokens: int
    """Tokens that the model reads."""
    rows: int
    """Rows at each site."""
    trained_rows: int
    """Rows of the training at each site: more than ``rows`` in several passes."""
    evaluated_rows: int
    arms: int
    """Dictionaries at each site."""
    d_in: int
    d_sae: int
    store_bytes: int
    checkpoint_bytes: int
    """Of one checkpoint of all arms of a site; while it is replaced, there are two."""
    dictionary_bytes: int
    """Of all dictionaries of all sites."""
    disk_bytes: int
    """The most that is on the disk at a time."""
    disk_free: int | None
    """None of the machine of an accelerator that is not here."""
    memory_bytes: int
    """The most that is in the memory of the device at a time."""
    memory_there: int
    times: Times
    """Whether times were measured here, or computed from published numbers."""
    seconds: dict[str, float]
    """By stage; empty if not measured."""
    price_per_hour: float | None
    advice: Advice
    why: str
    """The reason of the advice."""
    shortage: str | None
    """What does not fit, and the way out; None if all does."""
    notes: list[str] = field(default_factory=list)

    @property
    def total_seconds(self) -> float:
        """All stages."""
        return sum(self.seconds.values())

    @property
    def price(self) -> float | None:
        """What all stages cost; None without times or a price per hour."""
        if self.price_per_hour is None or not self.seconds:
            return None
        return self.price_per_hour * self.total_seconds / 3600

    def check(self) -> None:
        """Raises LlmWsaeError if the disk or the memory is too small."""
        if self.shortage is not None:
            raise LlmWsaeError(self.shortage)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {**asdict(self), "total_seconds": self.total_seconds, "price": self.price}

    def table(self) -> str:
        """The table for people."""
        sites, passes = len(self.sites), self.trained_rows / self.rows
        latents = f"{self.arms} × {self.d_sae:,} latents"
        rows = [
            ["", "takes", ""],
            ["rows", f"{self.rows:,}", f"at each of {sites} site{'s' * (sites > 1)}"],
            ["store", in_bytes(self.store_bytes), f"each row is trained on {passes:.2g} ×"],
            ["checkpoint", in_bytes(self.checkpoint_bytes), latents],
            ["dictionaries", in_bytes(self.dictionary_bytes), ""],
            ["disk", in_bytes(self.disk_bytes), f"at most{self._free()}"],
            ["memory", in_bytes(self.memory_bytes), f"at most, of {in_bytes(self.memory_there)}"],
        ]
        units = {
            "harvest": (self.tokens, "tokens"),
            "train": (self.trained_rows * sites, "rows"),
            "evaluate": (self.evaluated_rows * sites, "rows"),
        }
        for stage, seconds in self.seconds.items():
            count, unit = units.get(stage, (0, ""))
            speed = f", {count / seconds:,.0f} {unit}/s" if count and seconds else ""
            rows.append([stage, in_time(seconds), f"{self._how}{speed}"])
        if self.seconds:
            rows.append(["in all", in_time(self.total_seconds), f"on {self.device}"])
        if self.price is not None:
            rows.append(["price", f"{self.price:,.2f}", f"at {self.price_per_hour:g} an hour"])
        return "\n".join([aligned(rows, left=3), "", f"{self.advice}: {self.why}", *self.notes])

    @property
    def _how(self) -> str:
        is_rough = self.times == "measured" and self.tokens < _LONG
        return "roughly measured" if is_rough else self.times

    def _free(self) -> str:
        return "" if self.disk_free is None else f" of {in_bytes(self.disk_free)} free"

    def text(self) -> str:
        """A few lines, for the beginning of a run."""
        lines = [
            f"takes up to {in_bytes(self.disk_bytes)} of disk{self._free()}, "
            f"and {in_bytes(self.memory_bytes)} of memory (of {in_bytes(self.memory_there)})"
        ]
        if self.seconds:
            stages = ", ".join(f"{stage} {in_time(s)}" for stage, s in self.seconds.items())
            lines.append(f"takes about {in_time(self.total_seconds)} ({stages}; {self._how})")
        lines.append(f"{self.advice}: {self.why}")
        if self.shortage is not None:
            lines.append(f"warning: {self.shortage}")
        return "\n".join(lines)


def in_bytes(count: int) -> str:
    """Bytes in words."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def in_time(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"
