"""The optimizer: AdamW, Adam or Muon with a schedule; weight decay and learning rates depend on parameter names."""

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
"""Regex of the names of parameters with weight decay."""
RMS = 0.2  # root mean square of Muon's updates / learning rate, about that of AdamW (Liu et al. 2025, equation 4)


def capped_warmup(warmup_steps: int, steps: int) -> int:
    """Returns the number of warm-up steps, limited to half of the run's `steps`."""
    return min(warmup_steps, steps // 2)


def make_schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up from zero, then constant or a cosine to zero at `steps`."""
    peak, warmup_steps = settings.learning_rate, capped_warmup(settings.warmup_steps, steps)
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup_steps))
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup_steps)), after], [warmup_steps])


def make_optimizer(
    settings: Optimizer, schedule: optax.Schedule, params: Any, trainable: Trainable = EVERYTHING
) -> optax.GradientTransformation:
    """Returns the configured optimizer of the trained parameters; `params` may be shapes.

    It is initialised with `trainable.pick(params)` and updates only those. Weight decay, which "adam" leaves out,
    applies to kernels, adapters and embedding tables (DECAYED), not to position embeddings. The clipped norm is that of
    the gradients of trained parameters. Betas and epsilon are those of Adam and AdamW; Muon has optax's defaults.

    "muon" (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) updates each linear map and convolution by
    its orthogonalised momentum, scaled to the size of AdamW's updates (Liu et al. 2025, arXiv:2502.16982), so that
    AdamW's learning rates apply. All other parameters, adapters included, are updated by AdamW.
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
    """Returns Muon for trained kernels, and `other` for all other trained parameters."""
    labels = jax.tree.map(lambda name: "muon" if name.endswith("kernel") else "other", names(trained))

    def map_kernels(make: Callable[[str, Any], Any]) -> Any:
        return jax.tree.map(
            lambda label, *leaf: make(*leaf) if label == "muon" else optax.MaskedNode(), labels, names(trained), trained
        )

    def scale(name: str, leaf: Any) -> float:
        return RMS * max(math.prod(leaf.shape[axis] for axis in axes) for axes in _matrix(name, leaf)) ** 0.5

    muon = optax.chain(
        scale_by_muon(weight_dimension_numbers=map_kernels(_matrix)),
        _scale_each(map_kernels(scale)),
    )
    return optax.partition({"muon": muon, "other": other}, labels)


def _matrix(name: str, leaf: Any) -> MuonDimensionNumbers:
    """Returns the input and the output axes of a kernel; the remaining axes index separate matrices."""
    axes = tuple(range(BLOCKS in name, leaf.ndim))  # all but the axis of stacked layers
    if name.endswith("qkv/kernel"):  # (width, 3, heads, width of a head)
        return MuonDimensionNumbers(axes[:1], axes[2:])
    return MuonDimensionNumbers(axes[:-1], axes[-1:])


def _scale_each(factors: Any) -> optax.GradientTransformation:
    """Returns the transformation that multiplies each update by its own factor."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda factor, u: jnp.asarray(factor, u.dtype) * u, factors, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
