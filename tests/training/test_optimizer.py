"""The optimizer treats parameters by name: which are frozen, which decay, and their learning rates."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxclip.config.schema import Optimizer
from jaxclip.errors import UserError
from jaxclip.towers.trainable import EVERYTHING, make_trainable
from jaxclip.training.optimizer import make_optimizer, make_schedule

RATE = 0.01


def parameters():
    rng = np.random.default_rng(0)
    shapes = {
        "image": {"stem": {"kernel": (3, 4), "bias": (4,)}, "norm": {"scale": (4,)}, "positions": (5, 4)},
        "text": {"token_embedding": {"embedding": (6, 4)}, "projection": {"kernel": (4, 2)}},
        "logit_scale": (),
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def configured_optimizer(params, trainable=EVERYTHING, **changes):
    """Returns the optimizer of these parameters with a constant learning rate; `changes` are fields of Optimizer."""
    settings = Optimizer(weight_decay=0.1, beta1=0.9, beta2=0.98, epsilon=1e-6, clip_norm=1.0)
    return make_optimizer(replace(settings, **changes), optax.constant_schedule(RATE), params, trainable)


def take_steps(params, steps=3, gradient=None, rates=(), layer_decay=1.0, **changes):
    """Returns the parameters and the optimizer state after steps with random gradients, or with a constant one."""
    trainable = make_trainable(params, rates, layer_decay=layer_decay)
    chain = configured_optimizer(params, trainable=trainable, **changes)
    state = chain.init(trainable.pick(params))

    @jax.jit
    def step(gradients, state, params):
        trained = trainable.pick(params)
        updates, state = chain.update(trainable.pick(gradients), state, trained)
        return trainable.put(optax.apply_updates(trained, updates), params), state

    for seed in range(steps):
        rng = np.random.default_rng(seed)
        gradients = jax.tree.map(
            lambda p, rng=rng: jnp.asarray(rng.normal(size=p.shape), p.dtype) if gradient is None else p * 0 + gradient,
            params,
        )
        params, state = step(gradients, state, params)
    return params, state


def by_name(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def test_frozen_parameters_stay_bit_identical_and_have_no_optimizer_state():
    before = parameters()
    after, state = take_steps(before, rates=(("^image/", 0.0), ("token_embedding", 0)))
    before, after = by_name(before), by_name(after)
    for name in before:
        frozen = name.startswith("image/") or "token_embedding" in name
        assert np.array_equal(before[name], after[name]) == frozen, name
    assert not [name for name in by_name(state) if "image" in name or "token_embedding" in name]
    assert [name for name in by_name(state) if "text/projection" in name]


def test_the_clipped_norm_excludes_frozen_parameters():
    params = {"image": {"kernel": jnp.ones(2)}, "text": {"kernel": jnp.ones(2)}}
    huge = {"image": {"kernel": jnp.full(2, 1e6)}, "text": {"kernel": jnp.full(2, 0.1)}}
    trainable = make_trainable(params, (("^image", 0.0),))
    chain = configured_optimizer(params, trainable=trainable, epsilon=1.0, weight_decay=0.0)
    alone = configured_optimizer({"text": params["text"]}, epsilon=1.0, weight_decay=0.0)
    trained = trainable.pick(params)
    updates, _ = chain.update(trainable.pick(huge), chain.init(trained), trained)
    expected, _ = alone.update({"text": huge["text"]}, alone.init({"text": params["text"]}), {"text": params["text"]})
    np.testing.assert_array_equal(updates["text"]["kernel"], expected["text"]["kernel"])


def test_a_rate_scales_the_whole_update_of_matching_names_and_the_first_match_is_used():
    before = parameters()
    plain, _ = take_steps(before, steps=1)
    scaled, _ = take_steps(before, steps=1, rates=(("projection", 0.5), ("^text", 0.1)))
    before, plain, scaled = by_name(before), by_name(plain), by_name(scaled)
    for name in before:
        factor = 0.5 if "projection" in name else 0.1 if name.startswith("text") else 1.0
        np.testing.assert_allclose(scaled[name] - before[name], factor * (plain[name] - before[name]), atol=2e-7)


@pytest.mark.parametrize("rates", [(), (("^logit_scale$", 0.0),), (("^image/norm", 0.5),)])
def test_only_kernels_and_embeddings_decay(rates):
    before = parameters()
    after, _ = take_steps(before, steps=1, gradient=0.0, rates=rates)
    before, after = by_name(before), by_name(after)
    for name in before:
        decays = name.endswith(("kernel", "embedding"))
        np.testing.assert_allclose(
            after[name], before[name] * (1 - 0.1 * RATE if decays else 1), rtol=1e-6, err_msg=name
        )
        assert decays or np.array_equal(after[name], before[name])


def test_adam_is_adamw_without_decay():
    adam, _ = take_steps(parameters(), name="adam", weight_decay=0.5)
    adamw, _ = take_steps(parameters(), name="adamw", weight_decay=0.0)
    decayed, _ = take_steps(parameters(), name="adamw", weight_decay=0.5)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, adam, adamw)))
    assert not np.array_equal(adam["text"]["projection"]["kernel"], decayed["text"]["projection"]["kernel"])


def tower_parameters():
    """Returns parameters shaped like a tower's: two stacked layers, a convolution, and some that are not kernels."""
    shapes = {
        "blocks": {"qkv": {"kernel": (2, 8, 3, 2, 4), "bias": (2, 3, 2, 4)}, "out": {"kernel": (2, 2, 4, 8)}},
        "stem": {"kernel": (3, 3, 2, 6)},
        "projection": {"kernel": (8, 5), "lora": {"a": (8, 2)}},
        "token_embedding": {"embedding": (9, 8)},
        "logit_scale": (),
    }
    rng = np.random.default_rng(1)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, {"image": shapes}, is_leaf=lambda x: isinstance(x, tuple))


def test_muon_moves_each_matrix_of_a_kernel_orthogonally_and_leaves_the_rest_to_adamw():
    before = tower_parameters()
    after, state = take_steps(before, steps=1, name="muon", weight_decay=0.0)
    adamw, _ = take_steps(before, steps=1, name="adamw", weight_decay=0.0)
    before, after, adamw = by_name(before), by_name(after), by_name(adamw)
    matrices = {
        "image/blocks/qkv/kernel": lambda x: x.transpose(0, 2, 1, 3, 4).reshape(6, 8, 8),
        "image/blocks/out/kernel": lambda x: x.reshape(2, 8, 8),
        "image/stem/kernel": lambda x: x.reshape(1, 18, 6),
        "image/projection/kernel": lambda x: x.reshape(1, 8, 5),
    }
    for name in before:
        if name not in matrices:
            assert not np.array_equal(after[name], before[name])
            np.testing.assert_allclose(after[name], adamw[name], rtol=1e-6, err_msg=name)
            continue
        steps = matrices[name](after[name] - before[name])
        singular_values = np.linalg.svd(steps, compute_uv=False) / (RATE * 0.2 * np.sqrt(max(steps.shape[1:])))
        # Five Newton-Schulz iterations bring singular values near 1, except the smallest ones.
        assert np.median(singular_values, axis=1).min() > 0.7 and singular_values.max() < 1.3, name
    moments = [name for name in by_name(state) if name.endswith("kernel")]
    assert len(moments) == len(matrices)  # Muon stores one moment per kernel, Adam two


def test_muon_follows_rates_and_freezing_by_name_and_decays_as_adamw():
    before = tower_parameters()
    after, state = take_steps(before, name="muon", rates=(("stem|qkv|embedding", 0.0),))
    half, _ = take_steps(before, steps=1, name="muon", rates=(("projection", 0.5),))
    whole, _ = take_steps(before, steps=1, name="muon")
    before, after, half, whole = by_name(before), by_name(after), by_name(half), by_name(whole)
    for name in before:
        frozen = any(part in name for part in ("stem", "qkv", "embedding"))
        assert np.array_equal(before[name], after[name]) == frozen, name
    assert not [name for name in by_name(state) if "stem" in name]
    name = "image/projection/kernel"
    np.testing.assert_allclose(half[name] - before[name], 0.5 * (whole[name] - before[name]), atol=2e-7)
    plain, _ = take_steps(tower_parameters(), steps=1, name="muon", weight_decay=0.0)
    np.testing.assert_allclose(whole[name], by_name(plain)[name] - 0.1 * RATE * before[name], atol=2e-7)


def test_warm_up_is_linear_from_zero_and_cosine_ends_at_zero():
    schedule = make_schedule(Optimizer(learning_rate=2.0, schedule="cosine", warmup_steps=10), steps=110)
    values = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 200)]
    np.testing.assert_allclose(values, [0, 1, 2, 1, 0, 0], atol=1e-6)


def test_constant_schedule_stays_at_its_peak_after_warm_up():
    schedule = make_schedule(Optimizer(learning_rate=2.0, schedule="constant", warmup_steps=4), steps=100)
    np.testing.assert_allclose([float(schedule(step)) for step in (0, 1, 4, 50, 100)], [0, 0.5, 2, 2, 2])


def test_a_short_run_warms_up_for_at_most_half_of_its_steps():
    schedule = make_schedule(Optimizer(learning_rate=1.0, schedule="cosine", warmup_steps=100), steps=10)
    assert float(schedule(5)) == pytest.approx(1.0) and float(schedule(10)) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ((("(", 0.1),), ["'('", "not a regular expression"]),
        ((("^txet/", 0.1),), ["'^txet/'", "no parameter's name", "image/"]),
        ((("", 0.0),), ["freezes every parameter"]),
    ],
)
def test_rates_that_match_nothing_or_freeze_everything_are_refused(rates, words):
    with pytest.raises(UserError) as raised:
        make_trainable(parameters(), rates)
    assert all(word in str(raised.value) for word in ["config.optimizer.rates", *words])
