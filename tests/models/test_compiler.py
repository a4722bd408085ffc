"""XLA's CPU compiler is asked for what it knows, and for nothing that it does not."""

import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxclip.models import compiler
from jaxclip.models.linear import contract
from jaxclip.models.stem import convolve


def test_xla_knows_the_options():
    for wanted in (compiler.TOWERS, compiler.AMD, compiler.INTEL):
        assert compiler.options(wanted) == wanted
    if jax.__version_info__ < (0, 11):
        assert compiler.options(compiler.RANKS) == compiler.RANKS


def test_an_option_that_xla_does_not_know_leaves_its_defaults():
    assert compiler.options({**compiler.RANKS, "xla_cpu_no_such_option": True}) is None


def test_a_product_that_would_go_to_ynnpack_stays_with_xla():
    square = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    product = jax.jit(lambda a, b: jax.nn.gelu(a @ b)).lower(square, square)
    usual, ours = (product.compile(compiler_options=o).as_text() for o in (None, compiler.options(compiler.AMD)))
    assert "__ynn_fusion" in usual and "__ynn_fusion" not in ours


@pytest.mark.parametrize(
    ("maker", "wanted"),
    [
        (("AuthenticAMD", 25), compiler.AMD),
        (("AuthenticAMD", 26), {}),
        (("GenuineIntel", 6), compiler.INTEL),
        (("", 0), {}),
    ],
)
def test_each_maker_s_processors_have_their_options(monkeypatch, maker, wanted):
    monkeypatch.setattr(compiler, "_maker", lambda: maker)
    assert compiler.towers() == compiler.TOWERS | wanted
    with compiler.made_for("gpu"):
        assert compiler.towers() is None


def test_a_program_for_another_platform_is_written_as_it_is_there():
    half = jnp.ones((2, 8, 8, 4), jnp.bfloat16)
    for place in ("cpu", "tpu"):
        with compiler.made_for(place):
            assert (compiler.options(compiler.AMD) is not None) == (place == "cpu")
            product = str(jax.make_jaxpr(lambda x, k: contract(x, k))(half, half[0, 0].T))
            stem = str(jax.make_jaxpr(lambda x, k: convolve(x, k, stride=2))(half, jnp.ones((3, 3, 4, 4), half.dtype)))
        assert ("preferred_element_type=float32" in product) == (place == "cpu")
        assert ("conv_general_dilated" in stem) == (place == "tpu")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux names the processor's maker there")
def test_this_processor_has_a_maker():
    vendor, family = compiler._maker()
    assert vendor in Path("/proc/cpuinfo").read_text()
    assert platform.machine() != "x86_64" or (vendor and family)
