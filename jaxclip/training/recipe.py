"""How towers are trained: number of steps, batch, loss and step, as configured."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.losses.objective import Objective
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.towers import Towers
from jaxclip.training.step import make_loss, make_step

if TYPE_CHECKING:
    from jaxclip.pipeline.records import Records


def number_of_steps(config: Config, train: "Records") -> int:
    """Returns the length of the run: config.steps, or as many as config.epochs passes over the split take."""
    if config.batch_size > len(train):
        raise UserError(f"config.batch_size = {config.batch_size} is more than the {len(train)} training products")
    return config.steps or max(1, round(config.epochs * len(train) / config.batch_size))


def abstract_batch(config: Config, towers: Towers) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and sharding of a training batch; UserError where the mesh does not divide it."""
    rows, size = meshes.batch_multiple(towers.mesh), towers.preprocess.image_size
    if config.batch_size < rows:
        raise UserError(
            f"config.batch_size = {config.batch_size} is smaller than the number of devices that share it, mesh data x "
            f"fsdp = {rows}: take a larger batch, or put devices on mesh.tensor"
        )
    for name, given in (("batch_size", config.batch_size), ("loss.microbatch", config.loss.microbatch)):
        meshes.check_divides(towers.mesh, name, given)
    tokens = ((towers.preprocess.context_length,), np.int32)
    shapes = {"image": ((size, size, 3), np.uint8), "text": tokens, "group": ((), np.int32)}
    if config.loss.name == "incorrect_pairs":
        shapes |= {"incorrect_text": tokens, "similarity": ((), np.float32), "has_incorrect": ((), np.bool_)}
    sharding = meshes.batch_sharding(towers.mesh)
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def make_objective(config: Config) -> Objective:
    """Returns the configured loss."""
    loss = config.loss
    return Objective(
        loss.name, loss.implementation, loss.tile, loss.alpha, loss.beta, loss.weighting, info_nce=loss.info_nce
    )


def train_step(config: Config, towers: Towers) -> Callable:
    """Returns the configured step(state, batch) -> (state, metrics), to be compiled."""
    loss = make_loss(
        towers.graph,
        mask_groups=config.loss.mask_groups,
        learned_temperature=config.loss.learned_temperature,
        objective=make_objective(config),
        microbatch=config.loss.microbatch,
    )
    return make_step(
        loss, towers.optimizer, towers.schedule, towers.trainable, seed=config.seed, ema=config.optimizer.ema
    )
