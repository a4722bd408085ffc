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
    """Exact nearest neighbours by dot product; the gallery is split over the given devices, by default all.

    Every query is compared with every vector in float32; there is no approximate index, so the time grows with the size
    of the gallery.

    Attributes:
      size: G, the number of vectors.
      dimension: D, the dimension of the vectors.
      max_k: the largest number of neighbours that a search returns for each query; at most G.
    """

    def __init__(self, vectors: Float[np.ndarray, "G D"], *, max_k: int, devices: Sequence[jax.Device] | None = None):
        devices = jax.devices() if devices is None else devices
        mesh = mesh_of({"gallery": len(devices)}, devices)
        self._sharding = NamedSharding(mesh, PartitionSpec("gallery"))
        self.size, self.dimension = vectors.shape
        self.max_k = min(max_k, self.size)
        self._tile = -(-self.size // len(devices))
        self._gallery = self._place(vectors)  # (N * T, D) for N devices of T rows each
        self._all_allowed = self._place(np.ones(self.size, bool))  # (N * T,)

    def __call__(
        self, queries: Float[np.ndarray, "B D"], allowed: Bool[np.ndarray, "G"] | None = None
    ) -> tuple[Float[np.ndarray, "B K"], Int[np.ndarray, "B K"]]:
        """Returns the scores and gallery rows of each query's nearest neighbours, best first.

        Rows with equal scores are in ascending order. K is `max_k`, or the number of rows at which `allowed` is True if
        that is smaller; without `allowed` all rows are searched. The search is compiled once for each number B of
        queries.
        """
        mask = self._all_allowed if allowed is None else self._place(allowed)
        count = self.max_k if allowed is None else min(self.max_k, int(allowed.sum()))
        scores, rows = _find_nearest(queries, self._gallery, mask, devices=self._sharding.num_devices, k=self.max_k)
        return np.asarray(scores)[:, :count], np.asarray(rows)[:, :count]

    def vector(self, row: int) -> Float[np.ndarray, "D"]:
        """Returns one row of the gallery."""
        return np.asarray(_read_row(self._gallery, row))

    @property
    def vectors(self) -> Float[np.ndarray, "G D"]:
        """The gallery, copied from the devices."""
        return np.asarray(self._gallery)[: self.size]

    def _place(self, rows: np.ndarray) -> jax.Array:
        """Returns the rows split over the devices, padded with zeros to a multiple of the number of devices."""
        shape = (self._sharding.num_devices * self._tile, *rows.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start = index[0].start or 0
            block = rows[start : start + self._tile]
            return np.pad(block, [(0, self._tile - len(block))] + [(0, 0)] * (rows.ndim - 1))

        return jax.make_array_from_callback(shape, self._sharding, part)


@partial(jax.jit, static_argnames=("devices", "k"))
def _find_nearest(queries, gallery, allowed, *, devices, k):
    # The product is two-dimensional: with a third axis for the devices, XLA's CPU back end is many times slower.
    scores = kernel.product(queries, gallery)  # (B, N * T)
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
