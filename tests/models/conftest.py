"""The towers of these tests are tiny: compiling them costs more than running them."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(quick_compilation):
    """Leaves XLA's optimisations out in every module here."""
