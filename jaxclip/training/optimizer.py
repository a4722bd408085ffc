"""The optimizer: AdamW or Adam under a schedule, with decay and rates by parameter name."""

import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip.training.mesh import names
from jaxclip.training.trainable import EVERYTHING, Trainable

if TYPE_CHECKING:
    from jaxclip.config.schema import Optimizer

DECAYED = r"(kernel|embedding|lora/[ab])$"


def warmup_of(warmup_steps: int, steps: int) -> int:
    """Returns the steps of warm-up of a run: half of it at most."""
    return min(warmup_steps, steps // 2)


def make_schedule(peak: float, kind: str, *, warmup_steps: int, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up from zero, then cosine to zero at `steps`, or constant."""
    warmup_steps = warmup_of(warmup_steps, steps)
    if kind == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup_steps))
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup_steps)), after], [warmup_steps])


def make_optimizer(
    params: Any,
    schedule: optax.Schedule,
    *,
    name: str,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    clip_norm: float,
    trainable: Trainable = EVERYTHING,
) -> optax.GradientTransformation:
    """Returns the gradient transformation for what is trained of parameters (or their shapes) of these names.

    It is initialised with, and updates, what `trainable.pick` gives. Only matrices and embeddings decay, adapters'
    among them. The clipped norm is that of what is trained.
    """
    trained = jax.eval_shape(trainable.pick, params)
    factors = trainable.trained_factors(trained)
    steps = [optax.scale_by_adam(beta1, beta2, epsilon)]
    if name == "adamw" and weight_decay:
        decayed = jax.tree.map(lambda name: bool(re.search(DECAYED, name)), names(trained))
        steps.append(optax.add_decayed_weights(weight_decay, mask=decayed))
    if clip_norm:
        steps.insert(0, optax.clip_by_global_norm(clip_norm))
    steps.append(optax.scale_by_learning_rate(schedule))
    if any(np.any(np.not_equal(factor, 1.0)) for factor in jax.tree.leaves(factors)):
        steps.append(_scale_each(factors))
    return optax.chain(*steps)


def configured_optimizer(
    given: "Optimizer", shapes: Any, trainable: Trainable, steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the schedule and the optimizer that a configuration describes, for a run of so many steps."""
    schedule = make_schedule(given.learning_rate, given.schedule, warmup_steps=given.warmup_steps, steps=steps)
    optimizer = make_optimizer(
        shapes,
        schedule,
        name=given.name,
        weight_decay=given.weight_decay,
        beta1=given.beta1,
        beta2=given.beta2,
        epsilon=given.epsilon,
        clip_norm=given.clip_norm,
        trainable=trainable,
    )
    return schedule, optimizer


def _scale_each(factors: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda factor, u: jnp.asarray(factor, u.dtype) * u, factors, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
