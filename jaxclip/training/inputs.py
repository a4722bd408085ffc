"""Batches of a training run: made on the host, then placed on the devices."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.config import Config
from jaxclip.pipeline import prepared_data, tokens
from jaxclip.pipeline.batches import Partners, training_batches
from jaxclip.pipeline.judged_queries import JudgedQueries
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.tokens import StoredTokens
from jaxclip.pipeline.words import CaptionTokenizer, TokenizedByCaption, caption_tokenizer
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.towers import Towers


def device_batches(
    config: Config,
    towers: Towers,
    train: Records,
    partners: Partners | None = None,
    *,
    captions: StoredTokens | CaptionTokenizer,
    steps: range,
    canvas: int = 0,
    judged: JudgedQueries | None = None,
) -> tuple[Any, Callable]:
    """Returns the host batches of `steps`, and the function that places a host batch on the devices.

    `captions`: the result of `caption_tokens`. `canvas`: side, in pixels, of the squares that hold unscaled pictures; 0
    = the host scales them. `judged`: queries that replace some of the captions.
    """
    sharding = meshes.batch_sharding(towers.mesh)
    rows = meshes.process_rows(sharding, config.batch_size)
    order = prepared_data.training_order(config, train)
    batches = training_batches(
        train,
        captions,
        towers.preprocess,
        config,
        partners,
        steps=steps,
        rows=rows,
        canvas=canvas,
        order=order,
    )
    if judged is not None:
        batches = judged.mixed_into(batches, config, order, steps=steps, rows=rows)

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: meshes.place_rows(sharding, config.batch_size, rows) for name, rows in batch.items()}

    return batches, place


def caption_tokens(
    config: Config, towers: Towers, train: Records, prepared: Path, *, steps: int, say: Callable[[str], None]
) -> StoredTokens | CaptionTokenizer:
    """Returns the stored tokens of the training captions, or what tokenizes them in every step.

    Tokens are stored, before the first run that needs them, if captions are not augmented and the run of `steps` steps
    has more than one epoch. Otherwise, words are cut into tokens once per process where the tokenizer allows it.
    """
    augmentation, preprocess = config.augmentation, towers.preprocess
    samples, _ = next(tokens.unchanged_captions(train.texts(), preprocess))
    encode = caption_tokenizer(towers.tokenizer, preprocess.context_length, samples)
    if isinstance(encode, TokenizedByCaption):
        say(f"captions are tokenized as a whole, which takes more time than word by word: {encode.reason}")
    if augmentation.changes_captions or steps * config.batch_size <= len(train):
        return encode
    try:
        return tokens.find_or_store(prepared, train, towers.tokenizer, preprocess, encode, say=say)
    except OSError as error:
        say(f"the tokens of captions cannot be stored, and are computed in every step: {error}")
        return encode


def bytes_per_pair(batch: dict[str, jax.Array], batch_size: int) -> float:
    """Returns the bytes that all devices together receive from their hosts for each pair of a batch."""
    leaves = jax.tree.leaves(batch)
    sent = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize * x.sharding.num_devices for x in leaves)
    return sent / batch_size
