"""The tiled loss compiled for absent TPUs: what it keeps, what it sends, and what it computes meanwhile."""

import importlib.util
import json
import math
import re

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu, which compiles for TPUs, is missing"),
]
MEBIBYTE = 2**20

COMPILE = """
import dataclasses, json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxclip.losses import tiled
from jaxclip.losses.labels import Labels
from jaxclip.planning.cost import program_cost
from jaxclip.planning.topologies import open_topology
from jaxclip.runtime import compiler
from jaxclip.runtime.mesh import batch_sharding, make_mesh

topology = open_topology("{topology}", {slices})
mesh = make_mesh(-1, 8, 1, topology.devices, slices={slices} if {slices} > 1 else 0)
rows = jax.ShapeDtypeStruct(({rows}, {dimension}), jnp.float32, sharding=batch_sharding(mesh))
groups = jax.ShapeDtypeStruct(({rows},), jnp.int32, sharding=batch_sharding(mesh))
scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
with jax.set_mesh(mesh), compiler.compiling_for("tpu", topology.devices):
    loss = lambda x, y, s, g: tiled.info_nce(x, y, s, Labels(g), exchange="{exchange}", products="bfloat16")[0]
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(rows, rows, scale, groups)
    compiled = program.lower(lowering_platforms=("tpu",)).compile(compiler_options=dict(topology.options))
cost = program_cost(compiled.as_text(), list(mesh.devices.flat), topology.chip)
found = {{name: getattr(cost, name) for name in ("compute", "memory", "network", "exposed", "sent")}}
print(json.dumps(found | {{"temporaries": compiled.memory_analysis().temp_size_in_bytes, "text": compiled.as_text()}}))
"""


@pytest.fixture(scope="module")
def compiled(run_for_tpus):
    """Returns a function (topology, rows, dimension, exchange) -> the cost of value and gradient, and the program."""

    def run(topology: str, rows: int, dimension: int, exchange: str, slices: int = 1) -> dict:
        settings = {"topology": topology, "rows": rows, "dimension": dimension, "exchange": exchange, "slices": slices}
        return json.loads(run_for_tpus(COMPILE.format(**settings)).splitlines()[-1])

    return run


def largest_array(program: str) -> int:
    """Returns the elements of the largest array of a program."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_a_million_rows_pass_around_a_ring_of_256_chips_without_a_large_buffer(compiled):
    found = compiled("v5e:16x16", 2**20, 512, "ring")
    assert found["temporaries"] < 32 * MEBIBYTE
    assert largest_array(found["text"]) <= 4096 * 2048  # a chip's rows by a tile's columns
    assert "all-gather" not in found["text"]
    assert found["compute"] < 0.1  # seconds: a float32 product takes six times as long


def test_a_million_rows_are_gathered_in_blocks_by_all_links(compiled):
    found = compiled("v5e:16x16", 2**20, 512, "gather")
    assert found["temporaries"] < 1024 * MEBIBYTE
    assert largest_array(found["text"]) <= 2**17 * 512
    assert found["compute"] < 0.1 and found["memory"] < 0.03
    assert found["network"] < 0.04  # the ring takes 0.087


def test_the_ring_sends_while_it_computes(compiled):
    found = compiled("v5e:2x4", 2**15, 512, "ring")
    assert "collective-permute-start" in found["text"]
    assert found["network"] > 1e-3 and found["exposed"] < 0.15 * found["network"]


def test_between_slices_each_chip_sends_its_share_of_a_gather(compiled):
    found = {name: compiled("v5e:4x4", 4096, 512, name, slices=2) for name in ("gather", "ring")}
    assert found["gather"]["network"] < found["ring"]["network"] / 8
