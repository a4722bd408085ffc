"""The towers of these tests are tiny: compiling them costs more than running them."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Leaves XLA's optimisations out while a module's tests run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
