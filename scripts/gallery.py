"""Writes docs/gallery.md: ten latents of each dictionary after block 9, as texts show them.

    bash scripts/reproduce.sh gallery

The rule of choice is the page's: the ten most recognisable latents, which are those whose firing a
label of three different long words finds best (F1), of those that fire on .01 to 1 % of the rows.
"""

from benchmarks import README, write_section
from results_labels import asked

from llm_wsae import ActivationStore, Dictionary
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
    store, vocabulary, dictionaries = asked(__doc__)
    shown = [of(store, dictionary, vocabulary) for dictionary in dictionaries]
    write_section("gallery", "\n\n".join(shown) + "\n", README.parent / "docs/gallery.md")
