"""Floating-point operations of a program, counted in what JAX traced: XLA's own count takes a loop's body once."""

import math
from functools import partial
from typing import Any


def matmul_flops(jaxpr: Any, *, without: str = "") -> float:
    """Returns the FLOPs of all matrix products and convolutions of a jaxpr over all devices, loops multiplied out.

    A multiplication and an addition are two. What a backward pass recomputes counts again. Of branches the dearest
    counts; a loop whose length is not known counts once. Jitted functions named `without` do not count.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    counted = (eqn for eqn in jaxpr.eqns if not without or eqn.params.get("name") != without)
    return float(sum(_COUNTS.get(eqn.primitive.name, partial(_inner, without=without))(eqn) for eqn in counted))


def model_flops(jaxpr: Any) -> float:
    """Returns those of a training step without the products that its optimizer makes of gradients, as Muon does."""
    return matmul_flops(jaxpr, without="optimize")


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _convolution(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    put_between = math.prod(eqn.params["lhs_dilation"])  # zeros, where it is the gradient of one with a stride
    return 2 * eqn.outvars[0].aval.size * math.prod(kernel) / out_features / put_between


def _inner(eqn: Any, *, without: str) -> float:
    found = [matmul_flops(part, without=without) for value in eqn.params.values() for part in _jaxprs(value)]
    if eqn.primitive.name == "cond":
        return max(found)
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    if eqn.primitive.name == "shard_map":
        times = eqn.params["mesh"].size
    return times * sum(found)


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, tuple | list) else [value]
    return [item for item in values if hasattr(getattr(item, "jaxpr", item), "eqns")]


_COUNTS = {"dot_general": _dot, "conv_general_dilated": _convolution}
