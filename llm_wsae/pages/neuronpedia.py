"""``export_neuronpedia``: the latents of a dictionary in the files that SAEDashboard writes and
Neuronpedia imports, from what the page collects of them.

    out/
      export.json             what was exported, with which settings and versions
      batch-0.json            latents 0 to 127
      batch-1.json            …
      explanations/batch-0.jsonl.gz    what a language model said of them, for Neuronpedia,
      delphi/explanations/…_latent7.txt    and as delphi keeps it; only if it was asked

SAEDashboard's words: a *prompt* is a context, a *feature* a latent, a *neuron* a dimension of the
stream. Numbers have five decimals.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llm_wsae.artifact.artifact import Artifact
from llm_wsae.artifact.files import folder_lock, remove_partials, write_text
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import (
    read_explanations,
    write_for_delphi,
    write_for_neuronpedia,
)
from llm_wsae.errors import UsageError, shown
from llm_wsae.inspecting.firings import check_store
from llm_wsae.inspecting.readout import Readout
from llm_wsae.inspecting.sentence import check_width
from llm_wsae.inspecting.vocabulary import Vocabulary
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.pages.collecting import (
    BINS_PER_OCTAVE,
    Firings,
    Windows,
    collect,
    context_of_every_row,
    windows,
)

LATENTS_AT_ONCE = 128
"""Latents in a file; Neuronpedia takes no more in one upload."""
_FILES_AT_ONCE = 8  # whose contexts are read together
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
    bands: int
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
    bands: int = 5,
    contexts: int | None = None,
    model_id: str | None = None,
    sae_set: str | None = None,
    sae_id_suffix: str | None = None,
) -> Export:
    """Write the batch files of SAEDashboard, which Neuronpedia imports, into the folder ``out``.

    ``dictionary`` and ``store`` may be opened or given by their folders, ``model`` is a
    LanguageModel or whatever ``LanguageModel.load`` takes. Of each latent, its ``top`` strongest
    contexts are shown, and one of each of ``bands`` quantile bands of its activation, as the
    dashboard does. ``contexts`` limits how many of the store are looked at. On Neuronpedia the
    latents are those of ``model_id``/block-``sae_set``__``sae_id_suffix``; the model's and the
    dictionary's own names by default, without a suffix.

    Explanations in the dictionary's folder (``explain``) are written too, in Neuronpedia's and in
    delphi's form.

    Activations are in units of decoder rows of length 1. The store is read and encoded once, and
    contexts with examples once more. The same call writes the same files again.

    Raises UsageError for numbers below 1 or a name that cannot be part of an address; LlmWsaeError
    if the folder holds anything else, or the dictionary, store or model cannot be read or do not
    belong together.
    """
    out = Path(out)
    export = export_in(out)
    export.check_place()
    if not isinstance(dictionary, Dictionary):
        dictionary = Dictionary.load(dictionary)
    dictionary = dictionary.on_cpu()  # as the rows of a store are
    explained = {} if dictionary.folder is None else read_explanations(dictionary.folder)
    store = store if isinstance(store, ActivationStore) else ActivationStore.open(store)
    check_store(store, dictionary)
    store.source(dictionary.site)  # raises if the store lacks the site
    there = store.manifest.num_contexts
    settings = _Settings(
        top,
        bands,
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
    }
    with folder_lock(out, "export"):
        remove_partials(out)
        record = export.begin(asked)
        files = -(-dictionary.d_sae // LATENTS_AT_ONCE)
        batches = _batches(dictionary, store, model, settings)
        for number, batch in enumerate(tqdm(batches, total=files, desc="files", unit="file")):
            write_text(out / f"batch-{number}.json", json.dumps(batch))
        said = {n: one for n, one in explained.items() if one.text and n < dictionary.d_sae}
        if said:
            suffix = "" if sae_id_suffix is None else f"__{sae_id_suffix}"
            source = f"{dictionary.site.block}-{settings.sae_set}{suffix}"
            write_for_neuronpedia(out / "explanations", said, settings.model_id, source)
            write_for_delphi(out / "delphi" / "explanations", said, str(dictionary.site))
        export.finish(record, [f"batch-{number}.json" for number in range(files)])
    return Export(out, files, dictionary.d_sae, len(said))


def export_in(folder: Path) -> Artifact:
    """The export in a folder."""
    return Artifact(folder, "export.json", "export for Neuronpedia")


def _check(settings: _Settings) -> None:
    """Raises UsageError for settings that cannot be."""
    if min(settings.top, settings.bands, settings.contexts) < 1:
        raise UsageError("top, bands and contexts must be at least 1")
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


def _batches(
    dictionary: Dictionary, store: ActivationStore, model: LanguageModel, settings: _Settings
) -> Iterator[dict[str, Any]]:
    """The content of the files, one after another."""
    rows = int(np.searchsorted(context_of_every_row(store), settings.contexts))
    every, floors = collect(store, {"": dictionary}, settings.top, settings.bands, max(rows, 1))
    found, floor, readout = every[""], floors[""], Readout(model)
    token = cache(Vocabulary(model.tokenizer).text)
    facts = {
        "n_prompts_total": settings.contexts,
        "n_tokens_in_prompt": store.context_size,
        "dataset": str(store.manifest.corpus.get("name", "")),
        "decoder_weights_dist": [],  # over heads, for attention's outputs
        "vector": [],  # given one, Neuronpedia would use it in the place of the encoder
    }
    around = store.context_size - 1
    for begin in range(0, dictionary.d_sae, _FILES_AT_ONCE * LATENTS_AT_ONCE):
        end = min(begin + _FILES_AT_ONCE * LATENTS_AT_ONCE, dictionary.d_sae)
        those = torch.arange(begin, end)
        texts = windows(store, dictionary, those, found.row[begin:end], floor, around, around)
        shown = _Shown(found, texts, begin, settings, store.context_size, token)
        for first in range(begin, end, LATENTS_AT_ONCE):
            decoder = dictionary.W_dec[first : min(first + LATENTS_AT_ONCE, end)]
            parts = zip(
                decoder.norm(dim=1).tolist(),
                _alignment(decoder),
                _logits(readout.effects(decoder), token),
                strict=True,
            )
            features = [
                {"feature_index": latent} | aligned | logits | shown.of(latent, length) | facts
                for latent, (length, aligned, logits) in enumerate(parts, first)
            ]
            yield {
                "model_id": settings.model_id,
                "layer": dictionary.site.block,
                "sae_set": settings.sae_set,
                "sae_id_suffix": settings.sae_id_suffix,
                "features": features,
            }


@dataclass(frozen=True)
class _Shown:
    """What latents do in the text, of which ``texts`` has the contexts of those from ``first``."""

    found: Firings
    texts: Windows
    first: int
    settings: _Settings
    context_size: int
    token: Callable[[int], str]

    def of(self, latent: int, length: float) -> dict[str, Any]:
        """How often a latent fires, how strongly, and where; its decoder row has this length."""
        share = int(self.found.count[latent]) / (self.settings.contexts * self.context_size)
        centres, heights = self._histogram(latent)
        return {
            "frac_nonzero": round(share, _DECIMALS),
            "freq_hist_data_bar_values": _rounded(centres * length),
            "freq_hist_data_bar_heights": heights,
            # Not collected: the dashboard counts which latents fire together.
            **{f"correlated_{what}_{number}": [] for what in ("neurons", "features")
               for number in ("indices", "l1", "pearson")},
            "activations": list(self._examples(latent, length, share)),
        }  # fmt: skip

    def _histogram(self, latent: int) -> tuple[np.ndarray, list[int]]:
        """Centres of bins of half an octave, and how many activations are in each."""
        heights = self.found.histogram[latent].numpy()
        (there,) = np.nonzero(heights)
        bins = np.arange(there.min(initial=len(heights)), there.max(initial=-1) + 1)
        return self.found.first_edge * 2 ** ((bins - 0.5) / BINS_PER_OCTAVE), heights[bins].tolist()

    def _examples(self, latent: int, length: float, share: float) -> Iterator[dict[str, Any]]:
        """The strongest contexts, then one of each band, with the activation on every token."""
        settings, per_latent = self.settings, self.found.row.shape[1]
        edges = (self.found.edges[latent] * length).tolist()
        for rank in torch.where(self.found.row[latent] >= 0)[0].tolist():
            place = (latent - self.first) * per_latent + rank
            there = np.flatnonzero(self.texts.ids[place] >= 0)
            here = slice(int(there[0]), int(there[-1]) + 1)
            lower, upper, part = -1.0, edges[0], -1.0
            if rank >= settings.top:
                band = rank - settings.top
                lower, upper, part = edges[band + 1], edges[band], share / settings.bands
            yield {
                "bin_min": round(lower, _DECIMALS),
                "bin_max": round(upper, _DECIMALS),
                "bin_contains": round(part, _DECIMALS),
                "tokens": [self.token(one) for one in self.texts.ids[place, here].tolist()],
                "values": _rounded(self.texts.activation[place, here] * length),
                "qualifying_token_index": self.context_size - 1 - here.start,
            }


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
