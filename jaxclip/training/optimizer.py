"""The optimizer: AdamW or Adam under a schedule, with decay, rates and freezing by parameter name."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxclip.errors import UserError
from jaxclip.training.mesh import names

DECAYED = r"(kernel|embedding)$"


def make_schedule(peak: float, kind: str, *, warmup_steps: int, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up from zero, then cosine to zero at `steps`, or constant."""
    warmup_steps = min(warmup_steps, steps // 2)
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
    rates: Mapping[str, float],
) -> optax.GradientTransformation:
    """Returns the gradient transformation for parameters (or their shapes) of these names.

    Only matrices and embeddings decay. `rates` maps regexes to factors of the learning rate; the first that is found
    in a parameter's name holds, and 0 freezes it: it has no optimizer state, no decay, no part in the clipped norm.

    Raises:
      UserError: a regex of `rates` is invalid or is found in no name, or all parameters are frozen.
    """
    named = names(params)
    _check(rates, jax.tree.leaves(named))
    factors = jax.tree.map(lambda name: _factor(name, rates), named)
    steps = [optax.scale_by_adam(beta1, beta2, epsilon)]
    if name == "adamw" and weight_decay:
        decayed = jax.tree.map(lambda name: bool(re.search(DECAYED, name)), named)
        steps.append(optax.add_decayed_weights(weight_decay, mask=_masked_like(decayed)))
    if clip_norm:
        steps.insert(0, optax.clip_by_global_norm(clip_norm))
    steps.append(optax.scale_by_learning_rate(schedule))
    if any(factor not in (0.0, 1.0) for factor in jax.tree.leaves(factors)):
        steps.append(_scale_each(factors))
    chain = optax.chain(*steps)
    if all(jax.tree.leaves(factors)):
        return chain
    labels = jax.tree.map(lambda factor: "trained" if factor else "frozen", factors)
    return optax.multi_transform({"trained": chain, "frozen": optax.set_to_zero()}, labels)


def _masked_like(tree: Any) -> Any:
    """Returns a mask function: frozen parameters reach an inner transformation as MaskedNode, which has no leaves."""

    def mask(params: Any) -> Any:
        return jax.tree.map(
            lambda kept, p: False if isinstance(p, optax.MaskedNode) else kept,
            tree,
            params,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )

    return mask


def _scale_each(factors: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = jax.tree.map(
            lambda factor, u: u if isinstance(u, optax.MaskedNode) else jnp.asarray(factor, u.dtype) * u,
            factors,
            updates,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _factor(name: str, rates: Mapping[str, float]) -> float:
    return next((float(factor) for pattern, factor in rates.items() if re.search(pattern, name)), 1.0)


def _check(rates: Mapping[str, float], present: list[str]) -> None:
    for pattern in rates:
        try:
            found = any(re.search(pattern, name) for name in present)
        except re.error as error:
            raise UserError(f"config.optimizer.rates: {pattern!r} is not a regular expression: {error}") from None
        if not found:
            raise UserError(
                f"config.optimizer.rates: {pattern!r} is found in no parameter's name; names are as {present[0]!r}"
            )
    if not any(_factor(name, rates) for name in present):
        raise UserError("config.optimizer.rates freezes every parameter")
