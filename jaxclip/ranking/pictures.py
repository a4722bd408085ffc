"""Layout of a gallery whose products have several pictures: a product's score is the highest of its pictures' scores.

The kernel scores the pictures of a tile and then takes the maximum of each product's. All tiles have the same places
for pictures, so that one program scores them all and every device has the same work: a product takes as many places as
any product at its position of a tile has pictures, and repeats a picture in the places that it does not need, which
changes no maximum. The products with equally many pictures are dealt evenly to the tiles, so that few places are
repeated.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from jaxclip.ranking import kernel
from jaxclip.ranking.layout import Layout, round_up

POSITIONS = 4  # neighbouring products of a tile that have equally many places
EXACT = 8  # products with more pictures have up to a quarter more places than pictures, so that there are few segments


def first_pictures(owners, pictures: int) -> np.ndarray:
    """Returns (G + 1,) the first picture of each of G products, and after them the number of pictures P.

    Args:
      owners: (P,) the product of each picture, 0 to G - 1, ascending.
      pictures: P.

    Raises:
      ValueError: there are not P owners, they do not ascend from 0, or a product has no picture.
    """
    owners = np.asarray(owners)
    steps = np.diff(owners, prepend=-1) if owners.shape == (pictures,) else np.array([-1])
    if not pictures or steps[0] != 1 or not np.isin(steps, (0, 1)).all():
        raise ValueError(
            f"owners must be ({pictures},) numbers of products, ascending from 0, with at least one picture each"
        )
    return np.append(np.flatnonzero(steps), pictures)


@dataclass(frozen=True, eq=False)
class Gallery:
    """A gallery of items, each with one or more pictures, of which a query may leave out one.

    Attributes:
      embeddings: (P, D) float32, of the pictures.
      starts: (G + 1,) from `first_pictures`; an item's pictures are those from its start to the next one's.
      own: (Q,) the picture that is left out for each query, -1 for none; an item without another picture is then no
        candidate of the query. None = none for all queries.
    """

    embeddings: np.ndarray
    starts: np.ndarray
    own: np.ndarray | None = None

    @classmethod
    def of(cls, embeddings, owners=None, own=None) -> "Gallery":
        """Returns the gallery of items with one picture each or, with `owners` (P,), of products with their pictures.

        `owners` are those of `first_pictures`, `own` is the attribute.

        Raises:
          ValueError: the owners do not match the embeddings, or `own` names no picture.
        """
        embeddings = np.asarray(embeddings, np.float32)
        size = len(embeddings)
        starts = np.arange(size + 1) if owners is None else first_pictures(owners, size)
        own = None if own is None else np.asarray(own, np.int64)
        if own is not None and (own.ndim != 1 or ((own < -1) | (own >= size)).any()):
            raise ValueError(f"own must be (Q,) rows of the gallery's {size} pictures, or -1")
        return cls(embeddings, starts, own)

    @property
    def own_item(self) -> np.ndarray:
        """(Q,) the item whose picture is left out for each query, -1 for none."""
        return np.searchsorted(self.starts, self.own, side="right") - 1

    @property
    def own_item_is_out(self) -> np.ndarray:
        """(Q,) whether that item has no other picture; empty if no query leaves out a picture."""
        if self.own is None:
            return np.zeros(0, bool)
        return (self.own >= 0) & (np.diff(self.starts)[self.own_item] == 1)


@dataclass(frozen=True)
class PictureLayout(Layout):
    """How products with several pictures are ordered and cut into shards and tiles, and their pictures placed in these.

    The lines of `Layout` are the products; in addition a tile has places, one or more for each slot.

    Attributes:
      starts: (G + 1,) from `first_pictures`; the rows of `embeddings` are pictures.
      segments: (pictures, slots) of each run of slots in a tile that have equally many places. The places of a segment
        are the first ones of its slots, then the second ones, and so on. The places after the last segment are empty.
    """

    starts: np.ndarray
    segments: tuple[tuple[int, int], ...]

    @property
    def places(self) -> int:
        """The number of places in a tile, a multiple of `kernel.MULTIPLE`.

        CPUs may add up other products in another order, and then the scores differ in their last bits from those of the
        small tiles that are computed first.
        """
        return round_up(sum(pictures * slots for pictures, slots in self.segments), kernel.MULTIPLE)

    @cached_property
    def rows(self) -> np.ndarray:
        """(tiles * places,) the picture in each place, -1 in the places of empty slots."""
        slots, numbers, first = [], [], 0
        for pictures, count in self.segments:
            slots.append(np.tile(np.arange(first, first + count), pictures))
            numbers.append(np.repeat(np.arange(pictures), count))
            first += count
        products = np.full(np.prod(self.shape), -1)
        products[: len(self.order)] = self.order
        products = products.reshape(-1, self.tile)[:, np.concatenate(slots)]
        pictures = self.starts[products] + np.minimum(np.concatenate(numbers), np.diff(self.starts)[products] - 1)
        rows = np.full((len(products), self.places), -1)
        rows[:, : pictures.shape[1]] = np.where(products < 0, -1, pictures)
        return rows.reshape(-1)


def arrange(layout: Layout, starts: np.ndarray) -> PictureLayout:
    """Returns the layout of products with pictures.

    Each tile gets an equal share of the products with equally many pictures. Of these the order remains, so that what
    `layout.order` brings close together stays close.

    Args:
      layout: of the products in the wished order; its embeddings are those of the pictures, and its `max_tile` bounds
        the pictures of a tile.
      starts: (G + 1,) from `first_pictures`.
    """
    products, pictures = len(layout.order), len(layout.embeddings)
    layout = replace(layout, max_tile=max(layout.min_tile, layout.max_tile * products // pictures))
    tile, slots = layout.tile, np.arange(products)
    widths = _places(np.diff(starts))  # (G,)
    slot_widths = np.empty(products, np.int64)  # slots at the same position of all tiles have nearly equal widths
    slot_widths[np.argsort(slots % tile, kind="stable")] = -np.sort(-widths)
    order = np.empty(products, np.int64)
    order[np.argsort(-slot_widths, kind="stable")] = layout.order[np.argsort(-widths[layout.order], kind="stable")]
    first_tile = np.pad(slot_widths[:tile], (0, max(0, tile - products)), constant_values=1)  # the largest widths
    starting = first_tile[::POSITIONS]
    changes = np.flatnonzero(np.diff(starting, prepend=0))
    sizes = np.diff(np.append(changes, len(starting))) * POSITIONS
    segments = tuple(zip(starting[changes].tolist(), sizes.tolist(), strict=True))
    fields = {name: getattr(layout, name) for name in ("embeddings", "shards", "min_tile", "max_tile", "parts")}
    return PictureLayout(**fields, order=order, starts=starts, segments=segments)


def _places(pictures: np.ndarray) -> np.ndarray:
    """Returns the numbers rounded up: those above EXACT to multiples of an eighth of the next power of two."""
    octave = np.ceil(np.log2(np.maximum(pictures, EXACT))).astype(np.int64)
    step = 1 << (octave - 3)
    return -(-pictures // step) * step
