"""Checks and optionally describes the picture of every product, in threads or processes."""

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

BLOCK = 64  # products per task of a worker, at most
BLOCK_BYTES = 2**24  # a block also ends when its encoded pictures reach this size
MIN_FOR_PROCESSES = 1000  # by default, no processes are started for fewer products
QUEUED_BLOCKS = 2  # per worker; bounds memory


@dataclass(frozen=True)
class Examined:
    """The result for one product.

    Attributes:
      product: the product.
      picture: its picture, or the reason why it has none.
      description: its description; None if it has no picture or there is no describer.
    """

    product: Product
    picture: Picture | str
    description: Description | None


def examine(products: Collection[Product], describer: Describer | None, workers: int) -> Iterator[Examined]:
    """Yields the result of each product, in order.

    Without a describer, the work runs in threads. Describing holds Python's global lock, so with a describer the work
    runs in separate processes, or in this process if `workers` is 1.

    Args:
      products: the products, read lazily.
      describer: computes the descriptions; None to check pictures only.
      workers: number of threads or processes; 0 means one per core, but 1 with a describer and fewer than
        MIN_FOR_PROCESSES products.

    Raises:
      UserError: a worker process was killed.
    """
    if describer is not None and not workers and len(products) < MIN_FOR_PROCESSES:
        workers = 1
    workers = workers or os.cpu_count() or 1
    work = partial(examine_block, describer=describer)
    if describer is not None and workers == 1:
        for block in blocks(products):
            yield from work(block)
        return
    with ThreadPoolExecutor(workers) if describer is None else _processes(workers) as pool:
        pending: deque[Future[list[Examined]]] = deque()
        try:
            for block in blocks(products):
                pending.append(pool.submit(work, block))
                if len(pending) == QUEUED_BLOCKS * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out, and nothing was saved: start again, "
                "with a small --config.data.workers, such as 2, if memory ran out"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def examine_block(products: Sequence[Product], describer: Describer | None) -> list[Examined]:
    """Returns the result of each product, computed in the calling thread."""
    pictures = [inspect(product.image) for product in products]
    if describer is None:
        return [Examined(*pair, None) for pair in zip(products, pictures, strict=True)]
    readable = [(p, picture) for p, picture in zip(products, pictures, strict=True) if isinstance(picture, Picture)]
    descriptions = iter(describer([p for p, _ in readable], [picture for _, picture in readable]) if readable else [])
    return [
        Examined(product, picture, next(descriptions) if isinstance(picture, Picture) else None)
        for product, picture in zip(products, pictures, strict=True)
    ]


def blocks(products: Iterable[Product]) -> Iterator[list[Product]]:
    """Yields the products in blocks of BLOCK products; a block also ends when its pictures reach BLOCK_BYTES."""
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
    """Returns the size of a product's encoded picture in bytes (see `Embedded.size`); 0 if the file is missing."""
    try:
        return product.image.stat().st_size if isinstance(product.image, Path) else product.image.size
    except OSError:
        return 0


def _processes(workers: int) -> Executor:
    # Forking a process that runs threads (TensorFlow's) may hang the child.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)


def _follow_parent() -> None:
    """Ignores interrupts, which the parent handles, and makes this process exit when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
