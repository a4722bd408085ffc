"""What a plan counts is what a program does: products, loops and bytes between devices whose numbers are known."""

import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxclip.errors import UserError
from jaxclip.training import hardware, hlo, mesh, planning
from jaxclip.training.flops import matmul_flops

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "plans"
LAYERS, WIDTH, ROWS = 5, 64, 32
WEIGHTS = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
INPUT = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
ONE_LAYER = 2 * ROWS * WIDTH * WIDTH


def network(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()


def test_products_in_a_loop_count_as_often_as_it_runs():
    assert matmul_flops(jax.make_jaxpr(network)(WEIGHTS, INPUT)) == LAYERS * ONE_LAYER
    both = jax.make_jaxpr(jax.grad(network, argnums=(0, 1)))(WEIGHTS, INPUT)
    assert matmul_flops(both) == 3 * LAYERS * ONE_LAYER


def test_what_a_backward_pass_computes_again_counts_again():
    def recomputing(weights, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), policy=jax.checkpoint_policies.nothing_saveable)
        return jax.lax.scan(layer, x, weights)[0].sum()

    again = jax.make_jaxpr(jax.grad(recomputing, argnums=(0, 1)))(WEIGHTS, INPUT)
    assert matmul_flops(again) == 4 * LAYERS * ONE_LAYER


def test_a_convolution_counts_its_window_and_a_branch_the_dearest():
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 16))
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert matmul_flops(jax.make_jaxpr(convolve)(image, kernel)) == 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)

    def branches(p, x):
        return jax.lax.cond(p, lambda x: x @ x, lambda x: x, x)

    assert matmul_flops(jax.make_jaxpr(branches)(True, jnp.zeros((8, 8)))) == 2 * 8**3


def test_collectives_in_a_loop_are_counted_as_often_as_it_runs():
    devices = mesh.make_mesh(8, 1, 1, jax.devices("cpu")[:8])
    split = mesh.batch_sharding(devices)

    def step(weights, x):
        total, shares = jax.value_and_grad(network)(weights, x)
        return total, shares

    with jax.set_mesh(devices):
        weights = jax.ShapeDtypeStruct(WEIGHTS.shape, jnp.float32, sharding=jax.NamedSharding(devices, PartitionSpec()))
        x = jax.ShapeDtypeStruct(INPUT.shape, jnp.float32, sharding=split)
        moved = hlo.traffic(jax.jit(step).lower(weights, x).compile().as_text())
    assert moved.sent.keys() == {"all-reduce"}
    gradient = LAYERS * WIDTH * WIDTH * 4
    assert moved.sent["all-reduce"] == pytest.approx(2 * 7 / 8 * gradient, rel=0.01)
    assert moved.memory > 3 * gradient


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("replica_groups=mesh['data'=16,'fsdp'=4,'tensor'=2] {'data','tensor'}, x", 32),
        ("replica_groups=[4,64]<=[256], x", 64),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", 4),
    ],
)
def test_groups_of_devices_are_read_however_they_are_written(line, count):
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, {line}\n}}\n"  # noqa: E501
    assert hlo.traffic(text).sent["all-reduce"] == pytest.approx(2 * (count - 1) / count * 32)


@pytest.mark.parametrize("topology", ["v5e", "v9:4x4", "h100:7", "16x16"])
def test_a_topology_that_is_none_is_told(topology):
    with pytest.raises(UserError, match="--topology="):
        planning.topology_devices(topology)


def test_every_chip_is_known_by_its_name():
    assert set(hardware.KINDS.values()) == set(hardware.CHIPS)


@pytest.mark.slow
def test_the_plan_of_a_small_step_is_the_one_kept(run, tmp_path):
    """JAXCLIP_WRITE_GOLDENS=1 rewrites it: then read what changed."""
    if importlib.util.find_spec("libtpu") is None:  # loaded, it would break the profiler of this very process
        pytest.skip("libtpu is not installed")
    model = [f"--config.model.{value}" for value in ("preset=tiny", "dtype=bfloat16", "remat=full")]
    written = tmp_path / "plan.json"
    quickstart = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    done = run("plan", quickstart, *model, "--topology=v5e:2x2", f"--json={written}")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(written.read_text())
    golden = GOLDENS / "tiny_v5e_2x2.json"
    if os.environ.get("JAXCLIP_WRITE_GOLDENS") == "1":
        golden.write_text(json.dumps(found, indent=2) + "\n")
    kept = json.loads(golden.read_text())
    exact = ("topology", "devices", "mesh", "batch_size", "parameters", "optimizer", "batch", "flops", "model_flops")
    assert {name: found[name] for name in exact} == {name: kept[name] for name in exact}
    assert found["fits"] and found["flops"] > found["model_flops"]
    # Another libtpu lays out and schedules otherwise.
    for name in ("temporaries", "traffic"):
        assert found[name] == pytest.approx(kept[name], rel=0.25), name
    assert sum(found["sent"].values()) == pytest.approx(sum(kept["sent"].values()), rel=0.1)
    assert "roofline step" in done.stdout and "v5e:2x2" in done.stdout


@pytest.mark.parametrize("name", [path.stem for path in GOLDENS.glob("*.json") if "tiny" not in path.stem])
def test_a_kept_plan_is_consistent_and_fits(name):
    kept = json.loads((GOLDENS / f"{name}.json").read_text())
    plan = planning.Plan(**{key: value for key, value in kept.items() if key not in ("fits", "step_seconds")})
    assert plan.fits
    chip = hardware.CHIPS[plan.topology.partition(":")[0]]
    assert plan.seconds["compute"] == pytest.approx(plan.flops / chip.peak)
    assert plan.mfu == pytest.approx(plan.model_flops / plan.step_seconds / chip.peak)
    assert plan.mfu < plan.model_flops / plan.flops <= 1
