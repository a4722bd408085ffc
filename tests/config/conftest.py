"""Fixtures of the configuration's tests."""

import pytest

from jaxclip import config
from jaxclip.errors import UserError


@pytest.fixture(scope="session")
def problems():
    """A function that returns the lines of the error that settings raise."""

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
