"""Every product's picture checked and, where a describer is given, described: in threads or in processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxclip.catalog.describe import Describer, Description
from jaxclip.catalog.pictures import Picture, inspect
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError

BLOCK = 64  # products handed to a worker at once
WORTH_PROCESSES = 1000  # products: starting the processes takes seconds
BLOCK_BYTES = 2**24  # of their pictures, from which a block is full too
AHEAD = 2  # blocks waiting for each worker: memory does not grow with the catalogue


@dataclass(frozen=True)
class Examined:
    """A product with its picture, or the reason why it has none, and its description where one was asked for."""

    product: Product
    picture: Picture | str
    description: Description | None


def examine(products: Collection[Product], describer: Describer | None, workers: int) -> Iterator[Examined]:
    """Yields each product examined, in the order given.

    Decoding runs in threads. Describing holds Python's lock, so with a describer it runs in processes of its own; with
    one worker, or by default for few products, it runs here.

    Args:
      products: read as they are needed.
      describer: None checks pictures alone.
      workers: threads or processes; 0 is one for each core.

    Raises:
      UserError: a worker process was killed.
    """
    if describer is not None and not workers and len(products) < WORTH_PROCESSES:
        workers = 1
    workers = workers or os.cpu_count() or 1
    work = partial(examine_block, describer=describer)
    if describer is not None and workers == 1:
        for block in blocks(products):
            yield from work(block)
        return
    with ThreadPoolExecutor(workers) if describer is None else _processes(workers) as pool:
        waiting: deque[Future[list[Examined]]] = deque()
        try:
            for block in blocks(products):
                waiting.append(pool.submit(work, block))
                if len(waiting) == AHEAD * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, by hand or because memory ran out; nothing was kept: start again"
            ) from error
        finally:
            for unneeded in waiting:
                unneeded.cancel()


def examine_block(products: Sequence[Product], describer: Describer | None) -> list[Examined]:
    """Returns each product examined, here and now."""
    pictures = [inspect(product.image) for product in products]
    if describer is None:
        return [Examined(*pair, None) for pair in zip(products, pictures, strict=True)]
    good = [(p, picture) for p, picture in zip(products, pictures, strict=True) if isinstance(picture, Picture)]
    descriptions = iter(describer([p for p, _ in good], [picture for _, picture in good]) if good else [])
    return [
        Examined(product, picture, next(descriptions) if isinstance(picture, Picture) else None)
        for product, picture in zip(products, pictures, strict=True)
    ]


def blocks(products: Iterable[Product]) -> Iterator[list[Product]]:
    """Yields the products in blocks that can be held in memory with their pictures."""
    block, size = [], 0
    for product in products:
        block.append(product)
        size += _size(product)
        if len(block) == BLOCK or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _size(product: Product) -> int:
    """Returns the bytes of a product's picture; 0 where there is none."""
    try:
        return product.image.stat().st_size if isinstance(product.image, Path) else product.image.size
    except OSError:
        return 0


def _processes(workers: int) -> Executor:
    # Forking a process that runs threads (TensorFlow's) may hang the child.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)


def _follow_parent() -> None:
    """Leaves interrupts to the parent, and does not outlive it: a pool's processes would wait for it for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
