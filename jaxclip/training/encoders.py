"""A checkpoint's towers as functions from pictures and captions to embeddings, over all devices and processes."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from flax import nnx

from jaxclip.pipeline import text
from jaxclip.pipeline.batches import Shard, image_batches
from jaxclip.pipeline.records import Records
from jaxclip.retrieval.embed import embed, embed_stored, padded_blocks
from jaxclip.retrieval.store import EmbeddingStore, content_key
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
        self._shard = Shard(jax.process_index(), jax.process_count())

    def pictures(
        self,
        params: Params,
        records: Records,
        *,
        store: EmbeddingStore | None = None,
        keys: Sequence[bytes] | None = None,
    ) -> np.ndarray:
        """Returns the unit vectors of all pictures, (G, D); those that the store has are read there.

        `keys` are the pictures' content keys, where they are known already.
        """

        def batches(numbers: np.ndarray) -> Iterable[np.ndarray]:
            return image_batches(
                records.take(numbers),
                self.towers.preprocess,
                batch_size=self.batch_size,
                shard=self._shard,
                workers=self.workers,
            )

        if store is not None and keys is None:
            keys = [content_key(picture) for _, picture in records.pictured()]
        return self._embed(self.image, params, batches, len(records), "pictures", store, keys)

    def captions(self, params: Params, captions: Sequence[str], *, store: EmbeddingStore | None = None) -> np.ndarray:
        """Returns the unit vectors of captions as they are worded, (Q, D); those that the store has are read there."""
        towers = self.towers
        tokens = text.encode(towers.tokenizer, captions, towers.preprocess.context_length)

        def batches(numbers: np.ndarray) -> Iterable[np.ndarray]:
            for block in padded_blocks(tokens[numbers], self.batch_size):
                yield np.split(block, self._shard.count)[self._shard.index]

        keys = [content_key(row.tobytes()) for row in tokens]
        return self._embed(self.text, params, batches, len(tokens), "captions", store, keys)

    def _embed(
        self,
        encoder: Callable,
        params: Params,
        batches: Callable[[np.ndarray], Iterable[np.ndarray]],
        rows: int,
        what: str,
        store: EmbeddingStore | None,
        keys: Sequence[bytes] | None,
    ) -> np.ndarray:
        sharding = meshes.batch_sharding(self.towers.mesh)

        def encode(batch: np.ndarray) -> jax.Array:
            return encoder(params, jax.make_array_from_process_local_data(sharding, batch))

        def shown(numbers: np.ndarray) -> Iterable[np.ndarray]:
            total = -(-len(numbers) // self.batch_size)
            return bar(batches(numbers), total=total, desc=f"embedding {what}", unit="batch", leave=False)

        if store is None:
            return embed(encode, shown(np.arange(rows)), rows)
        return embed_stored(store, keys, encode, shown)
