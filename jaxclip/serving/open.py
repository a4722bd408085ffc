"""A workdir's towers over a catalogue: every product embedded once, ready to be searched."""

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
from jaxclip.reranking.first_stage import embed_gallery
from jaxclip.runtime import distributed
from jaxclip.runtime import mesh as meshes
from jaxclip.runtime.progress import bar
from jaxclip.serving import second_stage
from jaxclip.serving.gallery import Gallery, ProductDetails
from jaxclip.serving.searcher import MOST, QueryEncoders, Searcher
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.load import load
from jaxclip.towers.params import Params

COMPUTED_COLOUR = "colour"
"""Attribute of the dominant colour that preparation measured, where the catalogue names no colours."""
MAX_PIXELS = 24_000_000
"""Of pictures that are searched with."""
LOOKED_AT = 1024


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

    Vectors are kept in the workdir by content, those of evaluations among them; only pictures that have none are
    embedded. `rerank` is the workdir of a re-ranker of these towers and its configuration.

    Raises:
      UserError: there is no such checkpoint or split, the split holds no product, the vectors are not finite, or the
        re-ranker does not fit.
    """
    distributed.require_one_process("a search")
    if rerank is None:
        found = load(config, workdir, step, prepared=prepared, say=say)
    else:
        found = second_stage.find_first_stage(rerank[1], rerank[0], config, workdir, step)
    records = Records(prepared, config.data.split)
    if not len(records):
        raise UserError(f"{prepared} has no product in its split {config.data.split}: there is nothing to search")
    encoders = Encoders(found.towers, batch_size=config.evaluation.batch_size, workers=config.data.workers)
    products, *keys = _read(records, encoders)
    store = encoders.store(workdir, found.params, found.step, say=say)
    with jax.set_mesh(found.towers.mesh):
        vectors = encoders.pictures(found.params, records, store=store, keys=keys[0])
    if not np.isfinite(vectors).all():
        raise UserError(f"step {found.step} of {workdir} gives vectors that are not finite: take another --step")
    second, depth = None, MOST + 1
    if rerank is not None:
        folder, own = rerank
        tokens = second_stage.needs_tokens(own)
        with jax.set_mesh(found.towers.mesh):
            known = embed_gallery(found, records, products, encoders, tokens=tokens, store=store, keys=keys)
        second = second_stage.open_second_stage(own, folder, found, known, encoders)
        depth = max(depth, second.candidates + 1)
    gallery = Gallery(
        Path(builder.metadata(prepared)["source"]["path"]).name,
        _with_colours(products, records),
        records.picture,
        lambda number: ProductDetails(*records.described(number)),
    )
    return Searcher(
        gallery,
        NearestNeighbours(vectors, most=depth),
        query_encoders(encoders, found.params, make_describer(config)),
        second,
    )


def query_encoders(encoders: Encoders, params: Params, describer: ProductDescriber | None) -> QueryEncoders:
    """Returns the towers as functions of sentences and pictures; `describer` crops these where towers see crops."""
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
    """Returns a picture as the image tower takes it, (S, S, 3) uint8.

    Args:
      image: a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array.
      preprocess: of the workdir.
      describer: of the workdir's catalogue; what crops the picture where `preprocess` wants that.

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
    if preprocess.picture == "crop":
        seen = describer.best_crop(seen)
    return images.resize(seen, preprocess.image_size, preprocess.resize, preprocess.filter).numpy()


def _read(records: Records, encoders: Encoders) -> tuple[list[Product], list[bytes], list[bytes]]:
    """Returns the products, and what stands for their pictures and for their crops in a store."""
    products, pictures, crops = [], [], []
    for product, picture, crop in bar(records.pictured(), total=len(records), desc="reading products", unit="product"):
        products.append(product)
        pictures.append(encoders.picture_key(picture, crop))
        crops.append(encoders.picture_key(picture, crop, crops=True))
    return products, pictures, crops


def _with_colours(products: Sequence[Product], records: Records) -> Sequence[Product]:
    """Returns the products with the dominant colour that preparation measured, where the catalogue names no colours."""
    named = colour_attribute([product.attributes for product in products]) is not None
    if named or "colour_names" not in records.features:
        return products
    colours = records.columns(("colour_names",))["colour_names"]
    return [
        dataclasses.replace(product, attributes={**product.attributes, COMPUTED_COLOUR: names[0]})
        for product, names in zip(products, colours, strict=True)
    ]
