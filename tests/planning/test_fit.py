"""A plan's FLOPs, loop counts and bytes sent equal known values, and stored plans can be reproduced."""

import importlib.util
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxclip import config as configuration
from jaxclip import plan
from jaxclip.config.schema import Optimizer
from jaxclip.errors import UserError
from jaxclip.models.presets import Preset, clip_config, with_execution
from jaxclip.planning import fit, hlo
from jaxclip.runtime import hardware, mesh
from jaxclip.runtime.flops import matmul_flops, model_flops
from jaxclip.towers.params import make_model
from jaxclip.training.optimizer import make_optimizer
from jaxclip.training.state import abstract_state
from jaxclip.training.step import make_loss, make_step

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "plans"
LAYERS, WIDTH, ROWS = 5, 64, 32
WEIGHTS = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
INPUT = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
ONE_LAYER = 2 * ROWS * WIDTH * WIDTH


def network(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()


def test_products_in_a_loop_count_once_per_iteration():
    assert matmul_flops(jax.make_jaxpr(network)(WEIGHTS, INPUT)) == LAYERS * ONE_LAYER
    backward = jax.make_jaxpr(jax.grad(network, argnums=(0, 1)))(WEIGHTS, INPUT)
    assert matmul_flops(backward) == 3 * LAYERS * ONE_LAYER


def test_recomputed_products_count_again():
    def recomputing(weights, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), policy=jax.checkpoint_policies.nothing_saveable)
        return jax.lax.scan(layer, x, weights)[0].sum()

    backward = jax.make_jaxpr(jax.grad(recomputing, argnums=(0, 1)))(WEIGHTS, INPUT)
    assert matmul_flops(backward) == 4 * LAYERS * ONE_LAYER


def test_a_convolution_counts_its_window_and_a_conditional_its_costliest_branch():
    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 16))

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forward = 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)
    assert matmul_flops(jax.make_jaxpr(convolve)(image, kernel)) == forward
    gradients = jax.make_jaxpr(jax.grad(lambda x, k: convolve(x, k).sum(), argnums=(0, 1)))(image, kernel)
    assert matmul_flops(gradients) == 3 * forward  # zeros inserted between the output's gradients are free

    def conditional(condition, x):
        return jax.lax.cond(condition, lambda x: x @ x, lambda x: x, x)

    assert matmul_flops(jax.make_jaxpr(conditional)(True, jnp.zeros((8, 8)))) == 2 * 8**3


def test_collectives_in_a_loop_count_once_per_iteration():
    devices = mesh.make_mesh(8, 1, 1, jax.devices("cpu")[:8])
    with jax.set_mesh(devices):
        weights = jax.ShapeDtypeStruct(WEIGHTS.shape, jnp.float32, sharding=jax.NamedSharding(devices, PartitionSpec()))
        x = jax.ShapeDtypeStruct(INPUT.shape, jnp.float32, sharding=mesh.batch_sharding(devices))
        traffic = hlo.traffic(jax.jit(jax.value_and_grad(network)).lower(weights, x).compile().as_text())
    assert traffic.sent.keys() == {"all-reduce"}
    gradient = LAYERS * WIDTH * WIDTH * 4
    assert traffic.sent["all-reduce"] == pytest.approx(2 * 7 / 8 * gradient, rel=0.01)
    assert traffic.memory > 3 * gradient


def test_every_permute_of_a_ring_counts_although_they_share_a_channel():
    devices = mesh.make_mesh(8, 1, 1, jax.devices("cpu")[:8])
    ring = [(n, (n + 1) % 8) for n in range(8)]

    def rotate(_, blocks):
        return jax.tree.map(lambda block: jax.lax.ppermute(block, "data", ring) * 2, blocks)

    step = jax.shard_map(
        lambda a, b: jax.lax.fori_loop(0, 8, rotate, (a, b)),
        mesh=devices,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )
    blocks = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8 * 16,), (8 * 16, 32))]
    traffic = hlo.traffic(jax.jit(step).lower(*blocks).compile().as_text())
    assert traffic.sent == {"collective-permute": 8 * (16 + 16 * 32) * 4}


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("replica_groups=mesh['data'=16,'fsdp'=4,'tensor'=2] {'data','tensor'}, x", 32),
        ("replica_groups=[4,64]<=[256], x", 64),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", 4),
    ],
)
def test_the_size_of_a_device_group_is_read_from_every_notation(line, count):
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, {line}\n}}\n"  # noqa: E501
    assert hlo.traffic(text).sent["all-reduce"] == pytest.approx(2 * (count - 1) / count * 32)


# Asynchronous slices as libtpu writes them: blocks are copied in and out while other instructions run.
ASYNCHRONOUS_SLICES = """
ENTRY %main (p: f32[64,32]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %i = s32[]{:S(2)} constant(0)
  %s = ((f32[64,32]{1,0}, s32[], s32[]), f32[8,32]{1,0:S(1)}, s32[]{:S(2)}) dynamic-slice-start(%p, %i, %i)
  %d = f32[8,32]{1,0:S(1)} dynamic-slice-done(%s)
  %t = ((f32[64,32]{1,0}), f32[16,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:16], [0:32]}
  %e = f32[16,32]{1,0:S(1)} slice-done(%t)
  %u = ((f32[64,32]{1,0}, f32[8,32]{1,0:S(1)}, s32[], s32[]), f32[64,32]{1,0}, s32[]{:S(2)}) dynamic-update-slice-start(%p, %d, %i, %i)
  ROOT %v = f32[64,32]{1,0} dynamic-update-slice-done(%u)
}
"""  # noqa: E501


def test_an_asynchronous_slice_counts_the_bytes_of_the_slice_only():
    assert hlo.traffic(ASYNCHRONOUS_SLICES).memory == (8 + 16 + 8) * 32 * 4


@pytest.mark.parametrize("topology", ["v5e", "v9:4x4", "h100:7", "16x16"])
def test_an_unknown_topology_is_refused(topology):
    with pytest.raises(UserError, match="--topology="):
        fit.topology_devices(topology)


def test_every_chip_has_a_device_kind():
    assert set(hardware.KINDS.values()) == set(hardware.CHIPS)


PLAN = fit.Plan(
    topology="",
    devices=4,
    mesh=(4, 1, 1),
    batch_size=0,
    parameters=100.0,
    optimizer=200.0,
    batch=0.0,
    temporaries=0.0,
    memory=0.0,
    flops=1.0,
    model_flops=1.0,
    traffic=1.0,
    sent={},
    seconds={"compute": 1.0},
    mfu=0.5,
    pairs_per_second=1.0,
)


@pytest.mark.parametrize(
    ("memory", "temporaries", "largest"),
    [
        (1300.0, lambda rows: rows, 1000),  # linear: 1,000 rows fit next to the parameters and the optimizer
        (1300.0, lambda rows: rows + rows**2 / 4000, 828),
        (303.0, lambda rows: rows, None),  # not even one row on each of the four devices fits
    ],
)
def test_the_largest_batch_is_found_with_few_compilations(monkeypatch, memory, temporaries, largest):
    compiled = []

    def plan(config, topology):
        compiled.append(config.batch_size)
        size = config.batch_size
        return replace(PLAN, batch_size=size, memory=memory, temporaries=float(temporaries(size)))

    monkeypatch.setattr(fit, "topology_devices", lambda topology: jax.devices("cpu")[:4])
    monkeypatch.setattr(fit, "plan", plan)
    config = configuration.build({"steps": 1, "batch_size": 64})
    if largest is None:
        with pytest.raises(UserError, match="none of the batches tried, .* fits v5e:2x2"):
            fit.largest_batch(config, "v5e:2x2", say=lambda line: None)
        return
    best = fit.largest_batch(config, "v5e:2x2", say=lambda line: None)
    assert best.fits and best.batch_size % 4 == 0
    assert (1 - fit.MIN_GAIN) * largest <= best.batch_size <= largest
    assert len(compiled) == len(set(compiled)) <= fit.MAX_PLANS


LARGE_BATCH = "pretrain_large_batch.py"
# Name of the stored plan -> configuration, topology, overrides.
PLANS = {
    "tiny_v5e_2x2": ("quickstart.py", "v5e:2x2", ("model.preset=tiny", "model.dtype=bfloat16", "model.remat=full")),
    "vit_l_14_v5e_16x16": (f"{LARGE_BATCH}:vit_l_14", "v5e:16x16", ()),
    "vit_l_14_v6e_16x16": (f"{LARGE_BATCH}:vit_l_14", "v6e:16x16", ()),
    "vit_b_16_cached_v5e_16x16": (f"{LARGE_BATCH}:vit_b_16,1048576", "v5e:16x16", ()),
    **{
        f"vit_b_16_v5e_{shape}": (
            f"{LARGE_BATCH}:vit_b_16",
            f"v5e:{shape}",
            (f"batch_size={256 * chips}", "loss.implementation=tiled"),
        )
        for shape, chips in (("4x4", 16), ("8x8", 64), ("16x16", 256))
    },
}
# Fields that do not depend on the version of libtpu.
EXACT = ("topology", "devices", "mesh", "batch_size", "parameters", "optimizer", "batch", "flops", "model_flops")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_new_plan_equals_the_stored_one(run, tmp_path, name):
    """JAXCLIP_EVERY_PLAN=1 includes the large plans, minutes each; JAXCLIP_WRITE_GOLDENS=1 stores the new plans."""
    if importlib.util.find_spec("libtpu") is None:  # not imported, because it would break this process's profiler
        pytest.skip("libtpu is not installed")
    if name != "tiny_v5e_2x2" and os.environ.get("JAXCLIP_EVERY_PLAN") != "1":
        pytest.skip("takes minutes; set JAXCLIP_EVERY_PLAN=1 to run it")
    config, topology, overrides = PLANS[name]
    output, golden = tmp_path / "plan.json", GOLDENS / f"{name}.json"
    arguments = [f"--config={ROOT / 'configs' / config}", f"--topology={topology}", f"--json={output}"]
    done = run("plan", *arguments, *(f"--config.{override}" for override in overrides))
    assert done.returncode == 0, done.stderr
    (new,) = json.loads(output.read_text())
    if os.environ.get("JAXCLIP_WRITE_GOLDENS") == "1":
        golden.write_text(json.dumps(new, indent=2) + "\n")
    stored = json.loads(golden.read_text())
    assert {field: new[field] for field in EXACT} == {field: stored[field] for field in EXACT}
    assert new["fits"] and new["flops"] > new["model_flops"]
    # Versions of libtpu differ in memory layout and schedule.
    for field in ("temporaries", "traffic"):
        assert new[field] == pytest.approx(stored[field], rel=0.25), field
    assert sum(new["sent"].values()) == pytest.approx(sum(stored["sent"].values()), rel=0.1)
    assert "roofline step" in done.stdout and topology in done.stdout


@pytest.mark.slow
def test_compare_adds_plans_for_another_mesh_and_for_gpus(run, tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    output, config = tmp_path / "plans.json", f"--config={ROOT / 'configs' / 'quickstart.py'}"
    arguments = ["--topology=v5e:2x2", "--compare=2x2x1,h100:16", "--config.model.preset=tiny", f"--json={output}"]
    done = run("plan", config, *arguments)
    assert done.returncode == 0, done.stderr
    data_parallel, split, gpus = json.loads(output.read_text())
    assert [plan["mesh"] for plan in (data_parallel, split, gpus)] == [[4, 1, 1], [2, 2, 1], [16, 1, 1]]
    assert split["parameters"] < 0.6 * data_parallel["parameters"]
    # The program is compiled for 16 TPUs; its times follow from the GPU's specification and the network's.
    h100 = hardware.CHIPS["h100"]
    assert gpus["memory"] == h100.memory and gpus["seconds"]["compute"] == pytest.approx(gpus["flops"] / h100.peak)
    assert gpus["seconds"]["network"] == pytest.approx(sum(gpus["sent"].values()) / hardware.MACHINE_BANDWIDTH)
    assert all(name in done.stdout.splitlines()[0] for name in ("v5e:2x2", "h100:16"))


@pytest.mark.parametrize("item", ["16x16", "v5e", "axbxc"])
def test_an_invalid_item_of_compare_is_refused(item):
    with pytest.raises(UserError, match=f"--compare={item} is neither a topology"):
        plan._variant(item, configuration.build({"steps": 1}))


def test_every_stored_plan_has_a_command():
    assert {path.stem for path in GOLDENS.glob("*.json")} <= PLANS.keys()


def traced_step(layers, name="adamw"):
    """Returns the traced training step of towers with this number of layers, under the optimizer `name`."""
    towers = with_execution(
        clip_config(
            Preset(16, (64, layers, 2), (64, layers, 2), 64, "patch", "class", "end", "gelu"),
            image_size=32,
            vocab_size=256,
            context_length=8,
            end_token=255,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        execution="scan",
        remat="full",
    )
    graph, shapes = make_model(towers)
    settings = Optimizer(name=name, weight_decay=0.1, beta1=0.9, beta2=0.98, epsilon=1e-6, clip_norm=1.0)
    optimizer = make_optimizer(settings, optax.constant_schedule(1e-3), shapes)
    loss = make_loss(graph, mask_groups=True, learned_temperature=True)
    step = make_step(loss, optimizer, lambda step: 1e-3, seed=0)
    abstract = abstract_state(shapes, optimizer, mesh.make_mesh(1, 1, 1, jax.devices("cpu")[:1]))
    batch = {
        "image": jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((4, 8), jnp.int32),
        "group": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    return jax.jit(step).trace(abstract, batch)


def test_model_flops_exclude_the_optimizers_products():
    adamw, muon = (traced_step(2, name).jaxpr for name in ("adamw", "muon"))
    assert matmul_flops(muon) > matmul_flops(adamw)
    assert model_flops(muon) == model_flops(adamw) == matmul_flops(adamw)


def test_the_time_to_compile_does_not_grow_with_depth(quick_compilation):
    """Layers are scanned, so neither the program nor the CPU time of its compilation grows with their number."""

    def seconds(lowered):
        start = time.process_time()
        lowered.compile()
        return time.process_time() - start

    shallow, deep = traced_step(12).lower(), traced_step(24).lower()
    assert len(deep.as_text().splitlines()) <= 1.01 * len(shallow.as_text().splitlines())
    deep_seconds, shallow_seconds = seconds(deep), seconds(shallow)
    print(f"12 layers {shallow_seconds:.2f} s, 24 layers {deep_seconds:.2f} s")  # shown by pytest -rP
    assert deep_seconds <= 1.3 * shallow_seconds


@pytest.mark.parametrize("name", [path.stem for path in GOLDENS.glob("*.json") if "tiny" not in path.stem])
def test_a_stored_plan_is_consistent_and_fits(name):
    stored = json.loads((GOLDENS / f"{name}.json").read_text())
    plan = fit.Plan(**{key: value for key, value in stored.items() if key not in ("fits", "step_seconds")})
    assert plan.fits
    chip = hardware.CHIPS[plan.topology.partition(":")[0]]
    assert plan.seconds["compute"] == pytest.approx(plan.flops / chip.peak)
    assert plan.mfu == pytest.approx(plan.model_flops / plan.step_seconds / chip.peak)
    assert plan.mfu < plan.model_flops / plan.flops <= 1
