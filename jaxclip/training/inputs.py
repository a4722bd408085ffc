"""From a configuration to what a run reads: the prepared dataset, its records, and batches on the devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxclip.config import Config
from jaxclip.pipeline import text
from jaxclip.pipeline.batches import Partners, training_batches
from jaxclip.pipeline.images import ImageAugmentation
from jaxclip.pipeline.records import Records
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.towers import Towers


def image_augmentation(config: Config) -> ImageAugmentation:
    """Returns what the configuration says of training pictures."""
    given = config.augmentation
    return ImageAugmentation(given.crop_area, given.crop_aspect, given.flip)


def device_batches(
    config: Config,
    towers: Towers,
    train: Records,
    partners: Partners | None = None,
    *,
    first: int,
    last: int,
    canvas: int = 0,
) -> tuple[Any, Callable]:
    """Returns the batches of steps first to last - 1 on the host, and the function that places one on the devices."""
    given, sharding = config.augmentation, meshes.batch_sharding(towers.mesh)
    batches = training_batches(
        train,
        towers.tokenizer,
        towers.preprocess,
        image_augmentation(config),
        text.TextAugmentation(given.keep_attributes, given.keep_words, given.prompts),
        partners,
        batch_size=config.batch_size,
        seed=config.seed,
        first_step=first,
        last_step=last,
        rows=meshes.process_rows(sharding, config.batch_size),
        workers=config.data.workers,
        canvas=canvas,
    )

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: meshes.place_rows(sharding, config.batch_size, rows) for name, rows in batch.items()}

    return batches, place
