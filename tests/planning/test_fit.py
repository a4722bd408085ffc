"""Plans of large steps equal the stored ones, and the search for the largest batch needs few of them."""

import importlib.util
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxclip import config as configuration
from jaxclip import plan
from jaxclip.config.schema import Optimizer
from jaxclip.errors import UserError
from jaxclip.models.presets import Preset, clip_config, with_execution
from jaxclip.planning import fit, tables, topologies
from jaxclip.runtime import compiler, hardware, mesh
from jaxclip.towers.params import make_model
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training.optimizer import make_optimizer
from jaxclip.training.recipe import abstract_batch, make_recipe
from jaxclip.training.state import abstract_state
from jaxclip.training.step import make_loss, make_step

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "plans"
COMPILERS = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda13"}


def installed(topology: str) -> bool:
    """Returns whether the compiler for a topology is installed; libtpu is not imported, it would break the profiler."""
    gpu = hardware.CHIPS[topology.partition(":")[0]].gpu
    try:
        return importlib.util.find_spec(COMPILERS["gpu" if gpu else "tpu"]) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("topology", ["v5e", "v9:4x4", "v5e:foo", "h100:12", "h100:0", "h100:²", "16x16"])
def test_an_unknown_topology_is_refused(topology):
    with pytest.raises(UserError, match=f"the topology {topology} (must be|is impossible)"):
        topologies.open_topology(topology)


@pytest.mark.parametrize(("topology", "extra"), [("v5e:4x4", "plan"), ("h200:8", "plan_gpu")])
def test_a_missing_compiler_is_named(monkeypatch, topology, extra):
    monkeypatch.setattr(topologies, "_installed", lambda module: False)
    with pytest.raises(UserError, match=rf"pip install -e '.\[{extra}\]'$"):
        topologies.open_topology(topology)


@pytest.mark.skipif(not installed("v5e:2x2"), reason="libtpu is not installed")
def test_a_topology_has_the_devices_that_a_run_would_have(run_for_tpus):
    """In a process of its own, because a loaded libtpu breaks the profiler of this one."""
    script = """
from jaxclip.planning.topologies import open_topology
print([len(open_topology(name).devices) for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "7x:2x2x1")])
print(len(open_topology("v5e:2x2", slices=2).devices))
"""
    assert run_for_tpus(script).splitlines() == ["[4, 4, 4, 4, 8]", "8"]  # a 7x chip is two devices


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind, known):
    assert hardware.chip(SimpleNamespace(device_kind=kind)) is hardware.CHIPS.get(known)


def test_every_chip_has_a_device_kind():
    assert set(hardware.KINDS.values()) == set(hardware.CHIPS)


PLAN = fit.Plan(
    topology="",
    devices=4,
    slices=1,
    mesh=(4, 1, 1),
    batch_size=0,
    parameters=100.0,
    optimizer=200.0,
    batch=0.0,
    temporaries=0.0,
    memory=0.0,
    model_flops=1.0,
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

    four = topologies.Topology("v5e:2x2", hardware.CHIPS["v5e"], jax.devices("cpu")[:4], 1, {})
    monkeypatch.setattr(fit, "open_topology", lambda topology, slices: four)
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


@pytest.mark.parametrize(
    ("error", "temporaries"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.50G of 15.75G hbm.", 19.5 * 2**30 - 1e9),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (17.43G) exceeds available HBM (15.75G). HLO module: jit_step.",
            17.43 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem.", None),
        ("INTERNAL: something else", None),
    ],
)
def test_the_memory_of_a_refused_program_is_read_from_the_error(error, temporaries):
    assert fit.refused_temporaries(error, 1e9) == temporaries


def test_a_table_says_what_is_unknown_of_a_plan_that_does_not_fit():
    fitting = replace(
        PLAN, memory=1000.0, flops=2e12, traffic=1.0, seconds={"compute": 2.0, "memory": 1.0, "network": 0.0}
    )
    fitting = replace(fitting, exposed=0.0, mfu=0.5, pairs_per_second=1.0, topology="v5e:2x2")
    lines = tables.table([fitting, PLAN]).splitlines()
    rows = {name.strip(): line.split() for line in lines for name in [line[:16]] for line in [line[16:]]}
    assert rows["fits"] == ["yes", "NO"] and rows["MFU allowed"] == ["50%", "unknown"]
    assert rows["roofline step"] == ["2,000.0", "ms", "(compute)", "unknown"]
    assert len({len(line) for line in lines}) == 1  # columns are as wide as their longest value


LARGE_BATCH = "pretrain_large_batch.py"
# Name of the stored plan -> configuration, topology, overrides.
KEEP_PRODUCTS = "model.remat=qkv,mixed,attended,hidden"  # recomputes nothing that takes matrix products
PLANS = {
    "tiny_v5e_2x2": ("quickstart.py", "v5e:2x2", ("model.preset=tiny", "model.dtype=bfloat16", "model.remat=full")),
    "vit_l_14_v5e_16x16": (f"{LARGE_BATCH}:vit_l_14", "v5e:16x16", ()),
    "vit_l_14_v5e_16x16_fsdp": (f"{LARGE_BATCH}:vit_l_14", "v5e:16x16", ("mesh.fsdp=16",)),
    "vit_l_14_v6e_16x16": (f"{LARGE_BATCH}:vit_l_14", "v6e:16x16", ()),
    "vit_l_14_v5e_2_slices_16x8": (f"{LARGE_BATCH}:vit_l_14", "v5e:16x8", ("mesh.slices=2", "mesh.fsdp=8")),
    "vit_b_16_cached_v5e_16x16": (f"{LARGE_BATCH}:vit_b_16,1048576", "v5e:16x16", ()),
    **{
        f"vit_b_16_v5e_{shape}": (
            f"{LARGE_BATCH}:vit_b_16",
            f"v5e:{shape}",
            (f"batch_size={256 * chips}", "loss.implementation=tiled"),
        )
        for shape, chips in (("4x4", 16), ("8x8", 64), ("16x16", 256))
    },
    "vit_b_16_h200_1": (f"{LARGE_BATCH}:vit_b_16", "h200:1", ("batch_size=512", "model.remat=none")),
    "vit_l_14_h200_8": (f"{LARGE_BATCH}:vit_l_14", "h200:8", ("batch_size=4096", KEEP_PRODUCTS)),
    "vit_l_14_h200_8_fsdp": (f"{LARGE_BATCH}:vit_l_14", "h200:8", ("batch_size=4096", "mesh.fsdp=8", KEEP_PRODUCTS)),
    "vit_l_14_h100_64": (f"{LARGE_BATCH}:vit_l_14", "h100:64", ()),
}
ALWAYS = ("tiny_v5e_2x2", "vit_l_14_v5e_16x16", "vit_b_16_h200_1")  # the others take minutes each
# Fields that do not depend on the version of the compiler.
EXACT = ("topology", "devices", "slices", "mesh", "batch_size", "parameters", "optimizer", "batch", "model_flops")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_new_plan_equals_the_stored_one(run, tmp_path, name):
    """JAXCLIP_EVERY_PLAN=1 includes the large plans, minutes each; JAXCLIP_WRITE_GOLDENS=1 stores the new plans."""
    config, topology, overrides = PLANS[name]
    if not installed(topology):
        pytest.skip("the compiler is not installed")
    if name not in ALWAYS and os.environ.get("JAXCLIP_EVERY_PLAN") != "1":
        pytest.skip("takes minutes; set JAXCLIP_EVERY_PLAN=1 to run it")
    output, golden = tmp_path / "plan.json", GOLDENS / f"{name}.json"
    arguments = [f"--config={ROOT / 'configs' / config}", f"--topology={topology}", f"--json={output}"]
    done = run("plan", *arguments, *(f"--config.{override}" for override in overrides))
    assert done.returncode == 0, done.stderr
    (new,) = json.loads(output.read_text())
    assert new.pop("operations") and new.pop("settings") is not None
    if os.environ.get("JAXCLIP_WRITE_GOLDENS") == "1":
        golden.write_text(json.dumps(new, indent=2) + "\n")
    stored = json.loads(golden.read_text())
    assert {field: new[field] for field in EXACT} == {field: stored[field] for field in EXACT}
    assert new["fits"] and new["flops"] > new["model_flops"]
    for field in ("temporaries", "traffic", "flops"):
        assert new[field] == pytest.approx(stored[field], rel=0.03), field
    assert sum(new["sent"].values()) == pytest.approx(sum(stored["sent"].values()), rel=0.03)
    assert "roofline step" in done.stdout and topology in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not installed("v5e:2x2"), reason="libtpu is not installed")
def test_compare_adds_plans_for_other_meshes_and_topologies(run, tmp_path):
    output, config = tmp_path / "plans.json", f"--config={ROOT / 'configs' / 'quickstart.py'}"
    arguments = ["--topology=v5e:2x2", "--compare=2x2x1,v6e:2x2", "--config.model.preset=tiny", f"--json={output}"]
    done = run("plan", config, *arguments, "--operations=3")
    assert done.returncode == 0, done.stderr
    data_parallel, split, other = json.loads(output.read_text())
    assert [plan["mesh"] for plan in (data_parallel, split, other)] == [[4, 1, 1], [2, 2, 1], [4, 1, 1]]
    assert split["parameters"] < 0.6 * data_parallel["parameters"]
    assert split["sent"]["all-gather"] > 0 and other["memory"] == hardware.CHIPS["v6e"].memory
    assert all(name in done.stdout.splitlines()[0] for name in ("v5e:2x2", "v6e:2x2"))
    assert done.stdout.count("the operations that move the most bytes") == 3


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


def test_the_step_for_gpus_multiplies_in_bfloat16_and_its_loss_in_float32():
    """The program that is lowered for CUDA, before XLA compiles it; no GPU and no compiler for GPUs is needed."""
    config = configuration.build({"steps": 1, "batch_size": 8, "model": {"preset": "tiny", "dtype": "bfloat16"}})
    towers = make_towers(config, make_preprocess(config), fit.Vocabulary(512, 511), devices=jax.devices()[:1])
    recipe = make_recipe(config, towers, steps=1)
    with jax.set_mesh(towers.mesh), compiler.compiling_for("gpu"):
        lowered = jax.jit(recipe.step).trace(recipe.state, abstract_batch(config, towers))
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    of_loss = [line for line in products if "HIGHEST" in line]
    assert len(of_loss) == 3 and all("bf16" not in line for line in of_loss)  # forward, and towards both sides
    of_towers = [line for line in products if line not in of_loss]
    assert len(of_towers) > 20 and all("bf16" in line.rsplit(" : ", 1)[1].split("->")[0] for line in of_towers)
    assert "custom_call" not in text  # attention by XLA, as on a machine without JAX's plugin for CUDA


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
    derived = {field: stored.pop(field) for field in ("needed", "fits", "step_seconds", "bound")}
    plan = fit.Plan(**stored)
    assert {field: getattr(plan, field) for field in derived} == derived and plan.fits
    chip = hardware.CHIPS[plan.topology.partition(":")[0]]
    assert plan.seconds["compute"] >= plan.flops / chip.peak("bfloat16")
    assert plan.seconds["memory"] == pytest.approx(plan.traffic / chip.memory_bandwidth)
    assert plan.exposed <= plan.seconds["network"] * (1 + 1e-9)
    assert plan.mfu == pytest.approx(plan.model_flops / plan.step_seconds / chip.peak("bfloat16"))
    assert plan.mfu <= plan.model_flops / plan.flops * (1 + 1e-9) and plan.model_flops <= plan.flops


def test_the_published_tables_show_the_stored_plans():
    table = (ROOT / "jaxclip" / "benchmarks" / "README.md").read_text().partition("\n## Plans\n")[2]
    for path in GOLDENS.glob("vit_*.json"):
        plan = json.loads(path.read_text())
        needed = sum(plan[part] for part in ("parameters", "optimizer", "batch", "temporaries"))
        if "v5e_4x4" in path.stem or "v5e_8x8" in path.stem:  # only in the table of weak scaling
            assert f"| {plan['batch_size']:,} | {plan['sent']['all-reduce'] / 1e6:,.0f} MB |" in table, path.stem
        else:
            assert f"| {needed / 2**30:.2f} of {plan['memory'] / 2**30:.2f} GiB |" in table, path.stem
            assert f"| {plan['pairs_per_second']:,.0f} | {plan['mfu']:.0%} |" in table, path.stem
    docstring = (ROOT / "configs" / LARGE_BATCH).read_text()
    plan = json.loads((GOLDENS / "vit_l_14_v5e_16x16.json").read_text())
    needed = sum(plan[part] for part in ("parameters", "optimizer", "batch", "temporaries")) / 2**30
    assert f"{needed:.2f} of 15.75 GiB and at least {plan['step_seconds']:.2f} s" in docstring
