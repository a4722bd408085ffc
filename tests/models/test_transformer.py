"""A transformer computes the same in every execution mode and under every remat policy."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip.models.transformer import (
    ACTIVATIONS,
    REMAT_POLICIES,
    SAVED,
    Transformer,
    TransformerConfig,
    activate,
    dropout,
)

SHAPE = TransformerConfig(width=16, layers=2, heads=2)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 16)), jnp.float32)


@functools.cache
def parameters(layers=SHAPE.layers):
    config = replace(SHAPE, layers=layers)
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0)))))()


@functools.cache
def apply(config, causal=False):
    """Returns a compiled function (x, lengths, rng) -> tokens; only config.layers affects the parameters."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def run(params, x, lengths, rng):
        return nnx.merge(graph, params)(x, causal=causal, lengths=lengths, rng=rng)

    return functools.partial(jax.jit(run), parameters(config.layers))


def gradients(config, rng):
    """Returns ((loss, output), gradients); the loss is a fixed weighted mean of the output."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=X.shape), jnp.float32)

    def loss(params, x):
        out = nnx.merge(graph, params)(x, rng=rng)
        return jnp.mean(weights * out), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(parameters(), X)


@functools.cache
def expected_gradients(regularised):
    rng = jax.random.key(7) if regularised else None
    return gradients(replace(SHAPE, dropout=0.2, stochastic_depth=0.5, execution="unroll"), rng)


def assert_close(first, second, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), first, second)


@pytest.mark.parametrize("regularised", [False, True])
def test_scanned_layers_have_the_outputs_and_gradients_of_unrolled_layers(regularised):
    scanned = replace(SHAPE, dropout=0.2, stochastic_depth=0.5, execution="scan")
    assert_close(gradients(scanned, jax.random.key(7) if regularised else None), expected_gradients(regularised))


@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize("remat", [*sorted(set(REMAT_POLICIES) - {"none"}), "qkv,mixed", "attended", ",".join(SAVED)])
def test_every_remat_policy_gives_the_same_gradients(execution, remat):
    config = replace(SHAPE, dropout=0.2, stochastic_depth=0.5, execution=execution, remat=remat)
    assert_close(gradients(config, jax.random.key(7)), expected_gradients(True))


def test_a_remat_policy_stores_less_for_the_backward_pass():
    def stored_values(remat):
        config = replace(SHAPE, layers=8, execution="scan", remat=remat)
        graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        x = jax.ShapeDtypeStruct((8, 16, 16), jnp.float32)
        _, pullback = jax.eval_shape(lambda p, x: jax.vjp(nnx.merge(graph, p), x), params, x)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert stored_values("full") < stored_values("dots") < stored_values("none")
    of_layers = 8 * 8 * 16 * 16
    features = {name: (stored_values(name) - stored_values("full")) / of_layers for name in SAVED}
    assert features == pytest.approx({"qkv": 3, "mixed": 1, "attended": 1, "hidden": 4}, rel=0.02)  # less the biases


def test_under_a_causal_mask_a_token_does_not_depend_on_later_tokens():
    run, changed = apply(SHAPE, causal=True), X.at[:, 3:].set(0.5)
    np.testing.assert_array_equal(run(X, None, None)[:, :3], run(changed, None, None)[:, :3])
    plain = apply(SHAPE)
    assert not np.allclose(plain(X, None, None)[:, :3], plain(changed, None, None)[:, :3])


def test_other_tokens_do_not_depend_on_tokens_behind_the_length():
    lengths = jnp.asarray([5, 3, 1, 4])
    inside = np.arange(5) < np.asarray(lengths)[:, None]
    changed = jnp.where(inside[..., None], X, 9.0)
    run = apply(SHAPE)
    np.testing.assert_array_equal(run(X, lengths, None)[inside], run(changed, lengths, None)[inside])


@pytest.mark.parametrize("setting", ["dropout", "stochastic_depth"])
def test_regularisation_needs_an_rng_and_is_determined_by_it(setting):
    plain, run = apply(SHAPE)(X, None, None), apply(replace(SHAPE, **{setting: 0.5}))
    np.testing.assert_array_equal(run(X, None, None), plain)
    first, again, other = (run(X, None, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, plain)


def test_an_rng_without_regularisation_changes_nothing():
    np.testing.assert_array_equal(apply(SHAPE)(X, None, jax.random.key(1)), apply(SHAPE)(X, None, None))


def test_dropout_zeroes_the_given_share_and_preserves_the_mean():
    dropped = dropout(jnp.ones((200, 50)), 0.3, jax.random.split(jax.random.key(0), 200))
    assert abs(float((dropped == 0).mean()) - 0.3) < 0.02
    assert abs(float(dropped.mean()) - 1.0) < 0.03


def test_stochastic_depth_skips_whole_examples():
    dropped = dropout(jnp.ones((64, 5, 7)), 0.5, jax.random.split(jax.random.key(0), 64), shared_axes=(1, 2))
    per_example = np.asarray(dropped).reshape(64, -1)
    assert (per_example == per_example[:, :1]).all() and set(np.unique(per_example)) == {0.0, 2.0}


def test_stochastic_depth_never_skips_the_first_block():
    run = apply(replace(SHAPE, layers=1, stochastic_depth=0.9))
    np.testing.assert_array_equal(run(X, None, jax.random.key(0)), run(X, None, None))


def value_and_gradients(function, *arguments):
    value, pull = jax.vjp(function, *arguments)
    return value, *pull(jnp.ones_like(value))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_bfloat16_activation_and_its_gradient_are_computed_in_float32_and_rounded_once(name):
    x = jnp.linspace(-4, 4, 2048).astype(jnp.bfloat16)
    ours = lambda x: activate(x, name)  # noqa: E731
    wide = lambda x: ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, *(value_and_gradients(f, x) for f in (ours, wide)))
