"""Do automatic labels find held-out firings better than the tokens on which a latent fires most?

    bash scripts/reproduce.sh labels

Labels are made from half of the documents of a store and tested on the other half: a label is a
rule that says on which rows its latent fires. Written down before anything was measured: the
outcome is the mean F1 of rule and firing over 100 latents of each dictionary, drawn evenly over
their density, without dense ones, less that of the six tokens that a page lists of each latent
(of its largest activations in different contexts; in any case). Expected: labels are better for
every dictionary, with the whole 95 % interval over latents above 0.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from benchmarks import README, write_section

from llm_wsae import ActivationStore, Dictionary, LanguageModel
from llm_wsae.dictionary.dictionary import DENSE_DENSITY
from llm_wsae.explaining.examples import sample_by_density
from llm_wsae.inspecting.directions import Vocabulary
from llm_wsae.inspecting.labels import families_of, labels_of
from llm_wsae.inspecting.strongest import context_of_every_row
from llm_wsae.pages.collecting import ROWS_AT_ONCE
from llm_wsae.statistics.uncertainty import Bootstrap
from llm_wsae.terminal import markdown

PAGE = README.parent / "docs/results/labels.md"
LATENTS, LISTED, SEED = 100, 6, 0
FEWEST = 5  # firings in either half
HEAD = ["dictionary", "latents with a rule", "F1 of labels", "of listed tokens", "more [95 %]"]


class Text:
    """The rows of a store: half of their documents are shown to the labels."""

    def __init__(self, store: ActivationStore, vocabulary: Vocabulary):
        shards = [store.contexts(shard) for shard in range(len(store.manifest.shards))]
        document = np.concatenate([one.document[one.keep] for one in shards])
        ids = np.concatenate([one.ids[one.keep] for one in shards])
        words = {one: vocabulary.text(one).strip().casefold() for one in np.unique(ids).tolist()}
        self.store, self.context = store, context_of_every_row(store)
        self.token = np.array([words[one] for one in ids.tolist()])
        self.shown = np.random.default_rng(SEED).random(document.max() + 1)[document] < 0.5
        self.heldout_documents = len(np.unique(document[~self.shown]))
        self.families = families_of(store, vocabulary, np.arange(store.num_rows))


def compared(text: Text, dictionary: Dictionary) -> list[str]:
    """A row of the table."""
    row, latent, value = firings(text.store, dictionary)
    own, d_sae = text.shown[row], dictionary.d_sae
    half = {n: one._replace(of_row=one.of_row[text.shown]) for n, one in text.families.items()}
    place = np.cumsum(text.shown) - 1
    labels = labels_of(half, place[row[own]], latent[own], d_sae)
    counts = [np.bincount(latent[side], minlength=d_sae) for side in (own, ~own)]
    usual = sum(counts) <= DENSE_DENSITY * len(text.shown)
    eligible = np.flatnonzero((np.minimum(*counts) >= FEWEST) & usual)
    chosen = sample_by_density(eligible, counts[0], LATENTS, SEED).tolist()
    scores = np.zeros((2, len(chosen)))
    for number, one in enumerate(chosen):
        mine = latent == one
        fires = np.zeros(len(text.shown), dtype=bool)
        fires[row[mine]] = True
        strongest = row[mine & own][np.argsort(-value[mine & own], kind="stable")]
        first = np.sort(np.unique(text.context[strongest], return_index=True)[1])[:LISTED]
        listed = np.isin(text.token, text.token[strongest[first]])
        for kind, rule in enumerate((labels[one].holds(text.families), listed)):
            scores[kind, number] = f1(rule[~text.shown], fires[~text.shown])
    apart = {"sum": scores[0] - scores[1], "count": np.ones(len(chosen))}
    bootstrap = Bootstrap(len(chosen), 10_000, SEED)
    low, high = bootstrap.interval(lambda drawn: drawn["sum"] / drawn["count"], apart)
    ruled = sum(bool(labels[one].clauses) for one in chosen)
    means = [f"{one:.3f}" for one in scores.mean(1)]
    more = f"{apart['sum'].mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    name = f"`{dictionary.site}/{dictionary.info.name}`"
    return [name, f"{ruled} of {len(chosen)}", *means, more]


def f1(rule: np.ndarray, fires: np.ndarray) -> float:
    return 2 * int((rule & fires).sum()) / max(1, int(rule.sum() + fires.sum()))


@torch.no_grad()
def firings(store: ActivationStore, dictionary: Dictionary) -> list[np.ndarray]:
    """Row, latent and activation of every firing."""
    reader, parts = store.reader(dictionary.site), []
    for start in range(0, store.num_rows, ROWS_AT_ONCE):
        x = reader.rows(start, min(start + ROWS_AT_ONCE, store.num_rows)).float()
        codes = dictionary.encode_sparse(x)
        active = codes.values > 0
        rows = start + torch.arange(len(x))[:, None].expand_as(active)
        parts.append((rows[active], codes.indices[active], codes.values[active]))
    return [torch.cat(column).numpy() for column in zip(*parts, strict=True)]


def asked(about: str) -> tuple[ActivationStore, Vocabulary, list[Dictionary]]:
    """The store, the model's vocabulary and the dictionaries of the command line."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("dictionaries", nargs="+", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--model", required=True)
    given = parser.parse_args()
    vocabulary = Vocabulary(LanguageModel.load(given.model).tokenizer)
    dictionaries = [Dictionary.load(folder) for folder in given.dictionaries]
    return ActivationStore.open(given.store), vocabulary, dictionaries


if __name__ == "__main__":
    store, vocabulary, dictionaries = asked(__doc__)
    text = Text(store, vocabulary)
    rows = [compared(text, dictionary) for dictionary in dictionaries]
    size = f"{int((~text.shown).sum()):,} held-out rows of {text.heldout_documents} documents"
    table = f"{markdown([HEAD, *rows])}\n\n{size}; intervals are over latents.\n"
    print(table)
    write_section("labels", table, PAGE)
