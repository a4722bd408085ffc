"""The towers return unit vectors in float32, read captions up to the end token and have finite gradients."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip.models.clip import (
    CLIP,
    CLIP_MEAN,
    MAX_LOGIT_SCALE,
    CLIPConfig,
    ImageConfig,
    TextConfig,
    keep_patches,
    normalise,
)
from jaxclip.models.transformer import TransformerConfig, example_keys, split_each

BLOCKS = TransformerConfig(width=32, layers=2, heads=2)
END, SIZE, CONTEXT = 9, 32, 8


def config_of(stem="patch", image_pooling="class", text_pooling="end", patch_dropout=0.0, mean=CLIP_MEAN, **blocks):
    blocks = replace(BLOCKS, **blocks)
    image = ImageConfig(SIZE, 8, blocks, stem, image_pooling, patch_dropout, mean=mean)
    return CLIPConfig(image, TextConfig(10, CONTEXT, END, blocks, text_pooling), embedding=24)


def pictures(count=3):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3)), jnp.uint8)


def captions():
    return jnp.asarray([[1, 2, 3, END, END, END, END, END], [4, END] + [END] * 6, [5, 6, 7, 8, 1, 2, 3, END]])


FORMS = [("patch", "class", "end"), ("conv", "mean", "mean")]


@functools.cache
def parameters(*form):
    config = config_of(*form)
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(CLIP(config, rngs=nnx.Rngs(0)))))()


def graph_of(config):
    return nnx.split(nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0))))[0]


@functools.cache
def towers(*form, method="__call__", **settings):
    """Returns a compiled method of the towers; `settings` do not change the shapes of the parameters."""
    graph = graph_of(config_of(*form, **settings))

    def run(params, *inputs, rng=None):
        return getattr(nnx.merge(graph, params), method)(*inputs, rng=rng)

    return functools.partial(jax.jit(run), parameters(*form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_float32_unit_vectors_for_any_compute_dtype(form, dtype):
    embeddings, exact = towers(*form, dtype=dtype)(pictures(), captions()), towers(*form)(pictures(), captions())
    for vectors, reference in ((embeddings.image, exact.image), (embeddings.text, exact.text)):
        assert vectors.dtype == jnp.float32 and vectors.shape == (3, 24)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
        cosines = np.sum(np.asarray(vectors) * np.asarray(reference), axis=1)
        assert (cosines > 0.99).all() and ((cosines < 1 - 1e-6).any() or dtype == "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_float32_for_any_compute_dtype(dtype):
    shapes = nnx.eval_shape(lambda: nnx.state(CLIP(config_of("conv", dtype=dtype), rngs=nnx.Rngs(0))))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_after_the_end_token_are_ignored(form):
    encode, tokens = towers(*form, method="encode_text"), captions()
    after_end = jnp.arange(CONTEXT) > jnp.argmax(tokens == END, axis=1)[:, None]
    vectors = encode(tokens)
    np.testing.assert_allclose(vectors, encode(jnp.where(after_end, 0, tokens)), atol=1e-6)
    changed = encode(tokens.at[0, 2].set(8))
    assert not np.allclose(vectors[0], changed[0], atol=1e-3)


def test_the_logit_scale_starts_at_the_inverse_temperature_and_is_clipped_at_100():
    graph, params = graph_of(config_of(*FORMS[0])), parameters(*FORMS[0])
    run = jax.jit(lambda params: nnx.merge(graph, params)(pictures(), captions()).logit_scale)
    assert float(run(params)) == pytest.approx(1 / 0.07)
    assert float(run({**params, "logit_scale": jnp.log(jnp.float32(1000.0))})) == MAX_LOGIT_SCALE == 100.0


@pytest.mark.parametrize("form", FORMS)
def test_patch_dropout_needs_an_rng_and_is_determined_by_it(form):
    encode = towers(*form, method="encode_image", patch_dropout=0.5)
    plain = towers(*form, method="encode_image")(pictures())
    np.testing.assert_array_equal(encode(pictures()), plain)
    first, again, other = (encode(pictures(), rng=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, plain)


def test_patch_dropout_keeps_distinct_patches_and_a_different_set_for_each_picture():
    x = jnp.broadcast_to(jnp.arange(16.0)[None, :, None], (50, 16, 1))
    kept = np.asarray(keep_patches(x, 0.75, jax.random.key(0)))[..., 0]
    assert kept.shape == (50, 4)
    assert all(len(set(row)) == 4 for row in kept)
    assert len({tuple(sorted(row)) for row in kept}) > 25
    assert keep_patches(x, 0.99, jax.random.key(0)).shape == (50, 1, 1)


def test_the_towers_draw_different_random_numbers_from_one_rng():
    embeddings = towers(*FORMS[0], dropout=0.5)(pictures(), captions(), rng=jax.random.key(0))
    image_rng, text_rng = split_each(example_keys(jax.random.key(0), len(pictures())), 2)
    image = towers(*FORMS[0], method="encode_image", dropout=0.5)(pictures(), rng=image_rng)
    text = towers(*FORMS[0], method="encode_text", dropout=0.5)(captions(), rng=text_rng)
    np.testing.assert_allclose(embeddings.image, image, atol=1e-6)
    np.testing.assert_allclose(embeddings.text, text, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_for_a_picture_that_is_all_zero_after_normalisation(form):
    graph = graph_of(config_of(*form, mean=(0.0, 0.0, 0.0)))
    black = jnp.zeros((2, SIZE, SIZE, 3), jnp.uint8)

    def loss(params):
        embeddings = nnx.merge(graph, params)(black, captions()[:2])
        return jnp.sum(embeddings.image * embeddings.text) * embeddings.logit_scale

    value, gradients = jax.jit(jax.value_and_grad(loss))(parameters(*form))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_normalising_a_zero_vector_has_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: normalise(x).sum())(jnp.zeros((2, 4)))
    assert value == 0 and np.isfinite(gradient).all()
