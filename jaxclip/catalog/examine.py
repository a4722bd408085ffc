"""Checks and optionally describes the pictures of every product, in threads or processes."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jaxclip.catalog.describe import Describer, Description
from jaxclip.catalog.ids import clean
from jaxclip.catalog.pictures import Picture, inspect
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError

BLOCK = 64  # products per task of a worker, at most
BLOCK_BYTES = 2**24  # a block also ends when its encoded pictures reach this size
MIN_FOR_PROCESSES = 1000  # by default, no processes are started for fewer products
QUEUED_BLOCKS = 2  # per worker; bounds memory
REPEATED = "picture repeated in its product"


@dataclass(frozen=True)
class Examined:
    """The result for one product.

    Attributes:
      product: the product, with those of its pictures that can be stored; none of them if it is to be dropped.
      pictures: its pictures, each once.
      left_out: (location, reason) of each picture that was left out.
      description: its description; None if it has no picture or there is no describer.
    """

    product: Product
    pictures: tuple[Picture, ...]
    left_out: tuple[tuple[str, str], ...]
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
    results = [_examine_product(product) for product in products]
    readable = [result for result in results if result.pictures]
    if describer is None or not readable:
        return results
    descriptions = iter(describer([result.product for result in readable], [result.pictures for result in readable]))
    return [replace(result, description=next(descriptions)) if result.pictures else result for result in results]


def _examine_product(product: Product) -> Examined:
    """Returns the result of one product without a description."""
    kept: dict[str, tuple[int, Picture]] = {}  # hash of the pixels -> index and picture
    left_out = []
    for index, location in enumerate(product.pictures):
        picture = inspect(location)
        if isinstance(picture, str):
            left_out.append((clean(str(location)), picture))
        elif picture.pixels in kept:
            left_out.append((clean(str(location)), REPEATED))
        else:
            kept[picture.pixels] = index, picture
    indices = [index for index, _ in kept.values()]
    locations = tuple(product.pictures[index] for index in indices)
    roles = tuple(product.roles[index] for index in indices) if product.roles else ()
    pictures = tuple(picture for _, picture in kept.values())
    return Examined(replace(product, pictures=locations, roles=roles), pictures, tuple(left_out), None)


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
    """Returns the size of a product's encoded pictures in bytes (see `Embedded.size`); missing files count as 0."""
    size = 0
    for location in product.pictures:
        # ValueError: a path with a NUL, which names no file.
        with contextlib.suppress(OSError, ValueError):
            size += location.stat().st_size if isinstance(location, Path) else location.size
    return size


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
