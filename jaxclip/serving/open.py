"""Opens a searcher: the towers of a workdir over an embedded catalogue."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps

from jaxclip.catalog import builder, pictures
from jaxclip.catalog.product import Product
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.features.agreement import colour_attribute
from jaxclip.features.describe import ProductDescriber
from jaxclip.pipeline import images, text
from jaxclip.pipeline.prepared_data import make_describer
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.ranking.index import NearestNeighbours
from jaxclip.reranking.first_stage import gallery_features
from jaxclip.runtime import distributed
from jaxclip.runtime import mesh as meshes
from jaxclip.runtime.progress import bar
from jaxclip.serving import second_stage
from jaxclip.serving.gallery import Gallery, ProductDetails
from jaxclip.serving.searcher import MOST, QueryEncoders, Searcher
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.load import load_checkpoint
from jaxclip.towers.params import Params

COMPUTED_COLOUR = "colour"
"""Attribute that holds the dominant colour measured by preparation, if the catalogue names no colours."""
MAX_PIXELS = 24_000_000
"""Largest number of pixels of a query picture."""
LONGEST_SIDE = 1024
"""Query pictures are decoded to at most this many pixels on the longer side."""


def open_searcher(
    config: Config,
    workdir: Path,
    prepared: Path,
    *,
    step: str,
    rerank: "tuple[Path, Config] | None" = None,
    say: Callable[[str], None],
) -> Searcher:
    """Returns the searcher of a workdir's checkpoint over the configured split of a prepared dataset.

    Vectors are stored in the workdir under a hash of the picture; evaluations use the same store. Only pictures that
    are not in it are embedded. `rerank` is the workdir of a re-ranker of these towers and its configuration.

    Raises:
      UserError: there is no such checkpoint or split, the split holds no product, the vectors are not finite, or the
        re-ranker was trained on other towers.
    """
    distributed.require_one_process("a search")
    if rerank is None:
        first = load_checkpoint(config, workdir, step, prepared=prepared, say=say)
    else:
        first = second_stage.find_first_stage(rerank[1], rerank[0], config, workdir, step)
    records = Records(prepared, config.data.split)
    if not len(records):
        raise UserError(f"{prepared} has no product in its split {config.data.split}: there is nothing to search")
    encoders = Encoders(first.towers, batch_size=config.evaluation.batch_size, workers=config.data.workers)
    products, *keys = _read(records, encoders)
    store = encoders.store(workdir, first.params, first.step, say=say)
    with jax.set_mesh(first.towers.mesh):
        vectors = encoders.pictures(first.params, records, store=store, keys=keys[0])
    if not np.isfinite(vectors).all():
        raise UserError(f"step {first.step} of {workdir} gives vectors that are not finite: give another --step")
    second, depth = None, MOST + 1
    if rerank is not None:
        folder, own = rerank
        tokens = second_stage.needs_tokens(own)
        with jax.set_mesh(first.towers.mesh):
            split = gallery_features(first, records, products, encoders, tokens=tokens, store=store, keys=keys)
        second = second_stage.open_second_stage(own, folder, first, split, encoders)
        depth = max(depth, second.candidates + 1)
    gallery = Gallery(
        Path(builder.metadata(prepared)["source"]["path"]).name,
        _with_colours(products, records),
        records.picture,
        lambda number: ProductDetails(*records.described(number)),
    )
    return Searcher(
        gallery,
        NearestNeighbours(vectors, max_k=depth),
        query_encoders(encoders, first.params, make_describer(config)),
        second,
    )


def query_encoders(encoders: Encoders, params: Params, describer: ProductDescriber | None) -> QueryEncoders:
    """Returns functions that encode sentences and pictures; `describer` crops pictures for towers trained on crops."""
    towers, rows = encoders.towers, meshes.batch_multiple(encoders.towers.mesh)
    params = towers.cast_kernels(params)

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
        picture=lambda image: read_picture(image, towers.preprocess, describer),
        picture_size=towers.preprocess.image_size,
    )


def read_picture(image: Any, preprocess: Preprocess, describer: ProductDescriber | None = None) -> np.ndarray:
    """Returns a picture as input of the image tower, (S, S, 3) uint8.

    Args:
      image: a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array.
      preprocess: preprocessing of the workdir.
      describer: describer of the workdir's catalogue; crops the picture if `preprocess.picture` is "crop".

    Raises:
      UserError: `image` is not a picture, or has more than 24 million pixels.
    """
    if isinstance(image, str | os.PathLike):
        if not Path(image).is_file():
            raise UserError(f"there is no picture at {image}")
        image = Path(image).read_bytes()
    if isinstance(image, Image.Image):
        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    seen = pictures.look(image, most=LONGEST_SIDE, max_pixels=MAX_PIXELS) if isinstance(image, bytes) else image
    if isinstance(seen, str):
        raise UserError(f"the picture cannot be read: {seen}")
    if not isinstance(seen, np.ndarray) or seen.dtype != np.uint8 or seen.ndim != 3 or seen.shape[-1] != 3:
        raise UserError("a picture is a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array")
    if preprocess.picture == "crop":
        seen = describer.best_crop(seen)
    return images.resize(seen, preprocess.image_size, preprocess.resize, preprocess.filter).numpy()


def _read(records: Records, encoders: Encoders) -> tuple[list[Product], list[bytes], list[bytes]]:
    """Returns the products, and the keys of their pictures and of their crops in an embedding store."""
    products, pictures, crops = [], [], []
    for product, picture, crop in bar(records.pictured(), total=len(records), desc="reading products", unit="product"):
        products.append(product)
        pictures.append(encoders.picture_key(picture, crop))
        crops.append(encoders.picture_key(picture, crop, crops=True))
    return products, pictures, crops


def _with_colours(products: Sequence[Product], records: Records) -> Sequence[Product]:
    """Returns the products; adds the measured dominant colour as an attribute if the catalogue names no colours."""
    named = colour_attribute([product.attributes for product in products]) is not None
    if named or "colour_names" not in records.features:
        return products
    colours = records.columns(("colour_names",))["colour_names"]
    return [
        dataclasses.replace(product, attributes={**product.attributes, COMPUTED_COLOUR: names[0]})
        for product, names in zip(products, colours, strict=True)
    ]
