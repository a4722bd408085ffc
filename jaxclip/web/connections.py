"""Connections that are closed if no complete request arrives in time."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


class Connection(H11Protocol):
    """Uvicorn's HTTP protocol with a time limit for the head of a request.

    Uvicorn waits forever for a first request and for the rest of an incomplete head. A client could therefore open all
    the connections that the server allows, send nothing or only a byte now and then, and lock everybody else out.

    Attributes:
      seconds: time between two checks. A connection is closed if no new request has arrived since the previous check
        and none is being answered.
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
