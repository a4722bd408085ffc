"""XLA's CPU compiler is asked for what it knows, and for nothing that it does not."""

import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxclip.models import compiler


def test_xla_knows_the_options():
    assert compiler.options(compiler.TOWERS) == compiler.TOWERS
    if jax.__version_info__ < (0, 11):
        assert compiler.options(compiler.RANKS) == compiler.RANKS


def test_an_option_that_xla_does_not_know_leaves_its_defaults():
    assert compiler.options({**compiler.RANKS, "xla_cpu_no_such_option": True}) is None


def test_a_product_that_would_go_to_ynnpack_stays_with_xla():
    square = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    product = jax.jit(lambda a, b: jax.nn.gelu(a @ b)).lower(square, square)
    usual, ours = (product.compile(compiler_options=o).as_text() for o in (None, compiler.options(compiler.TOWERS)))
    assert "__ynn_fusion" in usual and "__ynn_fusion" not in ours


@pytest.mark.parametrize(("vendor", "wanted"), [("AuthenticAMD", compiler.TOWERS), ("GenuineIntel", None), ("", None)])
def test_ynnpack_is_kept_from_towers_where_it_is_slower(monkeypatch, vendor, wanted):
    monkeypatch.setattr(compiler, "_vendor", lambda: vendor)
    assert compiler.towers() == wanted


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux names the processor's maker there")
def test_this_processor_has_a_maker():
    assert compiler._vendor() in Path("/proc/cpuinfo").read_text()
    assert platform.machine() != "x86_64" or compiler._vendor()
