"""Batches the queries of concurrent requests."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxclip.serving.searcher import Query, QueryResult

Find = Callable[[Sequence[Query]], list[QueryResult]]


class Overloaded(Exception):
    """The query is refused because too many are waiting."""


class Batcher:
    """Collects the queries that arrive while the devices are busy into the next batch.

    If the devices are idle, a query is answered immediately: no query waits for a batch to fill.

    Args:
      find: answers a batch; called in a separate thread.
      size: largest number of queries in a batch.
      waiting: largest number of waiting queries; further queries are refused.
      seconds: time after which a query is abandoned.
      observe: called with the size of each batch.
    """

    def __init__(self, find: Find, *, size: int, waiting: int, seconds: float, observe: Callable[[int], None]):
        self._find, self._size, self._limit, self._seconds, self._observe = find, size, waiting, seconds, observe
        self._waiting: deque[tuple[Query, asyncio.Future[QueryResult]]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    @property
    def waiting(self) -> int:
        """Number of waiting queries."""
        return len(self._waiting)

    async def __call__(self, query: Query) -> QueryResult:
        """Returns the results of a query.

        Raises:
          Overloaded: too many queries are waiting.
          TimeoutError: the answer took longer than `seconds`.
        """
        if len(self._waiting) >= self._limit:
            raise Overloaded
        answer: asyncio.Future[QueryResult] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, answer))
        self._arrived.set()
        async with asyncio.timeout(self._seconds):
            return await answer

    async def serve(self) -> None:
        """Answers queries until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._arrived.wait()
                if batch := self._take_batch():
                    self._observe(len(batch))
                    try:
                        results = await loop.run_in_executor(self._thread, self._find, [query for query, _ in batch])
                    except Exception as error:  # only this batch fails; the loop continues with the next
                        _resolve(batch, [error] * len(batch))
                    else:
                        _resolve(batch, results)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _take_batch(self) -> list[tuple[Query, asyncio.Future[QueryResult]]]:
        batch = []
        while self._waiting and len(batch) < self._size:
            query, answer = self._waiting.popleft()
            if not answer.done():  # a query that timed out needs no answer
                batch.append((query, answer))
        if not self._waiting:
            self._arrived.clear()
        return batch


def _resolve(
    batch: Sequence[tuple[Query, asyncio.Future[QueryResult]]], results: Sequence[QueryResult | Exception]
) -> None:
    for (_, answer), result in zip(batch, results, strict=True):
        if not answer.done():
            answer.set_exception(result) if isinstance(result, Exception) else answer.set_result(result)
