"""``steer``: what a model writes with a latent turned up or down, beside what it writes by itself.

Strengths are multiples of the latent's largest activation in a store or text. The effect is
KL(unsteered ‖ steered) of the next token in nats: first of all its mean over the positions of the
prompt that steering changes, beside it that behind the prompt. Text is greedy.

The model begins to *break* where the mean KL exceeds ``BREAKS`` nats. Greedy text alone does not
tell: a small model also goes in circles unsteered, and circles are cheap in cross-entropy.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llm_wsae.attaching import Ablate, Clamp, Edit, attach
from llm_wsae.attaching import Steer as Add
from llm_wsae.data.config import HarvestConfig, PackConfig
from llm_wsae.data.corpus import TEXT_OF_PART, Corpus
from llm_wsae.data.harvesting import harvest
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting import inspection
from llm_wsae.inspecting.directions import Vocabulary, check_store
from llm_wsae.inspecting.inspection import Example
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import check_number
from llm_wsae.terminal import Table, printable

STRENGTHS = (-1.0, 0.5, 1.0, 2.0, 4.0)
SWEEP = tuple(round(2 ** (step / 2), 2) for step in range(-4, 7))  # 0.25 to 8
BREAKS = 2.0
_MOST_ROWS = 100_000
_MEANINGS = {
    "KL": f"steered from unsteered, next token, mean over the prompt; breaks above {BREAKS:g} nats",
    "last": "the same behind the prompt alone",
    "CE": "of what is written, by the unsteered model; nats per token",
    "repeated": "share of its trigrams that it has written before, %",
}


_Pass = tuple[str, float | None, Tensor, Tensor]  # as ``_written`` takes it
Change = tuple[str, float, float]
"""A token, and its probability behind the prompt, unsteered and steered."""


@dataclass(frozen=True)
class Written:
    """What the model writes, and the effect of steering."""

    name: str  # "unsteered", or how it is steered
    strength: float | None  # multiples of the largest activation
    text: str
    kl: float  # mean over the prompt
    kl_last: float
    promoted: list[Change]  # what gains most probability
    suppressed: list[Change]  # what loses most
    cross_entropy: float
    repeated: float
    breaks: bool


@dataclass(frozen=True)
class Steering:
    """What ``steer`` found."""

    latent: int
    largest: Example  # where its activation is largest
    rows: int  # that were looked at
    source: str  # the store or text that they are of
    written: list[Written]  # the first is unsteered

    @property
    def verdict(self) -> str:
        """At which strength the model begins to break."""
        tried = sorted(
            (o.strength, o.breaks) for o in self.written if o.strength and o.strength > 0
        )
        if not tried:
            return "The model breaks." if self.written[-1].breaks else "The model does not break."
        broken = [strength for strength, breaks in tried if breaks]
        found = f"begins to break at {broken[0]:g}" if broken else f"holds up to {tried[-1][0]:g}"
        return (
            f"The model {found} × the largest activation (mean KL above {BREAKS:g} nats: broken)."
        )

    def table(self) -> str:
        """For a terminal: where the latent is strongest, what is written, and the numbers."""
        rows, text = [["", *_MEANINGS]], self.largest.text
        parts = [
            f"latent {self.latent}: its largest activation is {self.largest.activation:.2f}, in "
            f"{self.rows:,} rows of {printable(self.source)}\n  "
            + printable(f"{text.before}«{text.token}»{text.after}")
        ]
        for one in self.written:
            numbers = [f"{number:.3f}" for number in (one.kl, one.kl_last, one.cross_entropy)]
            rows.append([one.name, *numbers, f"{100 * one.repeated:.0f}"])
            lines = [one.name + one.breaks * " (breaks)", printable(one.text)]
            for what, changes in (("up", one.promoted), ("down", one.suppressed)):
                found = (f"«{printable(t)}» {100 * p:.1f} → {100 * q:.1f} %" for t, p, q in changes)
                lines += [f"{what:<5} {' · '.join(found)}"] if changes else []
            parts.append("\n  ".join(lines))
        return "\n\n".join([*parts, Table(rows, meanings=_MEANINGS, words=[self.verdict]).text()])


@torch.no_grad()
def steer(
    dictionary: Dictionary | Path | str,
    model: LanguageModel,
    latent: int,
    text: str,
    source: ActivationStore | Corpus,
    *,
    how: Literal["add", "clamp", "ablate"] = "add",
    strengths: Sequence[float] = STRENGTHS,
    new_tokens: int = 40,
    tokens: int = 20_000,
) -> Steering:
    """What a model writes behind a text without and with a latent turned up or down.

    ``how``: add strength × largest activation × decoder row to the stream, clamp the activation to
    strength × largest, or ablate it (set it to 0, at no strength). The largest activation is looked
    up in the first 100,000 rows of a store of the model, or on ``tokens`` tokens of a corpus.

    Raises UsageError for a latent or strength that cannot be, or a text that is too short or too
    long; LlmWsaeError if the latent never fires there, or the source is too small or of another
    model.
    """
    for each in strengths:
        check_number("strength", each, -1000, 1000)
    if not isinstance(dictionary, Dictionary):
        dictionary = Dictionary.load(dictionary)
    inspection.check_latent(dictionary, latent)
    prompt = prompt_ids(model, dictionary, text, new_tokens)
    packing = PackConfig.remembered(dictionary.info.store.get("packing"))
    kept = slice(min(packing.drop_positions, len(prompt) - 1), None)
    found = _largest(model, dictionary, latent, source, packing, tokens)
    kind, most = (Add if how == "add" else Clamp), found[0].activation
    edits: list[tuple[str, float | None, Edit]] = [
        (f"{how} {one:g} ×", one, kind(latent, one * most)) for one in strengths
    ]
    if how == "ablate":
        edits = [(how, None, Ablate(latent))]
    passes: list[_Pass] = [("unsteered", None, *_predicted(model, prompt, new_tokens))]
    for name, strength, edit in edits:
        with attach(model, dictionary) as attached:
            attached.edit(dictionary.site, edit)
            passes.append((name, strength, *_predicted(model, prompt, new_tokens)))
    written = [_written(model, prompt, kept, passes[0][2], *one) for one in passes]
    return Steering(latent, *found, written)


def prompt_ids(
    model: LanguageModel, dictionary: Dictionary, text: str, new_tokens: int
) -> list[int]:
    """The ids of a text that the model is to continue. Raises as ``token_ids``, and UsageError if
    it is too long."""
    check_number("new-tokens", new_tokens, 1)
    ids, longest = inspection.token_ids(model, dictionary, text), model.max_context
    if longest is not None and len(ids) + new_tokens > longest:
        raise UsageError(
            f"the text has {len(ids):,} tokens; with {new_tokens} more they are too many for "
            f"{model.name}, which reads at most {longest:,}"
        )
    return ids


def _largest(
    model: LanguageModel,
    dictionary: Dictionary,
    latent: int,
    source: ActivationStore | Corpus,
    packing: PackConfig,
    tokens: int,
) -> tuple[Example, int, str]:
    """Where the latent is strongest, and in how many rows of what. Raises LlmWsaeError if it never
    fires."""
    with tempfile.TemporaryDirectory(prefix="llm_wsae-") as folder:
        if isinstance(source, Corpus):
            name = f"{TEXT_OF_PART[source.part]} of {source.name}"
            config = HarvestConfig(tokens=tokens, **packing.packing())
            source = harvest(model, source, [dictionary.site], Path(folder) / "store", config)
        else:
            name = str(source.folder)
        check_store(source, dictionary)
        inspection.check_model(model, dictionary, source)
        one, rows = torch.tensor([latent]), min(source.num_rows, _MOST_ROWS)
        (firing,), _ = inspection.firings(source, dictionary.on_cpu(), one, 1, most_rows=rows)
        if not firing.values:
            raise LlmWsaeError(
                f"latent {latent} fires on none of {rows:,} rows of {name}, so no strength is "
                "known; measure on more text, or choose a latent that fires on yours (llm-wsae "
                "inspect --text)"
            )
        (example,) = inspection.examples_of(source, Vocabulary(model.tokenizer), firing)
        return example, rows, name


def _predicted(model: LanguageModel, prompt: list[int], count: int) -> tuple[Tensor, Tensor]:
    """The log probabilities behind each position of a prompt [positions, vocab], and the ids that
    the model writes behind it [new]."""
    ids = torch.tensor([prompt], device=model.device)
    predicted = model.hf_model(ids).logits[0].float().log_softmax(1)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False}
    return predicted, model.hf_model.generate(ids, **how)[0, len(prompt) :]


def _written(
    model: LanguageModel,
    prompt: list[int],
    kept: slice,
    clean: Tensor,
    name: str,
    strength: float | None,
    predicted: Tensor,
    new: Tensor,
) -> Written:
    """A pass beside what the model predicts unsteered; no edit is open."""
    kl = (clean.exp() * (clean - predicted)).sum(1)[kept]
    whole = torch.cat([new.new_tensor(prompt), new])
    expected = model.logits(whole[None])[0, len(prompt) - 1 : -1].float().log_softmax(1)
    trigrams = list(zip(*(new.tolist()[at:] for at in range(3)), strict=False))
    vocabulary, before, after = Vocabulary(model.tokenizer), clean[-1].exp(), predicted[-1].exp()

    def changes(sign: int) -> list[Change]:
        most = (sign * (after - before)).topk(5)
        ids = most.indices[most.values > 0].tolist()
        return [(vocabulary.text(one), float(before[one]), float(after[one])) for one in ids]

    return Written(
        name=name,
        strength=strength,
        text=model.tokenizer.decode(new),
        kl=float(kl.mean()),
        kl_last=float(kl[-1]),
        promoted=changes(1),
        suppressed=changes(-1),
        cross_entropy=-float(expected.gather(1, new[:, None]).mean()),
        repeated=1 - len(set(trigrams)) / max(len(trigrams), 1),
        breaks=not float(kl.mean()) <= BREAKS,  # NaN does, too
    )
