"""Counts the floating-point operations of the matrix products and convolutions in a traced program.

XLA's own count includes the body of a loop only once.
"""

import math
from functools import partial
from typing import Any


def matmul_flops(jaxpr: Any, *, without: str = "") -> float:
    """Returns the FLOPs of all matrix products and convolutions of a jaxpr, over all devices; nothing else is counted.

    A multiplication and an addition count as two operations. The body of a scan is counted once per iteration, and that
    of a loop of unknown length once. Recomputation in a backward pass is counted again. Only the most expensive branch
    of a conditional is counted. A Pallas kernel has the FLOPs of its cost estimate. Jitted functions named `without`
    are left out.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    counted = (eqn for eqn in jaxpr.eqns if not without or eqn.params.get("name") != without)
    return float(sum(_COUNTS.get(eqn.primitive.name, partial(_inner, without=without))(eqn) for eqn in counted))


def model_flops(jaxpr: Any) -> float:
    """Returns the `matmul_flops` of a training step, leaving out its function `optimize` (Muon multiplies matrices)."""
    return matmul_flops(jaxpr, without="optimize")


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _convolution(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    # The gradient of a strided convolution inserts zeros; products with them do not count.
    dilation = math.prod(eqn.params["lhs_dilation"])
    return 2 * eqn.outvars[0].aval.size * math.prod(kernel) / out_features / dilation


def _inner(eqn: Any, *, without: str) -> float:
    flops = [matmul_flops(part, without=without) for value in eqn.params.values() for part in _jaxprs(value)]
    if eqn.primitive.name == "cond":
        return max(flops)
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    if eqn.primitive.name == "shard_map":
        times = eqn.params["mesh"].size
    return times * sum(flops)


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, tuple | list) else [value]
    return [item for item in values if hasattr(getattr(item, "jaxpr", item), "eqns")]


def _kernel(eqn: Any) -> float:
    return eqn.params["cost_estimate"].flops


_COUNTS = {"dot_general": _dot, "conv_general_dilated": _convolution, "pallas_call": _kernel}
