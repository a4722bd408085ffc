"""Groups: which products are the same thing to a searcher, and splits that never divide them.

Captions unite products even where a caption is only the name of a class folder: whoever types "dress" into such a
catalogue is served by any dress, so a class is one group, relevant to each of its queries. A split then takes whole
classes. The alternative, a split within the class, would test on captions seen in training.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxclip.catalog.captions import normalise
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError


def assign(products: Iterable[Product], pixel_hashes: Sequence[str]) -> list[str]:
    """Returns the group of each product: the smallest id in it, whatever the order of the products.

    Products that share a normalised caption (any, where they have several), the very pixels or the group that their
    reader gave them are in one group, and so are those linked through others: A and C, if A shares a caption with B
    and B a picture with C.

    Args:
      products: their ids are unique.
      pixel_hashes: `Picture.pixels` of each, "" where it has none.
    """
    parents = list(range(len(pixel_hashes)))
    ids: list[str] = []

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first: dict[bytes, int] = {}
    for index, (product, pixels) in enumerate(zip(products, pixel_hashes, strict=True)):
        ids.append(product.id)
        keys = [("caption", normalise(caption)) for caption in product.captions]
        keys += [(kind, value) for kind, value in (("pixels", pixels), ("group", product.group)) if value]
        for key in keys:
            parents[root(index)] = root(first.setdefault(_digest(*key), index))
    names: dict[int, str] = {}
    for index, id_ in enumerate(ids):
        names[root(index)] = min(names.get(root(index), id_), id_)
    return [names[root(index)] for index in range(len(ids))]


def _digest(kind: str, value: str) -> bytes:
    """Returns 16 bytes for a key: captions may be long, and there is one key for each."""
    return hashlib.blake2b(f"{kind}:{value}".encode("utf-8", errors="surrogatepass"), digest_size=16).digest()


def split(groups: Sequence[str], test: int | float, seed: int) -> list[bool]:
    """Returns for each product whether it is a test product: True for all of a group or for none of it.

    Which groups are taken depends on the seed and their names alone, not on their order. As many products are taken
    as whole groups can make up, and never more than asked for.

    Args:
      groups: the group of each product.
      test: the number of test products, or their share if it is a float below 1.
      seed: another seed is another split.

    Raises:
      UserError: `test` leaves no product for training, or none for testing.
    """
    total = len(groups)
    target = round(test * total) if isinstance(test, float) and test < 1 else int(test)
    if not 0 < target < total:
        raise UserError(
            f"A test part of {test} is {target} of {total} products: it should be a share between 0 and 1, or a number "
            "from 1 up that leaves some for training."
        )
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda group: (_place(group, seed), group))
    taken = _first_fitting([sizes[group] for group in order], target)
    if not taken:
        raise UserError(
            f"A test part of {target} products is smaller than the smallest group ({min(sizes.values())} products that "
            "share a caption or a picture), and no group may be divided: ask for at least as many."
        )
    chosen = {order[index] for index in taken}
    return [group in chosen for group in groups]


def _place(group: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=16).digest()


def _first_fitting(sizes: Sequence[int], target: int) -> set[int]:
    """Returns indices whose sizes sum to `target`, or to the most below it: the first that fit, where that does."""
    taken, room = set(), target
    for index, size in enumerate(sizes):
        if size <= room:
            taken.add(index)
            room -= size
    return taken if room == 0 else _best_fitting(sizes, target)


def _best_fitting(sizes: Sequence[int], target: int) -> set[int]:
    """Returns the same by dynamic programming: bit s of `sums` says that some of the sizes so far sum to s."""
    sums, within = 1, (1 << (target + 1)) - 1
    reached_by: dict[int, int] = {}
    for index, size in enumerate(sizes):
        new = (sums << size) & within & ~sums
        sums |= new
        while new:
            lowest = new & -new
            reached_by[lowest.bit_length() - 1] = index
            new ^= lowest
        if sums >> target:
            break
    taken, room = set(), sums.bit_length() - 1
    while room:
        taken.add(reached_by[room])
        room -= sizes[reached_by[room]]
    return taken
