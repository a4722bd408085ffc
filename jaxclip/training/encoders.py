"""A checkpoint's towers as functions from pictures and captions to embeddings, over all devices and processes."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclip.pipeline import text
from jaxclip.pipeline.batches import Shard, image_batches
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
      image_tokens, text_tokens: (params, batch) -> (B, T, W), what the last block makes of each token, and of captions
        zeros past the end.
      batch_size: rows of a batch, over all devices.
    """

    def __init__(self, towers: Towers, *, batch_size: int, workers: int = 0):
        self.towers, self.workers = towers, workers
        multiple = meshes.rows(towers.mesh)
        self.batch_size = -(-batch_size // multiple) * multiple
        graph, out = towers.graph, replicated(towers.mesh)
        self.image = jax.jit(lambda params, x: nnx.merge(graph, params).encode_image(x), out_shardings=out)
        self.text = jax.jit(lambda params, x: nnx.merge(graph, params).encode_text(x), out_shardings=out)

        def text_tokens(params: Params, x: jax.Array) -> jax.Array:
            found, inside = nnx.merge(graph, params).text.tokens(x)
            return jnp.where(inside[..., None], found, 0)

        self.image_tokens = jax.jit(lambda params, x: nnx.merge(graph, params).image.tokens(x), out_shardings=out)
        self.text_tokens = jax.jit(text_tokens, out_shardings=out)
        self._shard = Shard(jax.process_index(), jax.process_count())

    def pictures(
        self, params: Params, records: Records, *, crops: bool = False, tokens: bool = False, store: Path | None = None
    ) -> np.ndarray:
        """Returns the unit vectors of all pictures, (G, D), or of their tokens, (G, T, W).

        With `crops` it is of the best crop of each. Parts of them are kept in the folder `store`.
        """

        def batches(first: int) -> Iterable[np.ndarray]:
            return image_batches(
                records,
                self.towers.preprocess,
                batch_size=self.batch_size,
                shard=self._shard,
                workers=self.workers,
                first=first,
                crops=crops,
            )

        encoder, what = self.image_tokens if tokens else self.image, "crops" if crops else "pictures"
        return self._embed(encoder, params, batches, len(records), what, store)

    def captions(
        self, params: Params, captions: Sequence[str], *, tokens: bool = False, store: Path | None = None
    ) -> np.ndarray:
        """Returns the unit vectors of captions as they are worded, (Q, D), or of their tokens, (Q, T, W).

        Parts of them are kept in the folder `store`.
        """
        towers = self.towers
        ids = text.encode(towers.tokenizer, captions, towers.preprocess.context_length)

        def batches(first: int) -> Iterable[np.ndarray]:
            for block in islice(padded_blocks(ids, self.batch_size), first, None):
                yield np.split(block, self._shard.count)[self._shard.index]

        encoder = self.text_tokens if tokens else self.text
        return self._embed(encoder, params, batches, len(ids), "captions", store)

    def _embed(self, encoder: Callable, params: Params, batches: Callable, rows: int, what: str, store: Path | None):
        sharding = meshes.batch_sharding(self.towers.mesh)

        def encode(batch: np.ndarray) -> jax.Array:
            return encoder(params, jax.make_array_from_process_local_data(sharding, batch))

        def shown(first: int) -> Iterable[np.ndarray]:
            total = -(-rows // self.batch_size)
            return bar(batches(first), initial=first, total=total, desc=f"embedding {what}", unit="batch", leave=False)

        if store is None:
            return embed(encode, shown(0), rows)
        return embed_stored(store, encode, shown, rows, self.batch_size)
