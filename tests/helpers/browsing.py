"""A page in a browser: what it complains of or asks for is an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watched(
    browser: Any, address: str, allowed: str = "file:", known: tuple[str, ...] = (), **options: Any
) -> Iterator[Any]:
    """A tab with a page. It must ask for nothing but ``allowed`` addresses, and complain of nothing
    but what is ``known``, each once."""
    wrong: list[str] = []
    tab = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append("dialog"))
    tab.on("request", lambda r: None if r.url.startswith(allowed) else wrong.append(r.url))
    tab.goto(address)
    yield tab
    tab.close()
    assert len(wrong) == len(known) and all(map(str.__contains__, wrong, known)), wrong


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
