"""Concurrent queries are answered in batches; excess queries are refused, slow queries time out."""

import asyncio
import threading

import pytest

from jaxclip.web.batching import Batcher, Overloaded


class GatedSearch:
    """Answers a batch when its gate is released, and records the batches."""

    def __init__(self):
        self.batches, self.gate = [], threading.Semaphore(0)

    def __call__(self, queries):
        self.batches.append(list(queries))
        self.gate.acquire(timeout=20)
        if "bad" in queries:
            raise ValueError("bad")
        return [query * 2 for query in queries]


def run(scenario, **limits):
    """Runs scenario(batcher, search) while the batcher serves; returns the batches and their observed sizes."""
    search, sizes = GatedSearch(), []
    settings = {"size": 4, "waiting": 6, "seconds": 15.0} | limits

    async def main():
        batcher = Batcher(search, observe=sizes.append, **settings)
        serving = asyncio.create_task(batcher.serve())
        try:
            await scenario(batcher, search)
        finally:
            search.gate.release(100)
            serving.cancel()

    asyncio.run(main())
    return search.batches, sizes


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_queries_that_arrive_during_a_batch_form_the_next_batch():
    async def scenario(batcher, search):
        first = asyncio.create_task(batcher(1))
        await until(lambda: search.batches)
        others = [asyncio.create_task(batcher(number)) for number in range(2, 8)]
        await until(lambda: batcher.waiting == 6)
        search.gate.release(3)
        assert await first == 2
        assert await asyncio.gather(*others) == [4, 6, 8, 10, 12, 14]

    assert run(scenario) == ([[1], [2, 3, 4, 5], [6, 7]], [1, 4, 2])


def test_a_query_beyond_the_limit_is_refused_immediately():
    async def scenario(batcher, search):
        tasks = [asyncio.create_task(batcher(1))]
        await until(lambda: search.batches)
        tasks += [asyncio.create_task(batcher(number)) for number in range(6)]
        await until(lambda: batcher.waiting == 6)
        with pytest.raises(Overloaded):
            await batcher(99)
        search.gate.release(9)
        assert len(await asyncio.gather(*tasks)) == 7

    run(scenario)


def test_an_abandoned_query_is_not_computed():
    async def scenario(batcher, search):
        tasks = [asyncio.create_task(batcher(number)) for number in (1, 2)]
        await until(lambda: search.batches)
        with pytest.raises(TimeoutError):
            await batcher(3)
        search.gate.release(9)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await batcher(5) == 10

    batches, _ = run(scenario, seconds=0.3)
    assert not any(3 in batch for batch in batches)


def test_a_failed_batch_does_not_stop_the_next():
    async def scenario(batcher, search):
        search.gate.release(9)
        with pytest.raises(ValueError, match="bad"):
            await batcher("bad")
        assert await batcher("good") == "goodgood"

    run(scenario)
