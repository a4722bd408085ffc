"""The first stage: the towers whose ranking is re-ordered, and a split's embeddings and features, cached on disk."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.special import logsumexp

from jaxclip.catalog import builder, library
from jaxclip.catalog.product import Product
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.features import colour_match
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
FORMAT = 3
"""Version of the cached arrays; raise it when they change, so that older ones are computed again."""
CONTRAST = slice(10, 14)
"""Entries of a texture that are contrasts, up to 225 (squared grey levels); all others lie within [-1, 1]."""

BANK, BANK_SEED, WORDINGS_SEED = 4096, 0, 0
SHARPNESS = (0.5, 1.0, 2.0)
"""Inverse temperatures of the hubness columns, in units of the logit scale."""


@dataclass(frozen=True, eq=False)
class FirstStage:
    """The towers whose ranking a re-ranker re-orders.

    Attributes:
      workdir: where they were trained.
      step: of their checkpoint.
      fingerprint: 12 hex digits that change with parameters, tokenizer or preprocessing.
      config: configuration of their run.
      towers: the restored towers.
      params: the restored parameters.
    """

    workdir: Path
    step: int
    fingerprint: str
    config: Config
    towers: Towers
    params: Params

    @property
    def logit_scale(self) -> float:
        """exp(logit scale): the towers' cosines times this are logits."""
        return float(np.exp(np.asarray(self.params["logit_scale"])))


@dataclass(frozen=True, eq=False)
class Split:
    """The products of a data split with their features, and their captions as queries, embedded by the first stage.

    Attributes:
      groups: (G,) group of each product; products of one group count as the same answer.
      features: name -> (G, S) float32, the features of each product.
      present: name -> (G,) whether a product has the feature.
      attributes: (G,) each product's columns, a JSON object.
      captions: (Q,) texts of the queries.
      queries: (Q, D) unit vectors of the captions.
      owners: (Q,) index of the product that a caption belongs to.
      query_tokens: (Q, T, V) float16, output tokens of the text tower, zeros in the padding; None unless tokens were
        requested. If they were, `features` has those of the image tower as IMAGE_TOKENS, (G, P, W).
    """

    groups: np.ndarray
    features: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    attributes: np.ndarray
    captions: np.ndarray
    queries: np.ndarray
    owners: np.ndarray
    query_tokens: np.ndarray | None = None


def load(workdir: Path, config: Config, step: int | None = None) -> FirstStage:
    """Returns the towers of a checkpoint, the newest without a `step`; the averaged parameters if there are any.

    Raises:
      UserError: the workdir does not hold towers, or has no such checkpoint.
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
    if towers.views != Views():  # without views the fingerprint is that of the parameters and files only
        digest.update(str(towers.views).encode())
    for path in sorted((workdir / TOKENIZER).iterdir()):
        digest.update(path.read_bytes())
    return FirstStage(workdir, step, digest.hexdigest()[:12], config, towers, params)


def data_fingerprint(first: FirstStage) -> str:
    """Returns the fingerprint of the dataset that the towers were trained on."""
    return Checkpoints(first.workdir, read_only=True).metadata(first.step)["data_fingerprint"]


def embed_split(
    first: FirstStage,
    prepared: Path,
    records: Records,
    *,
    wordings: int,
    segments: int,
    tokens: bool,
    batch_size: int,
    workers: int,
) -> Split:
    """Returns the split of the records, embedded by the first stage; from the cache if they were embedded before.

    Args:
      first: the towers.
      prepared: folder of the dataset that the records are from; it must have been prepared with features.
      records: the products.
      wordings: how many times each caption is worded: once as in evaluation, then augmented as in the towers' training.
      segments: most parts in which a caption longer than the context length is read; 1 = it is cut off.
      tokens: whether to add the output tokens of both towers, for cross-attention.
      batch_size: pictures or captions that are embedded at once.
      workers: pictures that are decoded in parallel.

    Raises:
      UserError: the dataset was prepared without features.
    """
    facts = builder.metadata(prepared)
    key = {
        "format": FORMAT,
        "first_stage": first.fingerprint,
        "data": facts["fingerprint"],
        "features": facts["source"].get(builder.DESCRIBER_KEY),
        "records": hashlib.sha256(records.numbers.tobytes()).hexdigest(),
        "tokens": tokens,
        "segments": segments,
        "wordings": [wordings, asdict(first.config.augmentation)] if wordings > 1 else 1,
    }
    name = files.fingerprint(key, 16)
    path = library.cache() / "embeddings" / first.fingerprint / f"{name}.npz"
    if not path.exists():
        split = _embed(first, records, wordings, segments, tokens, batch_size, workers)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomically(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **_flat(split))
    with np.load(path) as stored:
        return _unflat(dict(stored))


def training_records(first: FirstStage) -> Records:
    """Returns the records that the towers were trained on.

    Raises:
      UserError: the prepared dataset has changed since.
    """
    prepared = prepared_data.prepared_dataset(first.config, whole=False, say=lambda line: None)
    trained_on, here = data_fingerprint(first), prepared_data.data_fingerprint(prepared)
    if trained_on != here:
        raise UserError(
            f"{prepared} has the fingerprint {here}, but the towers in {first.workdir} were trained on {trained_on}: "
            "restore the catalogue that they were trained on"
        )
    return prepared_data.training_records(first.config, prepared)[0]


def querybank(first: FirstStage, *, segments: int, batch_size: int) -> np.ndarray:
    """Returns the query bank, (M, D): embeddings of up to 4,096 random captions from the towers' training data."""
    records = training_records(first)
    random = np.random.default_rng(BANK_SEED)
    records = records.take(np.sort(random.choice(len(records), min(BANK, len(records)), replace=False)))
    captions, _ = _wordings([product for product, _ in records.products()], first, 1)
    with jax.set_mesh(first.towers.mesh):
        return _embed_texts(first, Encoders(first.towers, batch_size=batch_size), captions[:BANK], segments)


def hubness(images: np.ndarray, bank: np.ndarray, logit_scale: float) -> np.ndarray:
    """Returns (G, 3), how close each picture is to queries in general. Hubs, close to every query, outrank answers.

    A column is log(mean over the query bank of exp(b * cosine)) / b, as a logit and minus its mean over the pictures,
    for b of half, once and twice the logit scale: the normaliser of the inverted softmax (Smith et al. 2017) over a
    bank of training queries (Bogolin et al. 2022).
    """
    columns = np.empty((len(images), len(SHARPNESS)), np.float32)
    for start in range(0, len(images), BANK):
        cosines = images[start : start + BANK] @ bank.T
        for number, factor in enumerate(SHARPNESS):
            sharp = factor * logit_scale
            columns[start : start + BANK, number] = logsumexp(sharp * cosines, axis=1) - np.log(len(bank))
            columns[start : start + BANK, number] /= sharp
    return logit_scale * (columns - columns.mean(axis=0))


def _embed(first, records, wordings, segments, tokens, batch_size, workers) -> Split:
    products = list(bar(_products(records), total=len(records), desc="reading captions", unit="product"))
    captions, owners = _wordings(products, first, wordings)
    if not captions:
        raise UserError(f"none of the {len(records):,} products has a caption: there are no queries to rank for")
    encoders = Encoders(first.towers, batch_size=batch_size, workers=workers)
    gallery = gallery_features(first, records, products, encoders, tokens=tokens)
    queries, query_tokens = _embed_texts(first, encoders, captions, segments), None
    if tokens:
        query_tokens = _embed_texts(first, encoders, captions, segments, tokens=True).astype(np.float16)
    return replace(gallery, captions=np.asarray(captions), queries=queries, owners=owners, query_tokens=query_tokens)


def gallery_features(
    first: FirstStage,
    records: Records,
    products: Sequence[Product],
    encoders: Encoders,
    *,
    tokens: bool,
    store: EmbeddingStore | None = None,
    keys: tuple[Sequence[bytes] | None, Sequence[bytes] | None] = (None, None),
) -> Split:
    """Returns the products of the records with their features, as a split without queries.

    To add a feature for the re-ranker:
      1. compute its (G, S) array here, under its name in `features`; set `present` to False where products lack it;
      2. raise FORMAT, so that cached splits are computed again;
      3. add the name to RERANK_FEATURES in config/values.py, and to README.md next to this file.
    A feature that depends on the first stage's training data (`hubness`) or on the re-ranker's (`attributes`) is added
    in data.py instead, by `with_hubness` or `with_attributes`, and is not cached.

    Args:
      first: the towers.
      records: the products as stored.
      products: the same products, decoded.
      encoders: the compiled encoders of the towers.
      tokens: whether to add the output tokens of the image tower, for cross-attention.
      store: see `Encoders.pictures`.
      keys: keys of the pictures and of the crops in the store; see `Encoders.pictures`.

    Raises:
      UserError: the dataset was prepared without features.
    """
    stored = records.columns(("geometry", "texture", "colour_shares", "colour_names"))
    dominant = [names[0] for names in stored["colour_names"]]
    texture = np.array(stored["texture"])
    texture[:, CONTRAST] = np.sqrt(texture[:, CONTRAST]) / 15
    named = _embed_texts(first, encoders, colour_match.NAMES)
    features = {
        "image": encoders.pictures(first.params, records, store=store, keys=keys[0]),
        "crop": encoders.pictures(first.params, records, crops=True, store=store, keys=keys[1]),
        "colour": colour_match.soft_colours(stored["colour_names"], stored["colour_shares"]),
        "colour_embedding": named[[colour_match.NAMES.index(name) for name in dominant]],
        "geometry": stored["geometry"],
        "texture": texture,
    }
    if tokens:
        features[IMAGE_TOKENS] = encoders.pictures(first.params, records, tokens=True).astype(np.float16)
    present = {name: np.ones(len(products), bool) for name in features}
    # A crop that covers the whole picture (nothing was detected, or the product fills the picture) tells nothing new.
    present["crop"] = present["geometry"] = stored["geometry"][:, 2] < 1.0
    attributes = np.array([json.dumps(dict(product.attributes)) for product in products])
    groups = np.asarray([int(product.group) for product in products])
    nothing = np.empty(0, np.int64)
    queries = np.empty((0, features["image"].shape[1]), np.float32)
    return Split(groups, features, present, attributes, nothing.astype(str), queries, nothing)


def _products(records: Records) -> Iterator[Product]:
    return (product for product, _ in records.products())


def _embed_texts(
    first: FirstStage, encoders: Encoders, texts: Sequence[str], segments: int = 1, *, tokens: bool = False
) -> np.ndarray:
    different, back = np.unique(np.asarray(texts), return_inverse=True)
    if segments > 1:
        return encoders.segmented(first.params, different.tolist(), segments, tokens=tokens)[back]
    return encoders.captions(first.params, different.tolist(), tokens=tokens)[back]


def _wordings(products: Sequence[Product], first: FirstStage, wordings: int) -> tuple[list[str], np.ndarray]:
    """Returns all captions as in evaluation, then all of them again per further wording, and the product of each."""
    augmentation, preprocess = first.config.augmentation, first.towers.preprocess
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
    flat = {name: getattr(split, name) for name in ("groups", "attributes", "captions", "queries", "owners")}
    flat |= {} if split.query_tokens is None else {"query_tokens": split.query_tokens}
    flat |= {f"features/{name}": values for name, values in split.features.items()}
    return flat | {f"present/{name}": values for name, values in split.present.items()}


def _unflat(flat: dict[str, Any]) -> Split:
    def section(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): array for name, array in flat.items() if name.startswith(prefix)}

    own = {name: array for name, array in flat.items() if "/" not in name}
    return Split(features=section("features/"), present=section("present/"), **own)
