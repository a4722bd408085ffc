"""A checkpoint's towers as functions from pictures and captions to embeddings, over all devices and processes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclip.pipeline import text
from jaxclip.pipeline.batches import image_batches
from jaxclip.pipeline.records import Records
from jaxclip.runtime import compiler, files
from jaxclip.runtime import mesh as meshes
from jaxclip.runtime.progress import bar
from jaxclip.towers.embed import embed, embed_stored, padded_blocks
from jaxclip.towers.params import Params, checksum, replicated
from jaxclip.towers.store import EmbeddingStore, content_key
from jaxclip.towers.towers import Towers

STORES = "embeddings"


class Encoders:
    """Both towers, compiled once for batches of one size, for whatever parameters they are given.

    Attributes:
      image, text: (params, batch) -> (B, D) unit vectors, a picture's over its `towers.views`.
      image_tokens, text_tokens: (params, batch) -> (B, T, W), what the last block makes of each token, and of captions
        zeros past the end.
      batch_size: rows of a batch, over all devices.
    """

    def __init__(self, towers: Towers, *, batch_size: int, workers: int = 0):
        self.towers, self.workers = towers, workers
        multiple = meshes.batch_multiple(towers.mesh)
        self.batch_size = -(-batch_size // multiple) * multiple
        graph, out = towers.graph, replicated(towers.mesh)
        jit = partial(jax.jit, out_shardings=out, compiler_options=compiler.towers())
        self.image = jit(lambda params, x: towers.views.embed(nnx.merge(graph, params).encode_image, x))
        self.text = jit(lambda params, x: nnx.merge(graph, params).encode_text(x))
        self._sharding = meshes.batch_sharding(towers.mesh)
        self._rows = meshes.process_rows(self._sharding, self.batch_size)

        def text_tokens(params: Params, x: jax.Array) -> jax.Array:
            found, inside = nnx.merge(graph, params).text.tokens(x)
            return jnp.where(inside[..., None], found, 0)

        self.image_tokens = jit(lambda params, x: nnx.merge(graph, params).image.tokens(x))
        self.text_tokens = jit(text_tokens)

    def store(self, workdir: Path, params: Params, step: int, *, say: Callable[[str], None]) -> EmbeddingStore:
        """Returns where a workdir keeps what these parameters make; the file's name changes with all it depends on."""
        depends = {
            "parameters": int(jax.jit(checksum)(params)),
            "preprocess": asdict(self.towers.preprocess),
            "towers": asdict(self.towers.config),
            "batch": self.batch_size,
            "views": asdict(self.towers.views),
        }
        key = files.fingerprint(depends)
        path = workdir / STORES / f"step-{step}-{key}.rows"
        return EmbeddingStore(path, fingerprint=key, dimension=self.towers.config.embedding, say=say)

    def pictures(
        self,
        params: Params,
        records: Records,
        *,
        crops: bool = False,
        tokens: bool = False,
        store: EmbeddingStore | None = None,
        keys: Sequence[bytes] | None = None,
    ) -> np.ndarray:
        """Returns the unit vectors of all pictures, (G, D), or of their tokens, (G, T, W).

        With `crops`, and wherever these are what the towers see, it is of the best crop of each. Vectors that the store
        has are read there; `keys` are those of the pictures in it (see `picture_key`), where they are known already.
        Tokens are in no store.
        """

        def batches(numbers: np.ndarray) -> Iterable[np.ndarray]:
            return image_batches(
                records.take(numbers),
                self.towers.preprocess,
                batch_size=self.batch_size,
                rows=self._rows,
                workers=self.workers,
                crops=crops,
            )

        def own_keys() -> Sequence[bytes]:
            return [self.picture_key(picture, crop, crops=crops) for _, picture, crop in records.pictured()]

        encoder, what = self.image_tokens if tokens else self.image, "crops" if crops else "pictures"
        return self._embed(encoder, params, batches, len(records), what, store, lambda: keys or own_keys())

    def picture_key(self, picture: bytes, crop: np.ndarray | None, *, crops: bool = False) -> bytes:
        """Returns what stands in a store for what the image tower sees of a picture.

        That is all of it, or `crop` (left, top, right, bottom as shares) with `crops` or where towers see these alone.
        """
        cropped = crop is not None and (crops or self.towers.preprocess.picture == "crop")
        return content_key(picture + crop.tobytes() if cropped else picture)

    def captions(
        self,
        params: Params,
        captions: Sequence[str],
        *,
        tokens: bool = False,
        store: EmbeddingStore | None = None,
    ) -> np.ndarray:
        """Returns the unit vectors of captions as they are worded, (Q, D), or of their tokens, (Q, T, W).

        Vectors that the store has are read there; tokens are in none.
        """
        towers = self.towers
        ids = text.encode(towers.tokenizer, captions, towers.preprocess.context_length)
        return self._tokenized(params, ids, tokens=tokens, store=store)

    def segmented(self, params: Params, captions: Sequence[str], segments: int, *, tokens: bool = False) -> np.ndarray:
        """Returns what `captions` does, of captions that are read in up to so many parts rather than cut off.

        A caption's vector is the mean of its parts' weighted by their tokens, at unit length; its tokens are those of
        its parts, (Q, segments * T, W), zeros where it has fewer.
        """
        towers = self.towers
        parts = text.segments(towers.tokenizer, captions, towers.preprocess.context_length, segments)
        number = np.arange(len(parts.owners)) - np.searchsorted(parts.owners, parts.owners)
        found = self._tokenized(params, parts.ids, tokens=tokens, store=None)
        if tokens:
            whole = np.zeros((len(captions), segments, *found.shape[1:]), found.dtype)
            whole[parts.owners, number] = found
            return whole.reshape(len(captions), -1, found.shape[-1])
        pooled = np.zeros((len(captions), found.shape[1]), found.dtype)
        np.add.at(pooled, parts.owners, found * parts.lengths[:, None])
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    def _tokenized(self, params: Params, ids: np.ndarray, *, tokens: bool, store: EmbeddingStore | None) -> np.ndarray:
        def batches(numbers: np.ndarray) -> Iterable[np.ndarray]:
            for block in padded_blocks(ids[numbers], self.batch_size):
                yield block[self._rows]

        def keys() -> Sequence[bytes]:
            return [content_key(row.tobytes()) for row in ids]

        encoder = self.text_tokens if tokens else self.text
        return self._embed(encoder, params, batches, len(ids), "captions", store, keys)

    def _embed(
        self,
        encoder: Callable,
        params: Params,
        batches: Callable[[np.ndarray], Iterable[np.ndarray]],
        rows: int,
        what: str,
        store: EmbeddingStore | None,
        keys: Callable[[], Sequence[bytes]],
    ) -> np.ndarray:
        narrow = cache(lambda: self.towers.cast_kernels(params))  # not where the store has all

        def encode(batch: np.ndarray) -> jax.Array:
            return encoder(narrow(), meshes.place_rows(self._sharding, self.batch_size, batch))

        def shown(numbers: np.ndarray) -> Iterable[np.ndarray]:
            total = -(-len(numbers) // self.batch_size)
            return bar(batches(numbers), total=total, desc=f"embedding {what}", unit="batch", leave=False)

        if store is None:
            return embed(encode, shown(np.arange(rows)), rows)
        return embed_stored(store, keys(), encode, shown)
