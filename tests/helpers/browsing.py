"""A page in a browser: what it complains of or asks for is kept."""

from typing import Any


def watched(browser: Any, allowed: str, **options: Any) -> tuple[Any, list[str]]:
    """A tab, and what it complains of or asks for outside the allowed address."""
    wrong: list[str] = []
    tab = browser.new_page(**options)
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append("dialog"))
    tab.on("request", lambda r: None if r.url.startswith(allowed) else wrong.append(r.url))
    return tab, wrong


def check_width_and_colours(tab: Any, show: Any = lambda view: None, views: Any = ("",)) -> None:
    """Nothing is wider than the window, on a small screen and a large one, in light and dark; and a
    button turns one into the other."""
    colour = "getComputedStyle(document.body).backgroundColor"
    for width in (390, 1280):
        tab.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            for view in views:
                show(view)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                assert (tab.evaluate(colour) == "rgb(255, 255, 255)") == (scheme == "light")
    tab.click("#theme")
    assert tab.evaluate(colour) == "rgb(255, 255, 255)"
