"""Settings for GPUs and TPUs are accepted by their real compilers, and a setting of the user's own replaces each."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jaxlib import xla_client

from jaxclip.runtime import compiler, startup, tunings
from jaxclip.runtime.tunings import Documented, Measured

OPTIONS = {"optimization_level": tunings.EFFORT_LEVELS["O1"]}
(FRACTION,) = tunings.VARIABLES

# Compiles a step of sharded layers for four devices that this machine need not have, and prints what the compiler says
# about options, and whether each of the given options changes the program. The text describes an H200 to XLA, which
# otherwise asks the driver.
COMPILE = """
import json, sys
from dataclasses import replace
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxclip.runtime import compiler

H200 = '''
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 14 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
'''
platform, known, invented, compared = sys.argv[1:]
if platform == "gpu":
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x4")
else:
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
compiler.TABLE += (replace(compiler.TABLE[0], name="invented", backend=platform, options={invented: True}),)
with compiler.compiling_for(platform, topology.devices):
    options = compiler.towers()
    answers = {name: compiler.is_known(name, True) for name in (known, invented)}
    report = compiler.report()

mesh = Mesh(topology.devices, ("fsdp",), axis_types=(AxisType.Auto,))
rows, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), (None, None, "fsdp")))
x = jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=rows)
layers = jax.ShapeDtypeStruct((6, 256, 256), jnp.float32, sharding=split)

def loss(layers, x):
    hidden, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, layers)
    return (hidden**2).sum()

traced = jax.jit(jax.grad(loss), out_shardings=split).trace(layers, x)
lowered = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else "tpu",))
always = {"xla_gpu_autotune_level": 0} if platform == "gpu" else {}  # there is no GPU to time kernels on

def compiled(options):
    return lowered.compile(compiler_options=always | options).as_text()

changes = {name: compiled(changed) != compiled({}) for name, changed in json.loads(compared).items()}
print(json.dumps([options, answers, report, changes]))
"""
EXAMPLES = {"gpu": "xla_gpu_enable_latency_hiding_scheduler", "tpu": "xla_tpu_enable_latency_hiding_scheduler"}
DEFAULTS = (
    "xla_tpu_enable_latency_hiding_scheduler",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
)
"""Options of libtpu that are often set, although they are on by default."""
COMPARED = {"gpu": {"ours": OPTIONS}, "tpu": {"on": dict.fromkeys(DEFAULTS, True), "off": {DEFAULTS[0]: False}}}
INSTALLED = {
    "gpu": any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    "tpu": importlib.util.find_spec("libtpu"),
}
# With these variables libtpu does not look for TPUs, and several processes may load it.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.fixture(scope="module")
def compile_for():
    """A function that compiles for a platform with its own compiler in another process; see COMPILE for its result."""

    @functools.cache
    def compile_for(platform):
        if not INSTALLED[platform]:
            pytest.skip(f"the compiler for {platform.upper()}s is not installed")
        flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL")
        variables = {name: value for name, value in os.environ.items() if name not in flags}
        arguments = (platform, EXAMPLES[platform], f"xla_{platform}_invented", json.dumps(COMPARED[platform]))
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, *arguments],
            env={**variables, **LIBTPU, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return compile_for


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_compiler_accepts_every_option_and_refuses_an_invented_one(compile_for, platform):
    options, answers, report, _ = compile_for(platform)
    assert answers == {EXAMPLES[platform]: True, f"xla_{platform}_invented": False}
    assert options == (OPTIONS if platform == "gpu" else None)
    assert report == (["settings for GPUs: optimization_level=O1"] if platform == "gpu" else [])


@pytest.mark.slow
def test_o1_changes_a_step_of_sharded_layers_on_gpus(compile_for):
    assert compile_for("gpu")[-1] == {"ours": True}


@pytest.mark.slow
def test_libtpu_overlaps_all_gathers_by_default(compile_for):
    assert compile_for("tpu")[-1] == {"on": False, "off": True}


@pytest.fixture
def without_flags(monkeypatch):
    """Removes the variables with which the user of the tests replaces settings."""
    jax.devices()  # XLA_FLAGS gives the CPU several devices
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL", FRACTION.name, *FRACTION.replaced_by):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch, without_flags):
    """Makes the machine look as if it had a GPU that JAX may use, with the variables as at the start of a command."""
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: ["/dev/nvidia0"] if pattern == startup.GPUS else [])
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cuda,cpu")
    yield
    jax.config.update("jax_platforms", platforms)
    for variable in tunings.VARIABLES:
        os.environ.pop(variable.name, None)


@pytest.fixture
def gpu_report():
    """A function that returns `compiler.report` of a run on GPUs."""

    def report() -> list[str]:
        with compiler.compiling_for("gpu"):
            return compiler.report()

    return report


def test_variables_are_set_and_named_on_gpus(gpus, gpu_report):
    startup.set_variables()
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.9
    assert gpu_report() == ["settings for GPUs: XLA_CLIENT_MEM_FRACTION=0.9, optimization_level=O1"]


@pytest.mark.parametrize("own", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_variable_that_the_user_set_is_kept_and_named(gpus, gpu_report, monkeypatch, own):
    monkeypatch.setenv(own, "0.5")
    startup.set_variables()
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.5
    assert gpu_report() == [
        "settings for GPUs: optimization_level=O1",
        f"your setting {own}=0.5 replaces XLA_CLIENT_MEM_FRACTION=0.9",
    ]


@pytest.mark.parametrize("platforms", ["cpu", "tpu,cpu"])
def test_no_variable_is_set_if_jax_may_not_use_the_gpus(gpus, platforms):
    jax.config.update("jax_platforms", platforms)
    startup.set_variables()
    assert FRACTION.name not in os.environ


def test_no_variable_is_set_without_gpus(gpus, monkeypatch):
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: [])
    startup.set_variables()
    assert FRACTION.name not in os.environ


def test_no_variable_is_set_for_a_version_of_jax_with_another_default(gpus, monkeypatch):
    monkeypatch.setattr(startup.jax, "__version_info__", FRACTION.before)
    startup.set_variables()
    assert FRACTION.name not in os.environ


def test_nothing_for_accelerators_is_set_or_named_on_cpus(without_flags, monkeypatch):
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: [])
    before = dict(os.environ)
    startup.set_variables()
    assert dict(os.environ) == before and compiler.report() == []
    assert not any(name.startswith(("optimization_level", "xla_gpu", "xla_tpu")) for name in compiler.towers() or {})


def test_the_users_optimization_level_replaces_ours(without_flags, gpu_report, monkeypatch):
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")
    assert gpu_report() == ["your setting JAX_OPTIMIZATION_LEVEL=O0 replaces optimization_level=O1"]
    with compiler.compiling_for("gpu"):
        assert compiler.towers() is None


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_flag_replaces_the_option_that_would_switch_it_on_only_if_it_is_off(
    without_flags, gpu_report, monkeypatch, value
):
    flag = f"--xla_gpu_enable_latency_hiding_scheduler={value}"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_autotune_level=2 {flag}")
    with compiler.compiling_for("gpu"):
        assert compiler.towers() == (OPTIONS if value == "true" else None)
    if value == "false":
        assert gpu_report() == [f"your setting XLA_FLAGS={flag} replaces optimization_level=O1"]


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS", "file"])
def test_an_option_that_the_user_set_in_flags_is_left_to_the_user(without_flags, monkeypatch, tmp_path, variable):
    row = replace(tunings.TABLE[0], backend="tpu", options={"xla_tpu_some_option": True})
    monkeypatch.setattr(compiler, "TABLE", (row,))
    flags = "--xla_other=1 --xla_tpu_some_option=false"
    (tmp_path / "flags").write_text(flags)
    name, value = ("XLA_FLAGS", str(tmp_path / "flags")) if variable == "file" else (variable, flags)
    with compiler.compiling_for("tpu"):
        assert compiler.towers() == {"xla_tpu_some_option": True}
        monkeypatch.setenv(name, value)
        assert compiler.towers() is None
        assert compiler.report() == [
            f"your setting {name}=--xla_tpu_some_option=false replaces xla_tpu_some_option=True"
        ]


def test_rows_for_several_devices_apply_only_to_these(without_flags, monkeypatch):
    row = replace(tunings.TABLE[0], several_devices=True, options={"xla_cpu_prefer_vector_width": 128})
    monkeypatch.setattr(compiler, "TABLE", (row,))
    assert compiler.towers() == row.options
    with compiler.compiling_for("cpu", jax.devices()[:1]):
        assert compiler.towers() is None


@pytest.mark.slow
def test_train_names_the_users_settings_before_it_compiles(run, config_file, tmp_path):
    own = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT"
    arguments = (f"--config={config_file}", "--config.steps=1", f"--workdir={tmp_path / 'run'}")
    done = run("train", *arguments, prefix=("env", f"XLA_FLAGS=--xla_backend_optimization_level=0 {own}"))
    assert done.returncode == 0, done.stderr
    named, compiling = (
        done.stderr.index(f"your setting XLA_FLAGS={own} replaces"),
        done.stderr.index("compiling the step"),
    )
    assert named < compiling and "settings for" not in done.stderr


def test_every_row_has_a_measurement_or_the_address_of_a_document():
    for row in (*tunings.TABLE, *tunings.VARIABLES):
        if isinstance(row.evidence, Documented):
            assert row.evidence.reason and row.evidence.url.startswith("https://")
        else:
            assert isinstance(row.evidence, Measured) and row.evidence.time_ratio <= 1 and row.evidence.what
