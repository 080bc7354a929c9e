"""A page in a browser: what it complains of or asks for is an error."""

import signal
import subprocess
import sys
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


@contextmanager
def serving(*words: Any) -> Iterator[str]:
    """The address of a live page of ``dashboard``, whose server is a process of its own."""
    command = [sys.executable, "-m", "llm_wsae", "dashboard", *map(str, words), "--live"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield next(line.split()[1] for line in server.stderr or () if line.startswith("open http"))
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0


def listed(tab: Any) -> list[int]:
    """The latents that the list shows, from its top."""
    return [int(t) for t in tab.locator(".row[role=option] :first-child").all_inner_texts()]


def searched(tab: Any, query: str) -> list[int]:
    """The latents that the list shows for a search."""
    tab.locator("#search").fill(query)
    tab.wait_for_selector(".list[aria-busy=false]", state="attached")
    return listed(tab)


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
