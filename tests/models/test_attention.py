"""Every implementation of attention computes the same; the fused ones are in the programs for GPUs and TPUs."""

import importlib.util
import json
import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding, PartitionSpec

from jaxclip.config import build, dump, load_config, of_run
from jaxclip.errors import UserError
from jaxclip.models import attention, presets, stablehlo, tpu
from jaxclip.models.attention import attend, self_attend
from jaxclip.models.clip import CLIP
from jaxclip.models.transformer import Transformer, TransformerConfig
from jaxclip.runtime import compiler, mesh

FLOAT32, BFLOAT16 = 1e-5, 2.0**-7  # the latter is the distance of two bfloat16 numbers, relative to the larger


def expected(query, key, value, gradient, *, causal=False, lengths=None):
    """Returns attention and its three gradients, computed in float64 with NumPy."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (query, key, value, gradient))
    scores = np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(k.shape[1], dtype=bool), scores, -np.inf)
    if lengths is not None:
        scores = np.where(np.arange(k.shape[1]) < np.asarray(lengths)[:, None, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    of_weights = np.einsum("bthd,bshd->bhts", g, v)
    of_scores = weights * (of_weights - (weights * of_weights).sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    return (
        np.einsum("bhts,bshd->bthd", weights, v),
        np.einsum("bhts,bshd->bthd", of_scores, k),
        np.einsum("bhts,bthd->bshd", of_scores, q),
        np.einsum("bhts,bthd->bshd", weights, g),
    )


def arrays(batch, queries, keys, heads, size, dtype=jnp.float32):
    """Returns query, key, value and the gradient of the result."""
    draw = np.random.default_rng(queries)
    lengths = (queries, keys, keys, queries)
    return [jnp.asarray(draw.normal(size=(batch, length, heads, size)), dtype) for length in lengths]


def results(function, query, key, value, gradient):
    mixed, pullback = jax.vjp(function, query, key, value)
    return mixed, *pullback(gradient)


def largest_error(found, right):
    """Returns the largest error of a result or gradient, relative to its largest entry, at least 0.1."""
    return max(
        float(np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 0.1))
        for x, y in zip(found, right, strict=True)
    )


SHAPES = [  # batch, queries, keys, heads, size
    (3, 1, 1, 2, 64),
    (4, 2, 2, 2, 64),
    (4, 50, 50, 2, 64),
    (3, 77, 77, 3, 64),
    (2, 197, 197, 2, 64),
    (1, 257, 257, 2, 80),
    (1, 577, 577, 2, 64),
    (2, 1024, 1024, 1, 72),
    (2, 1, 257, 2, 64),  # one query for all tokens, as in SigLIP's pooling
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_for_tpus_equals_a_float64_oracle(shape, dtype):
    """Also of causal attention and of lengths: one run for each, of the first example or with a length of its own."""
    inputs = arrays(*shape, dtype)
    tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    batch, queries, keys = shape[:3]
    lengths = jnp.asarray([1 + 7 * i % keys for i in range(batch)], jnp.int32)
    options = [{}, {"lengths": lengths}] + [{"causal": True}] * (queries == keys)
    for option in options[:2] if keys > 500 else options:
        run = partial(tpu.attention, **{"causal": False, "lengths": None} | option)
        found = jax.jit(partial(results, run))(*inputs)
        assert largest_error(found, expected(*inputs, **option)) <= tolerance, option
    if dtype == jnp.float32 and queries < 500:
        found = jax.jit(partial(results, partial(attend, implementation="xla", **option)))(*inputs)
        assert largest_error(found, expected(*inputs, **option)) <= tolerance


def test_the_kernel_for_tpus_splits_long_sequences_and_their_heads(monkeypatch):
    monkeypatch.setattr(tpu, "UNDIVIDED", 64)
    monkeypatch.setattr(tpu, "ROWS", 32)
    monkeypatch.setattr(tpu, "BLOCK_BYTES", 2**16)
    inputs = arrays(2, 77, 77, 4, 64)
    for option in ({"lengths": jnp.asarray([5, 77], jnp.int32)}, {"causal": True}):
        found = results(partial(tpu.attention, **{"causal": False, "lengths": None} | option), *inputs)
        assert largest_error(found, expected(*inputs, **option)) <= FLOAT32


@pytest.mark.parametrize("heads", [4, 3])  # three heads of 64 do not fill whole registers
def test_packed_queries_keys_and_values_have_the_same_attention(heads):
    *qkv, gradient = arrays(2, 20, 20, heads, 64)
    qkv = jnp.stack(qkv, axis=2)

    def run(qkv, implementation):
        project = lambda arrange=lambda x: x: arrange(qkv)  # noqa: E731
        return self_attend(project, causal=True, implementation=implementation)

    (packed, pullback), (plain, other) = (jax.vjp(partial(run, implementation=i), qkv) for i in ("pallas", "xla"))
    assert largest_error((packed, *pullback(gradient)), (plain, *other(gradient))) <= FLOAT32


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_the_kernel_for_tpus_gives_the_same_on_any_mesh(sizes):
    config = TransformerConfig(width=256, layers=2, heads=4, attention="pallas", execution="scan")
    graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 10, 256)), jnp.float32)
    lengths = jnp.arange(3, 11, dtype=jnp.int32)

    def run(state, x, lengths):
        return jnp.sum(nnx.merge(graph, state)(x, lengths=lengths) ** 2)

    right = jax.jit(jax.grad(run, argnums=(0, 1)))(state, x, lengths)
    devices = mesh.make_mesh(*sizes)
    kernel = NamedSharding(devices, PartitionSpec(None, "fsdp", None, "tensor"))
    split = {path: kernel if path[-2:] == ("qkv", "kernel") else None for path, _ in nnx.to_flat_state(state)}
    state = nnx.from_flat_state(
        [
            (path, leaf if split[path] is None else leaf.replace(jax.device_put(leaf.get_value(), split[path])))
            for path, leaf in nnx.to_flat_state(state)
        ]
    )
    rows = NamedSharding(devices, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(devices):
        step = jax.jit(jax.grad(run, argnums=(0, 1)))
        found = step(state, jax.device_put(x, rows), jax.device_put(lengths, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, right)


@pytest.fixture
def cudnn(monkeypatch):
    """As if JAX's plugin for CUDA, which has cuDNN, were installed, as far as lowering needs it."""
    versions = SimpleNamespace(cudnn_get_version=lambda: 91400)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", versions)
    monkeypatch.setattr(attention, "CUDA_PLUGINS", ("jax",))


def calls_of_cudnn(function, *shapes):
    """Returns the calls of cuDNN in a function lowered for CUDA: (target, operands' shapes, mask, layout of scores)."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with compiler.compiling_for("gpu"):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\S+?)\(.*?backend_config = (\".*?[^\\]\").*? : \((.*?)\) ->", text)
    return [
        (target, re.findall(r"tensor<(\S+?)>", operands), re.search(r"mask_type\\22: \\22(\w+)", options)[1])
        for target, options, operands in calls
    ]


@pytest.mark.parametrize(
    ("tokens", "causal", "padded", "mask"),
    [(197, False, 198, "PADDING"), (77, True, 78, "CAUSAL"), (50, False, 50, "NO_MASK")],
)
def test_cudnn_gets_an_even_number_of_tokens_and_the_cheapest_mask(cudnn, tokens, causal, padded, mask):
    def step(query, key, value, gradient):
        return results(partial(attend, causal=causal), query, key, value, gradient)

    forward, backward = calls_of_cudnn(step, *[(2, tokens, 4, 64)] * 4)
    assert forward[0] == "__cudnn$fmhaSoftmax" and backward[0] == "__cudnn$fmhaSoftmaxBackward"
    for _, operands, kind in (forward, backward):
        assert operands[:3] == [f"2x{padded}x4x64xbf16"] * 3 and kind == mask
        assert operands.count("2xi32") == (2 if mask == "PADDING" else 0)


def test_auto_is_the_fused_attention_of_the_back_end(cudnn):
    def chosen(backend, dtype, queries=50, head=64):
        with compiler.compiling_for(backend):
            return attention.choose(dtype, queries=queries, head=head)

    assert [chosen(backend, jnp.bfloat16) for backend in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "pallas"]
    assert [chosen(backend, jnp.float32) for backend in ("cpu", "gpu", "tpu")] == ["xla", "xla", "pallas"]
    assert [chosen(backend, jnp.bfloat16, queries=1) for backend in ("gpu", "tpu")] == ["xla", "xla"]
    assert [chosen("gpu", jnp.bfloat16, head=head) for head in (12, 160)] == ["xla", "xla"]


@pytest.mark.parametrize(
    ("backend", "dtype", "implementation"),
    [("cpu", jnp.bfloat16, "cudnn"), ("gpu", jnp.float32, "cudnn"), ("gpu", jnp.bfloat16, "pallas")],
)
def test_an_implementation_that_the_back_end_lacks_is_refused(backend, dtype, implementation):
    inputs = arrays(1, 4, 4, 1, 64, dtype)[:3]
    with compiler.compiling_for(backend), pytest.raises(UserError, match=f"attention = {implementation} needs"):
        attend(*inputs, implementation=implementation)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_exported_towers_have_no_kernel_of_one_platform(cudnn, tmp_path, backend):
    config = presets.clip_config(
        presets.Preset(16, (64, 1, 1), (64, 1, 1), 32),
        image_size=32,
        vocab_size=64,
        context_length=8,
        end_token=63,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    config = presets.with_execution(config, dtype="bfloat16")
    params = nnx.to_pure_dict(nnx.state(CLIP(config, rngs=nnx.Rngs(0))))
    with compiler.compiling_for(backend):
        assert stablehlo.write(config, params, tmp_path)


def test_a_run_is_used_on_other_machines_with_their_own_attention(tmp_path):
    trained = build({"steps": 1, "model": {"dtype": "bfloat16", "attention": "cudnn"}})
    (tmp_path / "config.json").write_text(json.dumps(dump(trained)))
    assert load_config(tmp_path).model.attention == "cudnn"
    assert of_run(tmp_path, {}).model.attention == "auto"
    assert of_run(tmp_path, {"model.attention": "xla"}).model.attention == "xla"


SLOW_SHAPES = [  # of the towers with the longest sequences: ViT-L/14 at 336 pixels, SigLIP so400m at 384 and 512
    (2, 577, 16, 64, "bfloat16"),
    (2, 729, 16, 72, "float32"),
    (2, 1024, 16, 72, "bfloat16"),
    (2, 77, 12, 64, "float32"),
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("precision", ["default", "highest"])
def test_the_kernel_compiles_for_tpus(run_for_tpus, precision):
    """Forward and backward pass; in a process of its own, because a loaded libtpu breaks the profiler of this one."""
    shapes = SLOW_SHAPES if precision == "default" else SLOW_SHAPES[-1:] + [(2, 77, 12, 64, "bfloat16")]
    printed = run_for_tpus(f"""
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxclip.models.attention import attend
from jaxclip.planning.topologies import open_topology
from jaxclip.runtime import compiler, mesh

devices = open_topology("v5e:2x2").devices
sharding = NamedSharding(mesh.make_mesh(4, 1, 1, devices), PartitionSpec(("data", "fsdp")))
for batch, tokens, heads, size, dtype in {shapes}:
    x = jax.ShapeDtypeStruct((4 * batch, tokens, heads, size), dtype, sharding=sharding)
    jax.config.update("jax_default_matmul_precision", "{precision}")
    with jax.set_mesh(sharding.mesh), compiler.compiling_for("tpu", devices):
        step = jax.jit(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))
        program = step.trace(x, x, x, x).lower(lowering_platforms=("tpu",)).compile().as_text()
    print(program.count('custom_call_target="tpu_custom_call"'))
""")
    assert printed.split() == ["1"] * len(shapes)  # the result of the forward pass is not used
