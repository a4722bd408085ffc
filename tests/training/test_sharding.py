"""Whatever the mesh, training takes the same steps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.models.lora import LoRAConfig
from jaxclip.models.presets import Preset, clip_config
from jaxclip.training import loop, mesh
from jaxclip.training.checkpoint import Checkpoints
from jaxclip.training.optimizer import make_optimizer, make_schedule
from jaxclip.training.state import abstract_state, checksum, initial_state, make_model
from jaxclip.training.step import make_loss, make_step
from jaxclip.training.trainable import EVERYTHING, make_trainable

MESHES = [(8, 1, 1), (2, 2, 2), (1, 8, 1), (4, 1, 2)]
STEPS, BATCH, CONTEXT, END = 5, 16, 12, 255
CONFIG = clip_config(
    Preset(16, (64, 2, 2), (64, 2, 2), 64, "conv", "mean", "mean", "gelu_tanh"),
    image_size=32,
    vocab_size=256,
    context_length=CONTEXT,
    end_token=END,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    temperature=0.07,
    dropout=0.1,
    stochastic_depth=0.1,
    execution="scan",
)
GRAPH, SHAPES = make_model(CONFIG)
SCHEDULE = make_schedule(1e-3, "cosine", warmup_steps=2, steps=STEPS)
ADAM = {"name": "adamw", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-6, "clip_norm": 1.0}
OPTIMIZER = make_optimizer(SHAPES, SCHEDULE, **ADAM)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiles for eight devices in seconds: what is compared here is the partitioning, not LLVM's work."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_mesh(sizes):
    return mesh.make_mesh(*sizes, jax.devices("cpu")[: int(np.prod(sizes))])


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, END, (BATCH, CONTEXT), dtype=np.int32)
        tokens[np.arange(BATCH), rng.integers(3, CONTEXT, BATCH)] = END
        pictures = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
        yield {"image": pictures, "text": tokens, "group": rng.integers(0, 12, BATCH, dtype=np.int32)}


def adapters():
    """Returns the towers' configuration and graph with adapters, what is trained of them, and its optimizer."""
    config = replace(CONFIG, lora=LoRAConfig(4, 8.0, 0.1, "/blocks/"))
    graph, shapes = make_model(config)
    trainable = make_trainable(shapes, (("/lora/", 1.0), ("text/.*blocks/1/mlp_out", 0.5), ("", 0.0)))
    return config, graph, shapes, trainable, make_optimizer(shapes, SCHEDULE, **ADAM, trainable=trainable)


PLAIN = (CONFIG, GRAPH, SHAPES, EVERYTHING, OPTIMIZER)


def train(sizes, towers=PLAIN):
    """Returns the losses and gradient norms of all steps, the state's leaves on the host and the compilations made."""
    config, graph, shapes_of_params, trainable, optimizer = towers
    devices = make_mesh(sizes)
    abstract = abstract_state(shapes_of_params, optimizer, devices, trainable, ema=True)
    placement = mesh.batch_sharding(devices)
    compilations = []

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    loss = make_loss(graph, mask_groups=True, learned_temperature=True)
    step = make_step(loss, optimizer, SCHEDULE, trainable, seed=3, ema=0.5)
    with jax.set_mesh(devices):
        state = initial_state(config, optimizer, abstract, trainable, seed=7)
        placed = [jax.device_put(batch, placement) for batch in batches()]
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), placed[0])
        jax.monitoring.register_event_duration_secs_listener(count)
        try:
            compiled, _ = loop.compile_step(step, abstract, shapes)
            figures = []
            for batch in placed:
                state, metrics = compiled(state, batch)
                figures.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
        finally:
            jax.monitoring.unregister_event_duration_listener(count)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    return np.asarray(figures), jax.device_get(state), len(compilations)


@pytest.fixture(scope="module")
def one_device():
    return train((1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_losses_on_any_mesh_are_those_of_one_device_and_the_step_is_compiled_once(one_device, sizes):
    expected, expected_state, _ = one_device
    figures, state, compilations = train(sizes)
    np.testing.assert_allclose(figures, expected, rtol=1e-5)
    for found, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert compilations == 1


@pytest.mark.slow
def test_adapters_and_a_layer_beside_them_are_trained_on_a_mesh_as_on_one_device():
    expected, expected_state, _ = train((1, 1, 1), adapters())
    figures, state, compilations = train((2, 2, 2), adapters())
    np.testing.assert_allclose(figures, expected, rtol=1e-5)
    for item in ("params", "ema"):
        leaves = (jax.tree.leaves(getattr(found, item)) for found in (state, expected_state))
        for found, wanted in zip(*leaves, strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert compilations == 1


def test_adapters_are_split_as_the_kernels_that_they_add_to():
    config, _, shapes, trainable, optimizer = adapters()
    abstract = abstract_state(shapes, optimizer, make_mesh((1, 1, 8)), trainable).params
    for tower in ("image", "text"):
        block = abstract[tower]["transformer"]["blocks"]
        for map_, matrix in (("mlp_in", "b"), ("mlp_out", "a")):
            leaf = block[map_]["lora"][matrix]
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == np.prod(leaf.shape)


@pytest.mark.slow
def test_initial_parameters_and_their_checksum_are_the_same_on_any_mesh():
    found = []
    for sizes in [(1, 1, 1), *MESHES]:
        devices = make_mesh(sizes)
        with jax.set_mesh(devices):
            state = initial_state(CONFIG, OPTIMIZER, abstract_state(SHAPES, OPTIMIZER, devices), seed=7)
            found.append((int(jax.jit(checksum)(state.params)), jax.device_get(state)))
    for total, state in found[1:]:
        assert total == found[0][0]
        jax.tree.map(np.testing.assert_array_equal, state, found[0][1])


def test_parameters_are_split_over_fsdp_and_tensor():
    devices = make_mesh((2, 2, 2))
    abstract = abstract_state(SHAPES, OPTIMIZER, devices)
    placed = dict(zip(jax.tree.leaves(mesh.names(abstract)), jax.tree.leaves(abstract), strict=True))
    for name in ("mlp_in/kernel", "mlp_out/kernel", "qkv/kernel", "attention/out/kernel", "token_embedding/embedding"):
        split = [leaf for path, leaf in placed.items() if name in path]
        assert len(split) >= 3
        for leaf in split:
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 == np.prod(leaf.shape), name


def test_the_table_tells_what_each_device_holds():
    devices = make_mesh((2, 2, 2))
    abstract = abstract_state(SHAPES, OPTIMIZER, devices)
    lines = mesh.table(abstract.params, devices).splitlines()
    leaves = jax.tree.leaves(abstract.params)
    assert len(lines) == len(leaves) + 2
    (line,) = [line for line in lines if "text/transformer/blocks/mlp_in/kernel" in line]
    assert " ".join(line.split()[1:]) == "(2, 64, 256) -, fsdp, tensor 32.0 KiB"
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in leaves)
    assert lines[-1] == f"mesh data 2 x fsdp 2 x tensor 2: {held / 2**20:,.2f} MiB of parameters per device"


@pytest.mark.parametrize(
    ("saved", "restored"), [((1, 8, 1), (2, 2, 2)), ((4, 1, 2), (1, 1, 1)), ((1, 1, 1), (1, 8, 1))]
)
def test_a_checkpoint_of_one_mesh_is_restored_under_another_bit_for_bit(tmp_path, saved, restored):
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
        found, _ = Checkpoints(tmp_path, read_only=True).restore(abstract, 5)
    for leaf, wanted, place in zip(*map(jax.tree.leaves, (found, state, abstract)), strict=True):
        np.testing.assert_array_equal(leaf, wanted)
        assert leaf.sharding == place.sharding and leaf.dtype == wanted.dtype


@pytest.mark.parametrize("sizes", [*MESHES, (1, 1, 8)], ids=str)
def test_a_process_holds_the_rows_that_its_devices_are_given(sizes):
    sharding = mesh.batch_sharding(make_mesh(sizes))
    rows = mesh.process_rows(sharding, BATCH)
    np.testing.assert_array_equal(rows, np.arange(BATCH))  # the only process holds them all, each once
    placed = mesh.place_rows(sharding, BATCH, rows[:, None])
    np.testing.assert_array_equal(placed, np.arange(BATCH)[:, None])
    assert placed.sharding == sharding
