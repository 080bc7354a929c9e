"""The server of the live page: few connections at once, and none that waits without asking.

Another program on this machine may connect without knowing the page's address. It must not be able
to lock out whoever does.
"""

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 50
SECONDS_TO_ASK = 10.0
"""How long a connection may be open without a complete head of a request."""
_BETWEEN_LOOKS = 1.0  # seconds


class _Connection(H11Protocol):
    """A connection that is closed if it asks nothing for some seconds, or is in the way of others
    meanwhile."""

    quiet_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.quiet_since = self.loop.time()
        # One that was aborted stays in the set until the loop has closed it.
        still_open: list[Any] = [c for c in self.connections if not c.transport.is_closing()]
        if len(still_open) > MOST_CONNECTIONS:
            quiet = [one for one in still_open if not one.asks]
            min(quiet, key=lambda one: one.quiet_since).transport.abort()  # at most this one
        self._look()

    @property
    def asks(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        now = self.loop.time()
        if self.asks:
            self.quiet_since = now
        if now - self.quiet_since > SECONDS_TO_ASK:
            self.transport.abort()
        elif not self.transport.is_closing():
            self.loop.call_later(_BETWEEN_LOOKS, self._look)


def run(application: Any, listening: socket.socket) -> None:
    """Serve an ASGI application on a socket until the process is interrupted."""
    config = uvicorn.Config(
        application,
        http=_Connection,
        ws="none",
        log_level="error",
        timeout_keep_alive=5,
        backlog=MOST_CONNECTIONS,  # accepted at once
    )
    uvicorn.Server(config).run(sockets=[listening])
