"""HTTP connections that are closed if the head of a request does not arrive in time."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


class Connection(H11Protocol):
    """Uvicorn's HTTP protocol with a time limit for the head of a request.

    Uvicorn waits forever for a first request and for the rest of an incomplete head. A client could therefore open
    every connection that the server allows, send nothing or a byte now and then, and lock all other clients out.

    Attributes:
      seconds: time between two checks. A connection is closed if no new request has arrived since the previous check
        and none is being answered.
    """

    seconds = 10.0
    _last_cycle: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.seconds, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        if self.cycle is self._last_cycle and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
            return
        self._last_cycle = self.cycle
        self._timer = self.loop.call_later(self.seconds, self._close_if_idle)
