"""Labels are rules: what they say of a latent is what its firing shows, and can be tested."""

from itertools import combinations

import numpy as np
import pytest
import torch
from tiny import tiny_model

from llm_wsae.inspecting.directions import Vocabulary
from llm_wsae.inspecting.labels import Clause, Family, Label, families_of, labels_of

LINE = "the war of the union and the civil war in 1861 of peace and civil trade for the war"
TEXT = LINE.split() * 40


def families(words: list[str]) -> dict[str, Family]:
    """Of a text of whole words: each, and the one before."""
    found = {}
    for name, column in (("word", words), ("before", ["", *words[:-1]])):
        values, of_row = np.unique(np.array(column, dtype=object), return_inverse=True)
        found[name] = Family(of_row, values.tolist())
    kind = np.array([word.isdigit() for word in words]).astype(int)
    return found | {"kind": Family(kind, ["", "years"])}


def label_of(fires: list[bool], words: list[str] = TEXT) -> Label:
    rows = np.flatnonzero(fires)
    (label,) = labels_of(families(words), rows, np.zeros(len(rows), dtype=int), d_sae=1)
    return label


@pytest.mark.parametrize(
    "text, fires",
    [
        ("“war”", lambda word, before: word == "war"),
        ("“peace”, “trade”", lambda word, before: word in ("peace", "trade")),
        ("“war”, after “civil”", lambda word, before: (before, word) == ("civil", "war")),
        ("after “of”", lambda word, before: before == "of"),
        ("“1861”", lambda word, before: word.isdigit()),  # words say more than kinds
    ],
)
def test_a_latent_is_labelled_with_what_it_fires_on(text, fires):
    truth = [fires(word, before) for word, before in zip(TEXT, ["", *TEXT], strict=False)]
    label = label_of(truth)
    assert set(label.text().split(", ")) == set(text.split(", "))
    assert label.holds(families(TEXT)).tolist() == truth
    assert label.f1 > 0.9


def test_a_latent_that_fires_at_random_or_hardly_ever_has_no_rule():
    draw = np.random.default_rng(0)
    for share in (0.01, 0.5 / len(TEXT)):
        label = label_of((draw.random(len(TEXT)) < share).tolist())
        assert label.clauses == () and label.f1 == 0
        assert not label.holds(families(TEXT)).any()
        assert label.text() == "" and label.text(["a", "b"]) == "promotes “a”, “b”"


def test_of_one_family_no_other_values_would_find_the_firing_better():
    """Beside all choices of up to four values, each counted with one more silent row."""
    words = [f"w{n}" for n in range(7)] * 30
    for seed in range(20):
        draw = np.random.default_rng(seed)
        likely = dict(zip(sorted(set(words)), draw.random(7) ** 3, strict=True))
        fires = np.array([draw.random() < likely[word] for word in words])
        if fires.sum() < 5:
            continue
        own = {"word": families(words)["word"]}
        rows = np.flatnonzero(fires)
        (label,) = labels_of(own, rows, np.zeros_like(rows), d_sae=1)
        column = np.array(words)

        def f1(values, fires=fires, column=column):
            rule = np.isin(column, values)
            return 2 * (rule & fires).sum() / (rule.sum() + len(values) + fires.sum())

        choices = [one for n in range(1, 5) for one in combinations(sorted(set(words)), n)]
        assert label.f1 == pytest.approx(max(map(f1, choices)), abs=0.02)


def test_rows_of_a_store_are_told_apart_by_what_their_text_says(store):
    model = tiny_model()
    rows = np.arange(0, store.num_rows, 7)
    found = families_of(store, Vocabulary(model.tokenizer), rows)
    assert {len(one.of_row) for one in found.values()} == {len(rows)}
    where = store.locate(torch.from_numpy(rows))
    words = Vocabulary(model.tokenizer)
    for place in range(0, len(rows), 11):
        at = int(where.position[place])
        token = words.text(int(where.ids[place, at])).strip().casefold()
        own = found["word"].values[found["word"].of_row[place]].rstrip("…")
        assert own.endswith(token)
        early = found["place"].values[found["place"].of_row[place]]
        assert bool(early) == (at < 4)


def test_values_of_a_rule_that_another_text_lacks_hold_nowhere():
    clause = Clause("word", ("absent", "war"))
    assert clause.holds(families(["war", "peace"])).tolist() == [True, False]
