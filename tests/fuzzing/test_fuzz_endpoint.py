"""Replies that no model server should give: each is an answer, or a sentence says what is wrong, in
a limited time and memory and without the key."""

import gzip
import json
import random
import resource
import time
import zlib
from collections.abc import Iterator
from functools import partial

import pytest
from endpoint_server import Server, head, whole
from fuzzing import Fuzz, blind, change

from llm_wsae.errors import LlmWsaeError
from llm_wsae.explaining.endpoint import Endpoint
from llm_wsae.explaining.protocol import Question

SECRET = "sk-do-not-show-me-0123456789"
SECONDS = 0.3  # for a whole reply, of which there are six at most
GRACE = 10.0  # seconds; the machine may be busy
MEMORY = 1 << 29  # bytes that all cases together may add: a bomb alone has as many
ANSWER = {
    "id": "1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "an answer é"}}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 2},
}
GOOD = json.dumps(ANSWER).encode()
BOMB = gzip.compress(bytes(MEMORY), 1)
PACKINGS = ("gzip", "x-gzip", "deflate", "br", "zstd", "gzip, gzip", " GZIP ", "identity",
            "\xe9", "a" * 9999, "")  # fmt: skip
WAITS = ("0", "1", "-1", "nan", "inf", "1e400", "9" * 5000, "soon", "3600", "\xff",
         "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 99999 07:28:00 GMT",
         "Wed, 21 Oct 2015 07:28:00 +9999999", "Wed, 21 Oct 2015 07:28:00 -0000")  # fmt: skip
STATUSES = (*range(200, 207), 300, 301, 302, 304, 307, 308, 400, 401, 402, 403, 404, 405, 408, 409,
            413, 418, 422, 425, 429, 500, 502, 503, 504, 599, 99, 600, 999)  # fmt: skip
DEEP = ("[" * 9999, '{"choices":' * 9999, "[" * 9999 + "]" * 9999,
        '{"a":' * 900 + "1" + "}" * 900)  # fmt: skip


def endless(first: list[bytes], then: bytes, pause: float) -> Iterator[bytes | float]:
    """A piece without end, after a few others."""
    yield from first
    for _ in range(100 if pause else 10_000):
        yield then
        yield pause


def damaged(draw: random.Random):
    """A value of the answer changed, or bytes of the reply."""
    if draw.random() < 0.5:
        value = json.loads(GOOD)
        done = change(value, draw)
        return done, whole(json.dumps(value).encode())
    parts = whole(GOOD)
    number = draw.randrange(2)
    done, parts[number] = blind(parts[number], draw, BOMB[:999])
    return done, parts


def packed(draw: random.Random):
    name = draw.choice(PACKINGS)
    body = draw.choice((GOOD, gzip.compress(GOOD), zlib.compress(GOOD), BOMB, BOMB[:-9],
                        gzip.compress(BOMB), b""))  # fmt: skip
    return f"{name[:20]} {body[:4]!r}", whole(body, content_encoding=name)


def deep(draw: random.Random):
    text = draw.choice(DEEP)
    if draw.random() < 0.5:
        text = f'{{"x": {text}, {GOOD.decode()[1:]}'
    return text[:20], whole(text.encode(), draw.choice((200, 200, 429)))


def statuses(draw: random.Random):
    status, wait = draw.choice(STATUSES), draw.choice(WAITS)
    where = f"http://127.0.0.1:9/{SECRET}"
    body = draw.choice((b"", b"busy", f"key {SECRET}".encode(), b"<html>\x1b[2J" * 99, GOOD))
    return f"{status} {wait[:20]}", whole(body, status, retry_after=wait, location=where)


def dripping(draw: random.Random):
    pause = draw.choice((0.0, 0.03))
    name, first, then = draw.choice((
        ("body", [head()], b" " * (1 << 16)),
        ("chunks", [head(transfer_encoding="chunked")], b"1\r\n \r\n"),
        ("a byte", [head(content_length=10**9)], b" "),
        ("head", [b"HTTP/1.1 200 x\r\n"], b"x: y\r\n"),
        ("a line", [b"HTTP/1.1 200 x\r\nx: "], b"y"),
        ("status", [], b"HTTP/1.1 100 Continue\r\n\r\n"),
        ("nothing", [], b""),
    ))  # fmt: skip
    return f"{name} {pause}", partial(endless, first, then, pause)


def broken(draw: random.Random):
    data = b"".join(whole(GOOD))
    return "cut", [data[: draw.randrange(len(data))]]


KINDS = (damaged, packed, deep, statuses, broken)


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


@pytest.mark.parametrize("part", range(4))
def test_replies(part, server, tmp_path, monkeypatch, fuzz: Fuzz):
    monkeypatch.setenv("LLM_WSAE_API_KEY", SECRET)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number, draw in fuzz.cases(f"endpoint {part}", 10 if fuzz.times == 1 else 25):
        kind = dripping if number % 20 == 5 else draw.choice(KINDS)
        done, pieces = kind(draw)
        server.reply = lambda *_, pieces=pieces: pieces() if callable(pieces) else pieces
        case, question = f"{number} {kind.__name__} ({done})", Question("s", str(number), {}, 5)
        out, started, said = tmp_path / str(number), time.monotonic(), ""
        outcome, why = "refused", ""
        try:
            with Endpoint(server.address, "m", out, timeout=SECONDS, wait=lambda s: None) as asked:
                answer = asked.ask(question, "about")
                said = asked.tally.why
                outcome = "refused" if answer is None else "harmless"
            with Endpoint(server.address, "m", out) as again:  # the file can be read
                if answer is not None and again.ask(question, "about") != answer:
                    outcome = "lost"
        except LlmWsaeError as error:
            said = str(error)
        except BaseException as error:
            outcome, why = "traceback", f"{type(error).__name__}: {error}"
        if time.monotonic() - started > 6 * SECONDS + GRACE:
            outcome, why = "traceback", "it took too long"
        written = "".join(path.read_text() for path in out.iterdir()) if out.exists() else ""
        if SECRET in said + written or not said.isprintable():
            outcome, why = "code", said
        fuzz.count(f"endpoint {part}", outcome, case, why)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert added < MEMORY, f"{added:,} bytes of memory"
