"""Training steps for GPUs and TPUs sum gradients over rows in float32; neither a device nor its compiler is needed."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip import config as configuration
from jaxclip.models import presets
from jaxclip.models.linear import add_bias
from jaxclip.models.recompute import LayerNorm
from jaxclip.planning.fit import Vocabulary
from jaxclip.runtime import compiler
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training.recipe import abstract_batch, make_recipe

VOCABULARY = 512
PRESETS = {
    "clip": presets.Preset(16, (64, 2, 2), (32, 2, 2), 64, "patch", "class", "end", "quick_gelu"),
    "siglip": presets.Preset(16, (64, 2, 2), (64, 2, 2), 64, "patch", "map", "last", "gelu_tanh"),
    "convolutions": presets.Preset(16, (64, 2, 2), (32, 2, 2), 64, "residual_conv", "mean", "mean", "gelu"),
}
REDUCE = r"stablehlo\.reduce\(.*applies stablehlo\.add across dimensions = \[([\d, ]+)\] : \(tensor<([\dx]+)x(\w+)>"


def lowered_step(monkeypatch, name, backend, platform):
    """Returns the text of the step of bfloat16 towers, lowered for a platform."""
    monkeypatch.setitem(presets.PRESETS, name, PRESETS[name])
    loss = {"name": "sigmoid"} if name == "siglip" else {}
    model = {"preset": "tiny", "dtype": "bfloat16", "attention": "xla"}  # Pallas is lowered for real TPUs only
    config = configuration.build({"steps": 1, "batch_size": 16, "model": model, "loss": loss})
    config = replace(config, model=replace(config.model, preset=name))
    with compiler.compiling_for(backend):
        vocabulary = Vocabulary(VOCABULARY, VOCABULARY - 1)
        towers = make_towers(config, make_preprocess(config), vocabulary, devices=jax.devices()[:1])
        recipe = make_recipe(config, towers, steps=1)
        with jax.set_mesh(towers.mesh):
            traced = jax.jit(recipe.step).trace(recipe.state, abstract_batch(config, towers))
            return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("backend", "platform"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_a_bfloat16_step_has_no_bfloat16_sum_over_examples_or_into_the_vocabulary(monkeypatch, name, backend, platform):
    text = lowered_step(monkeypatch, name, backend, platform)
    sums = re.findall(REDUCE, text)
    assert len(sums) > 20 and {dtype for *_, dtype in sums} >= {"f32"}
    over_examples = [(axes, shape) for axes, shape, dtype in sums if dtype == "bf16" and axes.startswith("0")]
    assert not over_examples
    scattered = re.findall(rf'"stablehlo\.scatter"[\s\S]*?\}}\) : \(tensor<{VOCABULARY}x\d+x(\w+)>', text)
    assert scattered and set(scattered) == {"f32"}


def relative_error(ours, expected):
    assert ours.dtype == jnp.float32
    return np.sqrt(np.mean((np.asarray(ours, np.float64) - expected) ** 2) / np.mean(expected**2))


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_a_bias_gradient_over_many_bfloat16_rows_is_not_rounded(backend):
    slope = (0.3 + jax.random.normal(jax.random.key(0), (64, 1000, 24))).astype(jnp.bfloat16)
    with compiler.compiling_for(backend):
        _, pull = jax.vjp(lambda bias: add_bias(jnp.zeros_like(slope), bias), jnp.zeros(24))
        (ours,) = pull(slope)
    assert relative_error(ours, np.asarray(slope, np.float64).sum(axis=(0, 1))) < 1e-5


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_gradients_of_a_bfloat16_norm_are_float32_sums(backend):
    x, slope = (jax.random.normal(jax.random.key(i), (64, 500, 16)).astype(jnp.bfloat16) for i in range(2))
    graph, params = nnx.split(LayerNorm(16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    with compiler.compiling_for(backend):
        y, pull = jax.vjp(lambda params: nnx.merge(graph, params)(x), params)
        (gradient,) = pull(slope)
    wide, exact = np.asarray(x, np.float64), np.asarray(slope, np.float64)
    normalised = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), normalised, rtol=2**-8, atol=1e-5)
    assert relative_error(gradient["bias"][...], exact.sum(axis=(0, 1))) < 1e-5
    assert relative_error(gradient["scale"][...], (exact * normalised).sum(axis=(0, 1))) < 1e-5
