"""``export_neuronpedia``: the latents of a dictionary in the files that SAEDashboard writes and
Neuronpedia imports.

    out/
      export.json             what was exported, with which settings and versions
      .digests.json           the SHA-256 of the batch files, by number
      batch-0.json            latents 0 to 127
      batch-1.json            …
      explanations/batch-0.jsonl.gz    what a language model said of them, for Neuronpedia,
      delphi/explanations/…_latent7.txt    and as delphi keeps it; only if it was asked

Every number means what it means in SAEDashboard 0.8, and has five decimals. Its words: a *prompt*
is a context, a *feature* a latent, a *neuron* a dimension of the stream.
"""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llm_wsae import provenance
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import (
    Explanation,
    read_explanations,
    write_for_delphi,
    write_for_neuronpedia,
)
from llm_wsae.errors import UsageError, shown
from llm_wsae.files import (
    folder_lock,
    read_own_json,
    remove_partials,
    sha256,
    write_json,
    write_text,
)
from llm_wsae.inspecting.firings import check_store
from llm_wsae.inspecting.readout import Readout
from llm_wsae.inspecting.sentence import check_width
from llm_wsae.inspecting.vocabulary import Vocabulary
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import mapping
from llm_wsae.pages.collecting import context_of_every_row
from llm_wsae.pages.firings_by_latent import FiringsByLatent, choose

RECORD, DIGESTS, FIRINGS = "export.json", ".digests.json", ".firings"
WHAT = "export for Neuronpedia"
LATENTS_AT_ONCE = 128
"""Latents in a file; Neuronpedia takes no more in one upload."""
_DECIMALS = 5
_BINS, _WORDS, _NEIGHBOURS = 50, 10, 3  # SAEDashboard's


@dataclass(frozen=True)
class Export:
    """A folder of batch files."""

    path: Path
    files: int
    latents: int
    explained: int
    """Latents with an explanation."""


@dataclass(frozen=True)
class _Settings:
    """What is shown, and under which names."""

    top: int
    intervals: int
    per_interval: int
    contexts: int
    model_id: str
    sae_set: str
    sae_id_suffix: str | None


def export_neuronpedia(
    dictionary: Dictionary | Path | str,
    store: ActivationStore | Path | str,
    model: LanguageModel | str,
    out: Path | str,
    *,
    top: int = 20,
    intervals: int = 5,
    per_interval: int = 5,
    contexts: int | None = None,
    model_id: str | None = None,
    sae_set: str | None = None,
    sae_id_suffix: str | None = None,
) -> Export:
    """Write the batch files of SAEDashboard, which Neuronpedia imports, into the folder ``out``.

    ``dictionary`` and ``store`` may be opened or given by their folders, ``model`` is a
    LanguageModel or whatever ``LanguageModel.load`` takes. Of each latent, its ``top`` strongest
    contexts are shown, and ``per_interval`` random ones from each of ``intervals`` equal intervals
    between 0 and its largest activation, a context once in each group. ``contexts`` limits how many
    of the store are looked at. On Neuronpedia the latents are those of
    ``model_id``/block-``sae_set``__``sae_id_suffix``; the model's and the dictionary's own names by
    default, without a suffix.

    Explanations in the dictionary's folder (``explain``) are written too, in Neuronpedia's and in
    delphi's form.

    Activations are in units of decoder rows of length 1. The store is read and encoded once; until
    the last file is written, all firings are in a folder in ``out``, 12 bytes each. In memory are
    two dictionaries, 4 bytes a row, at most 200 MB of firings and one file. An interrupted export
    goes on with the next file; one that changed since it was written is written again.

    Raises UsageError for numbers below 1 or a name that cannot be part of an address; LlmWsaeError
    if the folder holds anything else, or the dictionary, store or model cannot be read or do not
    belong together.
    """
    out = Path(out)
    check_folder(out)
    if not isinstance(dictionary, Dictionary):
        dictionary = Dictionary.load(dictionary)
    dictionary = dictionary.on_cpu()  # as the rows of a store are
    explained: dict[int, Explanation] = {}
    if dictionary.folder is not None:
        explained = read_explanations(dictionary.folder)
    store = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
    check_store(store, dictionary)
    store.source(dictionary.site)  # raises if the store lacks the site
    there = store.manifest.num_contexts
    settings = _Settings(
        top,
        intervals,
        per_interval,
        there if contexts is None else min(contexts, there),
        model_id or str(store.manifest.model.get("name")).rpartition("/")[2],
        sae_set or dictionary.info.name,
        sae_id_suffix,
    )
    _check(settings)
    model = model if isinstance(model, LanguageModel) else LanguageModel.load(model)
    store.check_model(model.identity())
    check_width(model, dictionary)
    asked = {
        "dictionary": _digest(dictionary),
        "rows": store.identity(dictionary.site),
        "settings": settings,
        "latents_in_a_file": LATENTS_AT_ONCE,
    }
    files = -(-dictionary.d_sae // LATENTS_AT_ONCE)
    with folder_lock(out, "export"):
        remove_partials(out)
        provenance.begin_or_resume(out, RECORD, WHAT, asked)
        written = _written(out)
        if missing := [number for number in range(files) if str(number) not in written]:
            features = _Features(dictionary, store, model, settings, out / FIRINGS)
            for number in tqdm(missing, desc="files", unit="file"):
                write_text(_file(out, number), json.dumps(features.file(number)))
                written[str(number)] = sha256(_file(out, number))
                write_json(out / DIGESTS, written)
        shutil.rmtree(out / FIRINGS, ignore_errors=True)
        said = {n: one for n, one in explained.items() if one.text and n < dictionary.d_sae}
        if said:
            suffix = "" if sae_id_suffix is None else f"__{sae_id_suffix}"
            source = f"{dictionary.site.block}-{settings.sae_set}{suffix}"
            write_for_neuronpedia(out / "explanations", said, settings.model_id, source)
            write_for_delphi(out / "delphi" / "explanations", said, str(dictionary.site))
    return Export(out, files, dictionary.d_sae, len(said))


def check_folder(out: Path) -> None:
    """Raises LlmWsaeError if a folder holds anything but an export."""
    provenance.check_folder(out, RECORD, WHAT)


def _file(out: Path, number: int) -> Path:
    return out / f"batch-{number}.json"


def _written(out: Path) -> dict[str, str]:
    """The digests of the batch files that are as they were written, by their numbers."""
    if not (out / DIGESTS).is_file():
        return {}
    known = mapping(read_own_json(out / DIGESTS, "digests of the batch files"))
    files = {number: out / f"batch-{number}.json" for number in known}
    return {n: known[n] for n, file in files.items() if file.is_file() and sha256(file) == known[n]}


def _check(settings: _Settings) -> None:
    """Raises UsageError for settings that cannot be."""
    if min(settings.top, settings.intervals, settings.per_interval, settings.contexts) < 1:
        raise UsageError("top, intervals, per_interval and contexts must be at least 1")
    for name in filter(None, (settings.model_id, settings.sae_set, settings.sae_id_suffix)):
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise UsageError(
                f"{shown(name)} cannot be a name on Neuronpedia, where it is part of an address; "
                "give one of letters, digits, dots, - and _"
            )


def _digest(dictionary: Dictionary) -> str:
    """SHA-256 of a dictionary's tensors."""
    digest = hashlib.sha256(str(dictionary.sparsity).encode())
    for tensor in dictionary.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


class _Features:
    """What the files say of the latents."""

    def __init__(
        self,
        dictionary: Dictionary,
        store: ActivationStore,
        model: LanguageModel,
        settings: _Settings,
        scratch: Path,
    ):
        self._dictionary, self._store, self._settings = dictionary, store, settings
        context = context_of_every_row(store)
        self._context = context[: np.searchsorted(context, settings.contexts)]
        self._positions = settings.contexts * store.context_size
        # A first token that gives no row is not shown.
        self._first = min(1, store.manifest.packing["drop_positions"])
        self._firings = FiringsByLatent.of(
            store, dictionary, len(self._context), LATENTS_AT_ONCE, scratch
        )
        self._token = functools.cache(Vocabulary(model.tokenizer).text)
        self._readout = Readout(model)

    def file(self, number: int) -> dict[str, Any]:
        """The content of a file."""
        first = number * LATENTS_AT_ONCE
        decoder = self._dictionary.W_dec[first : first + LATENTS_AT_ONCE]
        firings = self._firings.batch(number)
        length = decoder.norm(dim=1).tolist()
        scaled = [(r, v * one) for (r, v), one in zip(firings, length, strict=True)]
        parts = zip(
            _alignment(decoder),
            self._correlated(number, [values for _, values in firings]),
            _logits(self._readout.effects(decoder), self._token),
            map(self._activity, scaled),
            self._activations(first, scaled),
            strict=True,
        )
        facts = {
            "n_prompts_total": self._settings.contexts,
            "n_tokens_in_prompt": self._store.context_size,
            "dataset": str(self._store.manifest.corpus.get("name", "")),
            "decoder_weights_dist": [],  # over heads, for attention's outputs
            "vector": [],  # given one, Neuronpedia would use it in the place of the encoder
        }
        features = [
            {"feature_index": first + place} | functools.reduce(dict.__or__, own) | facts
            for place, own in enumerate(parts)
        ]
        return {
            "model_id": self._settings.model_id,
            "layer": self._dictionary.site.block,
            "sae_set": self._settings.sae_set,
            "sae_id_suffix": self._settings.sae_id_suffix,
            "features": features,
        }

    def _correlated(self, number: int, values: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """The dimensions and the latents whose activations correlate most with each latent's."""
        totals, squares = (
            np.array([np.sum(own**power, dtype=np.float64) for own in values]) for power in (1, 2)
        )
        neurons = self._firings.with_dimensions(number, totals, squares)
        pearson, cosine = self._firings.with_latents(number)
        own = np.arange(len(values))
        pearson[own, number * LATENTS_AT_ONCE + own] = 0  # with itself
        return [
            one | other
            for one, other in zip(
                _most_correlated("neurons", *neurons),
                _most_correlated("features", pearson, cosine),
                strict=True,
            )
        ]

    def _activity(self, firings: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        """How often a latent fires, and how strongly."""
        _, values = firings
        histogram = _histogram(torch.from_numpy(values)) if len(values) else ([], [])
        return {
            "frac_nonzero": round(len(values) / self._positions, _DECIMALS),
            "freq_hist_data_bar_values": histogram[0],
            "freq_hist_data_bar_heights": histogram[1],
        }

    def _activations(
        self, first: int, firings: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[dict[str, Any]]:
        """The contexts of each latent, with its activation on every token."""
        settings = self._settings
        sizes = settings.top, settings.intervals, settings.per_interval
        examples = [
            list(choose(*own, self._context, self._positions, *sizes, seed=first + place))
            for place, own in enumerate(firings)
        ]
        rows = np.array([one.row for own in examples for one in own], dtype=np.int64)
        texts = self._contexts(np.unique(self._context[rows]))
        for own, (row, value) in zip(examples, firings, strict=True):
            activations, rounded = [], np.array(_rounded(value))
            for one in own:
                ids, position, start = texts[int(self._context[one.row])]
                inside = slice(*np.searchsorted(row, (start, start + len(position))))
                values = np.zeros(len(ids))
                values[position[row[inside] - start]] = rounded[inside]
                activations.append(
                    {
                        "bin_min": round(one.lower, _DECIMALS),
                        "bin_max": round(one.upper, _DECIMALS),
                        "bin_contains": round(one.share, _DECIMALS),
                        "tokens": [self._token(token) for token in ids[self._first :].tolist()],
                        "values": values[self._first :].tolist(),
                        "qualifying_token_index": int(position[one.row - start]) - self._first,
                    }
                )
            yield {"activations": activations}

    def _contexts(self, numbers: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray, int]]:
        """Of each context: its token ids, the positions that give rows, and its first row."""
        found = {}
        starts = np.searchsorted(self._context, numbers)
        for number, start in zip(numbers.tolist(), starts.tolist(), strict=True):
            shard, place = self._store.place_of_context(number)
            contexts = self._store.contexts(shard)
            found[number] = contexts.ids[place], np.flatnonzero(contexts.keep[place]), start
        return found


def _alignment(decoder: Float[Tensor, "latents d_in"]) -> list[dict[str, Any]]:
    """The dimensions that each latent writes to most, and their parts of the L1 norm."""
    unit = torch.nn.functional.normalize(decoder, dim=1)
    best = unit.topk(min(_NEIGHBOURS, unit.shape[1]), dim=1)
    parts = best.values.abs() / unit.abs().sum(1, keepdim=True).clamp(min=1e-30)
    return [
        {
            "neuron_alignment_indices": indices,
            "neuron_alignment_values": _rounded(values),
            "neuron_alignment_l1": _rounded(part),
        }
        for indices, values, part in zip(
            best.indices.tolist(), best.values.numpy(), parts.numpy(), strict=True
        )
    ]


def _most_correlated(
    what: str, pearson: np.ndarray, cosine: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Where the correlation of each latent is largest; SAEDashboard's ``l1`` is the cosine."""
    best = np.argsort(-pearson, axis=1, kind="stable")[:, :_NEIGHBOURS]
    for indices, one, other in zip(best, pearson, cosine, strict=True):
        yield {
            f"correlated_{what}_indices": indices.tolist(),
            f"correlated_{what}_l1": _rounded(other[indices]),
            f"correlated_{what}_pearson": _rounded(one[indices]),
        }


def _logits(
    logits: Float[Tensor, "latents words"], text: Callable[[int], str]
) -> Iterator[dict[str, Any]]:
    """The tokens that each latent suppresses and promotes, and the histogram over all tokens."""
    for own in logits:
        found: dict[str, Any] = {}
        for name, largest in (("neg", False), ("pos", True)):
            best = own.topk(min(_WORDS, len(own)), largest=largest)
            found[f"{name}_str"] = [text(token) for token in best.indices.tolist()]
            found[f"{name}_values"] = _rounded(best.values.numpy())
        values, heights = _histogram(own)
        yield found | {
            "logits_hist_data_bar_heights": heights,
            "logits_hist_data_bar_values": values,
        }


def _histogram(values: Float[Tensor, " n"]) -> tuple[list[float], list[int]]:
    """Centres of equal bins from the smallest to the largest value, and how many are in each."""
    edges = torch.linspace(float(values.min()), float(values.max()), _BINS + 1)
    heights = torch.histc(values, bins=_BINS).long()
    return _rounded(((edges[1:] + edges[:-1]) / 2).numpy()), heights.tolist()


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values.astype(np.float64), _DECIMALS).tolist()
