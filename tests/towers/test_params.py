"""Casting kernels to the dtype of the computation does not change embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip import config
from jaxclip.pipeline.text import train_tokenizer
from jaxclip.towers.params import cast_kernels
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training.recipe import make_recipe
from jaxclip.training.state import initial_state

SMALL = {"steps": 1, "batch_size": 8, "data": {"image_size": 32, "context_length": 8, "vocab_size": 258}}


def make_small_towers(**model):
    """Returns a configuration with these fields of its model section, and its towers."""
    configuration = config.build({**SMALL, "model": model})
    tokenizer = train_tokenizer(["a red shirt"], 258)
    return configuration, make_towers(configuration, make_preprocess(configuration), tokenizer)


@pytest.mark.parametrize(("preset", "execution"), [("tiny", "unroll"), ("tiny", "scan"), ("laptop", "auto")])
def test_embeddings_with_cast_kernels_are_bit_identical(preset, execution):
    configuration, towers = make_small_towers(preset=preset, execution=execution, dtype="bfloat16")
    recipe = make_recipe(configuration, towers, 1)
    params = initial_state(towers.config, recipe.optimizer, recipe.state, seed=0).params
    cast_params = cast_kernels(params, "bfloat16")
    assert cast_params["image"]["positions"] is params["image"]["positions"]
    kernels = {str(path[-1]): leaf.dtype for path, leaf in jax.tree.leaves_with_path(cast_params)}
    assert kernels["['kernel']"] == jnp.bfloat16 and kernels["['scale']"] == jnp.float32
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    tokens = random.integers(0, 258, (8, 8), dtype=np.int32)

    @jax.jit
    def encode(params):
        model = nnx.merge(towers.graph, params)
        return model.encode_image(pixels), model.encode_text(tokens)

    for actual, expected in zip(encode(cast_params), encode(params), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_float32_kernels_are_not_copied():
    params = {"a": {"kernel": jnp.ones((2, 2))}}
    assert cast_kernels(params, "float32")["a"]["kernel"] is params["a"]["kernel"]
