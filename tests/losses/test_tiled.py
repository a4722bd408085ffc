"""The tiled losses equal dense float64 ones, in value and every gradient, at any size on any mesh and any processes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.losses import contrastive, tiled
from jaxclip.losses import sigmoid as pairwise
from jaxclip.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[2]
MESHES = [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 2), (8, 1, 1)]
SCALES = [0.0, 14.3, 100.0]  # the last is the temperature's clip
BIAS = -10.0
# Sizes and tiles that divide each other and that do not; each of their pairs is one compilation.
SIZES, TILES = [1, 2, 7, 16, 37], [1, 5, 8]


def vectors(size, dimension=24, seed=0):
    """Unit vectors that are alike in pairs, some rows of them twice."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(size, dimension))
    images[size // 2 :][::3] = images[0]
    texts = images + 0.7 * random.normal(size=(size, dimension))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (images, texts))


def groups_of(size, seed=0):
    return np.random.default_rng(seed).integers(0, max(1, 2 * size // 3), size).astype(np.int32)


def softmax_oracle(images, texts, scale, groups):
    """Value and gradients of InfoNCE by images, texts and scale, in float64 over whole matrices."""
    images, texts, scale, size = np.float64(images), np.float64(texts), float(np.float32(scale)), len(images)
    cosines, pairs = images @ texts.T, np.eye(size, dtype=bool)
    logits = scale * cosines
    if groups is not None:
        logits[(groups[:, None] == groups) & ~pairs] = -np.inf
    slopes, value = -2.0 * pairs, -2 * np.trace(scale * cosines)
    for axis in (0, 1):
        top = logits.max(axis=axis, keepdims=True)
        sums = np.exp(logits - top).sum(axis=axis, keepdims=True)
        slopes, value = slopes + np.exp(logits - top) / sums, value + (top + np.log(sums)).sum()
    return value / (2 * size), gradients_of(slopes / (2 * size), images, texts, scale)


def queued_oracle(images, texts, scale, groups, queue):
    """As softmax_oracle, with a queue's rows as further candidates of both directions, row by row."""
    images, texts, scale, size = np.float64(images), np.float64(texts), float(np.float32(scale)), len(images)
    value, slopes = 0.0, [np.zeros_like(images), np.zeros_like(texts)]
    scale_slope = 0.0
    for side, (ours, theirs, further) in enumerate(((images, texts, queue.text), (texts, images, queue.image))):
        for row in range(size):
            own = [i for i in range(size) if i == row or groups[i] != groups[row]]
            old = [i for i in range(len(further)) if queue.group[i] >= 0 and queue.group[i] != groups[row]]
            candidates = np.concatenate([theirs[own], np.float64(further)[old]])
            logits = scale * candidates @ ours[row]
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
            value += (np.log(np.exp(logits - logits.max()).sum()) + logits.max() - scale * ours[row] @ theirs[row]) / (
                2 * size
            )
            shares[own.index(row)] -= 1
            slopes[side][row] += scale * shares @ candidates / (2 * size)
            slopes[1 - side][own] += scale * np.outer(shares[: len(own)], ours[row]) / (2 * size)
            scale_slope += shares @ candidates @ ours[row] / (2 * size)
    return value, (*slopes, scale_slope)


def sigmoid_oracle(images, texts, scale, groups):
    """Value and gradients of the sigmoid loss by images, texts, scale and bias, in float64 over whole matrices."""
    images, texts, scale, size = np.float64(images), np.float64(texts), float(np.float32(scale)), len(images)
    sign, counted = 2 * np.eye(size) - 1, np.ones((size, size))
    if groups is not None:
        counted[(groups[:, None] == groups) & (sign < 0)] = 0
    logits = scale * (images @ texts.T) + BIAS
    slopes = -counted * sign / (1 + np.exp(sign * logits)) / size
    value = (counted * np.logaddexp(0, -sign * logits)).sum() / size
    return value, (*gradients_of(slopes, images, texts, scale), slopes.sum())


def gradients_of(slopes, images, texts, scale):
    return scale * slopes @ texts, scale * slopes.T @ images, (slopes * (images @ texts.T)).sum()


@partial(jax.jit, static_argnames="tile")
def run_softmax(images, texts, scale, groups, tile):
    def loss(images, texts, scale):
        return tiled.info_nce(images, texts, scale, groups, tile=tile)[0]

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(images, texts, jnp.float32(scale))


@partial(jax.jit, static_argnames="tile")
def run_sigmoid(images, texts, scale, groups, tile):
    def loss(images, texts, scale, bias):
        return tiled.sigmoid(images, texts, scale, bias, groups, tile=tile)

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(images, texts, jnp.float32(scale), jnp.float32(BIAS))


LOSSES = {"info_nce": (run_softmax, softmax_oracle), "sigmoid": (run_sigmoid, sigmoid_oracle)}


def assert_equals_oracle(name, images, texts, scale, groups, tile):
    run, oracle = LOSSES[name]
    value, found = run(images, texts, scale, groups, tile)
    expected, gradients = oracle(images, texts, scale, groups)
    # float32 carries seven digits of a logit. A probability p is off by p (1 - p) <= 1/4 of that, and a row's gradient
    # is scale / size times probabilities times differences of unit vectors (<= 2), summed over `size` rows.
    logit_error = 2e-7 * (1 + scale)
    assert abs(value - expected) <= 1e-5 * abs(expected) + logit_error
    absolute = logit_error * (1 + scale / (2 * len(images) ** 0.5))
    for ours, right in zip(found, gradients, strict=True):
        assert np.linalg.norm(ours - right) <= 1e-5 * np.linalg.norm(right) + absolute


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SIZES), st.sampled_from(TILES), st.sampled_from(SCALES), st.booleans(), st.integers(0, 99))
def test_value_and_gradients_equal_the_oracle_at_any_size_and_tile(name, size, tile, scale, grouped, seed):
    groups = groups_of(size, seed) if grouped else None
    assert_equals_oracle(name, *vectors(size, seed=seed), scale, groups, tile)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_value_and_gradients_equal_the_oracle_on_any_mesh(name, sizes):
    devices = make_mesh(*sizes, jax.devices("cpu")[: int(np.prod(sizes))])
    with jax.set_mesh(devices):
        for size, scale, groups in ((1, 14.3, None), (37, 100.0, groups_of(37)), (64, 14.3, groups_of(64))):
            assert_equals_oracle(name, *vectors(size), scale, groups, 3)


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("filled", [0, 9, 14])
def test_a_queue_is_further_negatives_never_of_a_rows_own_group(sizes, filled):
    size, held = 11, 14
    images, texts = vectors(size)
    kept = (np.arange(held) % 7).astype(np.int32)
    kept[filled:] = -1
    queue, groups = contrastive.Queue(*vectors(held, seed=5), kept), groups_of(size)
    assert filled == 0 or set(groups) & set(kept)
    expected, gradients = queued_oracle(images, texts, 14.3, groups, queue)
    if not filled:
        assert expected == pytest.approx(softmax_oracle(images, texts, 14.3, groups)[0], rel=1e-9)
    for loss in (contrastive.info_nce, partial(tiled.info_nce, tile=4)):
        run = jax.jit(jax.value_and_grad(lambda x, y, s, loss=loss: loss(x, y, s, groups, queue)[0], argnums=(0, 1, 2)))
        with jax.set_mesh(make_mesh(*sizes, jax.devices("cpu")[: int(np.prod(sizes))])):
            value, found = run(images, texts, jnp.float32(14.3))
        assert float(value) == pytest.approx(expected, rel=1e-5)
        for ours, right in zip(found, gradients, strict=True):
            assert np.linalg.norm(ours - right) <= 1e-5 * np.linalg.norm(right) + 5e-7


@pytest.mark.parametrize("grouped", [False, True])
def test_accuracies_are_those_of_the_dense_loss(grouped):
    images, texts = vectors(45)
    groups = groups_of(45) if grouped else None
    _, expected = contrastive.info_nce(images, texts, jnp.float32(10.0), groups)
    _, found = tiled.info_nce(images, texts, jnp.float32(10.0), groups, tile=7)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-6)
    assert 0 < found["image_to_text_accuracy"] < 1


def test_the_dense_sigmoid_loss_is_its_oracle():
    images, texts = vectors(31)
    for groups in (None, groups_of(31)):
        value = pairwise.sigmoid(images, texts, jnp.float32(14.3), jnp.float32(BIAS), groups)
        assert float(value) == pytest.approx(sigmoid_oracle(images, texts, 14.3, groups)[0], rel=1e-5)


def test_the_oracles_gradients_are_their_slopes():
    images, texts = np.float64(vectors(9))
    for oracle in (softmax_oracle, sigmoid_oracle):
        base, gradients = oracle(images, texts, 5.0, groups_of(9))
        for side in (0, 1):
            moved = [images.copy(), texts.copy()]
            moved[side][2, 3] += 1e-6
            slope = (oracle(*moved, 5.0, groups_of(9))[0] - base) / 1e-6
            assert slope == pytest.approx(gradients[side][2, 3], rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_vector_that_is_not_finite_makes_a_loss_that_is_not(name):
    images, texts = vectors(20)
    images[7, 2] = np.nan
    assert not np.isfinite(LOSSES[name][0](images, texts, 10.0, None, 8)[0])


def test_a_cotangent_scales_all_gradients():
    images, texts = vectors(10)

    def slopes(factor):
        def loss(x, y, s):
            return factor * tiled.info_nce(x, y, s, tile=4)[0]

        return jax.grad(loss, argnums=(0, 1, 2))(images, texts, jnp.float32(9.0))

    for one, three in zip(slopes(1.0), slopes(3.0), strict=True):
        np.testing.assert_allclose(3 * one, three, rtol=1e-5, atol=1e-8)


def temporaries(rows, loss):
    vector = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda *args: loss(*args)[0], argnums=(0, 1, 2)))
    return (
        run.lower(vector, vector, jax.ShapeDtypeStruct((), jnp.float32)).compile().memory_analysis().temp_size_in_bytes
    )


def test_memory_grows_with_the_batch_and_not_with_its_square():
    def small(*args):
        return tiled.info_nce(*args, tile=128)

    found = [temporaries(rows, small) for rows in (2048, 4096, 8192)]
    assert found[2] - found[1] <= 2.2 * (found[1] - found[0])
    assert found[2] < temporaries(8192, contrastive.info_nce) / 45


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
sys.path.insert(0, sys.argv[3])
from test_tiled import LOSSES, groups_of, vectors
from jaxclip.runtime.mesh import batch_sharding, make_mesh

assert len(jax.local_devices()) == 4 and len(jax.devices()) == 8
size, groups = 48, groups_of(48)
for sizes in ((8, 1, 1), (2, 2, 2)):
    mesh = make_mesh(*sizes)
    sharding = batch_sharding(mesh)
    place = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    for run, oracle in LOSSES.values():
        with jax.set_mesh(mesh):
            value, found = run(*map(place, vectors(size)), 14.3, place(groups), 5)
        expected, gradients = oracle(*vectors(size), 14.3, groups)
        assert abs(float(value) - expected) <= 1e-5 * expected, (float(value), expected)
        for ours, right in zip(found, gradients, strict=True):
            for shard in getattr(ours, "addressable_shards", ()):
                part = right[shard.index] if np.ndim(right) else right
                assert np.linalg.norm(np.asarray(shard.data) - part) <= 2e-5 * np.linalg.norm(right) + 1e-7
print("equal")
"""


@pytest.mark.slow
def test_two_processes_of_four_devices_compute_what_one_does():
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    arguments = [sys.executable, "-c", PROCESS, address]
    processes = [
        subprocess.Popen(
            [*arguments, str(index), str(Path(__file__).parent)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0 and "equal" in out, error
    finally:
        for process in processes:
            process.kill()
