"""The page, served on this machine alone, with the model behind it: sentences and steering.

The server listens on 127.0.0.1. Its address holds a random token, a request must name this host and
port (so that no other site's name can be pointed here), and a request that a page of another origin
makes is refused. The model answers one request at a time, and each within a limited time.

Import this only where the extra ``page`` is installed.
"""

import asyncio
import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from llm_wsae.attaching import Steer, attach
from llm_wsae.dictionary.dictionary import Dictionary
from llm_wsae.errors import LlmWsaeError, UsageError
from llm_wsae.inspecting.inspection import read_sentence
from llm_wsae.model.language_model import LanguageModel
from llm_wsae.outside import mapping, parse_json
from llm_wsae.pages.dashboard import shown, strongest
from llm_wsae.steering import prompt_ids

LONGEST_TEXT, MOST_NEW_TOKENS, LARGEST_REQUEST = 2000, 60, 16_000
_MOST_CONNECTIONS = 64
SECONDS = 20.0  # for one text that the model writes, and to wait for the model


@dataclass(frozen=True)
class Session:
    """What the page may ask of the model, which writes for at most ``seconds``."""

    model: LanguageModel
    dictionaries: Mapping[str, Dictionary]
    seconds: float = SECONDS
    _busy: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Raises UsageError for a request that makes no sense."""
        text, number = asked.get("text"), asked.get("dictionary")
        if not isinstance(text, str) or not text:
            raise UsageError("there is no text; give a sentence")
        if len(text) > LONGEST_TEXT:
            raise UsageError(
                f"the text has {len(text):,} characters, and at most {LONGEST_TEXT:,} are read here"
            )
        if not isinstance(number, int) or not 0 <= number < len(self.dictionaries):
            raise UsageError("there is no such dictionary")
        dictionary = list(self.dictionaries.values())[number]
        if not self._busy.acquire(timeout=2 * self.seconds):
            raise UsageError("the model is busy with another question; ask again")
        try:
            with torch.no_grad():
                if asked.get("latent") is None:
                    tokens = read_sentence(self.model, dictionary, text)
                    return {"tokens": [(shown(one.token), strongest(one)) for one in tokens]}
                return self._steered(dictionary, text, asked)
        finally:
            self._busy.release()

    def _steered(self, dictionary: Dictionary, text: str, asked: Mapping[str, Any]) -> Any:
        """What the model writes after a text without and with a latent turned up, whether either
        was cut for want of time, and the edit's change of the last token's logits."""
        latent, strength, count = (asked.get(key) for key in ("latent", "strength", "tokens"))
        if not isinstance(latent, int) or not 0 <= latent < dictionary.d_sae:
            raise UsageError(f"there is no latent {latent!r}")
        if not isinstance(strength, (int, float)) or not abs(strength) <= 1e6:
            raise UsageError("a strength is a number")
        if not isinstance(count, int) or not 1 <= count <= MOST_NEW_TOKENS:
            raise UsageError(f"from 1 to {MOST_NEW_TOKENS} tokens can be written")
        tokenizer, model = self.model.tokenizer, self.model.hf_model
        prompt = prompt_ids(self.model, dictionary, text, count)
        ids = torch.tensor([prompt], device=self.model.device)

        def write() -> tuple[str, bool, torch.Tensor]:
            logits, started = model(ids).logits[0, -1].float(), time.monotonic()
            new = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                max_time=self.seconds,
            )[0, ids.shape[1] :]
            cut = len(new) < count and time.monotonic() - started > self.seconds
            return tokenizer.decode(new), cut, logits

        before, cut, clean = write()
        with attach(self.model, dictionary) as attached:
            attached.edit(dictionary.site, Steer(latent=latent, strength=float(strength)))
            after, cut_too, steered = write()
        change = float(f"{float((steered - clean).abs().max()):.4g}")
        return {"before": before, "after": after, "cut": cut or cut_too, "change": change}


def application(page: str, session: Session, token: str, port: int) -> Any:
    """The ASGI application. Everything but the page and its questions is refused."""

    async def respond(request: Request) -> Response:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        known = secrets.compare_digest(request.path_params["token"].encode(), token.encode())
        here = host in (f"127.0.0.1:{port}", f"localhost:{port}")
        if not (known and here and origin in (None, f"http://{host}")):
            return PlainTextResponse("not found", 404)
        return HTMLResponse(page) if request.method == "GET" else await ask(request)

    async def ask(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":
            return JSONResponse({"error": "questions are JSON"}, 415)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_REQUEST:
                return JSONResponse({"error": f"at most {LONGEST_TEXT:,} characters are read"}, 413)
        try:
            asked = mapping(parse_json(body, "the question"))
            return JSONResponse(await run_in_threadpool(session.answer, asked))
        except (ValueError, LlmWsaeError) as error:
            return JSONResponse({"error": shown(str(error))}, 400)

    return Starlette(
        routes=[
            Route("/{token}/", respond, methods=["GET"]),
            Route("/{token}/ask", respond, methods=["POST"]),
        ]
    )


class _Connection(H11Protocol):
    """One of a limited number: a new one closes the oldest on which no whole request has come, so
    that half a request, which needs no token, cannot lock the owner out."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.made = time.monotonic()
        own = [one for one in self.connections if isinstance(one, _Connection)]
        silent = [one for one in own if one.cycle is None or one.cycle.response_complete]
        if len(own) > _MOST_CONNECTIONS and silent:
            min(silent, key=lambda one: one.made).transport.close()


def listen(port: int) -> socket.socket:
    """A port of this machine alone, taken before the page is built; 0 takes a free one. Raises
    LlmWsaeError if the port is taken."""
    listening = socket.socket()
    try:
        listening.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise LlmWsaeError(f"port {port} cannot be used ({error}); name another") from error
    return listening


def serve(
    page: Path,
    model: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    listening: socket.socket,
    announce: Callable[[str], None],
) -> None:
    """Serve a page until the process is interrupted; ``announce`` is told its address."""
    port, token = listening.getsockname()[1], secrets.token_urlsafe(16)
    session = Session(model, dictionaries)
    made = application(page.read_text(encoding="utf-8"), session, token, port)
    listening.listen()  # who follows the address at once waits, and is not refused
    announce(f"http://127.0.0.1:{port}/{token}/")
    with contextlib.suppress(KeyboardInterrupt):  # which is how it ends
        config = uvicorn.Config(
            made, http=_Connection, ws="none", log_level="error", backlog=_MOST_CONNECTIONS
        )
        uvicorn.Server(config).run(sockets=[listening])
