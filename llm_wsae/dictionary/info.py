"""What a dictionary remembers of how it was made: plain data, light to import."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llm_wsae.errors import LlmWsaeError, shown

CENTRED = "center_writing_weights"
"""In ``model``, as TransformerLens calls it: the rows of the stream had mean 0 over dimensions.
Codes are those of any stream then; what is reconstructed lacks each row's mean."""


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
    """Seed of the initial weights."""
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

        Raises TypeError if ``site`` is missing, LlmWsaeError if a field holds another kind of
        value.
        """
        known = {f.name for f in fields(cls)}
        found = {key: value for key, value in values.items() if key in known}
        for key, value in found.items():
            kinds = _KINDS.get(key, (dict,))
            if float in kinds and type(value) is int and abs(value) < 2**63:
                found[key] = float(value)  # JSON makes no difference between 1 and 1.0
            elif type(value) not in kinds:
                raise LlmWsaeError(f"{key} cannot be {shown(value)}")
        return cls(**found)


_NOTHING = type(None)
_KINDS: dict[str, tuple[type, ...]] = {  # of the values in JSON; the other fields are objects
    **dict.fromkeys(("site", "name", "rule"), (str,)),
    "alpha": (float,),
    **dict.fromkeys(("seed", "context_size"), (int, _NOTHING)),
    "prepend_bos": (bool, _NOTHING),
    "massive_threshold": (float, _NOTHING),
}
