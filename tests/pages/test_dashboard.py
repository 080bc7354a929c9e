"""The page: what is collected is what a slow look finds, and a browser can use it."""

import base64
import gzip
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from command_line import SITE, call, works

from llm_wsae import dashboard, inspect
from llm_wsae.data.store import ActivationStore
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.dictionary.explanations import Explanation, Score, keep_explanations
from llm_wsae.dictionary.sparsity import JumpReLU
from llm_wsae.errors import UsageError
from llm_wsae.inspecting.readout import Vocabulary
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.model.site import Site
from llm_wsae.pages import collecting
from llm_wsae.pages.collecting import collect, context_of_every_row, windows
from llm_wsae.pages.dashboard import named_dictionaries
from llm_wsae.pages.live import Session, application
from llm_wsae.pages.payload import Words, shown

PLAIN, WEIGHTED = "trained/uniform-k4", "trained/variance-a0.5-k4"
TOP, BANDS = 3, 2


@pytest.fixture(scope="module")
def store(world):
    return ActivationStore.open(world / "store")


def of_kind(world, kind: str) -> Dictionary:
    """The plain dictionary, as it is or with thresholds in the place of k."""
    one = Dictionary.load(world / PLAIN)
    if kind == "topk":
        return one
    parts = {name: getattr(one, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "info")}
    return Dictionary(**parts, sparsity=JumpReLU(), threshold=torch.full((one.d_sae,), 0.4))


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_what_is_collected_is_what_a_slow_look_finds(world, store, kind, monkeypatch):
    monkeypatch.setattr(collecting, "ROWS_AT_ONCE", 700)  # pieces that end within contexts
    dictionary = of_kind(world, kind)
    rows = store.rows(Site.parse(SITE), 0, store.num_rows).float()
    dense = dictionary.encode(rows)
    context = torch.from_numpy(context_of_every_row(store)).long()
    found, floors = collect(store, {"one": dictionary}, TOP, BANDS)
    one, floor = found["one"], floors["one"]
    assert one.rows_seen == len(rows)
    assert torch.equal(one.count, (dense > 0).sum(0))
    torch.testing.assert_close(one.total, dense.sum(0))
    assert torch.equal(one.histogram.sum(1), one.count)
    fires = (dense > 0).float()
    both = fires.T @ fires
    either = fires.sum(0)[:, None] + fires.sum(0) - both
    overlap = (both / either.clamp(min=1)).fill_diagonal_(0)
    torch.testing.assert_close(one.overlap, overlap.topk(5, dim=1).values)
    torch.testing.assert_close(overlap.gather(1, one.together), one.overlap)
    smallest = dense.where(dense > 0, torch.inf).amin(1)
    torch.testing.assert_close(floor, smallest)
    for latent in range(dictionary.d_sae):
        best = {}
        for row in dense[:, latent].argsort(descending=True).tolist():
            if dense[row, latent] > 0:
                best.setdefault(int(context[row]), row)
        wanted = list(best.values())[:TOP]
        values = one.value[latent, : len(wanted)]
        torch.testing.assert_close(values, dense[wanted, latent])
        assert (one.row[latent, len(wanted) : TOP] == -1).all()
        bands = one.row[latent, TOP:]
        if (bands >= 0).all():
            torch.testing.assert_close(one.value[latent, TOP:], dense[bands, latent])
            assert one.value[latent, TOP] >= one.value[latent, TOP + 1]
        else:
            assert one.count[latent] < BANDS
    shown_texts = windows(
        store, dictionary, torch.arange(dictionary.d_sae), one.row, floor, before=2, after=1
    )
    where = store.locate(one.row.flatten().clamp(min=0))
    for example, row in enumerate(one.row.flatten().tolist()):
        ids, activations = shown_texts.ids[example], shown_texts.activation[example]
        if row < 0:
            assert (ids == -1).all() and not activations.any()
            continue
        latent, at = example // one.row.shape[1], int(where.position[example])
        assert ids[2] == where.ids[example, at]
        assert activations[2] == pytest.approx(float(dense[row, latent]), rel=1e-4)
        if row + 1 < len(rows) and context[row + 1] == context[row] and ids[3] >= 0:
            assert activations[3] == pytest.approx(float(dense[row + 1, latent]), abs=1e-4)


def unpacked(page: str, name: str):
    text = re.search(rf'id="{name}">([^<]*)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(text)))


LABEL = "names of </script><b>months</b>"


@pytest.fixture(scope="module")
def page(world):
    out = world / "page.html"
    scores = {"detection": Score(0.75, (0.5, 1.0), 16, 15)}
    keep_explanations(world / PLAIN, [Explanation(5, LABEL, "a model", scores)])
    result = works(
        "dashboard", world / PLAIN, world / WEIGHTED, "--store", world / "store",
        "--model", world / "model", "--out", out, "--prompt", "one two three", "--top", TOP,
        "--bands", BANDS, "--json",
    )  # fmt: skip
    assert result.json["page"] == str(out)
    return out


def test_the_page_knows_both_dictionaries_and_each_latents_partner(world, page):
    text = page.read_text()
    about = json.loads(re.search(r'id="about">(.*?)</script>', text)[1])
    assert [one["name"] for one in about["dictionaries"]] == ["uniform-k4", "variance-a0.5-k4"]
    assert [one["partner"] for one in about["dictionaries"]] == [1, 0]
    first, second = (Dictionary.load(world / name) for name in (PLAIN, WEIGHTED))
    cosine = (
        torch.nn.functional.normalize(first.W_dec, dim=1)
        @ torch.nn.functional.normalize(second.W_dec, dim=1).T
    )
    columns = unpacked(text, "table-0")
    assert columns["partner"] == cosine.argmax(1).tolist()
    assert columns["likeness"] == pytest.approx(cosine.amax(1).tolist(), rel=1e-3)
    latents = unpacked(text, "chunk-0-0")
    assert len(latents) == min(64, first.d_sae) == len(unpacked(text, "search-0"))
    assert len(latents[0]["promotes"]) == len(latents[0]["suppresses"])
    words = unpacked(text, "words")
    number, value, _, centre, tokens, shades = latents[
        int(torch.tensor(columns["density"]).argmax())
    ]["examples"][0]
    assert number == 0 and value > 0 and shades[centre] == 9 and len(words[tokens[centre]])
    (prompt,) = about["prompts"]
    assert set(prompt) == {"uniform-k4", "variance-a0.5-k4"}


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
    tab.locator("#search").fill("MONTHS")
    row = tab.locator(".row[role=option]")
    assert row.count() == 1 and row.inner_text().startswith(f"5\n{LABEL} · ")
    row.click()
    tab.wait_for_selector("text=Explanation by a model")
    said = tab.locator("article").inner_text()
    assert LABEL in said and "detection 0.75 [0.50, 1.00], 15 of 16" in said


def test_text_of_a_corpus_is_harmless():
    assert shown("a\u202eb\u200bc\x00") == r"a\u202eb\u200bc\x00"
    assert shown("\n\t") == "↵→" and len(shown("x" * 10_000)) == 81
    words = Words(Vocabulary(None))
    assert words.number(7) == words.number(7) == 0 and words.texts == ["<7>"]


def test_a_notebook_shows_it_inline(world, store):
    model = LanguageModel.load(str(world / "model"))
    made = dashboard([Dictionary.load(world / PLAIN)], store, model, world / "own.html")
    assert made._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert "Side by side" in (world / "own.html").read_text()  # the script knows it, unused


def test_what_cannot_be_shown_is_refused_and_nothing_is_written(world, tmp_path):
    ask = ("--store", world / "store", "--model", world / "model", "--out")
    for words, said in (
        (("dashboard", *ask, tmp_path / "p.html"), "name at least one dictionary"),
        (("dashboard", world / PLAIN, *ask, tmp_path / "p.txt"), "so --out cannot be"),
        (("dashboard", world / PLAIN, *ask, tmp_path / "p.html", "--port", 1), "is for --live"),
        (
            ("dashboard", "unread", *ask, tmp_path / "p.html", "--live", "--port", 70_000),
            "port 70000 cannot be used",
        ),
        (("dashboard", world / "nowhere", *ask, tmp_path / "p.html"), "nowhere"),
        (("dashboard", world / PLAIN, *ask, tmp_path / "p.html", "--top", 0), "at least 1"),
        (("dashboard", world / PLAIN, *ask, tmp_path / "p.html", "--prompt", ""), "text is empty"),
    ):
        result = call(*words)
        assert result.code in (1, 2) and said in result.err and result.out == ""
    other = Dictionary.load(world / PLAIN)
    other.info = replace(other.info, site="blocks.0.hook_resid_post")
    with pytest.raises(UsageError, match="a page shows dictionaries of one site"):
        dashboard([world / PLAIN, other], world / "store", "unused", tmp_path / "p.html")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tab(browser, page):
    """The page, opened; whatever it complains of or asks for is an error."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda r: wrong.append(r.url) if not r.url.startswith("file:") else None)
    tab.goto(f"file://{page}")
    tab.wait_for_selector("main h1")
    yield tab
    assert wrong == []
    tab.close()


def test_a_browser_shows_searches_sorts_and_follows(tab, page):
    tab.click("text=its latents >> nth=0")
    tab.wait_for_selector("article h2")
    rows = tab.locator(".row[role=option]")
    densities = [float(t) for t in tab.locator(".row[role=option] :nth-child(3)").all_inner_texts()]
    assert densities == sorted(densities, reverse=True) and rows.count() > 10
    tab.keyboard.press("/")
    tab.keyboard.type("#5")
    assert rows.count() >= 1 and any(t.startswith("5\n") for t in rows.all_inner_texts())
    tab.locator("#search").fill("no such token")
    assert rows.count() == 0 and "0 of 64" in tab.locator("[role=status]").inner_text()
    tab.locator("#search").fill("")
    first = tab.locator("article h1").inner_text()
    tab.keyboard.press("Escape")
    tab.locator("body").press("j")
    tab.wait_for_function(
        "was => document.querySelector('article h1').innerText !== was", arg=first
    )
    tab.click("text=Side by side")
    tab.wait_for_selector("text=Its partner in variance-a0.5-k4")
    likeness = [float(t) for t in tab.locator(".row[role=option] :nth-child(3)").all_inner_texts()]
    assert likeness == sorted(likeness)
    tab.click("article p a")
    tab.wait_for_selector("text=variance-a0.5-k4 beside uniform-k4")
    assert "#compare/d1/L" in tab.url


def test_a_latent_has_an_address_and_a_prompt_its_latents(tab, page):
    tab.goto(f"file://{page}#L7")
    tab.reload()
    tab.wait_for_selector("text=Latent 7")
    tab.click("text=Prompts")
    tab.wait_for_selector("text=Sentences, as uniform-k4 sees them")
    assert tab.locator(".card tr").count() >= 1


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window_in_light_or_dark(tab, page, width):
    tab.set_viewport_size({"width": width, "height": 900})
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        for view in ("overview", "latents", "compare", "prompts"):
            tab.goto(f"file://{page}#{view}/d0")
            tab.reload()
            tab.wait_for_selector("main h1")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (colour == "rgb(255, 255, 255)") == (scheme == "light")


def test_hostile_text_does_nothing(browser, world, page, tmp_path):
    """Tokens that would end the script, reverse the line or fill the window."""
    bad = ["</script><img src=x onerror=alert(1)>", "\u202eabc", "y" * 10_000]

    class Hostile:
        name_or_path = "hostile"

        def convert_ids_to_tokens(self, token):
            return bad[token % 3]

        def decode(self, ids):
            return bad[ids[0] % 3]

    from llm_wsae.pages import dashboard as module

    model = LanguageModel.load(str(world / "model"))
    ordinary = module.Vocabulary
    module.Vocabulary = lambda tokenizer: ordinary(Hostile())
    try:
        dashboard([world / PLAIN], world / "store", model, tmp_path / "bad.html")
    finally:
        module.Vocabulary = ordinary
    tab, wrong = browser.new_page(), []
    tab.on("dialog", lambda dialog: wrong.append("dialog"))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda r: wrong.append(r.url) if not r.url.startswith("file:") else None)
    tab.goto(f"file://{tmp_path / 'bad.html'}#L1")
    tab.wait_for_selector("article .context")
    assert tab.locator("img").count() == 0 and "<img src=x" in tab.locator("article").inner_text()
    assert wrong == [] and tab.evaluate("document.documentElement.scrollWidth") <= 1280
    tab.close()


# --- the live page ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(world):
    model = LanguageModel.load(str(world / "model"))
    return Session(model, named_dictionaries([world / PLAIN, world / WEIGHTED]))


@pytest.fixture(scope="module")
def client(session):
    pytest.importorskip("starlette", reason="the extra page is not installed")
    from starlette.testclient import TestClient

    return TestClient(application("the page", session, "secret", 8123), "http://127.0.0.1:8123")


def test_only_this_machine_with_the_token_is_answered(client):
    assert client.get("/secret/").text == "the page"
    question = {"text": "w1 w2", "dictionary": 0}
    assert client.post("/secret/ask", json=question).status_code == 200
    refused = (
        client.get("/wrong/"),
        client.get("/secret/", headers={"host": "evil.example"}),
        client.post("/wrong/ask", json=question),
        client.post("/secret/ask", json=question, headers={"origin": "http://evil.example"}),
        client.post("/secret/ask", json=question, headers={"host": "evil.example"}),
        client.get("/"),
    )
    assert [reply.status_code for reply in refused] == [404] * 6
    plain_text = {"content-type": "text/plain"}  # what another page may post without asking
    assert client.post("/secret/ask", content="{}", headers=plain_text).status_code == 415
    assert client.post("/secret/ask", json={"text": "x" * 20_000}).status_code == 413
    assert "access-control-allow-origin" not in client.get("/secret/").headers


def test_questions_are_answered_or_refused_in_a_sentence(client, world):
    found = client.post("/secret/ask", json={"text": "w1 w2 w3", "dictionary": 1}).json()["tokens"]
    one = inspect(world / WEIGHTED, text="w1 w2 w3", model=str(world / "model"))
    assert [[a.latent for a in t.latents] for t in one.tokens] == [
        [latent for latent, _ in active] for _, active in found
    ]
    steer = {"text": "w1 w2 w3", "dictionary": 0, "latent": 5, "strength": 50.0, "tokens": 5}
    changed = client.post("/secret/ask", json=steer).json()
    assert changed["change"] > 0
    same = client.post("/secret/ask", json=steer | {"strength": 0}).json()
    assert same["before"] == same["after"] == changed["before"] and same["change"] < 1e-3
    for wrong, said in (
        ({"text": ""}, "1 to 2000 characters"),
        ({"dictionary": 2}, "no such dictionary"),
        ({"latent": 64}, "there is no latent 64"),
        ({"strength": "much"}, "a strength is a number"),
        ({"tokens": 1000}, "from 1 to 60 tokens"),
    ):
        reply = client.post("/secret/ask", json=steer | wrong)
        assert reply.status_code == 400 and said in reply.json()["error"]
    assert (
        client.post(
            "/secret/ask", content="[", headers={"content-type": "application/json"}
        ).status_code
        == 400
    )


def test_a_browser_asks_the_model(browser, world, tmp_path):
    """Over the real server, in a process of its own."""
    command = [
        sys.executable, "-m", "llm_wsae", "dashboard", world / PLAIN, "--store", world / "store",
        "--model", world / "model", "--out", tmp_path / "live.html", "--live",
    ]  # fmt: skip
    server = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        address = next(line.split()[1] for line in server.stderr if line.startswith("open http"))
        tab, wrong = browser.new_page(), []
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("request", lambda r: None if r.url.startswith(address) else wrong.append(r.url))
        tab.goto(f"{address}#live/d0")
        tab.locator("textarea").fill("w1 w2 w3")
        tab.click("#read")
        tab.wait_for_selector(".card .context")
        tab.click("#write")
        tab.wait_for_selector("text=turned by 30")
        assert wrong == []
        tab.close()
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
