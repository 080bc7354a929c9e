"""Requests to a Hub, which may be anybody's server: what it answers is read up to a size, and for
a time.

The client's own downloads are not used. They name files in the cache, and what they replace or
delete, after headers of the answer, and read as long as the server sends.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import parse_qs, quote, urlsplit

from llm_wsae.errors import LlmWsaeError, shown
from llm_wsae.outside import hub_is_unreachable, mapping, parse_json, text

COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 30
"""Seconds in which something must arrive."""
LONGEST_ANSWER = 60.0
"""Seconds in which an answer must be complete, a file's content apart."""
SLOWEST = 10_000
"""Bytes of a file's content that must arrive in a second, on average."""
_LARGEST_ANSWER = 8 << 20  # bytes; a page of a listing has a thousand files
_TRIES = 5  # of a download that brings nothing


def ask(path: str, cursor: str | None = None) -> tuple[Any, str | None]:
    """What the Hub's API answers for ``/api/models/<path>``, a JSON value, and where the listing
    goes on (a page has a ``cursor``), if it does.

    Raises LlmWsaeError for an answer that is no JSON, too long or too slow, and the client's errors
    for refusals and broken connections.
    """
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/models/{path}"
    asked = {"recursive": "true"} if path.partition("/tree/")[1] else {}
    if cursor is not None:
        asked["cursor"] = cursor
    body = bytearray()
    with _answer(url, LONGEST_ANSWER, asked) as response:
        for piece in response.iter_raw():
            body += piece
            if len(body) > _LARGEST_ANSWER:
                raise LlmWsaeError(
                    f"the Hub ({constants.ENDPOINT}) answered {path} with more than "
                    f"{_LARGEST_ANSWER:,} bytes, which are not read"
                )
        after = response.links.get("next", {}).get("url")
    if after is not None:  # only the cursor is believed: the address could be anyone's
        (after,) = parse_qs(urlsplit(after).query).get("cursor", [""])[:1]
        if not after:
            raise ValueError(f"{path} has another page, but no cursor to it")
    return parse_json(bytes(body), f"the answer of the Hub ({constants.ENDPOINT}) to {path}"), after


def references(repo_id: str, kind: str) -> dict[str, str]:
    """The ``branches`` or ``tags`` of a repository, and the commit of each. Raises as ``ask`` does,
    and ValueError for an answer of another form."""
    found, _ = ask(f"{repo_id}/refs")
    listed = mapping(found).get(kind)
    names = {
        text(mapping(one).get("name")): mapping(one).get("targetCommit") for one in listed or ()
    }
    return {name: commit_of(commit) for name, commit in names.items() if name}


def commit_of(value: Any) -> str:
    """The value if it is the id of a commit. Raises ValueError for anything else: a commit that a
    server names becomes the name of a folder."""
    if not (isinstance(value, str) and COMMIT.fullmatch(value)):
        raise ValueError(f"{shown(value)} is not the id of a commit")
    return value


def download(
    repo_id: str,
    commit: str,
    path: str,
    file: IO[bytes],
    size: int,
    progress: Callable[[int], object],
) -> None:
    """Add to an open ``file`` what it lacks of ``size`` bytes; it may hold the beginning.

    ``progress`` is told how many bytes arrive.
    A connection that breaks is opened again, where it broke. Raises LlmWsaeError if the server
    sends another number of bytes, or too slowly, and the client's errors otherwise.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    url = f"{constants.ENDPOINT}/{repo_id}/resolve/{commit}/{quote(path)}"
    until = time.monotonic() + LONGEST_ANSWER + size / SLOWEST
    tries = _TRIES
    if file.tell() > size:
        _empty(file)
    while (have := file.tell()) < size:
        header = {"Range": f"bytes={have}-"} if have else {}
        try:
            with _answer(url, until - time.monotonic(), headers=header) as response:
                if response.status_code != 206:
                    _empty(file)
                    have = 0
                for piece in response.iter_raw():
                    if file.tell() + len(piece) > size:
                        raise LlmWsaeError(
                            f"the Hub ({constants.ENDPOINT}) sends more for {path} of {repo_id} "
                            f"than the {size:,} bytes that it lists, so it is not read"
                        )
                    file.write(piece)
                    progress(len(piece))
        except (httpx.TransportError, HfHubHTTPError) as error:
            tries = tries - 1 if file.tell() <= have else _TRIES
            if not tries or not hub_is_unreachable(error):
                raise
            time.sleep(1)
        else:
            if file.tell() < size:
                raise LlmWsaeError(
                    f"{path} of {repo_id} arrived incomplete, with {file.tell():,} of {size:,} "
                    "bytes; run the same command again"
                )


@contextmanager
def guarded() -> Iterator[None]:
    """Let the client, which writes to the Hub, wait a minute for anything at most, and read answers
    as far as ``ask`` does. What it only gets in the meantime, for others, is not touched."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import httpx

    class Bounded(httpx.SyncByteStream):
        def __init__(self, stream: Any):
            self._stream, self._until = stream, time.monotonic() + LONGEST_ANSWER

        def __iter__(self) -> Iterator[bytes]:
            left = _LARGEST_ANSWER
            for piece in self._stream:
                left -= len(piece)
                if left < 0 or time.monotonic() > self._until:
                    raise LlmWsaeError("the Hub answers too slowly, or without an end")
                yield piece

        def close(self) -> None:
            self._stream.close()

    def plainly(request: Any) -> None:
        if request.method != "GET":
            request.headers["Accept-Encoding"] = "identity"

    def bounded(response: Any) -> None:
        if response.request.method != "GET":
            response.headers.pop("Content-Encoding", None)  # nothing is unpacked
            response.stream = Bounded(response.stream)

    client = get_session()
    timeout, hooks = client.timeout, client.event_hooks
    client.timeout = LONGEST_ANSWER
    client.event_hooks = {
        "request": [*hooks["request"], plainly],
        "response": [*hooks["response"], bounded],
    }
    try:
        yield
    finally:
        client.timeout, client.event_hooks = timeout, hooks


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


@contextmanager
def _answer(
    url: str, seconds: float, asked: Mapping[str, str] | None = None, headers: Any = None
) -> Iterator[Any]:
    """The answer to a GET, its body not yet read; after some seconds the connection is closed.

    Raises the client's error for an answer that refuses; only its headers are read.
    """
    from huggingface_hub import close_session, constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

    sent = {**build_hf_headers(), "Accept-Encoding": "identity", **(headers or {})}
    closing = threading.Timer(max(seconds, 0), close_session)
    closing.daemon = True
    begun = time.monotonic()
    closing.start()
    try:
        with get_session().stream(
            "GET", url, params=asked, headers=sent, timeout=TIMEOUT
        ) as response:
            if response.status_code not in (200, 206):
                said = {k: v for k, v in response.headers.items() if k.startswith("x-error-")}
                hf_raise_for_status(
                    httpx.Response(response.status_code, headers=said, request=response.request)
                )
                raise ValueError(f"it has the status {response.status_code}")
            yield response
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        if time.monotonic() - begun < seconds:
            raise
        raise LlmWsaeError(
            f"the Hub ({constants.ENDPOINT}) answers too slowly, so the connection was closed; run "
            "the same command again later"
        ) from error
    finally:
        closing.cancel()
