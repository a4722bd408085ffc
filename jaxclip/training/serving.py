"""A workdir's towers over a catalogue: every product embedded once, ready to be searched."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from PIL import Image, ImageOps

from jaxclip.catalog import builder, pictures
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.features.agreement import colour_attribute
from jaxclip.pipeline import images, text
from jaxclip.pipeline.batches import image_batches
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.retrieval.gallery import Details, Gallery
from jaxclip.retrieval.index import KEY_BYTES, EmbeddingIndex, NearestNeighbours
from jaxclip.retrieval.searcher import MOST, Encoders, Searcher
from jaxclip.training import mesh as meshes
from jaxclip.training import setup
from jaxclip.training.base import checkpoint_params
from jaxclip.training.checkpoint import Checkpoints, chosen
from jaxclip.training.progress import bar
from jaxclip.training.setup import Towers
from jaxclip.training.state import Params, replicated

if TYPE_CHECKING:
    from jaxclip.config import Config

INDEX = "index"
COMPUTED_COLOUR = "colour"
"""Attribute of the dominant colour that preparation measured, where the catalogue names no colours."""
MAX_PIXELS = 24_000_000
"""Of pictures that are searched with."""
LOOKED_AT = 1024


def open_searcher(
    config: "Config", workdir: Path, prepared: Path, *, step: str, say: Callable[[str], None]
) -> Searcher:
    """Returns the searcher of a workdir's checkpoint over the configured split of a prepared dataset.

    Vectors are kept in WORKDIR/index by checkpoint and picture; only pictures that have none are embedded.

    Raises:
      UserError: there is no such checkpoint or split, or the split holds no product.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    number = chosen(step, checkpoints)
    records = Records(prepared, config.data.split)
    if not len(records):
        raise UserError(f"{prepared} has no product in its split {config.data.split}: there is nothing to search")
    towers = setup.load_towers(config, workdir)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, number)
    encoders = make_encoders(towers, params)
    products, keys = _read(records)
    encoder = fingerprint(towers, params)
    with EmbeddingIndex(
        workdir / INDEX / f"{encoder}.rows", encoder=encoder, dimension=towers.config.embedding, say=say
    ) as index:
        _embed_missing(index, records, keys, encoders, towers, config)
        vectors = index.vectors(keys)
    name = Path(builder.about(prepared)["source"]["path"]).name
    gallery = Gallery(name, products, records.picture, lambda number: Details(*records.described(number)))
    return Searcher(gallery, NearestNeighbours(vectors, most=MOST + 1), encoders)


def make_encoders(towers: Towers, params: Params) -> Encoders:
    """Returns the towers as functions of sentences and pictures."""
    graph, out, rows = towers.graph, replicated(towers.mesh), meshes.rows(towers.mesh)
    compiled_text = jax.jit(lambda params, x: nnx.merge(graph, params).encode_text(x), out_shardings=out)
    compiled_image = jax.jit(lambda params, x: nnx.merge(graph, params).encode_image(x), out_shardings=out)

    def encode(compiled: Callable, batch: np.ndarray) -> np.ndarray:
        filled = np.concatenate([batch, np.repeat(batch[-1:], -len(batch) % rows, axis=0)])
        with jax.set_mesh(towers.mesh):
            return np.asarray(compiled(params, filled))[: len(batch)]

    def encode_text(sentences: Sequence[str]) -> np.ndarray:
        worded = [text.caption(sentence, {}, towers.preprocess) for sentence in sentences]
        return encode(compiled_text, text.encode(towers.tokenizer, worded, towers.preprocess.context_length))

    return Encoders(
        text=encode_text,
        image=lambda batch: encode(compiled_image, batch),
        picture=lambda image: read_picture(image, towers.preprocess),
        picture_size=towers.preprocess.image_size,
    )


def read_picture(image: Any, preprocess: Preprocess) -> np.ndarray:
    """Returns a picture as the image tower takes it, (S, S, 3) uint8.

    Args:
      image: a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array.
      preprocess: of the workdir.

    Raises:
      UserError: it is no picture, or one of more than 24 million pixels.
    """
    if isinstance(image, str | os.PathLike):
        if not Path(image).is_file():
            raise UserError(f"there is no picture at {image}")
        image = Path(image).read_bytes()
    if isinstance(image, Image.Image):
        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    seen = pictures.look(image, most=LOOKED_AT, max_pixels=MAX_PIXELS) if isinstance(image, bytes) else image
    if isinstance(seen, str):
        raise UserError(f"the picture cannot be read: {seen}")
    if not isinstance(seen, np.ndarray) or seen.dtype != np.uint8 or seen.ndim != 3 or seen.shape[-1] != 3:
        raise UserError("a picture is a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array")
    return images.resize(seen, preprocess.image_size, preprocess.resize).numpy()


def fingerprint(towers: Towers, params: Params) -> str:
    """Returns 16 hex digits that change with any parameter and with how pictures reach the towers."""
    digest = hashlib.sha256()
    settings = [dataclasses.asdict(towers.preprocess), dataclasses.asdict(towers.config)]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _read(records: Records) -> tuple[list[Product], list[bytes]]:
    """Returns the products and the content keys of their pictures."""
    products, keys = [], []
    for product, picture in bar(records.pictured(), total=len(records), desc="reading products", unit="product"):
        products.append(product)
        keys.append(hashlib.blake2b(picture, digest_size=KEY_BYTES).digest())
    if "colour_names" in records.features and colour_attribute([product.attributes for product in products]) is None:
        colours = records.columns(("colour_names",))["colour_names"]
        products = [
            dataclasses.replace(product, attributes={**product.attributes, COMPUTED_COLOUR: names[0]})
            for product, names in zip(products, colours, strict=True)
        ]
    return products, keys


def _embed_missing(
    index: EmbeddingIndex,
    records: Records,
    keys: Sequence[bytes],
    encoders: Encoders,
    towers: Towers,
    config: "Config",
) -> None:
    missing, size = index.missing(keys), config.evaluation.batch_size
    if not len(missing):
        return
    batches = image_batches(records, towers.preprocess, batch_size=size, workers=config.data.workers, numbers=missing)
    total = -(-len(missing) // size)
    for start, batch in enumerate(bar(batches, total=total, desc="embedding pictures", unit="batch")):
        numbers = missing[start * size : (start + 1) * size]
        index.append([keys[number] for number in numbers], encoders.image(batch)[: len(numbers)])
