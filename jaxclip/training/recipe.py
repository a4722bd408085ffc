"""The length, batch, loss, optimizer and step of a configured training run. Does not import TensorFlow."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import jax
import numpy as np
import optax

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.losses.objective import Objective
from jaxclip.models.presets import with_execution
from jaxclip.runtime import compiler, hardware
from jaxclip.runtime import mesh as meshes
from jaxclip.runtime.flops import model_flops
from jaxclip.towers.params import make_model
from jaxclip.towers.towers import Towers
from jaxclip.training.negative_queue import with_queue
from jaxclip.training.optimizer import make_optimizer, make_schedule
from jaxclip.training.state import TrainState, abstract_state
from jaxclip.training.step import make_loss, make_step

if TYPE_CHECKING:
    from jaxclip.pipeline.records import Records  # imports TensorFlow


@dataclass(frozen=True)
class Recipe:
    """Optimizer, schedule, state and step with which towers or a re-ranker are trained.

    Attributes:
      optimizer: optimizer of the trained parameters.
      schedule: learning rate by step.
      state: shapes, dtypes and shardings of the training state.
      step: (state, batch) -> (state, metrics), to be compiled (see `step.compile_step`).
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    state: TrainState
    step: Callable


def make_recipe(config: Config, towers: Towers, steps: int) -> Recipe:
    """Returns the configured recipe for training these towers for `steps` steps; allocates no arrays."""
    schedule = make_schedule(config.optimizer, steps)
    optimizer = make_optimizer(config.optimizer, schedule, towers.shapes, towers.trainable)
    if config.loss.queue:
        queries = config.augmentation.queries > 0
        optimizer = with_queue(optimizer, config.loss.queue, towers.config.embedding, queries=queries)
    ema = config.optimizer.ema
    state = abstract_state(towers.shapes, optimizer, towers.mesh, towers.trainable, ema=ema > 0)
    loss = make_loss(
        towers.graph,
        mask_groups=config.loss.mask_groups,
        learned_temperature=config.loss.learned_temperature,
        objective=make_objective(config),
        microbatch=config.loss.microbatch,
    )
    step = make_step(loss, optimizer, schedule, towers.trainable, seed=config.seed, ema=ema)
    return Recipe(optimizer, schedule, state, step)


def step_model_flops(config: Config, towers: Towers) -> float:
    """Returns the model FLOPs of one step of these towers, over all devices: the numerator of MFU everywhere.

    They are the matrix products and convolutions of one forward and one backward pass over the batch, with the dense
    loss and without the optimizer. They do not depend on how the step is executed: recomputation of any kind
    (`model.remat`, `loss.microbatch`, the tiled loss) does not count (Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B).
    """
    plain = replace(config, loss=replace(config.loss, microbatch=0, implementation="dense"))
    transformer = towers.config.image.transformer
    execution = {name: getattr(transformer, name) for name in ("dropout", "stochastic_depth", "dtype")}
    shape = with_execution(
        towers.config,
        patch_dropout=towers.config.image.patch_dropout,
        execution="scan",
        attention="xla",
        **execution,
    )
    recipe = make_recipe(plain, replace(towers, graph=make_model(shape)[0]), steps=1000)
    with jax.set_mesh(towers.mesh), compiler.compiling_for("tpu"):  # special forms for CPUs have more products
        return model_flops(jax.make_jaxpr(recipe.step)(recipe.state, abstract_batch(plain, towers)))


def model_seconds(flops: Callable[[], float], dtype: str) -> float | None:
    """Returns the shortest time of one step's model FLOPs on all devices, or None on devices of unknown peak.

    `flops` counts them; it is called on known devices only, because it traces the step. `dtype` is the type that the
    products are computed in.
    """
    chip = hardware.chip(jax.devices()[0])
    return None if chip is None else flops() / jax.device_count() / chip.peak(dtype)


def number_of_steps(config: Config, train: "Records") -> int:
    """Returns the length of the run in steps: config.steps or, if that is 0, about config.epochs passes over `train`.

    Raises:
      UserError: a batch is larger than the training split.
    """
    if config.batch_size > len(train):
        raise UserError(
            f"config.batch_size = {config.batch_size} is more than the {len(train)} training products: "
            "use a smaller batch"
        )
    return config.steps or max(1, round(config.epochs * len(train) / config.batch_size))


def abstract_batch(config: Config, towers: Towers) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and sharding of a training batch, as the step receives it.

    Raises:
      UserError: the batch or the microbatch cannot be divided evenly over the data and fsdp axes of the mesh.
    """
    multiple, size = meshes.batch_multiple(towers.mesh), towers.preprocess.image_size
    if config.batch_size < multiple:
        raise UserError(
            f"config.batch_size = {config.batch_size} is smaller than the number of devices that share a batch, "
            f"mesh data x fsdp = {multiple}: use a larger batch, or put devices on mesh.tensor"
        )
    for name, rows in (("batch_size", config.batch_size), ("loss.microbatch", config.loss.microbatch)):
        meshes.check_divides(towers.mesh, name, rows)
    tokens = ((towers.preprocess.context_length,), np.int32)
    shapes = {"image": ((size, size, 3), np.uint8), "text": tokens, "group": ((), np.int32)}
    if config.loss.name == "incorrect_pairs":
        shapes |= {"incorrect_text": tokens, "similarity": ((), np.float32), "has_incorrect": ((), np.bool_)}
    if config.augmentation.queries:
        shapes |= {"query": ((), np.int32), "weight": ((), np.float32)}
    sharding = meshes.batch_sharding(towers.mesh)
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def make_objective(config: Config) -> Objective:
    """Returns the configured loss: each field has the value of the field of the same name in config.loss."""
    return Objective(**{field.name: getattr(config.loss, field.name) for field in fields(Objective)})
