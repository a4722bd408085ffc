"""Groups of products that are interchangeable as search results, and splits that never divide a group.

Products with the same caption are in one group even if the caption is only the name of a class folder: for the query
"dress", any dress in such a catalogue is correct. A split then takes whole classes, because splitting within a class
would test on captions seen in training.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.catalog.captions import normalise
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError


@dataclass(frozen=True)
class Groups:
    """The groups of N products.

    Attributes:
      names: name of each product's group: the smallest id in it, N strings.
      keys: (K,) uint64 hashes of all captions and pictures. A product of any catalogue that has one of a group's keys
        belongs to this group. The groups that readers state are not among them: their names mean nothing elsewhere.
      owners: (K,) int64 index of a product that has the key.
    """

    names: list[str]
    keys: np.ndarray
    owners: np.ndarray


def assign(products: Iterable[Product], ids: Sequence[str], pixel_hashes: Sequence[Sequence[str]]) -> Groups:
    """Returns the groups of products; the order of the products does not matter.

    Products are in one group if they share a caption (see `normalise`), identical pixels or the group that their reader
    set, also indirectly: if A shares a caption with B and B shares a picture with C, then A and C are in one group.

    Args:
      products: the products; their own ids are not read.
      ids: an id of each product that no other product has.
      pixel_hashes: `Picture.pixels` of each product's pictures.
    """
    parents = list(range(len(pixel_hashes)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first: dict[bytes, int] = {}
    stated: set[bytes] = set()
    for index, (product, pixels) in enumerate(zip(products, pixel_hashes, strict=True)):
        keys = [("caption", normalise(caption)) for caption in product.captions]
        digests = [_digest(*key) for key in [*keys, *(("pixels", hash_) for hash_ in pixels)]]
        if product.group:
            digests.append(_digest("group", product.group))
            stated.add(digests[-1])
        for digest in digests:
            parents[root(index)] = root(first.setdefault(digest, index))
    names: dict[int, str] = {}
    for index, id_ in enumerate(ids):
        names[root(index)] = min(names.get(root(index), id_), id_)
    shared = {digest: index for digest, index in first.items() if digest not in stated}
    keys = np.frombuffer(b"".join(shared), "<u8").reshape(-1, 2)[:, 0]
    return Groups(
        [names[root(index)] for index in range(len(ids))],
        keys.astype(np.uint64),
        np.fromiter(shared.values(), np.int64, len(shared)),
    )


def _digest(kind: str, value: str) -> bytes:
    """Returns a 16-byte digest of a key; captions may be long, so this saves memory."""
    return hashlib.blake2b(f"{kind}:{value}".encode("utf-8", errors="surrogatepass"), digest_size=16).digest()


def split(groups: Sequence[str], test: int | float, seed: int, field: str = "data.test") -> list[bool]:
    """Returns whether each product is held out; all products of a group have the same value.

    The choice depends only on `test`, the seed and the names and sizes of the groups, not on their order. What is held
    out is as large as whole groups allow, and never larger than requested.

    Args:
      groups: the name of each product's group.
      test: number of products to hold out, or their share, rounded to whole products, if it is a float below 1.
      seed: seed of the order in which groups are chosen.
      field: the field of the configuration that says how many, for messages.

    Raises:
      UserError: `test` holds out no product, or leaves none.
    """
    total = len(groups)
    target = round(test * total) if isinstance(test, float) and test < 1 else int(test)
    if not 0 < target < total:
        raise UserError(
            f"cannot hold out {test:g}, which is {target} of {total} products: set {field} to a share or a number that "
            "holds out at least 1 product and leaves at least 1 for training."
        )
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda group: (_sort_key(group, seed), group))
    chosen = _fit_greedily([sizes[group] for group in order], target)
    if not chosen:
        raise UserError(
            f"cannot hold out {target} products: the smallest group has {min(sizes.values())} products that share a "
            f"caption, a picture or an article, and groups are not divided; set {field} to hold out at least as many "
            "products as that group has" + (", or 0 for none." if field == "data.validation" else ".")
        )
    held_out = {order[index] for index in chosen}
    return [group in held_out for group in groups]


def _sort_key(group: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=16).digest()


def _fit_greedily(sizes: Sequence[int], target: int) -> set[int]:
    """Returns indices whose sizes sum to `target`, or to the largest possible sum below it.

    In order, every size that still fits is taken; only if their sum misses the target, the best sum is searched for.
    """
    taken, room = set(), target
    for index, size in enumerate(sizes):
        if size <= room:
            taken.add(index)
            room -= size
    return taken if room == 0 else _fit_exactly(sizes, target)


def _fit_exactly(sizes: Sequence[int], target: int) -> set[int]:
    """Returns indices with the largest possible sum: bit s of `sums` is set if some of the sizes sum to s."""
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
