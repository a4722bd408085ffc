"""Operations of the towers, written so that XLA's GPU back end compiles them to programs that move fewer bytes.

Each function equals the plain definition of the same name; `models.forms` chooses between the two.
"""

import jax
from jaxtyping import Array


@jax.custom_vjp
def write_gradient_once(x: Array) -> Array:
    """Returns x; its gradient is behind a barrier to fusion.

    XLA would otherwise compute the gradient again in each operation that reads it, from operands that together are
    larger.
    """
    return x


write_gradient_once.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))
