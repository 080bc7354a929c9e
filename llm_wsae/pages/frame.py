"""A page of one file: data, style and script inline, and a policy that forbids every request.

A frame is an HTML file of this folder with three gaps: ``@@policy@@``, ``@@style@@`` (what all
pages share, ``style.css``) and ``@@data@@``, the ``<script>`` blocks that hold its data.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_wsae.artifact.provenance import plain
from llm_wsae.terminal import printable

COLOURS = 6  # of series in ``report.html``, numbered from 0
_MARK = '<script type="application/json" id="about">'


def filled(
    frame: str,
    about: Mapping[str, Any],
    blocks: Sequence[tuple[str, str]] = (),
    asks_server: bool = False,
) -> str:
    """A frame with its data: ``about`` as JSON, whose strings are made printable as names may be
    others', and further ``blocks`` of text by their ids. The policy allows the frame's own style
    and script and nothing else, except requests to its own server if the page ``asks_server``."""
    page = _read(frame).replace("@@style@@", _read("style.css"), 1)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        f"connect-src '{'self' if asks_server else 'none'}'; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(_harmless(plain(about)), ensure_ascii=False).replace("<", "\\u003c")
    parts = [f"{_MARK}{data}</script>"]
    parts += [f'<script type="text/plain" id="{name}">{text}</script>' for name, text in blocks]
    return page.replace("@@policy@@", policy, 1).replace("@@data@@", "\n".join(parts), 1)


def is_page(path: Path) -> bool:
    """Whether a file is a page that was made here."""
    return _MARK.encode() in path.read_bytes()


def _harmless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _harmless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_harmless(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
