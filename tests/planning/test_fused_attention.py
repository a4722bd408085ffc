"""The step that `train` compiles for GPUs and TPUs has fused attention in every layer, chosen by `attention = auto`."""

import importlib
import re
from types import SimpleNamespace

import jax
import pytest

from jaxclip import config as configs
from jaxclip.models import attention
from jaxclip.planning import fit
from jaxclip.planning.topologies import open_topology
from jaxclip.runtime import compiler
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training.recipe import abstract_batch, make_recipe
from tests.planning.test_fit import installed

LAYERS = 12  # of each tower of vit_b_32
VOCABULARY = 512


def lowered_step(backend, platform, devices):
    """Returns the lowered training step of bfloat16 towers of small pictures."""
    model = {"preset": "vit_b_32", "dtype": "bfloat16", "execution": "unroll"}
    config = configs.build({"steps": 1, "batch_size": 16, "model": model, "data": {"image_size": 64}})
    with compiler.compiling_for(backend, devices if devices[0].platform == backend else ()):
        towers = make_towers(
            config, make_preprocess(config), fit.Vocabulary(VOCABULARY, VOCABULARY - 1), devices=devices
        )
        recipe = make_recipe(config, towers, steps=1)
        with jax.set_mesh(towers.mesh):
            traced = jax.jit(recipe.step).trace(recipe.state, abstract_batch(config, towers))
            return traced.lower(lowering_platforms=(platform,))


def test_the_step_for_gpus_calls_cudnn_in_every_layer(monkeypatch):
    """In the lowered program, for which only the version of cuDNN must be known."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91400))
    monkeypatch.setattr(attention, "CUDA_PLUGINS", ("jax",))
    text = lowered_step("gpu", "cuda", jax.devices()[:1]).as_text()
    # JAX lowers calls with the same arguments to one function.
    for target in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        functions = [part for part in text.split("func.func ") if f"@{target}(" in part]
        names = [re.search(r"@([\w.]+)\(", part)[1] for part in functions]
        calls = sum(len(re.findall(rf"call @{re.escape(name)}\(", text)) for name in names)
        inline = sum(part.count(f"@{target}(") for part, name in zip(functions, names, strict=True) if name == "main")
        assert calls + inline == 2 * LAYERS, target
    assert not re.search(rf'"stablehlo\.scatter"[\s\S]*?\}}\) : \(tensor<{VOCABULARY}x\d+xbf16>', text)


@pytest.mark.slow
@pytest.mark.skipif(not installed("h200:1"), reason="the compiler for CUDA is not installed")
def test_the_compiled_step_for_gpus_calls_cudnn_in_every_layer():
    topology = open_topology("h200:1")
    text = lowered_step("gpu", "cuda", topology.devices).compile(compiler_options=dict(topology.options)).as_text()
    calls = re.findall(r'custom_call_target="(__cudnn\$fmha\w+)"', text)
    assert sorted(calls) == ["__cudnn$fmhaSoftmax"] * 2 * LAYERS + ["__cudnn$fmhaSoftmaxBackward"] * 2 * LAYERS


@pytest.mark.slow
@pytest.mark.skipif(not installed("v5e:2x2"), reason="libtpu is not installed")
def test_the_step_for_tpus_has_the_kernel_in_every_layer(run_for_tpus):
    """In the lowered program; a process of its own, because a loaded libtpu breaks the profiler of this one."""
    printed = run_for_tpus("""
import re
from jaxclip.planning.topologies import open_topology
from tests.planning.test_fused_attention import lowered_step

text = lowered_step("tpu", "tpu", open_topology("v5e:2x2").devices).as_text()
names = re.findall(r'kernel_name = "(\\w+)"', text)
print(sorted((name, names.count(name)) for name in set(names)))
""")
    assert printed.splitlines()[-1] == str([("attention", 2 * LAYERS), ("attention_backward", 2 * LAYERS)])
