"""HTTP for the tests' Hub: routing, bodies, downloads with ranges, and faults on demand."""

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

_PIECE = 1 << 16


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that match."""

    kind: str
    method: str
    pattern: str
    times: int
    status: int = 0
    after: int = 0
    """Bytes of the body that still pass before the connection ends."""
    message: str = ""


@dataclass
class Said:
    """An answer that the server's ``twist`` may change before it is sent."""

    status: int
    body: Any
    """Bytes, or an iterable of pieces that are sent as they come, without a length."""
    headers: dict[str, str]
    headless: bool = False
    """Whether the pieces belong to the head, which then has no end."""


class Answer(Exception):
    """Leaves a handler early with an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        self.status, self.message, self.code = status, message, code
        self.body = body or {"error": message}


class Connection(BaseHTTPRequestHandler):
    """One connection, its requests led to the routes of a subclass."""

    hub: Any
    """The server: ``requests``, ``faults``, ``leaked`` and its ``store``."""
    routes: list[tuple[str, str, Callable[..., None]]]
    """Methods, pattern of the path, and what answers or raises ``Answer``; groups are passed."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Tests ask ``requests`` instead."""

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.hub.requests.append((self.command, parts.path))
        self.fault = self._next_fault(parts.path)
        self.body_read = False
        try:
            if self.fault and self.fault.kind == "fail":
                raise Answer(self.fault.status, self.fault.message or "something went wrong")
            for method, pattern, route in self.routes:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in method.split("|"):
                    route(self, *(unquote(group or "") for group in match.groups()))
                    return
            raise Answer(404, "Not Found")
        except Answer as answer:
            headers = {"X-Error-Message": answer.message}
            headers |= {"X-Error-Code": answer.code} if answer.code else {}
            with contextlib.suppress(ConnectionError):
                self._drain()
                self._send(answer.status, json.dumps(answer.body).encode(), headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _next_fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.pattern, path):
                fault.times -= 1
                return fault
        return None

    # Bodies

    def _pieces(self):
        """The request's body, piece by piece, of a known length or chunked."""
        self.body_read = True
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left > 0:
            piece = self.rfile.read(min(left, _PIECE))
            if not piece:
                raise ConnectionError
            left -= len(piece)
            yield piece

    def _body(self) -> bytes:
        return b"".join(self._pieces())

    def _json(self) -> dict:
        return json.loads(self._body() or b"{}")

    def _drain(self) -> None:
        if not self.body_read:
            for _ in self._pieces():
                pass

    def _break(self) -> None:
        """End the connection at once, as a network does."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionError

    def _send(self, status: int, body: bytes, headers: dict[str, str], type: str = "") -> None:
        if self.hub.twist:
            answer = Said(status, body, dict(headers))
            self.hub.twist(urlsplit(self.path).path, answer)
            status, body, headers = answer.status, answer.body, answer.headers
            if not isinstance(body, bytes):
                self._send_pieces(answer)
                return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value.encode("ascii", "replace").decode())
        self.send_header("Content-Type", type or "application/json; charset=utf-8")
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_pieces(self, answer: "Said") -> None:
        """A body of no length, or of a false one; the connection ends with it."""
        lines = [f"HTTP/1.1 {answer.status} Odd", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write("\r\n".join(lines).encode("utf-8", "replace"))
            if not answer.headless:
                self.wfile.write(b"\r\n\r\n")
            for piece in answer.body:
                self.wfile.write(piece)

    def _ok(self, value: Any, **headers: str) -> None:
        self._drain()
        self._send(200, json.dumps(value).encode(), headers)

    def _serve(self, source: bytes | Path, headers: dict[str, str]) -> None:
        """A file or the rest of one, cut or corrupted on its way when that was ordered."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        start, status = 0, 200
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(asked[1]), 206
            if start >= size:
                raise Answer(416, "Range Not Satisfiable")
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        if self.hub.twist:
            self._send(status, b"".join(_read(source, start)), headers, "application/octet-stream")
            return
        headers["Content-Length"] = str(size - start)
        self._send(status, b"", headers, "application/octet-stream")
        if self.command == "HEAD":
            return
        sent = 0
        for piece in _read(source, start):
            if self.fault and self.fault.kind == "corrupt" and sent == 0:
                piece = bytes([piece[0] ^ 255]) + piece[1:]
            if self.fault and self.fault.kind == "cut" and sent + len(piece) > self.fault.after:
                self.wfile.write(piece[: self.fault.after - sent])
                self._break()
            self.wfile.write(piece)
            sent += len(piece)


def _read(source: bytes | Path, start: int):
    if isinstance(source, bytes):
        yield from (source[i : i + _PIECE] for i in range(start, len(source), _PIECE))
        return
    with open(source, "rb") as file:
        file.seek(start)
        while piece := file.read(_PIECE):
            yield piece


class Storage(Connection):
    """The host of large files: anyone with the address of one may put or get it."""

    def upload(self, key: str) -> None:
        """A large file."""
        self._guard()
        target = self.hub.store.large(key)
        partial = target.with_name(f"{key}.{threading.get_ident()}.partial")
        digest, passed = hashlib.sha256(), 0
        try:
            with open(partial, "wb") as file:
                for piece in self._pieces():
                    if self.fault and self.fault.kind == "corrupt" and passed == 0:
                        piece = bytes([piece[0] ^ 255]) + piece[1:]
                    passed += len(piece)
                    if self.fault and self.fault.kind == "cut" and passed > self.fault.after:
                        self._break()
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != key:
                raise Answer(400, "the content does not have the SHA-256 that was announced")
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
        self._send(200, b"", {"ETag": f'"{digest.hexdigest()}"'})

    def download(self, key: str) -> None:
        self._guard()
        place = self.hub.store.large(quote(key, safe=""))
        if not place.exists():
            raise Answer(404, "no such object")
        self._serve(place, {"ETag": f'"{key}"', "Accept-Ranges": "bytes"})

    def _guard(self) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaked.append(self.path)
