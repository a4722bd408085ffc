"""A workdir's towers over a catalogue: every product embedded once, ready to be searched."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from PIL import Image, ImageOps

from jaxclip.catalog import builder, pictures
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.features.agreement import colour_attribute
from jaxclip.pipeline import images, text
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.retrieval.gallery import Details, Gallery
from jaxclip.retrieval.index import NearestNeighbours
from jaxclip.retrieval.searcher import MOST, QueryEncoders, Searcher
from jaxclip.retrieval.store import content_key
from jaxclip.training import evaluation
from jaxclip.training import mesh as meshes
from jaxclip.training.encoders import Encoders
from jaxclip.training.progress import bar
from jaxclip.training.state import Params

if TYPE_CHECKING:
    from jaxclip.config import Config

COMPUTED_COLOUR = "colour"
"""Attribute of the dominant colour that preparation measured, where the catalogue names no colours."""
MAX_PIXELS = 24_000_000
"""Of pictures that are searched with."""
LOOKED_AT = 1024


def open_searcher(
    config: "Config", workdir: Path, prepared: Path, *, step: str, say: Callable[[str], None]
) -> Searcher:
    """Returns the searcher of a workdir's checkpoint over the configured split of a prepared dataset.

    Vectors are kept in the workdir by content, those of evaluations among them; only pictures that have none are
    embedded.

    Raises:
      UserError: there is no such checkpoint or split, the split holds no product, or the vectors are not finite.
    """
    loaded = evaluation.load(config, workdir, step, prepared=prepared, say=say)
    if not len(loaded.records):
        raise UserError(f"{prepared} has no product in its split {config.data.split}: there is nothing to search")
    products, keys = _read(loaded.records)
    encoders = Encoders(loaded.towers, batch_size=config.evaluation.batch_size, workers=config.data.workers)
    store = evaluation.store_of(workdir, loaded, config, say=say)
    with jax.set_mesh(loaded.towers.mesh):
        vectors = encoders.pictures(loaded.params, loaded.records, store=store, keys=keys)
    if not np.isfinite(vectors).all():
        raise UserError(f"step {loaded.step} of {workdir} gives vectors that are not finite: take another --step")
    name = Path(builder.about(prepared)["source"]["path"]).name
    gallery = Gallery(name, products, loaded.records.picture, lambda n: Details(*loaded.records.described(n)))
    return Searcher(gallery, NearestNeighbours(vectors, most=MOST + 1), query_encoders(encoders, loaded.params))


def query_encoders(encoders: Encoders, params: Params) -> QueryEncoders:
    """Returns the towers as functions of sentences and pictures."""
    towers, rows = encoders.towers, meshes.rows(encoders.towers.mesh)

    def encode(compiled: Callable, batch: np.ndarray) -> np.ndarray:
        filled = np.concatenate([batch, np.repeat(batch[-1:], -len(batch) % rows, axis=0)])
        with jax.set_mesh(towers.mesh):
            return np.asarray(compiled(params, filled))[: len(batch)]

    def encode_text(sentences: Sequence[str]) -> np.ndarray:
        worded = [text.caption(sentence, {}, towers.preprocess) for sentence in sentences]
        return encode(encoders.text, text.encode(towers.tokenizer, worded, towers.preprocess.context_length))

    return QueryEncoders(
        text=encode_text,
        image=lambda batch: encode(encoders.image, batch),
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
    return images.resize(seen, preprocess.image_size, preprocess.resize, preprocess.filter).numpy()


def _read(records: Records) -> tuple[list[Product], list[bytes]]:
    """Returns the products and the content keys of their pictures."""
    products, keys = [], []
    for product, picture in bar(records.pictured(), total=len(records), desc="reading products", unit="product"):
        products.append(product)
        keys.append(content_key(picture))
    if "colour_names" in records.features and colour_attribute([product.attributes for product in products]) is None:
        colours = records.columns(("colour_names",))["colour_names"]
        products = [
            dataclasses.replace(product, attributes={**product.attributes, COMPUTED_COLOUR: names[0]})
            for product, names in zip(products, colours, strict=True)
        ]
    return products, keys
