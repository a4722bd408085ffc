"""Linear equals flax's LinearGeneral; on CPUs, values and gradients in bfloat16 are summed in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip.models.linear import Linear, contract


@pytest.fixture(params=[((8,), (3, 2, 4), -1), ((2, 4), (8,), (-2, -1))], ids=["split", "joined"])
def layers(request):
    """Returns a function from a dtype to (our layer, flax's layer with the same parameters, an input for both)."""
    inputs, outputs, axis = request.param

    def make(dtype):
        ours, flax = (
            kind(inputs, outputs, axis=axis, dtype=dtype, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
            for kind in (Linear, nnx.LinearGeneral)
        )
        x = jax.random.normal(jax.random.key(1), (5, 7, *inputs), dtype)
        return ours, flax, x

    return make


def gradients(layer, x):
    """Returns the gradients of a weighted sum of the outputs with respect to the parameters and the input."""
    weight = jax.random.randint(jax.random.key(2), layer(x).shape, -4, 5).astype(jnp.float32)
    return nnx.grad(lambda layer, x: (layer(x) * weight).sum(), argnums=(0, 1))(layer, x)


def test_float32_layers_equal_those_of_flax(layers):
    ours, flax, x = layers(jnp.float32)
    np.testing.assert_allclose(ours(x), flax(x), rtol=1e-6, atol=1e-6)
    for layer in (ours, flax):  # sums of whole numbers are exact in any order
        nnx.update(layer, jax.tree.map(lambda leaf: jnp.round(8 * leaf), nnx.state(layer)))
    jax.tree.map(np.testing.assert_array_equal, *(gradients(layer, jnp.round(4 * x)) for layer in (ours, flax)))


def test_on_a_cpu_the_gradient_of_a_float32_kernel_sums_over_one_axis(layers):
    layer, _, x = layers(jnp.float32)
    graph, params = nnx.split(layer)
    program = jax.jit(lambda params, x: gradients(nnx.merge(graph, params), x)).lower(params, x).as_text()
    contracted = re.findall(r"dot_general.* contracting_dims = (\[[^]]*\] x \[[^]]*\])", program)
    assert "[0] x [0]" in contracted and "[0, 1] x [0, 1]" not in contracted, contracted


def test_bfloat16_layers_differ_from_float32_layers_only_by_rounding(layers):
    (narrow, _, x), (wide, _, _) = layers(jnp.bfloat16), layers(jnp.float32)
    y, exact = narrow(x), wide(x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.02, atol=0.06)
    rounded, expected = gradients(narrow, x), gradients(wide, x.astype(jnp.float32))
    assert rounded[1].dtype == jnp.bfloat16
    for leaf, exact in zip(jax.tree.leaves(rounded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf.astype(jnp.float32), exact, rtol=0.03, atol=0.03 * np.abs(exact).max())


def test_on_a_cpu_every_bfloat16_product_has_a_float32_result(layers):
    layer, _, x = layers(jnp.bfloat16)
    graph, params = nnx.split(layer)
    program = jax.jit(lambda params, x: gradients(nnx.merge(graph, params), x)).lower(params, x).as_text()
    products = re.findall(
        r"dot_general.* : \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\) -> tensor<[^>]*x(\w+)>", program
    )
    assert len(products) >= 3 and set(products) == {("bf16", "bf16", "f32")}


def test_the_sum_of_many_small_products_is_rounded_only_once():
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert contract(ones, ones.T) == 4096
    gradient = jax.grad(lambda kernel: contract(ones.reshape(4096, 1), kernel).astype(jnp.float32).sum())(ones[:, :1])
    assert gradient == 4096
