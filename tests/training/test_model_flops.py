"""FLOPs counted in traced programs equal known values, and those of the model do not depend on how a step runs."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest

from jaxclip import config as configs
from jaxclip.planning.fit import Vocabulary
from jaxclip.runtime import compiler
from jaxclip.runtime.flops import matmul_flops, model_flops
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training.recipe import abstract_batch, make_recipe, step_model_flops

LAYERS, WIDTH, ROWS = 5, 64, 32
WEIGHTS = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
INPUT = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
ONE_LAYER = 2 * ROWS * WIDTH * WIDTH


def network(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()


def test_products_in_a_loop_count_once_per_iteration():
    assert matmul_flops(jax.make_jaxpr(network)(WEIGHTS, INPUT)) == LAYERS * ONE_LAYER
    backward = jax.make_jaxpr(jax.grad(network, argnums=(0, 1)))(WEIGHTS, INPUT)
    assert matmul_flops(backward) == 3 * LAYERS * ONE_LAYER


def test_recomputed_products_count_again():
    def recomputing(weights, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), policy=jax.checkpoint_policies.nothing_saveable)
        return jax.lax.scan(layer, x, weights)[0].sum()

    backward = jax.make_jaxpr(jax.grad(recomputing, argnums=(0, 1)))(WEIGHTS, INPUT)
    assert matmul_flops(backward) == 4 * LAYERS * ONE_LAYER


def test_a_convolution_counts_its_window_and_a_conditional_its_costliest_branch():
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 16))

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forward = 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)
    assert matmul_flops(jax.make_jaxpr(convolve)(image, kernel)) == forward
    gradients = jax.make_jaxpr(jax.grad(lambda x, k: convolve(x, k).sum(), argnums=(0, 1)))(image, kernel)
    assert matmul_flops(gradients) == 3 * forward  # zeros inserted between the output's gradients are free

    def conditional(condition, x):
        return jax.lax.cond(condition, lambda x: x @ x, lambda x: x, x)

    assert matmul_flops(jax.make_jaxpr(conditional)(True, jnp.zeros((8, 8)))) == 2 * 8**3


@cache
def step_of(
    platform="tpu", *, dtype="bfloat16", optimizer="adamw", microbatch=0, loss="dense", remat="none", attention="xla"
):
    """Returns (step_model_flops, the FLOPs of the step's products and convolutions as it is run on the platform)."""
    config = configs.build(
        {
            "steps": 10,
            "batch_size": 64,
            "model": {"preset": "tiny", "dtype": dtype, "remat": remat, "attention": attention},
            "loss": {"microbatch": microbatch, "implementation": loss},
            "optimizer": {"name": optimizer},
        }
    )
    towers = make_towers(config, make_preprocess(config), Vocabulary(512, 511), devices=jax.devices()[:1])
    recipe = make_recipe(config, towers, steps=10)
    with jax.set_mesh(towers.mesh), compiler.compiling_for(platform):
        jaxpr = jax.make_jaxpr(recipe.step)(recipe.state, abstract_batch(config, towers))
    return step_model_flops(config, towers), model_flops(jaxpr)


def test_model_flops_do_not_depend_on_recomputation():
    plain, dots, full, cached = (
        step_of(**options) for options in ({}, {"remat": "dots"}, {"remat": "full"}, {"microbatch": 16})
    )
    assert plain[0] == plain[1] > 0  # the plain step has nothing else
    assert plain[0] == dots[0] == full[0] == cached[0]
    assert plain[1] < dots[1] < full[1] < cached[1]
    fused = step_of(attention="pallas")
    assert fused[0] == plain[0] and 1 < fused[1] / plain[1] < 1.01  # its backward pass computes scores again


def test_model_flops_are_those_of_the_dense_loss_without_the_optimizer():
    dense = step_of()
    for options in ({"loss": "tiled"}, {"optimizer": "muon"}, {"platform": "cpu"}):
        assert step_of(**options)[0] == dense[0], options
    assert step_of(loss="tiled")[1] > dense[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_remat_dots_saves_the_products_of_linear_maps_on_every_platform(platform, dtype):
    none, dots, full = (step_of(platform, dtype=dtype, remat=remat)[1] for remat in ("none", "dots", "full"))
    assert dots - none < 0.1 * (full - none)  # only the products of attention are computed again
