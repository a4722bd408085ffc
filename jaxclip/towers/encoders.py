"""Embeds the pictures and captions of a split with both towers, on all devices and processes."""

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
    """Both towers, compiled once for one batch size; the parameters are an argument.

    B is the batch size, D the dimension of the embeddings, T the number of tokens and W the width of a tower.

    Embeddings are float32 even where the towers compute in bfloat16. Ranks are exact, and two items tie only if their
    float32 scores are equal. bfloat16 has 8 significant bits, so that near a cosine of 1 it could round scores that
    differ by up to 0.004 to one value: false ties, which change the ranks (see `models.clip.normalise`).

    Attributes:
      towers: the towers.
      workers: number of pictures that are decoded in parallel; 0 lets tf.data decide.
      batch_size: rows of a batch over all devices, rounded up to what the mesh can split evenly.
      image: (params, pixels) -> (B, D) float32 unit vectors, each the mean over `towers.views`, normalised.
      text: (params, tokens) -> (B, D) float32 unit vectors.
      image_tokens: (params, pixels) -> (B, T, W), the output of the last block for each token.
      text_tokens: (params, tokens) -> (B, T, W), the same for captions, with zeros after the end token.
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
            outputs, inside = nnx.merge(graph, params).text.tokens(x)
            return jnp.where(inside[..., None], outputs, 0)

        self.image_tokens = jit(lambda params, x: nnx.merge(graph, params).image.tokens(x))
        self.text_tokens = jit(text_tokens)

    def store(self, workdir: Path, params: Params, step: int, *, say: Callable[[str], None]) -> EmbeddingStore:
        """Returns the workdir's store for the embeddings that the towers give with these parameters.

        The file's name has the step and a fingerprint of the parameters, the towers, the preprocessing, the batch size
        and the views.
        """
        dependencies = {
            "parameters": int(jax.jit(checksum)(params)),
            "preprocess": asdict(self.towers.preprocess),
            "towers": asdict(self.towers.config),
            "batch": self.batch_size,
            "views": asdict(self.towers.views),
        }
        key = files.fingerprint(dependencies)
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
        """Returns the unit vectors of all pictures, (P, D) float32, or the outputs for their tokens, (P, T, W).

        They are in the order of `Records.picture_places`. For D, T and W see the class.

        Args:
          params: parameters of the towers.
          records: the products, which have P pictures together.
          crops: embed the best crop of each picture. Towers trained on crops (data.picture) always embed the crop.
          tokens: return the last block's output for each token instead; must not be combined with a store.
          store: where embeddings are looked up first and new ones are saved.
          keys: the store's keys of the pictures (`picture_key`), if the caller has computed them already.
        """

        places = records.picture_places

        def batches(positions: np.ndarray) -> Iterable[np.ndarray]:
            return image_batches(
                records,
                self.towers.preprocess,
                places=places[positions],
                batch_size=self.batch_size,
                rows=self._rows,
                workers=self.workers,
                crops=crops,
            )

        def own_keys() -> Sequence[bytes]:
            return [
                self.picture_key(picture, crop, crops=crops)
                for _, pictures in records.products_with_pictures()
                for picture, crop in pictures
            ]

        encoder, content = self.image_tokens if tokens else self.image, "crops" if crops else "pictures"
        return self._embed(encoder, params, batches, len(places), content, store, lambda: keys or own_keys())

    def picture_key(self, picture: bytes, crop: np.ndarray | None, *, crops: bool = False) -> bytes:
        """Returns the store's key for the part of a picture that the image tower sees.

        That part is the whole picture, or `crop` (left, top, right, bottom as shares of the sides) if `crops` is true
        or the towers were trained on crops.
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
        """Returns the unit vectors of Q captions, (Q, D) float32, or the outputs for their tokens, (Q, T, W).

        The captions are used as they are, without the caption template. Embeddings are looked up in the store first and
        new ones are saved in it; `tokens` must not be combined with a store.
        """
        towers = self.towers
        ids = text.encode(towers.tokenizer, captions, towers.preprocess.context_length)
        return self._tokenized(params, ids, tokens=tokens, store=store)

    def segmented(self, params: Params, captions: Sequence[str], segments: int, *, tokens: bool = False) -> np.ndarray:
        """Returns what `captions` returns, but splits a caption that is too long into up to `segments` parts.

        What does not fit into the parts is dropped. A caption's vector is the mean of its parts' vectors, weighted by
        their numbers of tokens and normalised. Its tokens are those of all parts, (Q, segments * T, W), with zeros for
        missing parts.
        """
        towers = self.towers
        parts = text.segments(towers.tokenizer, captions, towers.preprocess.context_length, segments)
        number = np.arange(len(parts.owners)) - np.searchsorted(parts.owners, parts.owners)
        encoded = self._tokenized(params, parts.ids, tokens=tokens, store=None)
        if tokens:
            by_caption = np.zeros((len(captions), segments, *encoded.shape[1:]), encoded.dtype)
            by_caption[parts.owners, number] = encoded
            return by_caption.reshape(len(captions), -1, encoded.shape[-1])
        pooled = np.zeros((len(captions), encoded.shape[1]), encoded.dtype)
        np.add.at(pooled, parts.owners, encoded * parts.lengths[:, None])
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    def _tokenized(self, params: Params, ids: np.ndarray, *, tokens: bool, store: EmbeddingStore | None) -> np.ndarray:
        """Returns the embeddings, or the outputs for tokens, of each row of `ids`.

        Equal rows are embedded once: at different places of a batch, their embeddings could differ in rounding.
        """
        _, first, inverse = np.unique(ids, axis=0, return_index=True, return_inverse=True)
        kept = np.sort(first)  # the first of equal rows, in the order of `ids`
        distinct = ids[kept]

        def batches(positions: np.ndarray) -> Iterable[np.ndarray]:
            for block in padded_blocks(distinct[positions], self.batch_size):
                yield block[self._rows]

        def keys() -> Sequence[bytes]:
            return [content_key(row.tobytes()) for row in distinct]

        encoder = self.text_tokens if tokens else self.text
        rows = self._embed(encoder, params, batches, len(distinct), "captions", store, keys)
        return rows if len(distinct) == len(ids) else rows[np.searchsorted(kept, first[inverse])]

    def _embed(
        self,
        encoder: Callable,
        params: Params,
        batches: Callable[[np.ndarray], Iterable[np.ndarray]],
        rows: int,
        content: str,
        store: EmbeddingStore | None,
        keys: Callable[[], Sequence[bytes]],
    ) -> np.ndarray:
        cast_params = cache(lambda: self.towers.cast_kernels(params))  # never called if the store has every embedding

        def encode(batch: np.ndarray) -> jax.Array:
            return encoder(cast_params(), meshes.place_rows(self._sharding, self.batch_size, batch))

        def with_progress(positions: np.ndarray) -> Iterable[np.ndarray]:
            total = -(-len(positions) // self.batch_size)
            return bar(batches(positions), total=total, desc=f"embedding {content}", unit="batch", leave=False)

        if store is None:
            return embed(encode, with_progress(np.arange(rows)), rows)
        return embed_stored(store, keys(), encode, with_progress)
