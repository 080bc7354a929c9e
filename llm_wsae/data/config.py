"""Settings of packing and harvesting. Needs neither torch nor numpy, so that --help stays fast."""

from dataclasses import dataclass
from typing import Any, Literal

from llm_wsae.outside import check_choices, check_numbers

HELDOUT = 0.1
"""Share of the documents that is held out, unless it is said otherwise."""


@dataclass(frozen=True)
class PackConfig:
    """How documents become contexts, and which positions of a context give a row."""

    context_size: int = 128
    """Tokens per context, the beginning-of-sequence token included."""
    prepend_bos: bool = True
    """Begin each context with the beginning-of-sequence token, if the model has one."""
    one_document_per_context: bool = False
    """One document per context, cut off or padded, instead of documents packed end to end."""
    drop_positions: int = 1
    """Positions at the beginning of a context that give no row; the first one holds massive
    activations."""
    drop_special: bool = True
    """Leave out the rows of special tokens, such as the separator between documents."""

    def __post_init__(self) -> None:
        check_numbers(self, context_size=2, drop_positions=(0, self.context_size - 1))

    @classmethod
    def remembered(cls, packing: Any) -> "PackConfig":
        """From a dictionary's file; unknown keys and values of another type are ignored."""
        given = packing if isinstance(packing, dict) else {}
        default = PackConfig().packing()
        return cls(**{n: given[n] for n, v in default.items() if type(given.get(n)) is type(v)})

    def packing(self) -> dict[str, Any]:
        """The settings that determine the rows, for a manifest."""
        return {name: getattr(self, name) for name in PackConfig.__dataclass_fields__}


@dataclass(frozen=True)
class HarvestConfig(PackConfig):
    """How many tokens to read, how, and in which format to store their activations."""

    tokens: int = 1_000_000
    """Tokens fed to the model, rounded up to whole contexts; dropped positions count too."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format on disk; auto is the model's own (float32 for a float16 model)."""
    batch_tokens: int = 4096
    """Tokens per forward pass, rounded down to whole contexts, at least one."""
    shard_tokens: int = 32_768
    """Tokens per shard, rounded up to whole forward passes: the most that a killed run loses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, tokens=1, batch_tokens=1, shard_tokens=1)
        check_choices(self, dtype=("auto", "bfloat16", "float32"))

    @property
    def num_contexts(self) -> int:
        """Total number of contexts to harvest."""
        return -(-self.tokens // self.context_size)

    @property
    def contexts_per_batch(self) -> int:
        """Contexts per forward pass."""
        return max(1, self.batch_tokens // self.context_size)

    @property
    def contexts_per_shard(self) -> int:
        """Contexts per shard, a multiple of ``contexts_per_batch``."""
        per_batch = self.contexts_per_batch
        return per_batch * -(-self.shard_tokens // (per_batch * self.context_size))


@dataclass(frozen=True)
class StreamConfig(PackConfig):
    """How a model's activations are streamed into training without a store."""

    batch_tokens: int = 4096
    """Tokens per forward pass, rounded down to whole contexts, at least one."""
    buffer_tokens: int = 1 << 17
    """Tokens whose rows are shuffled together, rounded down to whole forward passes; one buffer is
    in memory at a time, with a GPU up to three."""
    statistics_tokens: int = 1 << 17
    """Tokens at the beginning of the corpus from whose rows the statistics are computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, batch_tokens=1, buffer_tokens=1, statistics_tokens=1)

    @property
    def contexts_per_batch(self) -> int:
        """Contexts per forward pass."""
        return max(1, self.batch_tokens // self.context_size)

    @property
    def batches_per_buffer(self) -> int:
        """Forward passes whose rows are shuffled together."""
        return max(1, self.buffer_tokens // (self.contexts_per_batch * self.context_size))
