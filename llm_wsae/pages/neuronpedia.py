"""``export_neuronpedia``: what the page collects of a dictionary's latents, as the files that
SAEDashboard writes and Neuronpedia imports.

    out/
      export.json             what was exported, with which settings and versions
      batch-0.json            latents 0 to 127
      batch-1.json            …
      explanations/batch-0.jsonl.gz    what a language model said of them, for Neuronpedia,
      delphi/explanations/…_latent7.txt    and as delphi keeps it; only if it was asked

SAEDashboard's words: a *prompt* is a context, a *feature* a latent, a *neuron* a dimension of the
stream. Numbers have five decimals.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llm_wsae.artifact.artifact import Artifact
from llm_wsae.artifact.files import folder_lock, remove_partials, write_atomic, write_text
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, read_explanations
from llm_wsae.errors import UsageError, shown
from llm_wsae.inspecting.directions import (
    Readout,
    Vocabulary,
    check_store,
    check_width,
    top_words,
)
from llm_wsae.inspecting.strongest import context_of_every_row
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import check_number
from llm_wsae.pages.collecting import BINS_PER_OCTAVE, Windows, collect, windows

LATENTS_AT_ONCE = 128  # in a file; Neuronpedia takes no more in one upload
_FILES_AT_ONCE = 8  # whose contexts are read together
_DECIMALS = 5
_BINS, _WORDS, _NEIGHBOURS = 50, 10, 3  # SAEDashboard's
_AUTHOR = "clkht01d40000jv08hvalcvly"  # the user to whom Neuronpedia's own tools ascribe theirs


@dataclass(frozen=True)
class Export:
    """A folder of batch files."""

    path: Path
    files: int
    latents: int
    explained: int  # latents with an explanation


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

    ``dictionary``, ``store``, ``model``, ``top`` and ``bands`` are as for ``dashboard``;
    ``contexts`` limits how many of the store are looked at. On Neuronpedia the latents are those of
    ``model_id``/block-``sae_set``__``sae_id_suffix``; the model's and the dictionary's own names by
    default, without a suffix. Explanations in the dictionary's folder (``explain``) are written
    too, in Neuronpedia's and in delphi's form. Activations are in units of decoder rows of length
    1. The same call writes the same files again.

    Raises UsageError for numbers below 1 or a name that cannot be part of an address; LlmWsaeError
    if the folder holds anything else, or something cannot be read or does not belong together.
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
    rows, there = store.identity(dictionary.site.reads), store.manifest.num_contexts
    numbers = {"top": top, "bands": bands, "contexts": there if contexts is None else contexts}
    for name, value in numbers.items():
        check_number(name, value, 1)
    numbers["contexts"] = min(numbers["contexts"], there)
    names = {
        "model_id": model_id or str(store.manifest.model.get("name")).rpartition("/")[2],
        "sae_set": sae_set or dictionary.info.name,
        "sae_id_suffix": sae_id_suffix,
    }
    for name in filter(None, names.values()):
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise UsageError(
                f"{shown(name)} cannot be a name on Neuronpedia, where it is part of an address; "
                "give one of letters, digits, dots, - and _"
            )
    model = model if isinstance(model, LanguageModel) else LanguageModel.load(model)
    store.check_model(model.identity())
    check_width(model, dictionary)
    settings: dict[str, Any] = {**numbers, **names}
    asked = {"dictionary": dictionary.decoder_digest(), "rows": rows, "settings": settings}
    said = {n: one for n, one in explained.items() if one.text and n < dictionary.d_sae}
    with folder_lock(out, "export"):
        remove_partials(out)
        record = export.begin(asked)
        files: list[str] = []
        for batch in _Features(dictionary, store, model, settings).batches():
            files.append(f"batch-{len(files)}.json")
            write_text(out / files[-1], json.dumps(batch))
        if said:
            _write_explanations(out, said, dictionary, settings)
        export.finish(record, files)
    return Export(out, len(files), dictionary.d_sae, len(said))


def export_in(folder: Path) -> Artifact:
    """The export in a folder."""
    return Artifact(folder, "export.json", "export for Neuronpedia")


class _Features:
    """What the page collects of latents, under SAEDashboard's keys."""

    def __init__(
        self,
        dictionary: Dictionary,
        store: ActivationStore,
        model: LanguageModel,
        settings: dict[str, Any],
    ):
        self._dictionary, self._store, self._settings = dictionary, store, settings
        rows = int(np.searchsorted(context_of_every_row(store), settings["contexts"]))
        sizes = settings["top"], settings["bands"], max(rows, 1)
        self._found = collect(store, {"": dictionary}, *sizes)[""]
        self._readout, self._token = Readout(model), cache(Vocabulary(model.tokenizer).text)

    def batches(self) -> Iterator[dict[str, Any]]:
        """The content of the files, one after another."""
        dictionary, found, around = self._dictionary, self._found, self._store.context_size - 1
        settings = self._settings
        head = {"model_id": settings["model_id"], "layer": dictionary.site.block}
        head |= {name: settings[name] for name in ("sae_set", "sae_id_suffix")}
        for those in torch.arange(dictionary.d_sae).split(_FILES_AT_ONCE * LATENTS_AT_ONCE):
            rows = found.row[those]
            texts = windows(self._store, dictionary, those, rows, found.floor, around, around)
            for numbers in those.split(LATENTS_AT_ONCE):
                effects = self._readout.effects(dictionary.W_dec[numbers])
                first = int(those[0]) * rows.shape[1]  # example of the texts
                features = [
                    self._feature(latent, logits, texts, latent * rows.shape[1] - first)
                    for latent, logits in zip(numbers.tolist(), effects, strict=True)
                ]
                yield {**head, "features": features}

    def _feature(self, latent: int, logits: Tensor, texts: Windows, first: int) -> dict[str, Any]:
        """What is written of a latent; its examples begin at the ``first`` of the texts."""
        decoder, heights = self._dictionary.W_dec[latent], self._found.histogram[latent].numpy()
        length, contexts = float(decoder.norm()), self._settings["contexts"]
        (there,) = np.nonzero(heights)
        bins = np.arange(there.min(initial=len(heights)), there.max(initial=-1) + 1)
        centres = self._found.first_edge * 2 ** ((bins - 0.5) / BINS_PER_OCTAVE)
        share = int(self._found.count[latent]) / (contexts * self._store.context_size)
        unit = normalize(decoder, dim=0)
        best = unit.topk(min(_NEIGHBOURS, len(unit)))
        return {
            "feature_index": latent,
            "neuron_alignment_indices": best.indices.tolist(),
            "neuron_alignment_values": _rounded(best.values),
            "neuron_alignment_l1": _rounded(best.values.abs() / unit.abs().sum().clamp(min=1e-30)),
            **self._logits(logits),
            "frac_nonzero": round(share, _DECIMALS),
            "freq_hist_data_bar_values": _rounded(centres * length),
            "freq_hist_data_bar_heights": heights[bins].tolist(),
            # Not collected: the dashboard counts which latents fire together.
            **{f"correlated_{what}_{number}": [] for what in ("neurons", "features")
               for number in ("indices", "l1", "pearson")},
            "activations": list(self._examples(latent, length, share, texts, first)),
            "n_prompts_total": contexts,
            "n_tokens_in_prompt": self._store.context_size,
            "dataset": str(self._store.manifest.corpus.get("name", "")),
            "decoder_weights_dist": [],  # over heads, for attention's outputs
            "vector": [],  # given one, Neuronpedia would use it in the place of the encoder
        }  # fmt: skip

    def _examples(
        self, latent: int, length: float, share: float, texts: Windows, first: int
    ) -> Iterator[dict[str, Any]]:
        """The strongest contexts, then one of each band, with the activation on every token."""
        edges = (self._found.edges[latent] * length).tolist()
        for rank in torch.where(self._found.row[latent] >= 0)[0].tolist():
            here = texts.run(first + rank)
            ids, activation = texts.ids[first + rank, here], texts.activation[first + rank, here]
            lower, upper, part = -1.0, edges[0], -1.0
            band = rank - self._settings["top"]
            if band >= 0:
                lower, upper, part = edges[band + 1], edges[band], share / self._settings["bands"]
            yield {
                "bin_min": round(lower, _DECIMALS),
                "bin_max": round(upper, _DECIMALS),
                "bin_contains": round(part, _DECIMALS),
                "tokens": [self._token(one) for one in ids.tolist()],
                "values": _rounded(activation * length),
                "qualifying_token_index": self._store.context_size - 1 - here.start,
            }

    def _logits(self, logits: Tensor) -> dict[str, Any]:
        """The tokens that a latent suppresses and promotes, and the histogram over all tokens."""
        found: dict[str, Any] = {}
        for name, largest in (("neg", False), ("pos", True)):
            ids, values = zip(*top_words(logits, _WORDS, largest), strict=True)
            found[f"{name}_str"] = [self._token(one) for one in ids]
            found[f"{name}_values"] = _rounded(np.array(values))
        edges = torch.linspace(float(logits.min()), float(logits.max()), _BINS + 1)
        return found | {
            "logits_hist_data_bar_heights": torch.histc(logits, bins=_BINS).long().tolist(),
            "logits_hist_data_bar_values": _rounded((edges[1:] + edges[:-1]) / 2),
        }


def _rounded(values: np.ndarray | Tensor) -> list[float]:
    return np.round(np.asarray(values, dtype=np.float64), _DECIMALS).tolist()


def _write_explanations(
    out: Path, said: Mapping[int, Explanation], dictionary: Dictionary, settings: dict[str, Any]
) -> None:
    """What a language model said: rows of Neuronpedia's database, and a file for each latent, as
    delphi keeps and reads them, whose folder may hold others."""
    suffix = "" if settings["sae_id_suffix"] is None else f"__{settings['sae_id_suffix']}"
    place = {
        "modelId": settings["model_id"],
        "layer": f"{dictionary.site.block}-{settings['sae_set']}{suffix}",
    }
    lines = []
    for latent, one in said.items():
        own = {**place, "index": str(latent), "description": one.text}
        scores = "; ".join(f"{name} {score.value:.3f}" for name, score in one.scores.items())
        row = {
            "id": "c" + hashlib.sha256(json.dumps(own).encode()).hexdigest()[:24],
            **own,
            "authorId": _AUTHOR,
            "explanationModelName": one.explainer,
            "notes": scores or None,
        }
        lines.append(json.dumps(row) + "\n")
        name = f"{dictionary.site}_latent{latent}.txt"
        write_text(out / "delphi" / "explanations" / name, json.dumps(one.text))
    packed = gzip.compress("".join(lines).encode(), mtime=0)
    write_atomic(
        out / "explanations" / "batch-0.jsonl.gz", lambda partial: partial.write_bytes(packed)
    )
