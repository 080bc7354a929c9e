"""Writes docs/gallery.md: ten latents of each dictionary after block 9, as texts show them.

    bash scripts/reproduce.sh gallery

The rule of choice is the page's: the ten most recognisable latents, which are those whose firing a
label of three words or more finds best (F1), of those that fire on .01 to 1 % of the rows.
"""

import argparse
from pathlib import Path

from benchmarks import README, write_section

from llm_wsae import ActivationStore, Dictionary, LanguageModel
from llm_wsae.dictionary.hub.card import escape
from llm_wsae.inspecting.directions import Vocabulary
from llm_wsae.inspecting.labels import families_of, labels_of
from llm_wsae.pages.collecting import collect, windows
from llm_wsae.pages.telling import AFTER, BEFORE, context_of, recognisable

LATENTS, CONTEXTS = 10, 2


def of(store: ActivationStore, dictionary: Dictionary, vocabulary: Vocabulary) -> str:
    """A section of the page."""
    found = collect(store, {"": dictionary}, top=CONTEXTS, bands=1)[""]
    families = families_of(store, vocabulary, found.sample)
    labels = labels_of(families, *found.firings, dictionary.d_sae)
    best = recognisable(found.density, labels).topk(LATENTS).indices
    rows = found.row[best][:, :CONTEXTS]
    texts = windows(store, dictionary, best, rows, found.floor, BEFORE, AFTER)
    parts = [f"## {dictionary.info.name}"]
    for place, latent in enumerate(best.tolist()):
        share = f"{100 * float(found.density[latent]):.2g} % of the tokens"
        head = f"**{latent}** {escape(labels[latent].text())} ({share}, F1 {labels[latent].f1:.2f})"
        lines = [context_of(texts, place * CONTEXTS + rank, vocabulary) for rank in range(CONTEXTS)]
        parts.append("\n".join([f"{head}\n", *(f"- {escape(line)}" for line in lines)]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dictionaries", nargs="+", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--model", required=True)
    asked = parser.parse_args()
    own = ActivationStore.open(asked.store)
    vocabulary = Vocabulary(LanguageModel.load(asked.model).tokenizer)
    shown = [of(own, Dictionary.load(folder), vocabulary) for folder in asked.dictionaries]
    write_section("gallery", "\n\n".join(shown) + "\n", README.parent / "docs/gallery.md")
