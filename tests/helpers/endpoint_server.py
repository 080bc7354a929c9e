"""A language model's server on this machine, whose replies are scripted, to the byte if need be."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Pieces = Iterable[bytes | float]  # what is sent, and how long it waits in between
USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


class Server:
    """``reply`` gives the pieces to send, from the headers and the body of a request."""

    def __init__(self, reply: Callable[[str, Any], Pieces] = lambda headers, body: []):
        self.reply = reply
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        closed = contextlib.suppress(OSError, ValueError)  # by a client that had enough
        with closed, connection, connection.makefile("rb") as file:
            connection.settimeout(2)
            headers = "".join(iter(lambda: file.readline().decode().strip() + "\n", "\n"))
            length = int(headers.lower().partition("content-length:")[2].split("\n")[0])
            for piece in self.reply(headers, json.loads(file.read(length))):
                if isinstance(piece, float):
                    time.sleep(piece)
                else:
                    connection.sendall(piece)


def head(status: int = 200, **fields: object) -> bytes:
    lines = [f"HTTP/1.1 {status} x", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"


def whole(body: bytes, status: int = 200, **fields: object) -> list[bytes]:
    return [head(status, content_length=len(body), **fields), body]


class Judge(Server):
    """Keeps what it is asked. ``script`` gets the number of a request and its body, and gives the
    text of the answer, or (status, body, headers), or None not to answer."""

    def __init__(self, script: Callable[[int, Any], Any]):
        self.script = script
        self.bodies: list[Any] = []
        self.headers: list[str] = []
        self._lock = threading.Lock()
        super().__init__(self._scripted)

    def _scripted(self, headers: str, body: Any) -> Iterator[bytes | float]:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            reply = self.script(len(self.bodies), body)
        if reply is None:
            yield 1e6
        if isinstance(reply, str):
            choice = {"message": {"role": "assistant", "content": reply}}
            reply = 200, json.dumps({"choices": [choice], "usage": USAGE}), {}
        status, text, fields = reply
        yield from whole(text.encode(), status, **fields)
