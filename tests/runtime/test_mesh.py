"""The mesh is made of one slice after another; only its data axis crosses slices."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.errors import UserError
from jaxclip.losses import contrastive, tiled
from jaxclip.losses.labels import Labels
from jaxclip.runtime.mesh import batch_sharding, make_mesh, mesh_of, slice_of, slices_of

ROOT = Path(__file__).parents[2]
CPUS = jax.devices("cpu")


@dataclass(frozen=True)
class Device:
    """What a mesh reads of a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "H200"
    client: Any = field(default_factory=lambda: SimpleNamespace(runtime_type="pjrt_ifrt"), compare=False)


def machines(count, *, processes_per_machine=8):
    """Returns the GPUs of `count` machines with 8 each."""
    return [Device(i, i * processes_per_machine // 8, i // 8) for i in range(8 * count)]


def crossing_axes(mesh):
    """Returns the axes along which neighbours, or the ends, are on different slices."""
    numbers = slices_of(mesh).reshape(mesh.devices.shape)
    return {name for i, name in enumerate(mesh.axis_names) if (numbers != np.roll(numbers, 1, axis=i)).any()}


@pytest.mark.parametrize("processes_per_machine", [1, 8])
@pytest.mark.parametrize("sizes", [(32, 1, 1), (-1, 8, 1), (8, 4, 1), (4, 2, 4), (16, 1, 2)])
def test_fsdp_and_tensor_stay_inside_a_machine_in_whatever_order_the_gpus_are_given(sizes, processes_per_machine):
    gpus = machines(4, processes_per_machine=processes_per_machine)
    mesh = make_mesh(*sizes, np.random.default_rng(0).permutation(gpus), slices=4)
    assert crossing_axes(mesh) == {"data"}
    assert list(mesh.devices.flat) == gpus
    np.testing.assert_array_equal(slices_of(mesh), np.repeat(range(4), 8))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert make_mesh(*sizes, gpus) == mesh


def test_gpus_of_a_process_per_gpu_are_grouped_by_machine_if_processes_are_dealt_out_to_machines_in_turn():
    dealt = [Device(i, i, i % 2) for i in range(16)]
    mesh = make_mesh(2, 8, 1, dealt)
    assert crossing_axes(mesh) == {"data"}
    assert [device.id for device in mesh.devices[0].flat] == list(range(0, 16, 2))


def test_fsdp_spans_as_many_machines_as_it_needs_unless_slices_are_asked_for():
    mesh = make_mesh(2, 16, 1, machines(4))
    np.testing.assert_array_equal(slices_of(mesh)[:16], np.repeat([0, 1], 8))
    with pytest.raises(UserError, match=r"fsdp x tensor = 16 is more than the 8 devices of each of 4 slices"):
        make_mesh(2, 16, 1, machines(4), slices=4)


def test_a_mesh_with_any_axes_lets_slices_follow_each_other_along_the_first():
    mesh = mesh_of({"queries": 4, "gallery": 4}, machines(2))
    assert crossing_axes(mesh) == {"queries"}


def test_a_machine_of_absent_gpus_is_one_process():
    absent = SimpleNamespace(runtime_type="compile_only_runtime")
    gpus = [Device(i, i // 8, 0, client=absent) for i in range(16)]
    assert [slice_of(gpu) for gpu in gpus] == [0] * 8 + [1] * 8
    assert slice_of(Device(9, 1, 0)) == 0


def tpus(count):
    return [Device(i, i // 4, i // 16, "tpu") for i in range(16 * count)]


@pytest.mark.parametrize(
    ("devices", "sizes", "slices", "sentence"),
    [
        (tpus(2), (-1, 1, 1), 3, "config.mesh.slices = 3, but the 32 devices are in 2 slices: set it to 2, or to 0"),
        (tpus(2), (-1, 1, 1), 1, "config.mesh.slices = 1, but the 32 devices are in 2 slices: set it to 2, or to 0"),
        (tpus(1), (-1, 1, 1), 2, "config.mesh.slices = 2, but the 16 devices are in 1 slice: set it to 1, or to 0"),
        (machines(2), (-1, 1, 1), 4, "config.mesh.slices = 4, but the 16 devices are in 2 slices"),
        (tpus(2), (1, 32, 1), 0, "fsdp x tensor = 32 is more than the 16 devices of each of 2 slices: lower fsdp or"),
        (tpus(2), (1, 8, 4), 2, "fsdp x tensor = 32 is more than the 16 devices of each of 2 slices: lower fsdp or"),
        (tpus(3)[:36], (3, 12, 1), 2, "config.mesh.slices = 2, but the 36 devices are in 3 slices"),
        (CPUS, (1, 4, 2), 2, "fsdp x tensor = 8 is more than the 4 devices of each of 2 slices"),
        (CPUS, (8, 1, 1), 3, "config.mesh.data = 8 is not a multiple of the number of slices, 3: each slice must have"),
        (CPUS[:6], (3, 2, 1), 2, "config.mesh.data = 3 is not a multiple of the number of slices, 2"),
        (CPUS, (3, 1, 1), 3, "data x fsdp x tensor = 3 x 1 x 1 does not match 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_into_the_slices_are_refused_in_one_sentence(devices, sizes, slices, sentence):
    with pytest.raises(UserError) as error:
        make_mesh(*sizes, devices, slices=slices)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("slices", [0, 1, 2, 4])
def test_devices_in_no_slice_can_stand_for_slices_of_consecutive_devices(slices):
    mesh = make_mesh(-1, 2, 1, CPUS, slices=slices)
    assert mesh.devices.shape == (4, 2, 1) and list(mesh.devices.flat) == CPUS
    assert not slices_of(mesh).any()


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("loss", [contrastive.info_nce, tiled.info_nce], ids=["dense", "tiled"])
def test_loss_and_gradients_do_not_depend_on_the_number_of_slices(loss):
    rng = np.random.default_rng(0)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 32, 8)).astype(np.float32))
    labels = Labels(group=jnp.asarray(rng.integers(0, 20, 32), jnp.int32))
    compute = jax.jit(jax.value_and_grad(lambda sides, labels: loss(*sides, 10.0, labels)[0]))

    def run(mesh):
        with jax.set_mesh(mesh):
            return jax.device_get(compute(*jax.device_put(((image, text), labels), batch_sharding(mesh))))

    expected, expected_gradients = run(make_mesh(1, 1, 1, CPUS[:1]))
    for slices in (1, 2):
        value, gradients = run(make_mesh(2, 2, 2, CPUS, slices=slices))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradients, expected_gradients, atol=1e-7)


TPU = """
import json
import re
import jax
from jax.experimental import topologies
from jaxclip.runtime import mesh as meshes


def devices(slices):
    more = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc("v5e:4x4", platform="tpu", **more).devices

"""
PLACEMENT = (
    TPU
    + """
from jaxclip.errors import UserError
from jaxclip.ranking import kernel, ranks
from jaxclip.towers.sharding import sharding_table

one, two = devices(1), devices(2)
result = {"ordered": [], "single": [], "coordinates": []}
for sizes in [(32, 1, 1), (2, 16, 1), (8, 4, 1), (4, 4, 2), (4, 2, 4)]:
    mesh = meshes.make_mesh(*sizes, two[::-1])
    inside = meshes.make_mesh(sizes[0] // 2, *sizes[1:], one)
    result["ordered"].append(meshes.slices_of(mesh).tolist())
    result["coordinates"].append([list(device.coords) for device in mesh.devices.flat])
    result["single"].append([list(device.coords) for device in inside.devices.flat])
jax.devices, jax.device_count = lambda: two, lambda: 32
for sizes in [(-1, 1), (8, 4), (1, -1)]:
    result["ordered"].append(meshes.slices_of(ranks.make_mesh(*sizes)).tolist())
result["table"] = sharding_table({}, meshes.make_mesh(-1, 4, 1)).splitlines()[-1]
try:
    meshes.make_mesh(-1, 1, 1, slices=3)
except UserError as error:
    result["refused"] = str(error)
larger = topologies.get_topology_desc("v6e:8x8", platform="tpu").devices
result["split"] = meshes.make_mesh(16, 4, 1, larger).devices.shape
print(json.dumps(result))
"""
)
STEP = (
    TPU
    + """
from jaxclip import config
from jaxclip.planning.fit import Vocabulary
from jaxclip.runtime import compiler
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training.recipe import abstract_batch, make_recipe

settings = config.build({
    "batch_size": 256, "steps": 10, "mesh": {"fsdp": 4, "slices": 2}, "model": {"preset": "tiny"},
    "loss": {"implementation": "tiled", "exchange": "EXCHANGE"},
    "data": {"image_size": 32, "context_length": 12, "vocab_size": 300},
}, {})
with compiler.compiling_for("tpu"):
    towers = make_towers(settings, make_preprocess(settings), Vocabulary(300), devices=devices(2))
    recipe = make_recipe(settings, towers, 10)
    with jax.set_mesh(towers.mesh):
        traced = jax.jit(recipe.step, donate_argnums=0).trace(recipe.state, abstract_batch(settings, towers))
        program = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
gathers = re.findall(r" all-gather(?:-start)?\\(.*replica_groups=\\{(\\{[\\d,{}]+\\})\\}", program)
print(json.dumps({
    "slices": meshes.slices_of(towers.mesh).tolist(),
    "ids": [device.id for device in towers.mesh.devices.flat],
    "gathers": [json.loads("[" + groups.replace("{", "[").replace("}", "]") + "]") for groups in gathers],
    "crossing": re.findall(r' send\\(.*_xla_megascale_transfer_type="(\\w+)"', program),
    "hops": re.findall(r"_xla_megascale_target=\\{(\\{\\d+->[^=]*\\})\\},", program),
}))
"""
)


needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu, which compiles for TPUs, is not installed"
)


@needs_libtpu
def test_a_mesh_of_two_tpu_slices_is_one_slice_after_the_other_each_ordered_as_if_alone(run_for_tpus):
    found = json.loads(run_for_tpus(PLACEMENT).splitlines()[-1])
    halves = [0] * 16 + [1] * 16
    assert found["ordered"] == [halves] * 8  # 5 meshes of the towers, 3 of the ranks
    for both, single in zip(found["coordinates"], found["single"], strict=True):
        assert both == single * 2
    assert found["table"] == "mesh data 8 x fsdp 4 x tensor 1 in 2 slices: 0.00 MiB of parameters per device"
    assert "slices = 3, but the 32 devices are in 2 slices" in found["refused"]
    assert found["split"] == [16, 4, 1]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "crossing", "borders"),
    [("ring", {"ALL_REDUCE", "ONE_TO_ONE"}, 2), ("gather", {"ALL_REDUCE", "ALL_GATHER", "REDUCE_SCATTER"}, 0)],
)
def test_a_step_on_two_tpu_slices_gathers_parameters_inside_slices_and_only_its_loss_and_sums_cross_them(
    run_for_tpus, exchange, crossing, borders
):
    found = json.loads(run_for_tpus(STEP.replace("EXCHANGE", exchange)).splitlines()[-1])
    assert found["slices"] == [0] * 16 + [1] * 16
    over_fsdp = [list(range(start, start + 4)) for start in range(0, 16, 4)]
    assert over_fsdp in found["gathers"]
    assert all(group[-1] < 16 for groups in found["gathers"] for group in groups)  # positions within a slice
    # Gradients are summed, and the loss passes on or gathers its embeddings; no parameter comes from another slice.
    assert set(found["crossing"]) == crossing
    ids = found["ids"]
    ends = f"{{{ids[15]}->{ids[16]}}},{{{ids[31]}->{ids[0]}}}"
    assert set(found["hops"]) == ({ends} if borders else set())
