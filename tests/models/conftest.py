"""Compiles without optimisation: the towers of these tests are so small that compiling takes longer than running."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(quick_compilation):
    """Disables XLA's optimisations in every test module of this folder."""
