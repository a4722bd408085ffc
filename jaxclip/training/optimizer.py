"""The optimizer: AdamW, Adam or Muon under a schedule, with decay and rates by parameter name."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxclip.config.schema import Optimizer
from jaxclip.towers.sharding import names
from jaxclip.towers.trainable import BLOCKS, EVERYTHING, Trainable

DECAYED = r"(kernel|embedding|lora/[ab])$"
RMS = 0.2  # of Muon's updates in units of the learning rate, about that of AdamW's (Liu et al. 2025, equation 4)


def warmup_of(warmup_steps: int, steps: int) -> int:
    """Returns the steps of warm-up of a run: half of it at most."""
    return min(warmup_steps, steps // 2)


def make_schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up from zero, then cosine to zero at `steps`, or constant."""
    peak, warmup_steps = settings.learning_rate, warmup_of(settings.warmup_steps, steps)
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup_steps))
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup_steps)), after], [warmup_steps])


def make_optimizer(
    settings: Optimizer, schedule: optax.Schedule, params: Any, trainable: Trainable = EVERYTHING
) -> optax.GradientTransformation:
    """Returns the configured optimizer of the trained parameters; `params` may be their shapes.

    It is initialised with, and updates, what `trainable.pick` gives. Only matrices and embeddings decay, adapters'
    among them. The clipped norm is that of what is trained. The betas and epsilon are Adam's.

    "muon" (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves each linear map and convolution by its
    gradients' mean over steps, made orthogonal, in steps as large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so
    that it takes AdamW's learning rates; all else, adapters among it, is left to AdamW.
    """
    trained = jax.eval_shape(trainable.pick, params)
    factors = trainable.trained_factors(trained)
    adam = optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)
    steps = [_muon(trained, adam) if settings.name == "muon" else adam]
    if settings.name != "adam" and settings.weight_decay:
        decayed = jax.tree.map(lambda name: bool(re.search(DECAYED, name)), names(trained))
        steps.append(optax.add_decayed_weights(settings.weight_decay, mask=decayed))
    if settings.clip_norm:
        steps.insert(0, optax.clip_by_global_norm(settings.clip_norm))
    steps.append(optax.scale_by_learning_rate(schedule))
    if any(np.any(np.not_equal(factor, 1.0)) for factor in jax.tree.leaves(factors)):
        steps.append(_scale_each(factors))
    return optax.chain(*steps)


def _muon(trained: Any, other: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns Muon for the kernels of what is trained, and `other` for all else."""
    labels = jax.tree.map(lambda name: "muon" if name.endswith("kernel") else "other", names(trained))

    def of_kernels(make: Callable[[str, Any], Any]) -> Any:
        return jax.tree.map(
            lambda label, *leaf: make(*leaf) if label == "muon" else optax.MaskedNode(), labels, names(trained), trained
        )

    def step(name: str, leaf: Any) -> float:
        return RMS * max(math.prod(leaf.shape[axis] for axis in axes) for axes in _matrix(name, leaf)) ** 0.5

    muon = optax.chain(
        scale_by_muon(weight_dimension_numbers=of_kernels(_matrix)),
        _scale_each(of_kernels(step)),
    )
    return optax.partition({"muon": muon, "other": other}, labels)


def _matrix(name: str, leaf: Any) -> MuonDimensionNumbers:
    """Returns which axes of a kernel are inputs and which outputs; along the others lie matrices of their own."""
    axes = tuple(range(BLOCKS in name, leaf.ndim))  # without the layers of a stack
    if name.endswith("qkv/kernel"):  # (W, 3, H, D)
        return MuonDimensionNumbers(axes[:1], axes[2:])
    return MuonDimensionNumbers(axes[:-1], axes[-1:])


def _scale_each(factors: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda factor, u: jnp.asarray(factor, u.dtype) * u, factors, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
