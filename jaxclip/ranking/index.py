"""Exact nearest neighbours in a gallery of embeddings that is stored on the devices."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from jaxclip.ranking import kernel, selection
from jaxclip.runtime.mesh import mesh_of


class NearestNeighbours:
    """Exact nearest products by dot product; the gallery is split over the given devices, by default all.

    Every query is compared with every vector in float32; there is no approximate index, so the time grows with the size
    of the gallery. The score of a product is the highest of its vectors' scores.

    Attributes:
      size: G, the number of products.
      dimension: D, the dimension of the vectors.
      max_k: the largest number of products that a search returns for each query; at most G.
      owners: (P,) the product of each vector.
    """

    def __init__(
        self,
        vectors: Float[np.ndarray, "P D"],
        *,
        max_k: int,
        owners: Int[np.ndarray, "P"] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Places the vectors on the devices.

        Args:
          vectors: the vectors, product by product.
          max_k: see the class; it is lowered to G.
          owners: the product of each vector, 0 to G-1 ascending, each with at least one; None if each has one.
          devices: the devices; None for all.
        """
        devices = jax.devices() if devices is None else devices
        mesh = mesh_of({"gallery": len(devices)}, devices)
        self._sharding = NamedSharding(mesh, PartitionSpec("gallery"))
        self.owners = np.arange(len(vectors)) if owners is None else np.asarray(owners)
        self.dimension = vectors.shape[1]
        self.size = int(self.owners[-1]) + 1
        self.max_k = min(max_k, self.size)
        self._tile = -(-self.size // len(devices))
        self._firsts = np.searchsorted(self.owners, np.arange(self.size + 1))  # where each product's vectors start
        self._gallery, self._local_owners, self._rows = self._place_vectors(vectors)
        self._all_allowed = self._place_products(np.ones(self.size, bool))  # (N * T,)

    def __call__(
        self, queries: Float[np.ndarray, "B D"], allowed: Bool[np.ndarray, "G"] | None = None
    ) -> tuple[Float[np.ndarray, "B K"], Int[np.ndarray, "B K"]]:
        """Returns the scores and numbers of each query's nearest products, best first.

        Products with equal scores are in ascending order. K is `max_k`, or the number of products at which `allowed` is
        True if that is smaller; without `allowed` all are searched. The search is compiled once for each number B of
        queries.
        """
        mask = self._all_allowed if allowed is None else self._place_products(allowed)
        count = self.max_k if allowed is None else min(self.max_k, int(allowed.sum()))
        scores, rows = _find_nearest(
            queries,
            self._gallery,
            self._local_owners,
            mask,
            devices=self._sharding.num_devices,
            k=self.max_k,
        )
        return np.asarray(scores)[:, :count], np.asarray(rows)[:, :count]

    def of_product(self, number: int) -> Float[np.ndarray, "p D"]:
        """Returns the vectors of one product."""
        rows = self._rows[self._firsts[number] : self._firsts[number + 1]]
        return np.stack([np.asarray(_read_row(self._gallery, row)) for row in rows])

    @property
    def vectors(self) -> Float[np.ndarray, "P D"]:
        """The vectors, copied from the devices."""
        return np.asarray(self._gallery)[self._rows]

    def _place_vectors(self, vectors: np.ndarray) -> tuple[jax.Array, jax.Array | None, np.ndarray]:
        """Returns the vectors split over the devices by product, their products' places there, and their rows (P,).

        A device has T products, in places from 0, and as many rows as the device with the most vectors; further rows
        are zeros that belong to a place T of no product. If each product has one vector, its row is its place, and None
        replaces the places.
        """
        count, starts = self._sharding.num_devices, self._firsts
        ends = [min(self._tile * (device + 1), self.size) for device in range(count)]
        spans = [(starts[min(self._tile * device, self.size)], starts[end]) for device, end in enumerate(ends)]
        rows = max(stop - start for start, stop in spans)

        def place(values: np.ndarray, padding: int) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                device = (index[0].start or 0) // rows
                block = values[slice(*spans[device])]
                return np.pad(block, [(0, rows - len(block))] + [(0, 0)] * (values.ndim - 1), constant_values=padding)

            return jax.make_array_from_callback((count * rows, *values.shape[1:]), self._sharding, part)

        positions = np.concatenate([np.arange(stop - start) + d * rows for d, (start, stop) in enumerate(spans)])
        places = None
        if len(vectors) > self.size:
            places = place((self.owners % self._tile).astype(np.int32), self._tile)
        return place(vectors, 0), places, positions

    def _place_products(self, values: np.ndarray) -> jax.Array:
        """Returns a value of each product split over the devices, with zeros after the last product."""
        shape = (self._sharding.num_devices * self._tile,)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start = index[0].start or 0
            block = values[start : start + self._tile]
            return np.pad(block, (0, self._tile - len(block)))

        return jax.make_array_from_callback(shape, self._sharding, part)


@partial(jax.jit, static_argnames=("devices", "k"))
def _find_nearest(queries, gallery, owners, allowed, *, devices, k):
    # The product is two-dimensional: with a third axis for the devices, XLA's CPU back end is many times slower.
    scores = kernel.product(queries, gallery)  # (B, N * rows)
    if owners is not None:
        scores = _highest_of_each(scores, owners, devices, len(allowed) // devices)
    scores = jnp.where(allowed, scores, -jnp.inf).reshape(len(queries), devices, -1)
    # Each device selects its k best scores, so that only these are transferred between devices.
    tile = scores.shape[-1]
    scores, rows = selection.top_k(scores, min(k, tile))  # (B, N, k)
    rows += tile * jnp.arange(devices, dtype=rows.dtype)[:, None]
    if devices > 1:
        scores, best = selection.top_k(scores.reshape(len(queries), -1), k)
        return scores, jnp.take_along_axis(rows.reshape(len(queries), -1), best, axis=1)
    return scores[:, 0], rows[:, 0]


@jax.jit
def _read_row(gallery, row):
    return gallery[row]


def _highest_of_each(scores, owners, devices, tile):
    """Returns (B, N * tile) the highest score of each product, from the scores (B, N * rows) of their vectors."""
    by_device = scores.reshape(len(scores), devices, -1).transpose(1, 2, 0)  # (N, rows, B)
    highest = partial(jax.ops.segment_max, num_segments=tile + 1, indices_are_sorted=True)
    best = jax.vmap(highest)(by_device, owners.reshape(devices, -1))[:, :tile]  # (N, tile, B)
    return best.transpose(2, 0, 1).reshape(len(scores), -1)
