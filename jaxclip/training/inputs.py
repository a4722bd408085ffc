"""Batches of a training run: made on the host, then placed on the devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxclip.config import Config
from jaxclip.pipeline.batches import Partners, training_batches
from jaxclip.pipeline.records import Records
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.towers import Towers


def device_batches(
    config: Config,
    towers: Towers,
    train: Records,
    partners: Partners | None = None,
    *,
    steps: range,
    canvas: int = 0,
) -> tuple[Any, Callable]:
    """Returns the host batches of `steps`, and the function that places a host batch on the devices.

    `canvas`: side, in pixels, of the squares that hold unscaled pictures; 0 = the host scales them.
    """
    sharding = meshes.batch_sharding(towers.mesh)
    batches = training_batches(
        train,
        towers.tokenizer,
        towers.preprocess,
        config,
        partners,
        steps=steps,
        rows=meshes.process_rows(sharding, config.batch_size),
        canvas=canvas,
    )

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: meshes.place_rows(sharding, config.batch_size, rows) for name, rows in batch.items()}

    return batches, place
