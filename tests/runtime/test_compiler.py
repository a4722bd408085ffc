"""XLA's CPU compiler is asked for what it knows, and for nothing that it does not."""

import platform
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxclip.models.linear import contract
from jaxclip.models.stem import ConvStem, convolve
from jaxclip.runtime import compiler


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(quick_compilation):
    """Leaves XLA's optimisations out: these networks are tiny, and compiling them costs more than running them."""


def test_xla_knows_the_options():
    for wanted in (compiler.TOWERS, compiler.NO_YNNPACK, compiler.YNNPACK, compiler.WIDE):
        assert compiler.options(wanted) == wanted
    older = compiler.EMITTERS if jax.__version_info__ < (0, 11) else {}
    assert compiler.ranks() == compiler.WIDE | older


def test_an_option_that_xla_does_not_know_leaves_its_defaults():
    assert compiler.options({**compiler.WIDE, "xla_cpu_no_such_option": True}) is None


def test_a_product_that_would_go_to_ynnpack_stays_with_xla():
    square = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    product = jax.jit(lambda a, b: jax.nn.gelu(a @ b)).lower(square, square)
    usual, ours = (product.compile(compiler_options=o).as_text() for o in (None, compiler.options(compiler.NO_YNNPACK)))
    assert "__ynn_fusion" in usual and "__ynn_fusion" not in ours


@pytest.mark.parametrize("differentiated", [False, True])
def test_ynnpack_has_products_and_sums_of_a_stem_and_no_convolution(differentiated):
    graph, params = nnx.split(ConvStem(16, 256, residual=True, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    call = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    called = jax.grad(lambda params, x: (call(params, x) ** 2).sum()) if differentiated else call
    compiled = jax.jit(called, compiler_options=compiler.options(compiler.YNNPACK))
    program = compiled.lower(params, jax.ShapeDtypeStruct((256, 64, 64, 3), jnp.float32)).compile().as_text()
    bodies = dict(re.findall(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL))
    handed = [bodies[name] for name in re.findall(r"kind=kCustom, calls=%?([\w.-]+)[^\n]*__ynn_fusion", program)]
    assert any(" dot(" in body for body in handed) and any(" reduce(" in body for body in handed)
    assert program.count(" convolution(") >= 6 and not any(" convolution(" in body for body in handed)


@pytest.mark.parametrize(
    ("maker", "wanted"),
    [
        (("AuthenticAMD", 25), compiler.NO_YNNPACK),
        (("AuthenticAMD", 26), compiler.YNNPACK),
        (("GenuineIntel", 6), compiler.YNNPACK | compiler.WIDE),
        (("", 0), compiler.YNNPACK),
    ],
)
def test_each_maker_s_processors_have_their_options(monkeypatch, maker, wanted):
    monkeypatch.setattr(compiler, "_maker", lambda: maker)
    assert compiler.towers() == compiler.TOWERS | wanted
    with compiler.compiling_for("gpu"):
        assert compiler.towers() is None


def test_a_program_for_another_platform_is_written_as_it_is_there():
    half = jnp.ones((2, 8, 8, 4), jnp.bfloat16)
    for place in ("cpu", "tpu"):
        with compiler.compiling_for(place):
            assert (compiler.options(compiler.NO_YNNPACK) is not None) == (place == "cpu")
            product = str(jax.make_jaxpr(lambda x, k: contract(x, k))(half, half[0, 0].T))
            stem = str(jax.make_jaxpr(lambda x, k: convolve(x, k, stride=2))(half, jnp.ones((3, 3, 4, 4), half.dtype)))
        assert ("preferred_element_type=float32" in product) == (place == "cpu")
        assert ("custom_vjp" in stem) == (place == "cpu")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux names the processor's maker there")
def test_this_processor_has_a_maker():
    vendor, family = compiler._maker()
    assert vendor in Path("/proc/cpuinfo").read_text()
    assert platform.machine() != "x86_64" or (vendor and family)
