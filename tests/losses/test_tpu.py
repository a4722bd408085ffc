"""The tiled loss compiled for 256 absent TPU chips: a million rows fit, and embeddings are passed around a ring."""

import importlib.util
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS, DIMENSION, CHIPS = 2**20, 768, 256

COMPILE = f"""
import numpy as np
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from jaxclip.losses import tiled
from jaxclip.runtime.mesh import batch_sharding, make_mesh

mesh = make_mesh(16, 16, 1, topologies.get_topology_desc("v5e:16x16", platform="tpu").devices)
rows = jax.ShapeDtypeStruct(({ROWS}, {DIMENSION}), jnp.float32, sharding=batch_sharding(mesh))
groups = jax.ShapeDtypeStruct(({ROWS},), jnp.int32, sharding=batch_sharding(mesh))
scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
with jax.set_mesh(mesh):
    loss = lambda x, y, s, g: tiled.info_nce(x, y, s, g)[0]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(rows, rows, scale, groups).compile()
print("temporaries", compiled.memory_analysis().temp_size_in_bytes)
print(compiled.as_text())
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu, which compiles for TPUs, is not installed")
def test_a_million_rows_compile_for_v5e_16x16_as_a_ring_without_a_large_buffer(run_for_tpus):
    temporaries, program = run_for_tpus(COMPILE).split("\n", 1)
    assert int(temporaries.split()[1]) < 2**28  # 256 MiB of a chip's 16 GiB
    rows_per_chip = ROWS // CHIPS
    assert re.search(rf"f32\[{rows_per_chip},{DIMENSION}\]\S* collective-permute", program)
    assert "all-gather" not in program
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", program)

    def elements(shape: str) -> int:
        return math.prod(map(int, shape.split(",")))

    largest = max(shapes, key=elements)
    assert elements(largest) <= rows_per_chip * DIMENSION, largest
