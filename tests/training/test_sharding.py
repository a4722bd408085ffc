"""Training takes the same steps on any mesh."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.losses.contrastive import info_nce
from jaxclip.losses.labels import Labels
from jaxclip.runtime import mesh
from jaxclip.towers import sharding
from jaxclip.towers.checkpoints import Checkpoints
from jaxclip.towers.params import checksum, make_model
from jaxclip.training.optimizer import make_optimizer
from jaxclip.training.state import abstract_state, initial_state

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROGRAM = Path(__file__).with_name("five_steps.py")
spec = importlib.util.spec_from_file_location("five_steps", PROGRAM)
five_steps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(five_steps)

MESHES = [(8, 1, 1), (2, 2, 2), (1, 8, 1), (4, 1, 2)]
BATCH, CONFIG = five_steps.BATCH, five_steps.CONFIG
SHAPES = make_model(CONFIG)[1]
OPTIMIZER = make_optimizer(five_steps.ADAM, five_steps.SCHEDULE, SHAPES)
EVERY = [(case, sizes) for case in five_steps.CASES for sizes in MESHES]
# EVERY takes minutes and is run only with JAXCLIP_EVERY_MESH=1. SOME has each case and each mesh at least once.
SOME = [
    ("dense", (8, 1, 1)),
    ("dense", (2, 2, 2)),
    ("tiled", (1, 8, 1)),
    ("incorrect", (4, 1, 2)),
    ("adapters", (2, 2, 2)),
    ("muon", (2, 2, 2)),
    ("reranker", (4, 1, 2)),
]
JOBS = EVERY if os.environ.get("JAXCLIP_EVERY_MESH") == "1" else SOME


def make_mesh(sizes):
    return mesh.make_mesh(*sizes, jax.devices("cpu")[: int(np.prod(sizes))])


@pytest.fixture(scope="module")
def on_one_device():
    """A function that trains a case on one device, only once for all tests."""
    results = {}

    def train(case):
        if case not in results:
            results[case] = five_steps.train(case, (1, 1, 1))
        return results[case]

    return train


def assert_close(actual, expected):
    for name, leaf, reference in zip(
        jax.tree.leaves(sharding.names(expected)), jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, reference, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes"), JOBS, ids=str)
def test_five_steps_on_any_mesh_equal_those_on_one_device_and_the_step_is_compiled_once(on_one_device, case, sizes):
    expected, expected_state, _ = on_one_device(case)
    figures, state, compilations = five_steps.train(case, sizes)
    np.testing.assert_allclose(figures, expected, rtol=1e-5)
    assert_close((state.params, state.ema), (expected_state.params, expected_state.ema))
    assert compilations == 1


@pytest.mark.slow
def test_five_steps_of_two_processes_with_four_devices_each_equal_those_on_one_device(on_one_device, tmp_path):
    jobs = JOBS if JOBS is EVERY else [("dense", (2, 2, 2)), ("incorrect", (8, 1, 1)), ("adapters", (1, 8, 1))]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    names = [f"{case}:{'x'.join(map(str, sizes))}" for case, sizes in jobs]
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "XLA_FLAGS": flags}
    file = tmp_path / "results.npz"
    processes = [
        subprocess.Popen([sys.executable, PROGRAM, address, "2", str(number), file, *names], env=environment)
        for number in range(2)
    ]
    try:
        assert [process.wait(300 * len(jobs)) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    with np.load(file) as results:
        for name, (case, _) in zip(names, jobs, strict=True):
            figures, state, _ = on_one_device(case)
            np.testing.assert_allclose(results[f"{name}/figures"], figures, rtol=1e-5, err_msg=name)
            assert_close(
                jax.tree.map(lambda path, name=name: results[f"{name}/{path}"], sharding.names(state.params)),
                state.params,
            )


def test_no_collective_of_the_dense_loss_is_inside_a_condition_or_a_loop():
    """On CPUs, XLA runs such a collective concurrently with the others, in any order, and Gloo then confuses them."""
    devices = make_mesh((8, 1, 1))
    rows = mesh.batch_sharding(devices)
    side = jax.ShapeDtypeStruct((BATCH, 8), jnp.float32, sharding=rows)
    groups = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=rows)
    with jax.set_mesh(devices):
        gradient = jax.grad(lambda sides, groups: info_nce(*sides, 10.0, Labels(groups))[0])
        program = jax.jit(gradient).lower((side, side), groups).compile().as_text()
    inside, outside = program.split("\nENTRY ")
    assert " all-reduce(" in outside and " all-reduce(" not in inside and " all-gather(" not in inside


def test_adapters_are_sharded_like_the_kernels_they_adapt():
    _, _, shapes, trainable = five_steps.adapters()
    optimizer = make_optimizer(five_steps.ADAM, five_steps.SCHEDULE, shapes, trainable)
    abstract = abstract_state(shapes, optimizer, make_mesh((1, 1, 8)), trainable).params
    for tower in ("image", "text"):
        block = abstract[tower]["transformer"]["blocks"]
        for map_, matrix in (("mlp_in", "b"), ("mlp_out", "a")):
            leaf = block[map_]["lora"][matrix]
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == np.prod(leaf.shape)


@pytest.mark.slow
def test_initial_parameters_and_their_checksum_are_the_same_on_any_mesh():
    results = []
    for sizes in [(1, 1, 1), *MESHES]:
        devices = make_mesh(sizes)
        with jax.set_mesh(devices):
            state = initial_state(CONFIG, OPTIMIZER, abstract_state(SHAPES, OPTIMIZER, devices), seed=7)
            results.append((int(jax.jit(checksum)(state.params)), jax.device_get(state)))
    for total, state in results[1:]:
        assert total == results[0][0]
        jax.tree.map(np.testing.assert_array_equal, state, results[0][1])


def test_parameters_are_sharded_over_fsdp_and_tensor():
    devices = make_mesh((2, 2, 2))
    abstract = abstract_state(SHAPES, OPTIMIZER, devices)
    by_name = dict(zip(jax.tree.leaves(sharding.names(abstract)), jax.tree.leaves(abstract), strict=True))
    for name in ("mlp_in/kernel", "mlp_out/kernel", "qkv/kernel", "attention/out/kernel", "token_embedding/embedding"):
        split = [leaf for path, leaf in by_name.items() if name in path]
        assert len(split) >= 3
        for leaf in split:
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 == np.prod(leaf.shape), name


def test_the_sharding_table_shows_the_bytes_on_each_device():
    devices = make_mesh((2, 2, 2))
    abstract = abstract_state(SHAPES, OPTIMIZER, devices)
    lines = sharding.sharding_table(abstract.params, devices).splitlines()
    leaves = jax.tree.leaves(abstract.params)
    assert len(lines) == len(leaves) + 2
    (line,) = [line for line in lines if "text/transformer/blocks/mlp_in/kernel" in line]
    assert " ".join(line.split()[1:]) == "(2, 64, 256) -, fsdp, tensor 32.0 KiB"
    size = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in leaves)
    assert lines[-1] == f"mesh data 2 x fsdp 2 x tensor 2: {size / 2**20:,.2f} MiB of parameters per device"


@pytest.mark.parametrize(
    ("saved", "restored"), [((1, 8, 1), (2, 2, 2)), ((4, 1, 2), (1, 1, 1)), ((1, 1, 1), (1, 8, 1))]
)
def test_a_checkpoint_of_one_mesh_is_restored_on_another_bit_for_bit(tmp_path, saved, restored):
    def noise(leaf):
        values = np.random.default_rng(leaf.size).normal(size=leaf.shape) * 100
        return jax.device_put(jnp.asarray(values).astype(leaf.dtype), leaf.sharding)

    devices = make_mesh(saved)
    with jax.set_mesh(devices):
        state = jax.tree.map(noise, abstract_state(SHAPES, OPTIMIZER, devices))._replace(step=jnp.int32(5))
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(state, {})
        checkpoints.close()
    devices = make_mesh(restored)
    abstract = abstract_state(SHAPES, OPTIMIZER, devices)
    with jax.set_mesh(devices):
        actual, _ = Checkpoints(tmp_path, read_only=True).restore(abstract, 5)
    for leaf, expected, target in zip(*map(jax.tree.leaves, (actual, state, abstract)), strict=True):
        np.testing.assert_array_equal(leaf, expected)
        assert leaf.sharding == target.sharding and leaf.dtype == expected.dtype


@pytest.mark.parametrize("sizes", [*MESHES, (1, 1, 8)], ids=str)
def test_a_process_holds_the_rows_of_its_devices(sizes):
    sharding = mesh.batch_sharding(make_mesh(sizes))
    rows = mesh.process_rows(sharding, BATCH)
    np.testing.assert_array_equal(rows, np.arange(BATCH))  # a single process holds every row once
    placed = mesh.place_rows(sharding, BATCH, rows[:, None])
    np.testing.assert_array_equal(placed, np.arange(BATCH)[:, None])
    assert placed.sharding == sharding
