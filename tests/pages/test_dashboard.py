"""The page: what is collected is what a slow look finds, and a browser can use it."""

import base64
import gzip
import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import check_width_and_colours, listed, searched, serving, watched
from command_line import SITE, refused, works
from hostile import with_hostile_tokens
from looping import over
from small_dictionaries import SCORES, like, make_dictionary, said_of
from torch.nn.functional import cosine_similarity, normalize

from llm_wsae import dashboard, inspect
from llm_wsae.artifact.files import write_json
from llm_wsae.data.config import HarvestConfig
from llm_wsae.data.corpus import Corpus
from llm_wsae.data.harvesting import harvest
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import keep_explanations
from llm_wsae.dictionary.sparsity import JumpReLU, TopK
from llm_wsae.errors import UsageError
from llm_wsae.inspecting.directions import nearest
from llm_wsae.inspecting.inspection import read_sentence
from llm_wsae.inspecting.strongest import context_of_every_row
from llm_wsae.model.site import Site
from llm_wsae.pages import collecting
from llm_wsae.pages import dashboard as dashboards
from llm_wsae.pages.collecting import SAMPLE, Firings, collect, windows
from llm_wsae.pages.live import Session, application
from llm_wsae.statistics.uncertainty import TextSize

PLAIN, WEIGHTED = "trained/uniform-k4", "trained/variance-a0.5-k4"
TOP, BANDS = 3, 2


def of_kind(world, store, kind: str) -> Dictionary:
    """The plain dictionary, as it is; or with thresholds in the place of k, and a twentieth of the
    rows massive."""
    one = Dictionary.load(world / PLAIN)
    if kind == "topk":
        return one
    norms = store.rows(one.site, 0, store.num_rows).float().norm(dim=1)
    info = replace(one.info, massive_threshold=float(norms.quantile(0.95)))
    return like(one, info=info, sparsity=JumpReLU(), threshold=torch.full((one.d_sae,), 0.02))


@over(kind=["topk", "jumprelu"])
def test_what_is_collected_is_what_a_slow_look_finds(world, store, kind, monkeypatch):
    monkeypatch.setattr(collecting, "ROWS_AT_ONCE", 700)  # pieces that end within contexts
    dictionary = of_kind(world, store, kind)
    rows = store.rows(dictionary.site, 0, store.num_rows).float()
    usable = rows.norm(dim=1) <= (dictionary.info.massive_threshold or torch.inf)
    assert usable.float().mean() == pytest.approx(1 if kind == "topk" else 0.95, abs=1e-3)
    dense = dictionary.encode(rows) * usable[:, None]
    fires = (dense > 0).float()
    contexts = context_of_every_row(store).tolist()
    one = collect(store, {"one": dictionary}, TOP, BANDS)["one"]
    assert one.rows_seen == int(usable.sum()) and int(fires.sum()) > len(rows)
    assert torch.equal(one.count, fires.sum(0).long())
    assert torch.equal(one.histogram.sum(1), one.count)
    both = fires.T @ fires
    either = fires.sum(0)[:, None] + fires.sum(0) - both
    overlap = (both / either.clamp(min=1)).fill_diagonal_(0)
    for found, expected in (
        (one.total, dense.sum(0)),
        (one.overlap, overlap.topk(5, dim=1).values),
        (one.overlap, overlap.gather(1, one.together)),
        (one.floor, dense.where(dense > 0, torch.inf).amin(1)),
    ):
        torch.testing.assert_close(found, expected)
    for latent, own in enumerate(dense.T):
        best = {}
        for row in own.argsort(descending=True)[: one.count[latent]].tolist():
            best.setdefault(contexts[row], row)
        wanted = list(best.values())[:TOP]
        torch.testing.assert_close(one.value[latent, : len(wanted)], own[wanted])
        assert (one.row[latent, len(wanted) : TOP] == -1).all()
        bands, of_bands, edges = one.row[latent, TOP:], one.value[latent, TOP:], one.edges[latent]
        new = bands >= 0
        assert not new.any() or one.count[latent] >= BANDS
        torch.testing.assert_close(of_bands[new], own[bands[new]])
        assert of_bands[0] >= of_bands[1] or not new.all()
        assert not set(bands[new].tolist()) & set(wanted)
        assert edges[0] == one.value[latent, 0] and edges[-1] == 0
        assert ((edges[1:] <= of_bands) & (of_bands <= edges[:-1]))[new].all()
        if one.count[latent] > TOP + BANDS * SAMPLE and len(best) > TOP:
            assert new.any()  # else every band would have drawn one of the strongest
    check_windows(store, dictionary, one, rows, dense, contexts)


def check_windows(store, dictionary, one, rows, dense, contexts):
    """Tokens, activations and sources around every example."""
    every, mean = torch.arange(dictionary.d_sae), store.statistics(dictionary.site).mean.float()
    found = windows(store, dictionary, every, one.row, one.floor, before=2, after=1)
    where = store.locate(one.row.flatten().clamp(min=0))
    for example, row in enumerate(one.row.flatten().tolist()):
        ids, activations = found.ids[example], found.activation[example]
        if row < 0:
            assert (ids == -1).all() and not activations.any()
            continue
        latent, at = example // one.row.shape[1], int(where.position[example])
        assert ids[2] == where.ids[example, at]
        assert activations[2] == pytest.approx(float(dense[row, latent]), rel=1e-4)
        given, parts = (rows[row] - mean) * dictionary.W_enc[:, latent], found.part[example]
        assert parts == pytest.approx(given.topk(3).values.numpy(), abs=1e-4)
        assert given[found.source[example]].numpy() == pytest.approx(parts, abs=1e-4)
        if ids[3] >= 0 and contexts[row : row + 2] == [contexts[row]] * 2:
            assert activations[3] == pytest.approx(float(dense[row + 1, latent]), abs=1e-4)


def unpacked(page: str, name: str):
    text = re.search(rf'id="{name}">([^<]*)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(text)), parse_constant=lambda _: 1 / 0)


def write_scores(path, dictionary, per_latent):
    """A report of ``evaluate --monosemantic``."""
    own = {"sha256": dictionary.decoder_digest(), "per_latent": per_latent}
    write_json(path, {"monosemanticity": {"dictionaries": {Path(PLAIN).name: own}}})


DETECTION = [None if i % 7 == 3 else (100 + i) / 200 for i in range(64)]
LABEL = "names of </script><b>months</b>"


@pytest.fixture(scope="module")
def page(world):
    out = world / "page.html"
    (world / "trained/report.html").write_text("of the run")
    keep_explanations(world / PLAIN, [said_of(5, LABEL, SCORES)])
    per_latent = {"detection": DETECTION, "purity": [None] * 64, "density": [0.1] * 64}
    write_scores(world / "report.json", Dictionary.load(world / PLAIN), per_latent)
    result = works(
        "dashboard", world / PLAIN, world / WEIGHTED, "--store", world / "store",
        "--model", world / "model", "--out", out, "--prompt", "one two three", "--top", TOP,
        "--bands", BANDS, "--scores", world / "report.json", "--json",
    )  # fmt: skip
    assert result.json["page"] == str(out)
    held = result.json["found"]
    assert [one["partner"] for one in held] == ["variance-a0.5-k4", "uniform-k4"]
    assert all(64 == one["latents"] >= one["labelled"] >= len(one["told"]) for one in held)
    return out


def test_the_page_knows_both_dictionaries_and_each_latents_partner(world, page, model):
    text = page.read_text()
    about = json.loads(re.search(r'id="about">(.*?)</script>', text)[1])
    assert [one["name"] for one in about["dictionaries"]] == ["uniform-k4", "variance-a0.5-k4"]
    assert about["reports"] == ["trained/report.html"]
    assert dashboards.reports_of([Dictionary.load(world / PLAIN)], world / "other/page.html") == []
    lines = {
        name: value for _, group in about["dictionaries"][1]["facts"] for name, value, _ in group
    }
    assert lines["weights"] == "variance, α = 0.5" and lines["active latents a row"] == "4.0"
    assert lines["sparsity"] == "TopK: the 4 largest of every token"
    first, second = (Dictionary.load(world / name) for name in (PLAIN, WEIGHTED))
    cosine = cosine_similarity(first.W_dec[:, None], second.W_dec, dim=2)
    columns = unpacked(text, "table-0")
    assert columns["detection"] == DETECTION and "detection" not in unpacked(text, "table-1")
    assert columns["partner-1"] == cosine.argmax(1).tolist()
    assert columns["likeness-1"] == pytest.approx(cosine.amax(1).tolist(), rel=1e-3)
    latents = unpacked(text, "chunk-0-0")
    assert len(latents) == min(64, first.d_sae) == len(unpacked(text, "search-0"))
    assert len(latents[0]["promotes"]) == len(latents[0]["suppresses"])
    words = unpacked(text, "words")
    number, value, _, centre, tokens, shades, _ = latents[
        int(torch.tensor(columns["density"]).argmax())
    ]["examples"][0]
    assert number == 0 and value > 0 and shades[centre] == 99 and len(words[str(tokens[centre])])
    (prompt,) = about["prompts"]
    for found, dictionary in zip(prompt, (first, second), strict=True):
        wanted = read_sentence(model, dictionary, "one two three")
        assert [[latent for latent, _ in active] for _, active in found] == [
            [one.latent for one in token.latents[:12]] for token in wanted
        ]


def test_an_explanation_stands_before_the_tokens_and_in_the_latents_panel(browser, page, tab):
    text = page.read_text()
    assert [one.startswith(f"{LABEL} · ") for one in unpacked(text, "search-0")[:7]] == [
        number == 5 for number in range(7)
    ]
    latents = unpacked(text, "chunk-0-0")
    assert [number for number, one in enumerate(latents) if "explanation" in one] == [5]
    assert not any("explanation" in one for one in unpacked(text, "chunk-1-0"))
    tab.goto(f"file://{page}#latents/d0")
    tab.reload()
    assert searched(tab, "MONTHS") == [5]
    row = tab.locator(".row[role=option]")
    assert row.inner_text().startswith(f"5\n{LABEL} · ")
    row.click()
    tab.wait_for_selector("text=Explanation by a model")
    said = tab.locator("article").inner_text()
    assert LABEL in said and "detection 0.75 [0.50, 1.00], 15 of 16" in said


def test_the_card_shows_what_was_measured():
    metrics = {
        "fidelity": {
            "fvu": 0.1234,
            "kl": 0.2,
            "kl_interval": [0.19, 0.21],
            "ce_recovered": "much",
            "from_plain": {"plain": "two", "kl": -0.05, "kl_interval": [-0.06, -0.04]},
        },
        "monosemanticity": {"purity": {"value": 0.6, "interval": [0.5, 0.7], "control": 0.1}},
        "baselines": {
            "raw dimensions": {"fidelity": {"fvu": 0.6, "ce_recovered": 0.5, "kl": 2.5}},
            "frozen decoder": {"fidelity": {"fvu": 0.6, "ce_recovered": "much"}},
        },
    }
    dictionary, seen = make_dictionary(metrics=metrics), TextSize(100, 5, 4.0)
    nothing = Firings(dictionary, torch.zeros(9, dtype=torch.int32), 1, 1).finish()
    shown = dashboards.facts(dictionary, "one", nothing, seen)
    helped = "one: KL -20.0 % [-24.0, -16.0] beside two: the weights help here."
    groups = dict(shown["facts"])
    assert shown["answer"] == helped
    fidelity = [("FVU", "0.123"), ("KL", "0.200 [0.190, 0.210]")]
    assert [line[:2] for line in groups["Fidelity on held-out text"]] == fidelity
    beside = groups["The same of untrained and half-trained baselines (FVU, CE recovered, KL)"]
    assert beside == [("raw dimensions", "0.600, 0.500, 2.500", "")]
    ((name, value, meaning),) = groups["Monosemanticity on held-out text"]
    assert (name, value) == ("purity", "0.600 [0.500, 0.700] (control 0.100)")
    assert "random contexts" in meaning
    unmeasured = dashboards.facts(make_dictionary(metrics={}), "one", nothing, seen)
    assert unmeasured["answer"] == ""
    assert [title for title, _ in unmeasured["facts"]] == ["What it is", "On the rows of this page"]
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    partner, likeness = nearest(dictionary.W_dec, dictionary.W_dec[order], 1)
    columns = dashboards.table(
        dictionary, nothing, torch.zeros(80), {2: (partner + 12_345, likeness)}, {}
    )
    assert columns["partner-2"] == (order.argsort() + 12_345).tolist()  # numbers are exact


def test_principal_components_are_those_of_the_covariance():
    decoder = torch.randn(300, 12, generator=torch.Generator().manual_seed(1))
    decoder *= torch.linspace(3, 0.3, 12)
    rows = normalize(decoder, dim=1)
    rows = rows - rows.mean(0)
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -2:].flip(1)
    wanted, found = rows @ directions, dashboards.principal_components(decoder)
    torch.testing.assert_close(found.abs(), wanted.abs(), atol=0.01, rtol=0)
    state = torch.random.get_rng_state()
    assert torch.equal(dashboards.principal_components(decoder), found)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_cannot_be_shown_is_refused_and_nothing_is_written(world, tmp_path):
    one, page, report = Dictionary.load(world / PLAIN), tmp_path / "p.html", world / "other.json"
    other, edited = world / "strange.json", world / "edited.json"
    write_scores(report, one, {"detection": [1] * 64})
    write_scores(other, make_dictionary(), {"detection": [1] * 64})
    edited.write_text(json.dumps({"monosemanticity": {"dictionaries": {}}}))
    for words, said in (
        ((), "name at least one dictionary"),
        ((world / PLAIN, "--out", tmp_path / "p.txt"), "so --out cannot be"),
        ((world / PLAIN, "--port", 1), "is for --live"),
        (("unread", "--live", "--port", 70_000), "port 70000 cannot be used"),
        ((world / "nowhere",), "nowhere"),
        ((world / PLAIN, "--top", 0), "at least 1"),
        ((world / PLAIN, "--prompt", ""), "--prompt is empty"),
        ((world / WEIGHTED, "--scores", report), "holds no scores of latents of variance-a0.5-k4"),
        ((world / PLAIN, "--scores", edited), "edited.json"),  # it has no checksum
        ((world / PLAIN, "--scores", other), "is about another dictionary named uniform-k4"),
        ((world / PLAIN, "--scores", world / "trained"), "trained is a folder; it should be the"),
    ):
        ask = ("--store", world / "store", "--model", world / "model", "--out", page)
        refused(("dashboard", *words[:1], *ask, *words[1:]), said)
    names = ("a (2)", "a", "a")
    named = [like(one, info=replace(one.info, name=name)) for name in names]
    assert list(dashboards.named_dictionaries(named)) == ["a (2)", "a", "a (3)"]
    assert not list(tmp_path.iterdir())


def test_a_single_latent_has_none_near_it(world, store, model, tmp_path):
    alone = make_dictionary(d_in=16, d_sae=1, sparsity=TopK(1))
    page = dashboard([alone], store, model, tmp_path / "page.html").path.read_text()
    columns = unpacked(page, "table-0")
    assert columns["nearest"] == [None] and columns["pca1"] == [0]
    (latent,) = unpacked(page, "chunk-0-0")
    assert latent["neighbours"] == []


def test_a_page_that_is_sure_to_be_too_large_is_refused_before_rows_are_read(
    world, model, tmp_path
):
    assert dashboards.most_megabytes([4608], 20) == pytest.approx(10.2, rel=0.05)  # as was measured
    for d_sae, fits in ((4608, (3, 10)), (16_384, (3, 4)), (32_768, (2, 3)), (10**6, (1, 1))):
        assert dashboards.what_fits([d_sae] * 3) == fits
        assert dashboards.most_megabytes([d_sae] * fits[0], 2 * fits[1]) <= 60 or fits == (1, 1)
    assert dashboards.most_megabytes([4608], 20, [20 * 32]) < 1  # few rows have few examples
    damaged = shutil.copytree(world / "store", tmp_path / "store")
    for shard in (damaged / SITE).glob("0*.safetensors"):
        shard.write_bytes(b"")
    wide = make_dictionary(d_in=16, d_sae=512_000, sparsity=TopK(1))
    said = r"the page would be 103 MB large, more than 60; ask for fewer dictionaries"
    with pytest.raises(UsageError, match=said):
        dashboard([wide], damaged, model, tmp_path / "large.html")


def test_a_context_names_the_role_that_says_its_token(world, model, tmp_path, monkeypatch):
    """Also where a long message began some contexts, or a shard, before."""
    monkeypatch.setattr(collecting, "ROLES", roles := ("", "w1", "w4"))
    monkeypatch.setattr(dashboards, "ROLES", roles)
    mark = "{% for m in messages %}</s> {{ m.role }} {{ m.content }} {% endfor %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", mark, raising=False)
    spoken = {"w1": "w1", "w2": "w1", "w4": "w4", "w5": "w4", "w8": "", "w9": ""}
    each = [(role, f"w{int(role[1]) + 1} " * n) for n in range(5, 90, 9) for role in ("w1", "w4")]
    each.append(("w8", "w9 " * 90))  # a role that is not known
    talks = [{"messages": [{"role": role, "content": text}]} for role, text in each]
    talks[3]["messages"] += talks[4]["messages"]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    config = HarvestConfig(tokens=1000, context_size=16, batch_tokens=64, shard_tokens=64)
    text, site = Corpus.open(str(tmp_path / "talks.jsonl"), "all"), Site.parse(SITE)
    store = harvest(model, text, [site], tmp_path / "store", config)
    ids = [store.contexts(shard).ids[store.contexts(shard).keep] for shard in range(16)]
    tokens = [f"w{token}" for token in np.concatenate(ids)]
    found = collecting.role_of_every_row(store, model.tokenizer)
    assert {*tokens} == {*spoken} and [roles[one] for one in found] == [spoken[t] for t in tokens]
    made = dashboard([Dictionary.load(world / PLAIN)], store, model, tmp_path / "page.html")
    page = made.path.read_text()
    words = unpacked(page, "words")
    examples = [one for latent in unpacked(page, "chunk-0-0") for one in latent["examples"]]
    assert len(examples) > 100
    for _, _, document, centre, shown, *_ in examples:
        role = spoken[words[str(shown[centre])].strip()]
        assert document.startswith(f"{role} · talks.jsonl#" if role else "talks.jsonl#")


@pytest.fixture
def tab(browser, page):
    with watched(browser, f"file://{page}", f"file://{page}") as tab:
        tab.wait_for_selector("main h1")
        yield tab


def show(tab, view: str) -> None:
    """Go to a view by its address, and wait until it is there."""
    tab.evaluate("to => { location.hash = to; }", view)
    tab.wait_for_function("to => state.view === to", arg=view.split("/")[0])
    tab.evaluate("drawing")


def test_a_browser_shows_searches_and_follows(tab, page):
    search = unpacked(page.read_text(), "search-0")
    tab.click("text=list them")
    tab.wait_for_selector("article h2")
    assert len(listed(tab)) > 10
    tab.keyboard.press("/")
    tab.keyboard.type("#5")
    tab.wait_for_selector("text=1 of 64")
    assert listed(tab) == [5]
    word = search[9].split()[0]
    first = searched(tab, word.upper())[0]
    tab.keyboard.press("Enter")
    tab.wait_for_selector(f"text=Latent {first}")
    assert searched(tab, "no such token") == []
    assert "0 of 64" in tab.locator("[role=status]").inner_text()
    searched(tab, "")
    first = tab.locator("article h1").inner_text()
    tab.keyboard.press("Escape")
    tab.locator("body").press("j")
    tab.wait_for_function(
        "was => document.querySelector('article h1').innerText !== was", arg=first
    )
    tab.wait_for_selector("text=Most like it in variance-a0.5-k4")


def test_two_latents_stand_side_by_side_and_their_dictionaries_change_places(tab, page):
    """The partner of the one that was looked at is looked at next."""
    columns = [unpacked(page.read_text(), f"table-{number}") for number in (0, 1)]
    show(tab, "compare/d0/L9")
    partner = columns[0]["partner-1"][9]
    heads = tab.locator("article h1")
    assert [text.split("\n")[0] for text in heads.all_inner_texts()] == [
        "Latent 9uniform-k4",
        f"Latent {partner}variance-a0.5-k4",
    ]
    left, right = (heads.nth(number).bounding_box() for number in (0, 1))
    assert left["y"] == right["y"] and left["x"] + 300 < right["x"]
    paired = sum(cosine >= 0.7 for cosine in columns[0]["likeness-1"])
    said = f"{paired} of 64 latents have a partner in variance-a0.5-k4 (cosine ≥ 0.7)."
    assert tab.locator("main > p").inner_text() == said
    tab.set_viewport_size({"width": 390, "height": 900})
    assert [heads.nth(number).is_visible() for number in (0, 1)] == [True, False]
    tab.click("text=show the other one")
    assert [heads.nth(number).is_visible() for number in (0, 1)] == [False, True]
    tab.select_option("#dictionary", "1")
    tab.wait_for_function("to => location.hash === to", arg=f"#compare/d1/L{partner}")
    tab.wait_for_selector("text=variance-a0.5-k4 beside uniform-k4")


def test_any_other_dictionary_can_stand_beside_one(browser, world, store, model, tmp_path):
    first, second = (Dictionary.load(world / name) for name in (PLAIN, WEIGHTED))
    flipped = {"W_dec": first.W_dec.flip(0), "W_enc": first.W_enc.flip(1)}
    turned = like(first, b_enc=first.b_enc.flip(0), **flipped)
    out = dashboard({"a": first, "b": second, "c": turned}, store, model, tmp_path / "3.html").path
    with watched(browser, f"file://{out}#compare/d0/L9") as tab:
        tab.wait_for_selector("text=a beside b")
        tab.select_option("[aria-label=beside]", "2")
        tab.wait_for_selector("text=64 of 64 latents have a partner in c")
        assert "Latent 54" in tab.locator("article h1").nth(1).inner_text()
        tab.select_option("#dictionary", "2")
        tab.wait_for_selector("text=c beside a")
        assert tab.url.endswith("#compare/d2/p0/L54")
        tab.wait_for_selector("text=cosine 1.00: partners")


def test_a_page_of_several_blocks(browser, world, model, tmp_path):
    """Its names are the sites; of each transcoder's latents it shows what writes what they read,
    and a search also looks at the lists of other blocks."""
    sites = ["blocks.2.mlp", "blocks.0.mlp", "blocks.2.mlp"]
    corpus = Corpus.open(str(world / "text.jsonl"))
    config = HarvestConfig(tokens=800, context_size=16, batch_tokens=256, shard_tokens=2048)
    harvest(model, corpus, [*map(Site.parse, sites)], tmp_path / "store", config)
    made = [
        make_dictionary(name, seed, d_in=16, d_sae=64, sparsity=TopK(4), site=site)
        for seed, (name, site) in enumerate(zip("cab", sites, strict=True))
    ]
    named = dashboards.named_dictionaries(made)
    assert list(named) == ["blocks.0.mlp", "blocks.2.mlp c", "blocks.2.mlp b"]
    given = dashboards.named_dictionaries(dict(zip("xyz", made, strict=True)))
    assert list(given) == ["y", "x", "z"]  # names that were given stay
    dashboard(made, tmp_path / "store", model, out := tmp_path / "page.html", top=2, bands=1)
    page, (early, late, _) = out.read_text(), named.values()
    cosines = cosine_similarity(late.W_enc.T[:, None], early.W_dec[None], dim=2)
    for latent, own in enumerate(unpacked(page, "chunk-1-0")):
        expected = cosines[latent].topk(5)
        assert [one[:2] for one in own["upstream"]] == [[0, n] for n in expected.indices.tolist()]
        assert [one[2] for one in own["upstream"]] == pytest.approx(expected.values, rel=1e-3)
    assert not any(one["upstream"] for one in unpacked(page, "chunk-0-0"))
    lists = [" ".join(unpacked(page, f"search-{n}")) for n in range(3)]
    word = next(w for w in re.findall(r"\w+", lists[0]) if re.search(rf"\b{w}\b", lists[1]))
    many = sum(bool(re.search(rf"\b{word}\b", line)) for line in unpacked(page, "search-0"))
    with watched(browser, f"file://{out}#latents/d1") as tab:
        tab.wait_for_selector("article h1")
        assert tab.locator("[aria-label=beside]").count() == 0  # there is only one
        assert searched(tab, "#7") == [7]
        tab.wait_for_selector("h1:has-text('Latent 7')")  # a search opens the first that it finds
        found = [re.findall(r"\w+", unpacked(page, "search-1")[n]) for n in searched(tab, word)]
        places = [line.index(word) if word in line else 1000 for line in found]
        assert places and places == sorted(places) and places[0] < 1000
        tab.click(f"text=blocks.0.mlp: {many}")
        tab.wait_for_selector("text=Latents of blocks.0.mlp")
        assert tab.input_value("#search") == word and tab.url.startswith(f"file://{out}#latents/d0")
        assert "blocks.2.mlp c: " in tab.inner_text("main")
        tab.goto(f"file://{out}#latents/d1/L3")
        tab.wait_for_selector("text=reads what these write")
        latent = int(cosines[3].argmax())
        tab.click(f"section:has-text('reads what these write') >> text=#{latent}")
        tab.wait_for_selector(f"h1:has-text('Latent {latent}')")
        assert tab.url.endswith(f"#latents/d0/L{latent}")
        tab.goto(f"file://{out}#compare/d0")  # which has none beside it
        tab.wait_for_selector("text=Latents of blocks.0.mlp")
        check_width_and_colours(tab)


def test_a_search_finds_whole_words_of_all_contexts(browser, world, model, tmp_path):
    """Also a word of several tokens; the tokens of the list are only a few of them."""
    texts = [f" v{i}" for i in range(53)]
    texts[20:25] = [" War", " a", "wards", " tax", "ation"]
    out, said = tmp_path / "words.html", with_hostile_tokens(model, *texts)
    dashboard([Dictionary.load(world / PLAIN)], world / "store", said, out, top=2, bands=1)
    page = out.read_text()
    words, latents, lines = (unpacked(page, id) for id in ("words", "chunk-0-0", "search-0"))
    held = []
    for latent, line in zip(latents, lines, strict=True):
        contexts = ["".join(words[str(token)] for token in one[4]) for one in latent["examples"]]
        held.append(set(re.findall(r"\w+", " ".join([latent["label"], line, *contexts]).lower())))
    with watched(browser, f"file://{out}#latents/d0") as tab:
        tab.wait_for_selector("article h1")
        tab.select_option("[aria-label=sort]", "number")
        for query, wanted in (
            ("war", {i for i, own in enumerate(held) if "war" in own}),
            ("WAR, Tax", {i for i, own in enumerate(held) if {"war", "tax"} <= own}),
            ("taxation", {i for i, own in enumerate(held) if "taxation" in own}),
            ("tax*", {i for i, own in enumerate(held) if any(w.startswith("tax") for w in own)}),
            ("wardz", set()),
        ):
            assert set(searched(tab, query)) <= wanted and len(wanted) < 64
            count = tab.locator("main [role=status]").inner_text()
            assert count == f"{len(wanted)} of 64", query
    awards = {i for i, own in enumerate(held) if any("war" in word for word in own)}
    assert awards > {i for i, own in enumerate(held) if "war" in own} != set()


def test_back_and_forward_go_through_what_was_looked_at(tab, page):
    def place() -> tuple[str, str]:
        tab.evaluate("drawing")
        return tab.url.partition("#")[2], tab.locator("main").inner_text()

    places = [place()]
    for step in (
        lambda: tab.click("text=list them"),
        lambda: tab.locator(".row[role=option] >> nth=3").click(),
        lambda: (tab.fill("#search", "9"), tab.fill("#search", "9 w%/é")),  # typed: one step
        lambda: tab.click("nav >> text=Side by side"),
    ):
        step()
        tab.wait_for_function("was => location.hash.slice(1) !== was", arg=places[-1][0])
        tab.wait_for_selector("article h1")
        places.append(place())
    assert [address.count("/") for address, _ in places] == [0, 2, 2, 3, 3]
    for turn, passed in (("back", places[-2::-1]), ("forward", places[1:])):
        for address, text in passed:
            tab.evaluate(f"history.{turn}()")
            tab.wait_for_function("to => location.hash.slice(1) === to", arg=address)
            tab.wait_for_function(
                "text => document.querySelector('main').innerText === text", arg=text
            )
    tab.goto(f"file://{page}#{places[3][0]}")
    tab.reload()
    tab.wait_for_selector("article h1")
    assert tab.input_value("#search") == "9 w%/é" and place() == places[3]


def test_the_list_is_sorted_and_filtered(tab, page):
    columns = unpacked(page.read_text(), "table-0")
    tab.click("text=Latents")
    tab.wait_for_selector(".row[role=option]")
    assert tab.input_value("[aria-label=sort]") == "recognisable"
    tab.select_option("[aria-label=sort]", "density")
    by_density = sorted(range(64), key=lambda i: (-columns["density"][i], i))
    assert listed(tab) == by_density[: len(listed(tab))]
    tab.select_option("[aria-label=sort]", "number")
    assert listed(tab)[:5] == [0, 1, 2, 3, 4]
    tab.click("text=least first")
    assert listed(tab)[:5] == [63, 62, 61, 60, 59]
    tab.select_option("[aria-label=sort]", "detection")
    assert listed(tab)[:3] == [63, 62, 61]
    tab.click("text=most first")
    assert listed(tab)[:5] == [0, 1, 2, 4, 5]  # 3 has no score and comes last
    kept = {
        "all": set(range(64)),
        "fires": {i for i in range(64) if columns["density"][i] > 0},
        "silent": {i for i in range(64) if columns["density"][i] == 0},
        "dense": {i for i in range(64) if columns["density"][i] > 0.1},
        "alone": {i for i in range(64) if columns["likeness-1"][i] < 0.7},
        "paired": {i for i in range(64) if columns["likeness-1"][i] >= 0.7},
    }
    assert 0 < len(kept["dense"]) < 64
    for name, wanted in kept.items():
        tab.select_option("[aria-label=show]", name)
        assert f"{len(wanted)} of 64" in tab.locator("[role=status]").inner_text()
        assert set(listed(tab)) <= wanted
    tab.select_option("[aria-label=show]", "all")
    # A bound that cuts: latents of a world this small all fire on more than a hundredth.
    tab.evaluate("document.querySelector('[aria-label=\"density from\"]').options[1].value = 0.06")
    tab.select_option("[aria-label='density from']", "0.06")
    often = sum(density >= 0.06 for density in columns["density"])
    assert f"{often} of 64" in tab.locator("[role=status]").inner_text() and 0 < often < 64


def test_points_are_named_opened_and_selected(tab, page):
    columns = unpacked(page.read_text(), "table-0")
    assert tab.input_value("[aria-label=up]") == "detection"
    tab.select_option("[aria-label=across]", "pca1")
    tab.select_option("[aria-label=up]", "pca2")
    tab.locator("canvas").scroll_into_view_if_needed()
    box = tab.locator("canvas").bounding_box()
    width, height = round(box["width"]) - 2, round(box["height"]) - 2  # of the border
    x, y = columns["pca1"], columns["pca2"]

    def place(i: int) -> tuple[float, float]:
        across = (x[i] - min(x)) / (max(x) - min(x)) * (width - 66)
        up = (y[i] - min(y)) / (max(y) - min(y)) * (height - 46)
        return 54 + across, height - 34 - up

    alive = [i for i in range(64) if columns["density"][i] > 0]
    low, high = min(alive, key=lambda i: x[i]), max(alive, key=lambda i: x[i])
    left, top = box["x"] + 1, box["y"] + 1
    tab.mouse.move(left + place(high)[0], top + place(high)[1])
    tab.wait_for_selector(f"text=latent {high}:")
    middle = round((place(low)[0] + place(high)[0]) / 2)
    tab.mouse.move(left + 10, top + 10)  # the corners are round
    tab.mouse.down()
    tab.mouse.move(left + middle, top + height - 10)
    tab.mouse.up()
    tab.wait_for_selector("text=selection ×")
    inside = {i for i in alive if place(i)[0] <= middle}
    assert set(listed(tab)) <= inside and 0 < len(inside) < len(alive)
    assert f"{len(inside)} of 64" in tab.locator("[role=status]").inner_text()
    tab.click("text=selection ×")
    assert "64 of 64" in tab.locator("[role=status]").inner_text()
    tab.click("text=Overview")
    tab.locator("canvas").click(position={"x": place(low)[0], "y": place(low)[1]})
    tab.wait_for_selector(f"text=Latent {low}")


def test_a_latent_has_an_address_and_its_tokens_their_activations(tab, page):
    tab.goto(f"file://{page}#L7")
    tab.reload()
    tab.wait_for_selector("text=Latent 7")
    examples = unpacked(page.read_text(), "chunk-0-0")[7]["examples"]
    value, sources = examples[0][1], examples[0][6]
    title = tab.locator("article .centre").first.get_attribute("title")
    assert float(title) == pytest.approx(value, rel=0.01)
    assert tab.locator("article h1 a").get_attribute("href") == "#latents/d0/L7"
    context = tab.locator("article .context").first
    shown, held = context.inner_text(), examples[0]
    assert held[2] in shown and f"dimensions {sources[0][0]}" not in shown
    context.locator("button").press("Enter")
    assert f"dimensions {sources[0][0]} (+{sources[0][1]}" in context.inner_text()
    assert context.locator(".token:visible").count() == len(held[4]) > 0


@over(width=[390, 1280])
def test_a_tokens_activation_is_shown_by_tap_and_by_keyboard(browser, page, width):
    """As by the mouse, which finds its title."""
    size = {"width": width, "height": 900}
    address = f"file://{page}#latents/d0/L7"
    with watched(browser, address, f"file://{page}", viewport=size, has_touch=True) as tab:
        centre = tab.locator("article .centre").first
        shown = "node => [node.title, getComputedStyle(node, '::after').content]"
        assert centre.evaluate(shown)[1] == "none"
        centre.tap()
        title, text = centre.evaluate(shown)
        assert float(title) > 0 and text == f'"\xa0{title}"'
        tab.locator(".more").first.focus()
        assert centre.evaluate(shown)[1] == "none"
        tab.keyboard.press("Tab")
        title, text = tab.evaluate(f"({shown})(document.activeElement)")
        assert float(title) > 0 and text == f'"\xa0{title}"'
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_a_prompt_shows_its_latents_and_the_view_asked_for_last_stays(tab):
    tab.click("text=Prompts")
    tab.wait_for_selector("text=Sentences, as uniform-k4 sees them")
    assert tab.locator(".card tr").count() >= 1
    shaded = "[...document.querySelectorAll('.ink')].filter(n => n.style.background).length"
    assert tab.evaluate(shaded) >= 1
    tab.locator(".sentence .token").first.click()
    assert "not explained" in tab.locator(".ink[title]").first.get_attribute("title")
    assert tab.evaluate(shaded) == 0
    clicks = "[...document.querySelectorAll('nav button')].forEach(button => button.click())"
    for order in ("", ".reverse()"):
        tab.evaluate(clicks.replace("]", f"]{order}", 1) + "; drawing")
        shown = tab.locator("nav [aria-current=true]").inner_text()
        heading = tab.locator("main h1").first.inner_text()
        assert (shown, heading[:4]) == (("Overview", "What") if order else ("Prompts", "Sent"))


def test_nothing_is_wider_than_the_window_in_light_or_dark_and_paper_is_white(tab):
    views = ("overview", "latents", "compare", "prompts")
    check_width_and_colours(tab, lambda view: show(tab, view), views)
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator("header").is_visible() and tab.locator("main h1").is_visible()


def test_hostile_text_does_nothing(browser, world, model, tmp_path):
    """Tokens that would end the script, reverse the line, hide, or fill the window; and a name that
    would do the first two."""
    image = "</script><img src=x onerror=alert(1)>"
    bad = with_hostile_tokens(
        model, image, "\u202eabc", "a\u200b\u200d\ufeffb", "y" * 10_000, "c\n\td"
    )
    found, out = {f"{image}\u202e": Dictionary.load(world / PLAIN)}, tmp_path / "bad.html"
    dashboard(found, world / "store", bad, out, prompts=["w1 w2 w3"])
    with watched(browser, f"file://{out}") as tab:
        for view in ("overview", "latents/L1", "prompts"):
            show(tab, view)
            text = tab.locator("main").inner_text()
            assert "<img src=x" in text and tab.locator("img").count() == 0
            assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
            if view == "latents/L1":
                assert r"\u202eabc" in text and r"a\u200b\u200d\ufeffb" in text
                assert "y" * 80 + "…" in text and "y" * 81 not in text and "c↵→d" in text
                assert not set("\u202e\u200b\u200d\ufeff") & set(text)


def test_a_notebook_shows_it_inline(browser, world, store, model, tmp_path):
    """In a frame without an address of its own."""
    made = dashboard([Dictionary.load(world / PLAIN)], store, model, tmp_path / "own.html")
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><meta charset='utf-8'>{made._repr_html_()}")
    with watched(browser, f"file://{notebook}") as tab:
        frame = tab.frames[1]
        frame.wait_for_selector("main canvas")
        frame.click("text=list them")
        frame.click("article .columns.wide a >> nth=0")
        frame.click("article h1 a")
        assert frame.locator("main h1").first.inner_text() == "Latents of uniform-k4"
        assert [f.url for f in tab.frames] == [f"file://{notebook}", "about:srcdoc"]


# --- the live page ------------------------------------------------------------------------------

AS_JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(world, model):
    pytest.importorskip("starlette", reason="the extra page is not installed")
    from starlette.testclient import TestClient

    session = Session(model, dashboards.named_dictionaries([world / PLAIN, world / WEIGHTED]))
    return TestClient(application("the page", session, "secret", 8123), "http://127.0.0.1:8123")


def test_only_this_machine_with_the_token_is_answered(client):
    assert client.get("/secret/").text == "the page"
    assert "access-control-allow-origin" not in client.get("/secret/").headers
    question = json.dumps({"text": "w1 w2", "dictionary": 0})
    evil_host, evil_origin = {"host": "evil.example"}, {"origin": "http://evil.example"}
    for path, body, headers, status in (
        ("/secret/ask", question, {}, 200),
        ("/wrong/ask", question, {}, 404),
        ("/secret/ask", question, evil_host, 404),
        ("/secret/ask", question, evil_origin, 404),
        ("/secret/ask", "{}", {"content-type": "text/plain"}, 415),  # any page may post that
        ("/secret/ask", json.dumps({"text": "x" * 20_000}), {}, 413),
        ("/secret/ask", "[" * 15_999, {}, 400),
        ("/secret/ask", "[", {}, 400),
    ):
        reply = client.post(path, content=body, headers=AS_JSON | headers)
        assert reply.status_code == status, (path, headers)
    for path, headers in (("/wrong/", {}), ("/secret/", evil_host), ("/", {})):
        assert client.get(path, headers=headers).status_code == 404


def test_questions_are_answered_or_refused_in_a_sentence(client, world):
    found = client.post("/secret/ask", json={"text": "w1 w2 w3", "dictionary": 1}).json()["tokens"]
    one = inspect(world / WEIGHTED, text="w1 w2 w3", model=str(world / "model"))
    assert [[a.latent for a in t.latents] for t in one.tokens] == [
        [latent for latent, _ in active] for _, active in found
    ]
    steer = {"text": "w1 w2 w3", "dictionary": 0, "latent": 5, "strength": 50.0, "tokens": 5}
    changed = client.post("/secret/ask", json=steer).json()
    assert changed["change"] > 0
    assert not changed["cut"]
    same = client.post("/secret/ask", json=steer | {"strength": 0}).json()
    assert same["before"] == same["after"] == changed["before"] and same["change"] < 1e-3
    for wrong, said in (
        ({"text": ""}, "there is no text"),
        ({"text": "w" * 2001}, "the text has 2,001 characters, and at most 2,000"),
        ({"text": "\ud800"}, "not UTF-8"),
        ({"text": "w1 " * 200}, "with 5 more they are too many"),
        ({"dictionary": 2}, "no such dictionary"),
        ({"latent": 64}, "there is no latent 64"),
        ({"strength": "much"}, "a strength is a number"),
        ({"tokens": 1000}, "from 1 to 60 tokens"),
    ):
        asked = json.dumps(steer | wrong)
        reply = client.post("/secret/ask", content=asked, headers=AS_JSON)
        assert reply.status_code == 400 and said in reply.json()["error"]


def test_the_model_writes_and_waits_for_a_limited_time(world, model):
    session = Session(model, dashboards.named_dictionaries([world / PLAIN]), seconds=0.0)
    steer = {"text": "w1 w2", "dictionary": 0, "latent": 5, "strength": 1.0, "tokens": 50}
    answer = session.answer(steer)
    assert answer["cut"] and len(answer["before"].split()) < 50
    with session._busy, pytest.raises(UsageError, match="busy"):
        session.answer(steer)


def test_a_browser_asks_the_model(browser, world, tmp_path):
    """Over the real server, in a process of its own."""
    read = ("--store", world / "store", "--model", world / "model")
    with serving(world / PLAIN, *read, "--out", tmp_path / "live.html") as address:
        port = int(address.split(":")[2].split("/")[0])
        halves = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(200)]
        for half in halves:
            half.sendall(b"GET / HTTP/1.1\r\nHo")
        assert halves[0].recv(1) == b""  # closed, to make room
        with watched(browser, f"{address}#live/d0", address, known=("413",)) as tab:
            text = tab.locator("textarea")
            text.fill("")
            text.press_sequentially("w1 /jk w2")  # which are keys of the page elsewhere
            assert text.input_value() == "w1 /jk w2"
            tab.click("#read")
            tab.wait_for_selector(".card .context")
            tab.click("text=Latents")
            tab.click("text=steer this")
            latent = tab.input_value("[aria-label=latent]")
            tab.click("#write")
            tab.wait_for_selector(f"text=/latent {latent} turned by 1 × (?!0 )[0-9]/")
            for number, is_there in (("", False), ("64", False), (latent, True)):
                tab.fill("[aria-label=latent]", number)
                assert tab.is_enabled("#write") == is_there
            text.fill("w" * 30_000)
            tab.click("#read")
            tab.wait_for_selector("text=at most 2,000 characters are read")
            assert tab.locator(".card").count() == 0  # the old answers are gone
