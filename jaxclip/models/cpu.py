"""Operations of the towers, written so that XLA's CPU back end compiles them to faster programs.

Each public function equals, up to rounding, the plain definition of the same name in `models.linear`,
`models.stem` or `models.transformer`. `models.forms` chooses between the two; `runtime.compiler.TABLE` lists the
gain of each.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def contract(x: Array, kernel: Array, axes: int = 1) -> Array:
    """Returns (..., *N), the product of (..., *K) and (*K, *N), where *K stands for `axes` axes.

    In float32 the leading axes of x become one axis of rows. The gradient of the kernel then sums over one axis; over
    several axes XLA computes it from transposed copies of both operands.
    """
    if x.dtype == jnp.bfloat16:
        return _contract_bfloat16(x, kernel, axes)
    leading, contracted = x.shape[: x.ndim - axes], x.shape[x.ndim - axes :]
    return jnp.tensordot(x.reshape(-1, *contracted), kernel, axes).reshape(*leading, *kernel.shape[axes:])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract_bfloat16(x: Array, kernel: Array, axes: int) -> Array:
    """Returns the product, summed in float32 and rounded once; the gradients are computed in the same way.

    XLA's CPU back end has bfloat16 kernels only for products with a float32 result. It computes all others from
    float32 copies of the operands, without the processor's matrix instructions (AMX).
    """
    return _sum_in_float32(x, kernel, axes)


def _contract_forward(x: Array, kernel: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
    return _contract_bfloat16(x, kernel, axes), (x, kernel)


def _contract_backward(axes: int, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    leading = list(range(x.ndim - axes))
    outputs = list(range(len(leading), gradient.ndim)), list(range(axes, kernel.ndim))
    return _sum_in_float32(gradient, kernel, outputs), _sum_in_float32(x, gradient, (leading, leading))


_contract_bfloat16.defvjp(_contract_forward, _contract_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x + bias. The gradient of the bias is the product of a vector of ones and the gradient of the sum.

    XLA computes the usual gradient, a sum over rows, in several passes, which is slower than the product.
    """
    return x + bias


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    leading = list(range(gradient.ndim - bias.ndim))
    ones = jnp.ones(gradient.shape[: len(leading)], gradient.dtype)
    return gradient, _sum_in_float32(ones, gradient, (leading, leading))


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _sum_in_float32(x: Array, y: Array, axes: int | Sequence[Sequence[int]]) -> Array:
    return jnp.tensordot(x, y, axes, preferred_element_type=jnp.float32).astype(x.dtype)


def convolve(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], *, stride: int) -> Float[Array, "B T U D"]:
    """Returns the 3x3 convolution of stride 1 or 2 with one pixel of zero padding on each side.

    T = ceil(H / stride), U = ceil(W / stride).
    """
    _, height, width, _ = x.shape
    return _convolve(jnp.pad(x, ((0, 0), (0, height % stride), (0, width % stride), (0, 0))), kernel, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    return _keep_from_ynnpack(_convolution(_keep_from_ynnpack(x), kernel, stride))


def _convolve_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(x, kernel, stride), (x, kernel)


def _convolve_backward(stride: int, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    _, kernel_gradient = jax.vjp(lambda kernel: _convolution(x, kernel, stride), kernel)
    transposed = kernel.swapaxes(2, 3)  # (3, 3, D, C)
    if stride == 2:
        x_gradient = _stride_2_input_gradient(gradient, transposed)
    else:
        x_gradient = _convolution(gradient, transposed[::-1, ::-1], 1)
    return x_gradient, *kernel_gradient(gradient)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _keep_from_ynnpack(x: Array) -> Array:
    """Returns x unchanged; keeps XLA from fusing the convolution with the layer norm before or after it.

    XLA delegates fusions that start at a sum, as in a layer norm, to the library YNNPACK, whose convolutions are slower
    than XLA's own. YNNPACK does not support clamp, so the fusion ends here. The backward pass needs no such barrier:
    its fusions do not include the convolution.
    """
    return lax.clamp(jnp.array(-jnp.inf, x.dtype), x, jnp.array(jnp.inf, x.dtype))


def _stride_2_input_gradient(
    gradient: Float[Array, "B T U D"], kernel: Float[Array, "3 3 D C"]
) -> Float[Array, "B 2T 2U C"]:
    """Returns a stride-2 convolution's gradient for its input, without inserting zeros between values of `gradient`.

    Even rows of the input are multiplied by row 1 of the kernel only; odd rows by row 2 and, for the next output, by
    row 0. The same holds for columns. So the gradient is four small convolutions whose results are interleaved.
    """
    kernel_lines = slice(1, 2), slice(None, None, -2)

    def phase(row: int, column: int) -> Float[Array, "B T U C"]:
        return _convolution(gradient, kernel[kernel_lines[row], kernel_lines[column]], 1, ((0, row), (0, column)))

    phases = jnp.stack([jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)], axis=2)
    batch, height, width, _ = gradient.shape
    return phases.reshape(batch, 2 * height, 2 * width, -1)


def _convolution(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "R S C D"],
    stride: int,
    padding: tuple[tuple[int, int], ...] = ((1, 1), (1, 1)),
) -> Float[Array, "B T U D"]:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)


def attend(
    query: Float[Array, "B Q H D"], key: Float[Array, "B T H D"], value: Float[Array, "B T H D"], **options
) -> Float[Array, "B Q H D"]:
    """Returns `jax.nn.dot_product_attention`, computed in float32 and rounded to the dtype of `query`.

    XLA's batched bfloat16 products are slow on CPUs.
    """
    wide = (part.astype(jnp.float32) for part in (query, key, value))
    return jax.nn.dot_product_attention(*wide, **options).astype(query.dtype)
