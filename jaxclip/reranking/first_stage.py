"""The first stage: trained towers, and splits that they embed; `embed_split` caches the embeddings on disk."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.catalog import builder, library
from jaxclip.catalog.product import Product
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.features import rerank
from jaxclip.models.views import Views
from jaxclip.pipeline import prepared_data, text
from jaxclip.pipeline.preprocess import FILENAME
from jaxclip.pipeline.records import Records
from jaxclip.runtime import files
from jaxclip.runtime.progress import bar
from jaxclip.towers.adapter_base import checkpoint_params
from jaxclip.towers.checkpoints import Checkpoints, resolve_step
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.params import Params, checksum
from jaxclip.towers.shape import TOKENIZER
from jaxclip.towers.store import EmbeddingStore
from jaxclip.towers.towers import Towers, load_towers

IMAGE_TOKENS = "image_tokens"
FORMAT = 5
"""Version of the cached arrays; raise it when they change, so that older ones are computed again."""
BANK, BANK_SEED, WORDINGS_SEED = 4096, 0, 0
COLUMN = "columns/"
"""Prefix of the names under which a cached split holds the dataset's columns."""


@dataclass(frozen=True, eq=False)
class FirstStage:
    """The towers whose ranking a re-ranker re-orders.

    Attributes:
      workdir: workdir of the towers' run.
      step: step of the checkpoint.
      fingerprint: 12 hex digits of a hash of the parameters, the tokenizer, the preprocessing and the views.
      config: configuration of the towers' run.
      towers: the towers, without their parameters.
      params: the parameters of the checkpoint; their moving average if the checkpoint has one.
    """

    workdir: Path
    step: int
    fingerprint: str
    config: Config
    towers: Towers
    params: Params

    @property
    def logit_scale(self) -> float:
        """exp(logit scale), which turns the towers' cosines into logits."""
        return float(np.exp(np.asarray(self.params["logit_scale"])))


@dataclass(frozen=True, eq=False)
class Split:
    """The G products of a data split, and their captions as Q queries, embedded by the first stage.

    Attributes:
      groups: (G,) group of each product; products of one group count as the same answer.
      images: (P, D) float32 unit vectors of the products' P pictures.
      crops: (P, D) float32 unit vectors of each picture's best crop.
      picture_owners: (P,) the product of each picture, ascending.
      colour_names: (C, D) float32 unit vectors of the palette's C names (`features.rerank.COLOUR_NAMES`).
      columns: name in `features.rerank.COLUMNS` -> the G values of the prepared dataset.
      attributes: (G,) each product's attributes, a JSON object.
      captions: (Q,) texts of the queries.
      queries: (Q, D) unit vectors of the captions.
      owners: (Q,) index of the product that a caption belongs to.
      query_tokens: (Q, T, V) float16, the text tower's T output tokens of width V for each caption, zeros in the
        padding; None unless tokens were requested.
      image_tokens: (G, M, W) float16, the image tower's M output tokens of width W for each main picture; None unless
        tokens were requested.
      features: name -> (G, S) float32, the S values of a feature for each product; empty until `data.with_features` has
        computed them. The image tokens, if there are any, are among them as IMAGE_TOKENS, unchanged.
      present: name -> (G,) whether a product has the feature.
    """

    groups: np.ndarray
    images: np.ndarray
    crops: np.ndarray
    picture_owners: np.ndarray
    colour_names: np.ndarray
    columns: dict[str, np.ndarray]
    attributes: np.ndarray
    captions: np.ndarray
    queries: np.ndarray
    owners: np.ndarray
    query_tokens: np.ndarray | None = None
    image_tokens: np.ndarray | None = None
    features: dict[str, np.ndarray] = field(default_factory=dict)
    present: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def main(self) -> np.ndarray:
        """(G,) the index of each product's main picture among `images`."""
        return np.searchsorted(self.picture_owners, np.arange(len(self.groups)))


def load(workdir: Path, config: Config, step: int | None = None) -> FirstStage:
    """Returns the towers of a checkpoint, with the moving average of the parameters if there is one.

    Args:
      workdir: workdir of the towers.
      config: configuration of the towers.
      step: step of the checkpoint; None for the newest one.

    Raises:
      UserError: the workdir is that of a re-ranker, or has no towers or no such checkpoint.
    """
    if config.task == "rerank":
        raise UserError(f"first_stage = {workdir} is a re-ranker itself: name the workdir of towers")
    checkpoints = Checkpoints(workdir, read_only=True)
    step = resolve_step("latest", checkpoints) if step is None else step
    towers = load_towers(config, workdir)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, step)
        digest = hashlib.sha256(str(int(jax.jit(checksum)(params))).encode())
    digest.update((workdir / FILENAME).read_bytes())
    if towers.views != Views():  # otherwise the fingerprint covers the parameters and the files only
        digest.update(str(towers.views).encode())
    for path in sorted((workdir / TOKENIZER).iterdir()):
        digest.update(path.read_bytes())
    return FirstStage(workdir, step, digest.hexdigest()[:12], config, towers, params)


def data_fingerprint(stage: FirstStage) -> str:
    """Returns the fingerprint of the dataset that the towers were trained on."""
    return Checkpoints(stage.workdir, read_only=True).metadata(stage.step)["data_fingerprint"]


def embed_split(
    stage: FirstStage,
    prepared: Path,
    records: Records,
    *,
    wordings: int,
    segments: int,
    tokens: bool,
    batch_size: int,
    workers: int,
) -> Split:
    """Returns the records as a split without features: read from the cache if it is there, else embedded and cached.

    Args:
      stage: the towers.
      prepared: folder of the dataset that the records are from; it must have been prepared with features.
      records: the products.
      wordings: versions per caption: the first as in evaluation, the others augmented as in the towers' training.
      segments: largest number of segments in which a caption longer than the context length is read; 1 truncates it.
      tokens: whether to add the output tokens of both towers, for cross-attention.
      batch_size: number of pictures or captions that are embedded at once.
      workers: number of pictures that are decoded in parallel; 0 lets tf.data decide.

    Raises:
      UserError: the dataset was prepared without features, or no product has a caption.
    """
    facts = builder.metadata(prepared)
    key = {
        "format": FORMAT,
        "first_stage": stage.fingerprint,
        "data": facts["fingerprint"],
        "features": facts["source"].get(builder.DESCRIBER_KEY),
        "columns": rerank.COLUMNS,
        "split": records.split,
        "records": hashlib.sha256(records.numbers.tobytes()).hexdigest(),
        "tokens": tokens,
        "segments": segments,
        "wordings": [wordings, asdict(stage.config.augmentation)] if wordings > 1 else 1,
    }
    name = files.fingerprint(key, 16)
    path = library.cache() / "embeddings" / stage.fingerprint / f"{name}.npz"
    if not path.exists():
        split = _embed(stage, records, wordings, segments, tokens, batch_size, workers)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomically(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **_flat(split))
    with np.load(path) as stored:
        return _unflat(dict(stored))


def training_records(stage: FirstStage) -> Records:
    """Returns the records that the towers were trained on.

    Raises:
      UserError: the prepared dataset has changed since the training.
    """
    prepared = prepared_data.prepared_dataset(stage.config, whole=False, say=lambda line: None)
    trained_on, here = data_fingerprint(stage), prepared_data.data_fingerprint(prepared)
    if trained_on != here:
        raise UserError(
            f"{prepared} has the fingerprint {here}, but the towers in {stage.workdir} were trained on {trained_on}: "
            "restore the catalogue that the towers were trained on"
        )
    return prepared_data.training_records(stage.config, prepared)[0]


def querybank(stage: FirstStage, *, segments: int, batch_size: int) -> np.ndarray:
    """Returns the query bank, (M, D): embeddings of at most 4,096 captions of random products of `training_records`."""
    records = training_records(stage)
    random = np.random.default_rng(BANK_SEED)
    records = records.take(np.sort(random.choice(len(records), min(BANK, len(records)), replace=False)))
    captions, _ = _wordings([product for product, _ in records.products()], stage, 1)
    with jax.set_mesh(stage.towers.mesh):
        return _embed_texts(stage, Encoders(stage.towers, batch_size=batch_size), captions[:BANK], segments)


def _embed(stage, records, wordings, segments, tokens, batch_size, workers) -> Split:
    """Returns what `embed_split` returns, without the cache."""
    products = list(bar(_products(records), total=len(records), desc="reading captions", unit="product"))
    captions, owners = _wordings(products, stage, wordings)
    if not captions:
        raise UserError(f"none of the {len(records):,} products has a caption: there are no queries to rank for")
    encoders = Encoders(stage.towers, batch_size=batch_size, workers=workers)
    gallery = embed_gallery(stage, records, products, encoders, tokens=tokens)
    queries, query_tokens = _embed_texts(stage, encoders, captions, segments), None
    if tokens:
        query_tokens = _embed_texts(stage, encoders, captions, segments, tokens=True).astype(np.float16)
    return replace(gallery, captions=np.asarray(captions), queries=queries, owners=owners, query_tokens=query_tokens)


def embed_gallery(
    stage: FirstStage,
    records: Records,
    products: Sequence[Product],
    encoders: Encoders,
    *,
    tokens: bool,
    store: EmbeddingStore | None = None,
    keys: tuple[Sequence[bytes] | None, Sequence[bytes] | None] = (None, None),
) -> Split:
    """Returns the products of the records as a split without queries; its features are not computed yet.

    Args:
      stage: the towers.
      records: the products as stored.
      products: the same products, decoded.
      encoders: the compiled encoders of the towers.
      tokens: whether to add the output tokens of the image tower, for cross-attention.
      store: see `Encoders.pictures`.
      keys: keys of the pictures and of the crops in the store; see `Encoders.pictures`.

    Raises:
      UserError: the dataset was prepared without features.
    """
    columns = {name: np.asarray(values) for name, values in records.columns(rerank.COLUMNS).items()}
    images = encoders.pictures(stage.params, records, store=store, keys=keys[0])
    crops = encoders.pictures(stage.params, records, crops=True, store=store, keys=keys[1])
    image_tokens = None
    if tokens:
        image_tokens = encoders.pictures(stage.params, records.main_pictures(), tokens=True).astype(np.float16)
    return Split(
        groups=np.asarray([int(product.group) for product in products]),
        images=images,
        crops=crops,
        picture_owners=records.picture_owners,
        colour_names=_embed_texts(stage, encoders, rerank.COLOUR_NAMES),
        columns=columns,
        attributes=np.array([json.dumps(dict(product.attributes)) for product in products]),
        captions=np.empty(0, str),
        queries=np.empty((0, images.shape[1]), np.float32),
        owners=np.empty(0, np.int64),
        image_tokens=image_tokens,
    )


def _products(records: Records) -> Iterator[Product]:
    return (product for product, _ in records.products())


def _embed_texts(
    stage: FirstStage, encoders: Encoders, texts: Sequence[str], segments: int = 1, *, tokens: bool = False
) -> np.ndarray:
    """Returns the embeddings (or with `tokens` the output tokens) of the texts; equal texts are embedded once."""
    different, back = np.unique(np.asarray(texts), return_inverse=True)
    if segments > 1:
        return encoders.segmented(stage.params, different.tolist(), segments, tokens=tokens)[back]
    return encoders.captions(stage.params, different.tolist(), tokens=tokens)[back]


def _wordings(products: Sequence[Product], stage: FirstStage, wordings: int) -> tuple[list[str], np.ndarray]:
    """Returns the captions of all products, in `wordings` versions, and the index of each caption's product.

    The first version has all captions as in evaluation. Each further version has them augmented as in training.
    """
    augmentation, preprocess = stage.config.augmentation, stage.towers.preprocess
    random = np.random.default_rng(WORDINGS_SEED)
    captions, owners = [], []
    for wording in range(wordings):
        for owner, product in enumerate(products):
            for name in product.captions:
                owners.append(owner)
                if wording == 0:
                    captions.append(text.caption(name, product.attributes, preprocess))
                else:
                    draws = random.random(text.MAX_DRAWS)
                    captions.append(text.augmented_caption(name, product.attributes, preprocess, augmentation, draws))
    return captions, np.asarray(owners)


def _flat(split: Split) -> dict[str, np.ndarray]:
    arrays = {name: array for name, array in vars(split).items() if isinstance(array, np.ndarray)}
    return arrays | {COLUMN + name: values for name, values in split.columns.items()}


def _unflat(flat: dict[str, Any]) -> Split:
    columns = {name.removeprefix(COLUMN): array for name, array in flat.items() if name.startswith(COLUMN)}
    return Split(columns=columns, **{name: array for name, array in flat.items() if not name.startswith(COLUMN)})
