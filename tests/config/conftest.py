"""Fixtures for the tests of the configuration."""

import pytest

from jaxclip import config
from jaxclip.errors import UserError


@pytest.fixture(scope="session")
def problems():
    """A function that returns the list of problems for which settings are refused."""

    def problems(settings, overrides=None):
        with pytest.raises(UserError) as raised:
            config.build(settings, overrides)
        message = str(raised.value)
        first, *rest = message.splitlines()
        if not rest:
            return [first.removeprefix("config: ")]
        assert first == f"config: {len(rest)} problems"
        return [line.removeprefix("  - ") for line in rest]

    return problems
