"""The towers under a second stage: which ones they are, and a split as they embed it, kept on disk."""

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
"""Of the arrays kept on disk: another number, and they are computed again."""
CONTRAST = slice(10, 14)
"""Where a texture has its contrasts, in levels of grey squared, up to 225; all else lies within [-1, 1]."""

BANK, BANK_SEED, WORDINGS_SEED = 4096, 0, 0
SHARPNESS = (0.5, 1.0, 2.0)


@dataclass(frozen=True, eq=False)
class FirstStage:
    """The towers whose rankings a second stage re-orders.

    Attributes:
      workdir: where they were trained. step: of the checkpoint.
      fingerprint: 12 hex digits of the parameters, the tokenizer and the preprocessing.
      config: of their run. towers, params: restored.
    """

    workdir: Path
    step: int
    fingerprint: str
    config: Config
    towers: Towers
    params: Params

    @property
    def logit_scale(self) -> float:
        """exp(logit scale), by which the towers' cosines are logits."""
        return float(np.exp(np.asarray(self.params["logit_scale"])))


@dataclass(frozen=True, eq=False)
class Split:
    """Products and their captions as the first stage sees them.

    Attributes:
      groups: (G,) of the products.
      features: what is known of each product: name -> (G, S) float32.
      present: name -> (G,) whether it is known.
      attributes: (G,) each product's columns, a JSON object.
      captions: (Q,) texts. queries: (Q, D) their unit vectors. owners: (Q,) the product of each.
      query_tokens: (Q, T, V) float16, what the text tower's last block makes of each caption's tokens, zeros past its
        end; the feature IMAGE_TOKENS, (G, P, W), is the same of pictures. Only where tokens are asked for.
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
    """Returns the towers of a workdir's checkpoint, its newest where no step is given; averaged where they are.

    Raises:
      UserError: the workdir is none of towers, or has no such checkpoint.
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
    if towers.views != Views():  # the plain view adds nothing: re-rankers know their first stage by this number
        digest.update(str(towers.views).encode())
    for path in sorted((workdir / TOKENIZER).iterdir()):
        digest.update(path.read_bytes())
    return FirstStage(workdir, step, digest.hexdigest()[:12], config, towers, params)


def data_fingerprint(first: FirstStage) -> str:
    """Returns the fingerprint of the dataset that the towers were trained on."""
    return Checkpoints(first.workdir, read_only=True).beside(first.step)["data_fingerprint"]


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
    """Returns the products of the records as the first stage sees them, from disk where they were embedded before.

    Args:
      first: the towers.
      prepared: the dataset of the records, with features.
      wordings: of each caption: the first as evaluation words it, the others as the towers' training augments them.
      segments: parts that a caption beyond the context length is read in, at most; 1 = cut off.
      tokens: whether to keep what the towers make of each token too.
      batch_size: of embedding.
      workers: parallel decoders.

    Raises:
      UserError: the dataset was prepared without features.
    """
    facts = builder.metadata(prepared)
    key = {
        "format": FORMAT,
        "first_stage": first.fingerprint,
        "data": facts["fingerprint"],
        "features": facts["source"].get(builder.DESCRIBED),
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
      UserError: the catalogue is another one by now.
    """
    prepared = prepared_data.prepared_dataset(first.config, whole=False, say=lambda line: None)
    trained_on, here = data_fingerprint(first), prepared_data.data_fingerprint(prepared)
    if trained_on != here:
        raise UserError(
            f"{prepared} has the fingerprint {here}, and the towers in {first.workdir} were trained on {trained_on}: "
            "restore their catalogue"
        )
    return prepared_data.training_records(first.config, prepared)[0]


def querybank(first: FirstStage, *, segments: int, batch_size: int) -> np.ndarray:
    """Returns (M, D) the embeddings of up to 4,096 captions that the towers were trained on, drawn at random."""
    records = training_records(first)
    random = np.random.default_rng(BANK_SEED)
    records = records.take(np.sort(random.choice(len(records), min(BANK, len(records)), replace=False)))
    captions, _ = _wordings([product for product, _ in records.products()], first, 1)
    with jax.set_mesh(first.towers.mesh):
        return _embed_texts(first, Encoders(first.towers, batch_size=batch_size), captions[:BANK], segments)


def hubness(images: np.ndarray, bank: np.ndarray, logit_scale: float) -> np.ndarray:
    """Returns (G, 3) how close each picture is to queries in general: some are near to all and outrank the right ones.

    Per picture log(mean over the bank of exp(b * cosine)) / b in units of logits, less its mean over the pictures, for
    b of half, once and twice the logit scale: the normaliser of the inverted softmax (Smith et al. 2017) over a bank of
    other queries (Bogolin et al. 2022).
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
        raise UserError(f"none of the {len(records):,} products has a caption: there is no query to rank for")
    encoders = Encoders(first.towers, batch_size=batch_size, workers=workers)
    gallery = embed_gallery(first, records, products, encoders, tokens=tokens)
    queries, query_tokens = _embed_texts(first, encoders, captions, segments), None
    if tokens:
        query_tokens = _embed_texts(first, encoders, captions, segments, tokens=True).astype(np.float16)
    return replace(gallery, captions=np.asarray(captions), queries=queries, owners=owners, query_tokens=query_tokens)


def embed_gallery(
    first: FirstStage,
    records: Records,
    products: Sequence[Product],
    encoders: Encoders,
    *,
    tokens: bool,
    store: EmbeddingStore | None = None,
    keys: tuple[Sequence[bytes] | None, Sequence[bytes] | None] = (None, None),
) -> Split:
    """Returns the products of the records as the first stage sees them, without any query.

    `tokens` as for `embed_split`; of `keys`, those of pictures and of crops, and of the store see `Encoders.pictures`.

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
    # The whole picture as crop: nothing was detected, or what was found fills it; either way the crop adds nothing.
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
    """Returns all captions as evaluation words them, then all of them in each further wording; and their products."""
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
