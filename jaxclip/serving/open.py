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
from jaxclip.pipeline import images, text, trained_groups
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
from jaxclip.serving.searcher import MAX_RESULTS, QueryEncoders, Searcher
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.load import load_checkpoint
from jaxclip.towers.params import Params

COMPUTED_COLOUR = "colour"
"""Name of the attribute that holds the dominant colour measured by preparation, if the catalogue names no colours."""
MAX_PIXELS = 24_000_000
"""Encoded query pictures with more pixels are refused."""
LONGEST_SIDE = 1024
"""Encoded query pictures are decoded to at most this number of pixels on the longer side."""


def open_searcher(
    config: Config,
    workdir: Path,
    prepared: Path,
    *,
    step: str,
    rerank: tuple[Path, Config] | None = None,
    say: Callable[[str], None],
) -> Searcher:
    """Returns the searcher of a workdir's checkpoint over the configured split of a prepared dataset.

    Vectors are stored in the workdir under a hash of the picture; evaluations use the same store. Only pictures whose
    vectors are not stored yet are embedded. The image tokens that a cross-attention re-ranker reads are not stored:
    they are computed for all pictures.

    Args:
      config: configuration of the towers and the catalogue.
      workdir: workdir of the towers.
      prepared: folder of the prepared dataset.
      step: the checkpoint: "latest", "best" or a number.
      rerank: workdir and configuration of a re-ranker of these towers, None for a search without a second stage.
      say: prints a line for the user.

    Raises:
      UserError: there is no such checkpoint or split, the split has no products, the vectors are not finite, or the
        re-ranker was trained on other towers.
    """
    distributed.require_one_process("a search")
    if rerank is None:
        loaded = load_checkpoint(config, workdir, step, prepared=prepared, say=say)
        records = loaded.records
    else:
        loaded = second_stage.find_first_stage(rerank[1], rerank[0], config, workdir, step)
        trained = trained_groups.of_runs([workdir, rerank[0]], say)
        records, _ = trained_groups.unseen_records(prepared, config.data.split, trained, say)
    if not len(records):
        raise UserError(
            f"{prepared} has no products in the split {config.data.split}, so there is nothing to search: "
            "choose another --config.data.split"
        )
    encoders = Encoders(loaded.towers, batch_size=config.evaluation.batch_size, workers=config.data.workers)
    products, *keys = _read_products(records, encoders)
    store = encoders.store(workdir, loaded.params, loaded.step, say=say)
    with jax.set_mesh(loaded.towers.mesh):
        vectors = encoders.pictures(loaded.params, records, store=store, keys=keys[0])
    if not np.isfinite(vectors).all():
        raise UserError(f"step {loaded.step} of {workdir} gives vectors that are not finite: choose another --step")
    second, depth = None, MAX_RESULTS + 1  # one more, because a product that is itself the query is left out
    if rerank is not None:
        folder, reranker_config = rerank
        tokens = second_stage.needs_tokens(reranker_config)
        with jax.set_mesh(loaded.towers.mesh):
            split = embed_gallery(loaded, records, products, encoders, tokens=tokens, store=store, keys=keys)
        second = second_stage.open_second_stage(reranker_config, folder, loaded, split, encoders)
        depth = max(depth, second.candidates + 1)
    gallery = Gallery(
        Path(builder.metadata(prepared)["source"]["path"]).name,
        _with_colours(products, records),
        records.pictures,
        lambda number: ProductDetails(*records.product_with_features(number)),
    )
    return Searcher(
        gallery,
        NearestNeighbours(vectors, max_k=depth, owners=records.picture_owners),
        query_encoders(encoders, loaded.params, make_describer(config)),
        second,
    )


def query_encoders(encoders: Encoders, params: Params, describer: ProductDescriber | None) -> QueryEncoders:
    """Returns functions that encode sentences and pictures; `describer` crops pictures for towers trained on crops."""
    towers, multiple = encoders.towers, meshes.batch_multiple(encoders.towers.mesh)
    params = towers.cast_kernels(params)

    def encode(compiled: Callable, batch: np.ndarray) -> np.ndarray:
        padded = np.concatenate([batch, np.repeat(batch[-1:], -len(batch) % multiple, axis=0)])
        with jax.set_mesh(towers.mesh):
            return np.asarray(compiled(params, padded))[: len(batch)]

    def encode_text(sentences: Sequence[str]) -> np.ndarray:
        captions = [text.caption(sentence, {}, towers.preprocess) for sentence in sentences]
        return encode(encoders.text, text.encode(towers.tokenizer, captions, towers.preprocess.context_length))

    return QueryEncoders(
        text=encode_text,
        image=lambda batch: encode(encoders.image, batch),
        picture=lambda image: read_picture(image, towers.preprocess, describer),
        picture_size=towers.preprocess.image_size,
    )


def read_picture(image: Any, preprocess: Preprocess, describer: ProductDescriber | None = None) -> np.ndarray:
    """Returns a picture as the image tower's input, (S, S, 3) uint8, where S is `preprocess.image_size`.

    Args:
      image: a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array.
      preprocess: preprocessing of the workdir.
      describer: crops the picture if `preprocess.picture` is "crop"; not used otherwise.

    Raises:
      UserError: `image` is not a picture, or is an encoded picture of more than 24 million pixels.
    """
    if isinstance(image, str | os.PathLike):
        if not Path(image).is_file():
            raise UserError(f"there is no picture at {image}: give the path of a picture file")
        image = Path(image).read_bytes()
    if isinstance(image, Image.Image):
        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = image
    if isinstance(image, bytes):
        pixels = pictures.decode(image, max_side=LONGEST_SIDE, max_pixels=MAX_PIXELS)
    if isinstance(pixels, str):
        raise UserError(f"the picture cannot be read: {pixels}")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise UserError("the picture must be a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array")
    if preprocess.picture == "crop":
        pixels = describer.best_crop(pixels)
    return images.resize(pixels, preprocess.image_size, preprocess.resize, preprocess.filter).numpy()


def _read_products(records: Records, encoders: Encoders) -> tuple[list[Product], list[bytes], list[bytes]]:
    """Returns the products, and the keys of their pictures and of their crops in an embedding store."""
    products, picture_keys, crop_keys = [], [], []
    for product, own_pictures in bar(
        records.products_with_pictures(), total=len(records), desc="reading products", unit="product"
    ):
        products.append(product)
        for picture, crop in own_pictures:
            picture_keys.append(encoders.picture_key(picture, crop))
            crop_keys.append(encoders.picture_key(picture, crop, crops=True))
    return products, picture_keys, crop_keys


def _with_colours(products: Sequence[Product], records: Records) -> Sequence[Product]:
    """Returns the products, with the measured dominant colour as an attribute if the catalogue names no colours."""
    names_colours = colour_attribute([product.attributes for product in products]) is not None
    if names_colours or "colour_names" not in records.features:
        return products
    colours = records.columns(("colour_names",))["colour_names"]
    return [
        dataclasses.replace(product, attributes={**product.attributes, COMPUTED_COLOUR: names[0]})
        for product, names in zip(products, colours, strict=True)
    ]
