"""What a dictionary remembers of how it was made: plain data, light to import."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class DictionaryInfo:
    """Everything about a dictionary that is neither a tensor nor its kind of sparsity.

    All of it is JSON. The free dicts belong to the stage that fills them.
    """

    site: str
    """Where its rows come from, in TransformerLens names: ``blocks.9.hook_resid_post``."""
    name: str = "dictionary"
    """Name of the training arm."""
    rule: str = "uniform"
    """Name of the rule that made the loss weights γ."""
    alpha: float = 0.0
    """Exponent of the rule: γ = score^alpha."""
    weights: dict[str, Any] = field(default_factory=dict)
    """How γ was made from the scores, and whether it acted on the loss or as the training space."""
    seed: int | None = None
    """Seed of initialisation and batch order."""
    context_size: int | None = None
    """Tokens in a context of the text it was trained on."""
    prepend_bos: bool | None = None
    """Whether each of those contexts began with the model's BOS token."""
    massive_threshold: float | None = None
    """Norm above which a row was a massive activation and was left out of the loss."""
    model: dict[str, Any] = field(default_factory=dict)
    """Identity of the model (name, revision, dtype, …)."""
    corpus: dict[str, Any] = field(default_factory=dict)
    """Identity of the text (name, split, …)."""
    store: dict[str, Any] = field(default_factory=dict)
    """Identity of the activation store or stream."""
    training: dict[str, Any] = field(default_factory=dict)
    """Resolved training configuration."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was measured, at the end of training or by ``evaluate``."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DictionaryInfo":
        """The inverse of ``to_dict``; fields of a later version are passed over.

        Raises TypeError if ``site`` is missing.
        """
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})
