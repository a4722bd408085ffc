"""Programs get the XLA options and special operations that TABLE lists for their back end and processor."""

import platform
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxclip.models import forms
from jaxclip.models.linear import contract
from jaxclip.models.stem import ConvStem
from jaxclip.ranking import cpu_selection, gpu_selection
from jaxclip.runtime import compiler, mesh


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(quick_compilation):
    """Switches XLA's optimisations off: compiling these tiny networks takes longer than running them."""


ROWS = {row.name: row for row in compiler.TABLE}
MODULES = {"cpu": (forms.MODULES["cpu"], cpu_selection), "gpu": (forms.MODULES["gpu"], gpu_selection)}
NO_YNNPACK, YNNPACK = ROWS["no YNNPACK"].options, ROWS["YNNPACK for products"].options
SCHEDULER, WIDE = ROWS["memory scheduler"].options, ROWS["wide vectors"].options


def test_row_names_are_unique_and_every_form_exists():
    assert len(ROWS) == len(compiler.TABLE)
    for row in compiler.TABLE:
        if not row.options and row.target != "unroll":
            assert any(hasattr(module, row.target) for module in MODULES[row.backend])


def test_xla_supports_the_options():
    for options in (SCHEDULER, NO_YNNPACK, YNNPACK, WIDE):
        assert all(compiler.is_known(name, value) for name, value in options.items())
    older = ROWS["older emitters"].options if jax.__version_info__ < (0, 11) else {}
    assert compiler.ranks() == {**WIDE, **older}


def test_options_are_asked_for_under_any_mesh():
    compiler._is_known.cache_clear()
    with jax.set_mesh(mesh.make_mesh(8, 1, 1, jax.devices("cpu")[:8])):
        assert compiler.is_known("xla_cpu_prefer_vector_width", 512)
        assert not compiler.is_known("xla_cpu_no_such_option", True)


def test_a_row_with_an_option_that_xla_does_not_support_is_left_out(monkeypatch):
    unknown = replace(ROWS["memory scheduler"], options={**WIDE, "xla_cpu_no_such_option": True})
    monkeypatch.setattr(compiler, "TABLE", (unknown,))
    assert compiler.towers() is None


def test_without_ynnpack_xla_compiles_matrix_products_itself():
    square = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    product = jax.jit(lambda a, b: jax.nn.gelu(a @ b)).lower(square, square)
    default, without = (product.compile(compiler_options=o).as_text() for o in (None, dict(NO_YNNPACK)))
    assert "__ynn_fusion" in default and "__ynn_fusion" not in without


@pytest.mark.parametrize("differentiated", [False, True])
def test_ynnpack_runs_the_products_of_a_stem_but_no_convolution(differentiated):
    graph, params = nnx.split(ConvStem(16, 256, residual=True, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    forward = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    function = jax.grad(lambda params, x: (forward(params, x) ** 2).sum()) if differentiated else forward
    compiled = jax.jit(function, compiler_options=dict(YNNPACK))
    program = compiled.lower(params, jax.ShapeDtypeStruct((256, 64, 64, 3), jnp.float32)).compile().as_text()
    bodies = dict(re.findall(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL))
    delegated = [bodies[name] for name in re.findall(r"kind=kCustom, calls=%?([\w.-]+)[^\n]*__ynn_fusion", program)]
    assert any(" dot(" in body for body in delegated)
    assert program.count(" convolution(") >= 6 and not any(" convolution(" in body for body in delegated)


@pytest.mark.parametrize(
    ("processor", "options"),
    [
        (("AuthenticAMD", 25), NO_YNNPACK),
        (("AuthenticAMD", 26), YNNPACK),
        (("GenuineIntel", 6), {**YNNPACK, **WIDE}),
        (("", 0), YNNPACK),
    ],
)
def test_each_kind_of_processor_has_its_options(monkeypatch, processor, options):
    monkeypatch.setattr(compiler, "_vendor_and_family", lambda: processor)
    assert compiler.towers() == {**SCHEDULER, **options}
    with compiler.compiling_for("gpu"):
        assert not any(name.startswith("xla_cpu") for name in compiler.towers() or {})


def test_a_program_is_traced_with_the_special_operations_of_its_target():
    half = jnp.ones((2, 8, 8, 4), jnp.bfloat16)
    for backend in ("cpu", "tpu"):
        with compiler.compiling_for(backend):
            assert (compiler.towers() is not None) == compiler.on_cpu() == (backend == "cpu")
            product = str(jax.make_jaxpr(lambda x, k: contract(x, k))(half, half[0, 0].T))
        assert ("preferred_element_type=float32" in product) == (backend == "cpu")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux has this file")
def test_the_vendor_of_this_processor_is_read():
    vendor, family = compiler._vendor_and_family()
    assert vendor in Path("/proc/cpuinfo").read_text()
    assert platform.machine() != "x86_64" or (vendor and family)
