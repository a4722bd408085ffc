"""A checkpoint's towers as functions from pictures and captions to embeddings, over all devices and processes."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxclip.pipeline import text
from jaxclip.pipeline.batches import image_batches
from jaxclip.pipeline.records import Records
from jaxclip.retrieval.embed import embed, embed_stored, padded_blocks
from jaxclip.training import mesh as meshes
from jaxclip.training.progress import bar
from jaxclip.training.setup import Towers
from jaxclip.training.state import Params, replicated


class Encoders:
    """Both towers, compiled once for batches of one size, for whatever parameters they are given.

    Attributes:
      image, text: (params, batch) -> (B, D) unit vectors.
      batch_size: rows of a batch, over all devices.
    """

    def __init__(self, towers: Towers, *, batch_size: int, workers: int = 0):
        self.towers, self.workers = towers, workers
        multiple = meshes.rows(towers.mesh)
        self.batch_size = -(-batch_size // multiple) * multiple
        graph, out = towers.graph, replicated(towers.mesh)
        self.image = jax.jit(lambda params, x: nnx.merge(graph, params).encode_image(x), out_shardings=out)
        self.text = jax.jit(lambda params, x: nnx.merge(graph, params).encode_text(x), out_shardings=out)
        self._sharding = meshes.batch_sharding(towers.mesh)
        self._rows = meshes.process_rows(self._sharding, self.batch_size)

    def pictures(self, params: Params, records: Records, *, store: Path | None = None) -> np.ndarray:
        """Returns the unit vectors of all pictures, (G, D); parts of them are kept in the folder `store`."""

        def batches(first: int) -> Iterable[np.ndarray]:
            return image_batches(
                records,
                self.towers.preprocess,
                batch_size=self.batch_size,
                rows=self._rows,
                workers=self.workers,
                first=first,
            )

        return self._embed(self.image, params, batches, len(records), "pictures", store)

    def captions(self, params: Params, captions: Sequence[str], *, store: Path | None = None) -> np.ndarray:
        """Returns the unit vectors of captions as they are worded, (Q, D); parts are kept in the folder `store`."""
        towers = self.towers
        tokens = text.encode(towers.tokenizer, captions, towers.preprocess.context_length)

        def batches(first: int) -> Iterable[np.ndarray]:
            for block in islice(padded_blocks(tokens, self.batch_size), first, None):
                yield block[self._rows]

        return self._embed(self.text, params, batches, len(tokens), "captions", store)

    def _embed(self, encoder: Callable, params: Params, batches: Callable, rows: int, what: str, store: Path | None):
        def encode(batch: np.ndarray) -> jax.Array:
            return encoder(params, meshes.place_rows(self._sharding, self.batch_size, batch))

        def shown(first: int) -> Iterable[np.ndarray]:
            total = -(-rows // self.batch_size)
            return bar(batches(first), initial=first, total=total, desc=f"embedding {what}", unit="batch", leave=False)

        if store is None:
            return embed(encode, shown(0), rows)
        return embed_stored(store, encode, shown, rows, self.batch_size)
