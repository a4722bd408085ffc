"""Connections that do not wait for ever for a request."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


class Connection(H11Protocol):
    """Uvicorn's, but closed where no whole head of a request arrives in good time.

    Uvicorn waits for ever for the rest of a head, and for a first one: who opens enough connections and says nothing,
    or a byte now and then, would keep everybody else out.

    Attributes:
      seconds: between two looks; a connection that has no request at both, or the same one answered, is closed.
    """

    seconds = 10.0
    _seen: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._look_again = self.loop.call_later(self.seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look_again.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        if self.cycle is self._seen and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
            return
        self._seen = self.cycle
        self._look_again = self.loop.call_later(self.seconds, self._look)
