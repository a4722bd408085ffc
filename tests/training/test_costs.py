"""FLOPs and memory of compiled programs, as XLA counts them, equal their golden values.

They depend on XLA's version, so there is a golden file per minor version of JAX; on other versions these tests are
skipped. To write them after an intended change, or on a new version:
JAXCLIP_WRITE_GOLDENS=1 python -m pytest tests/training/test_costs.py
"""

import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxclip import config as configuration
from jaxclip.losses import contrastive, tiled
from jaxclip.models.clip import CLIP_MEAN, CLIP_STD
from jaxclip.models.presets import PRESETS, clip_config
from jaxclip.ranking import kernel, ranks
from jaxclip.runtime import compiler
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training.recipe import abstract_batch, make_recipe
from jaxclip.training.step import compile_step

pytestmark = pytest.mark.usefixtures("quick_compilation", "fixed_processor")
VERSION = ".".join(jax.__version__.split(".")[:2])
GOLDEN = Path(__file__).parents[1] / "goldens" / "costs" / f"jax-{VERSION}.json"
WRITE_GOLDENS = os.environ.get("JAXCLIP_WRITE_GOLDENS") == "1"
TOLERANCE = 0.05  # allows for patch releases of XLA; the same version always gives the same values


@pytest.fixture
def fixed_processor(monkeypatch):
    """Selects the XLA options of one kind of processor, so that the costs do not depend on this machine's."""
    monkeypatch.setattr(compiler, "_vendor_and_family", lambda: ("AuthenticAMD", 25))


def compiled_step(preset, **training):
    """Returns the training step of a preset with two layers per tower, compiled for one device."""
    config = configuration.build({"steps": 100, "batch_size": 16, **training})
    small = replace(PRESETS[preset], patch=16, image=(128, 2, 2), text=(128, 2, 2), embedding=64)
    text = {"vocab_size": 512, "context_length": 16, "end_token": 1}
    shape = clip_config(small, image_size=64, mean=CLIP_MEAN, std=CLIP_STD, **text)
    preprocess = replace(make_preprocess(config), image_size=64, context_length=16)
    towers = make_towers(config, preprocess, None, shape, jax.devices("cpu")[:1])
    with jax.set_mesh(towers.mesh):
        batch, recipe = abstract_batch(config, towers), make_recipe(config, towers, config.steps)
        return compile_step(recipe.step, recipe.state, batch)


def compiled_loss(loss):
    """Returns the loss of 1,024 pairs with its gradient, compiled for one device."""
    sides = jax.ShapeDtypeStruct((1024, 64), jnp.float32)
    gradient = jax.value_and_grad(lambda *args: loss(*args)[0], argnums=(0, 1, 2))
    return jax.jit(gradient).lower(sides, sides, jax.ShapeDtypeStruct((), jnp.float32)).compile()


def compiled_ranks(*, top):
    """Returns the compiled rank kernel for one block of 512 queries against two tiles of 512 items."""

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    block, width, real = 512, 64, jnp.float32
    mesh = jax.make_mesh((1, 1), kernel.AXES, axis_types=ranks.make_mesh().axis_types, devices=jax.devices("cpu")[:1])
    visit = kernel.make_visit(mesh, blocks=1, ks=(top, top), back=True, finite=True)
    state = shape(1, 2, 1, block), shape(1, 2, top, block, dtype=real), shape(1, 2, top, block)
    rows = kernel.Thresholds(shape(1, 1, block, dtype=real), shape())
    columns = kernel.Thresholds(shape(2, 1, block, dtype=real), shape(2))
    sides = shape(1, block, width, dtype=real), shape(2, block, width, dtype=real)
    return visit.lower(shape(), shape(2), *sides, rows, columns, shape(1, 2, 64, 2), state).compile()


PROGRAMS = {
    "step of a ViT": lambda: compiled_step("vit_b_32"),
    "step of a ViT, scanned": lambda: compiled_step("vit_b_32", model={"execution": "scan"}),
    "step of a ViT, in microbatches": lambda: compiled_step("vit_b_32", loss={"microbatch": 8}),
    "step with a convolutional stem": lambda: compiled_step("laptop"),
    "dense InfoNCE": lambda: compiled_loss(contrastive.info_nce),
    "tiled InfoNCE": lambda: compiled_loss(lambda *args: tiled.info_nce(*args, tile=256)),
    "ranks": lambda: compiled_ranks(top=0),
    "ranks with the best 10": lambda: compiled_ranks(top=10),
}


def costs(compiled):
    """Returns the FLOPs of a compiled program, and the bytes that are accessed, temporary and donated."""
    counted, sizes = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "flops": counted["flops"],
        "bytes accessed": counted["bytes accessed"],
        "temporaries": sizes.temp_size_in_bytes,
        "donated": sizes.alias_size_in_bytes,
    }


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the golden values are for x86-64 CPUs")
@pytest.mark.skipif(not WRITE_GOLDENS and not GOLDEN.exists(), reason=f"there is no golden file for JAX {VERSION}")
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_costs_of_a_program_equal_their_golden_values(name):
    current = costs(PROGRAMS[name]())
    if WRITE_GOLDENS:
        others = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(others | {name: current}, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())[name]
    changed = {
        measure: f"{golden[measure]:,.0f} -> {value:,.0f}"
        for measure, value in current.items()
        if value != pytest.approx(golden[measure], rel=TOLERANCE)
    }
    assert not changed, f"{name}: {changed}; if intended, JAXCLIP_WRITE_GOLDENS=1 writes the new values"


def test_every_golden_file_holds_the_costs_of_these_programs():
    for golden in GOLDEN.parent.glob("*.json"):
        assert json.loads(golden.read_text()).keys() == PROGRAMS.keys(), golden
