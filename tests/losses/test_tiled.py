"""The tiled losses and their gradients equal dense float64 oracles, for any size, mesh and number of processes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.losses import contrastive, exchange, tiled
from jaxclip.losses import sigmoid as pairwise
from jaxclip.losses.labels import Labels
from jaxclip.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[2]
MESHES = [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 2), (8, 1, 1)]
SCALES = [0.0, 14.3, 100.0]  # the last is the largest scale that training allows
BIAS = -10.0
# Some tiles divide some sizes and others do not. Each combination is compiled once, so the lists are short.
SIZES, TILES = [1, 2, 7, 16, 37], [1, 5, 8]


def unit_vectors(size, dimension=24, seed=0):
    """Returns images and texts (size, dimension): matching rows are similar, and some images are equal."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(size, dimension))
    images[size // 2 :][::3] = images[0]
    texts = images + 0.7 * random.normal(size=(size, dimension))
    return tuple((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for rows in (images, texts))


def random_groups(size, seed=0):
    return np.random.default_rng(seed).integers(0, max(1, 2 * size // 3), size).astype(np.int32)


def softmax_oracle(images, texts, scale, groups):
    """Returns InfoNCE and its gradients by images, texts and scale, in float64 from whole matrices."""
    images, texts, scale, size = np.float64(images), np.float64(texts), float(np.float32(scale)), len(images)
    cosines, pairs = images @ texts.T, np.eye(size, dtype=bool)
    logits = scale * cosines
    if groups is not None:
        logits[(groups[:, None] == groups) & ~pairs] = -np.inf
    slopes, value = -2.0 * pairs, -2 * np.trace(scale * cosines)
    for axis in (0, 1):
        largest = logits.max(axis=axis, keepdims=True)
        sums = np.exp(logits - largest).sum(axis=axis, keepdims=True)
        slopes, value = slopes + np.exp(logits - largest) / sums, value + (largest + np.log(sums)).sum()
    return value / (2 * size), chain_rule(slopes / (2 * size), images, texts, scale)


def queued_oracle(images, texts, scale, groups, queue):
    """Returns the same as softmax_oracle if the queue's rows are additional candidates in both directions."""
    images, texts, scale, size = np.float64(images), np.float64(texts), float(np.float32(scale)), len(images)
    value, gradients, scale_gradient = 0.0, [np.zeros_like(images), np.zeros_like(texts)], 0.0
    for side, (queries, gallery, queued) in enumerate(((images, texts, queue.text), (texts, images, queue.image))):
        for row in range(size):
            in_batch = [i for i in range(size) if i == row or groups[i] != groups[row]]
            in_queue = [i for i in range(len(queued)) if queue.group[i] >= 0 and queue.group[i] != groups[row]]
            candidates = np.concatenate([gallery[in_batch], np.float64(queued)[in_queue]])
            logits = scale * candidates @ queries[row]
            weights = np.exp(logits - logits.max())
            value += (np.log(weights.sum()) + logits.max() - scale * queries[row] @ gallery[row]) / (2 * size)
            slopes = weights / weights.sum()  # by each logit
            slopes[in_batch.index(row)] -= 1
            gradients[side][row] += scale * slopes @ candidates / (2 * size)
            gradients[1 - side][in_batch] += scale * np.outer(slopes[: len(in_batch)], queries[row]) / (2 * size)
            scale_gradient += slopes @ candidates @ queries[row] / (2 * size)
    return value, (*gradients, scale_gradient)


def sigmoid_oracle(images, texts, scale, groups):
    """Returns the sigmoid loss and its gradients by images, texts, scale and bias, in float64 from whole matrices."""
    images, texts, scale, size = np.float64(images), np.float64(texts), float(np.float32(scale)), len(images)
    sign, counted = 2 * np.eye(size) - 1, np.ones((size, size))
    if groups is not None:
        counted[(groups[:, None] == groups) & (sign < 0)] = 0
    logits = scale * (images @ texts.T) + BIAS
    slopes = -counted * sign / (1 + np.exp(sign * logits)) / size
    value = (counted * np.logaddexp(0, -sign * logits)).sum() / size
    return value, (*chain_rule(slopes, images, texts, scale), slopes.sum())


def chain_rule(slopes, images, texts, scale):
    """Returns the gradients by images, texts and scale, from the derivatives (B, B) by the logits."""
    return scale * slopes @ texts, scale * slopes.T @ images, (slopes * (images @ texts.T)).sum()


STATIC = ("tile", "gathered", "exchange_name", "products")


@partial(jax.jit, static_argnames=STATIC)
def run_softmax(
    images, texts, scale, groups, tile, exchange_name="gather", products="float32", gathered=exchange.BLOCK
):
    def loss(images, texts, scale):
        settings = {"tile": tile, "exchange": exchange_name, "products": products}
        return tiled.info_nce(images, texts, scale, Labels(groups), **settings)[0]

    with patch.object(exchange, "BLOCK", gathered):
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(images, texts, jnp.float32(scale))


@partial(jax.jit, static_argnames=STATIC)
def run_sigmoid(
    images, texts, scale, groups, tile, exchange_name="gather", products="float32", gathered=exchange.BLOCK
):
    def loss(images, texts, scale, bias):
        settings = {"tile": tile, "exchange": exchange_name, "products": products}
        return tiled.sigmoid(images, texts, scale, bias, Labels(groups), **settings)

    with patch.object(exchange, "BLOCK", gathered):
        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(images, texts, jnp.float32(scale), jnp.float32(BIAS))


LOSSES = {"info_nce": (run_softmax, softmax_oracle), "sigmoid": (run_sigmoid, sigmoid_oracle)}


def assert_equals_oracle(name, images, texts, scale, groups, tile, **options):
    run, oracle = LOSSES[name]
    value, gradients = run(images, texts, scale, groups, tile, **options)
    expected, expected_gradients = oracle(images, texts, scale, groups)
    # float32 has seven significant digits of a logit. The error of a probability p is p (1 - p) <= 1/4 of the logit's,
    # and a row's gradient is scale / size times probabilities times differences of unit vectors (<= 2), summed over
    # `size` rows.
    logit_error = 2e-7 * (1 + scale)
    assert abs(value - expected) <= 1e-5 * abs(expected) + logit_error
    absolute = logit_error * (1 + scale / (2 * len(images) ** 0.5))
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(gradient - exact) <= 1e-5 * np.linalg.norm(exact) + absolute


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SIZES), st.sampled_from(TILES), st.sampled_from(SCALES), st.booleans(), st.integers(0, 99))
def test_value_and_gradients_equal_the_oracle_at_any_size_and_tile(name, size, tile, scale, grouped, seed):
    groups = random_groups(size, seed) if grouped else None
    assert_equals_oracle(name, *unit_vectors(size, seed=seed), scale, groups, tile)


EXCHANGES = {
    "gather": {"exchange_name": "gather"},
    "gather, in blocks": {"exchange_name": "gather", "gathered": 16},  # two texts of each device, which has five
    "ring": {"exchange_name": "ring"},
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("options", EXCHANGES.values(), ids=EXCHANGES)
def test_value_and_gradients_equal_the_oracle_on_eight_devices_in_every_exchange(name, options):
    with jax.set_mesh(make_mesh(2, 4, 1, jax.devices("cpu"))):
        assert_equals_oracle(name, *unit_vectors(37), 100.0, random_groups(37), 3, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("options", EXCHANGES.values(), ids=EXCHANGES)
def test_value_and_gradients_equal_the_oracle_on_any_mesh(name, sizes, options):
    with jax.set_mesh(make_mesh(*sizes, jax.devices("cpu")[: int(np.prod(sizes))])):
        for size, scale, groups in ((1, 14.3, None), (37, 100.0, random_groups(37)), (64, 14.3, random_groups(64))):
            assert_equals_oracle(name, *unit_vectors(size), scale, groups, 3, **options)


@pytest.mark.parametrize(
    ("sizes", "exchange_name"), [((1, 1, 1), "gather"), ((2, 4, 1), "gather"), ((8, 1, 1), "ring")]
)
@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_products_round_embeddings_and_slopes_but_nothing_else(name, sizes, exchange_name):
    # Embeddings that are bfloat16 numbers already have exact products, so that only slopes are rounded.
    images, texts = (np.float32(x.astype(jnp.bfloat16)) for x in unit_vectors(37, seed=1))
    groups, (run, oracle) = random_groups(37, seed=1), LOSSES[name]
    with jax.set_mesh(make_mesh(*sizes, jax.devices("cpu")[: int(np.prod(sizes))])):
        value, gradients = run(images, texts, 14.3, groups, 8, exchange_name, "bfloat16")
    expected, expected_gradients = oracle(images, texts, 14.3, groups)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    # A slope's error is at most 2**-9 of it, but the sum of the products of slopes and embeddings partly cancels.
    for gradient, exact in zip(gradients[:2], expected_gradients[:2], strict=True):
        assert 2**-14 < np.linalg.norm(gradient - exact) / np.linalg.norm(exact) < 2**-7
    # The scale's gradient is the product of the images and their gradient, over the scale.
    largest = np.linalg.norm(images) * np.linalg.norm(expected_gradients[0]) / 14.3
    assert abs(gradients[2] - expected_gradients[2]) < 2**-7 * largest
    if name == "sigmoid":  # the bias's gradient is no product
        assert float(gradients[3]) == pytest.approx(expected_gradients[3], rel=1e-5)


@pytest.mark.parametrize("loss", ["dense", "tiled"])
@pytest.mark.parametrize(("products", "tolerance"), [("float32", 5e-6), ("bfloat16_3x", 1e-4), ("bfloat16", 2e-2)])
def test_the_precision_of_products_bounds_the_errors_of_value_and_gradients(loss, products, tolerance):
    images, texts = unit_vectors(96)

    def info_nce(images, texts, scale):
        if loss == "dense":
            return contrastive.info_nce(images, texts, scale, products=products)[0]
        return tiled.info_nce(images, texts, scale, tile=64, products=products)[0]

    def sigmoid(images, texts, scale):
        if loss == "dense":
            return pairwise.sigmoid(images, texts, scale, jnp.float32(BIAS), products=products)
        return tiled.sigmoid(images, texts, scale, jnp.float32(BIAS), tile=64, products=products)

    for function, oracle in ((info_nce, softmax_oracle), (sigmoid, sigmoid_oracle)):
        value, gradients = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(images, texts, jnp.float32(14.3))
        expected, expected_gradients = oracle(images, texts, 14.3, None)
        assert float(value) == pytest.approx(expected, rel=tolerance)
        pairs = zip(gradients, expected_gradients[:2], strict=True)
        errors = [np.linalg.norm(gradient - exact) / np.linalg.norm(exact) for gradient, exact in pairs]
        assert tolerance / 100 < max(errors) < tolerance, errors


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("filled", [0, 9, 14])
def test_a_queue_adds_negatives_of_other_groups_only(sizes, filled):
    size, capacity = 11, 14
    images, texts = unit_vectors(size)
    queue_groups = (np.arange(capacity) % 7).astype(np.int32)
    queue_groups[filled:] = -1
    queue, groups = contrastive.Queue(*unit_vectors(capacity, seed=5), queue_groups), random_groups(size)
    assert filled == 0 or set(groups) & set(queue_groups)
    expected, expected_gradients = queued_oracle(images, texts, 14.3, groups, queue)
    if not filled:
        assert expected == pytest.approx(softmax_oracle(images, texts, 14.3, groups)[0], rel=1e-9)
    by_tiles = [partial(tiled.info_nce, tile=4, exchange=name) for name in exchange.EXCHANGES]
    for loss in (contrastive.info_nce, *by_tiles[: 1 if sizes == (1, 1, 1) else 2]):
        run = jax.jit(
            jax.value_and_grad(lambda x, y, s, loss=loss: loss(x, y, s, Labels(groups), queue)[0], argnums=(0, 1, 2))
        )
        with jax.set_mesh(make_mesh(*sizes, jax.devices("cpu")[: int(np.prod(sizes))])):
            value, gradients = run(images, texts, jnp.float32(14.3))
        assert float(value) == pytest.approx(expected, rel=1e-5)
        for gradient, exact in zip(gradients, expected_gradients, strict=True):
            assert np.linalg.norm(gradient - exact) <= 1e-5 * np.linalg.norm(exact) + 5e-7


@pytest.mark.parametrize("grouped", [False, True])
def test_accuracies_equal_those_of_the_dense_loss(grouped):
    images, texts = unit_vectors(45)
    groups = random_groups(45) if grouped else None
    _, expected = contrastive.info_nce(images, texts, jnp.float32(10.0), Labels(groups))
    _, metrics = tiled.info_nce(images, texts, jnp.float32(10.0), Labels(groups), tile=7)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6)
    assert 0 < metrics["image_to_text_accuracy"] < 1


def test_the_dense_sigmoid_loss_equals_the_oracle():
    images, texts = unit_vectors(31)
    for groups in (None, random_groups(31)):
        value = pairwise.sigmoid(images, texts, jnp.float32(14.3), jnp.float32(BIAS), Labels(groups))
        assert float(value) == pytest.approx(sigmoid_oracle(images, texts, 14.3, groups)[0], rel=1e-5)


def test_the_oracles_gradients_equal_finite_differences():
    images, texts = np.float64(unit_vectors(9))
    for oracle in (softmax_oracle, sigmoid_oracle):
        base, gradients = oracle(images, texts, 5.0, random_groups(9))
        for side in (0, 1):
            shifted = [images.copy(), texts.copy()]
            shifted[side][2, 3] += 1e-6
            slope = (oracle(*shifted, 5.0, random_groups(9))[0] - base) / 1e-6
            assert slope == pytest.approx(gradients[side][2, 3], rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_in_a_vector_makes_the_loss_nan_or_infinite(name):
    images, texts = unit_vectors(20)
    images[7, 2] = np.nan
    assert not np.isfinite(LOSSES[name][0](images, texts, 10.0, None, 8)[0])


def test_the_gradients_are_proportional_to_the_cotangent():
    images, texts = unit_vectors(10)

    def gradients(factor):
        def loss(x, y, s):
            return factor * tiled.info_nce(x, y, s, tile=4)[0]

        return jax.grad(loss, argnums=(0, 1, 2))(images, texts, jnp.float32(9.0))

    for one, three in zip(gradients(1.0), gradients(3.0), strict=True):
        np.testing.assert_allclose(3 * one, three, rtol=1e-5, atol=1e-8)


def temporary_bytes(rows, loss):
    """Returns the temporary memory of the compiled loss and its gradients, for embeddings (rows, 64)."""
    embeddings = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda *args: loss(*args)[0], argnums=(0, 1, 2)))
    lowered = run.lower(embeddings, embeddings, jax.ShapeDtypeStruct((), jnp.float32))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_with_the_batch():
    def tiled_loss(*args):
        return tiled.info_nce(*args, tile=128)

    small, medium, large = (temporary_bytes(rows, tiled_loss) for rows in (2048, 4096, 8192))
    assert large - medium <= 2.2 * (medium - small)
    assert large < temporary_bytes(8192, contrastive.info_nce) / 45


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
sys.path.insert(0, sys.argv[3])
from test_tiled import LOSSES, random_groups, unit_vectors
from jaxclip.runtime.mesh import batch_sharding, make_mesh

assert len(jax.local_devices()) == 4 and len(jax.devices()) == 8
size, groups = 48, random_groups(48)
for sizes in ((8, 1, 1), (2, 2, 2)):
    mesh = make_mesh(*sizes)
    sharding = batch_sharding(mesh)
    place = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    for run, oracle in LOSSES.values():
        with jax.set_mesh(mesh):
            value, gradients = run(*map(place, unit_vectors(size)), 14.3, place(groups), 5)
        expected, expected_gradients = oracle(*unit_vectors(size), 14.3, groups)
        assert abs(float(value) - expected) <= 1e-5 * expected, (float(value), expected)
        for gradient, exact in zip(gradients, expected_gradients, strict=True):
            for shard in getattr(gradient, "addressable_shards", ()):
                part = exact[shard.index] if np.ndim(exact) else exact
                assert np.linalg.norm(np.asarray(shard.data) - part) <= 2e-5 * np.linalg.norm(exact) + 1e-7
print("equal")
"""


@pytest.mark.slow
def test_two_processes_with_four_devices_each_equal_the_oracle():
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
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
            stdout, stderr = process.communicate(timeout=300)
            assert process.returncode == 0 and "equal" in stdout, stderr
    finally:
        for process in processes:
            process.kill()
