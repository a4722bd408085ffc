"""Chooses between an operation's plain definition and a faster form written for one back end."""

from collections.abc import Callable
from functools import wraps

from jaxtyping import Array

from jaxclip.models import cpu, gpu
from jaxclip.runtime import compiler

MODULES = {"cpu": cpu, "gpu": gpu}
"""Back end -> the module of its forms; a form has the name of the plain definition that it replaces."""


def per_backend(plain: Callable[..., Array]) -> Callable[..., Array]:
    """Returns an operation that calls `plain`, or its faster form if `compiler.TABLE` has a row for one.

    The choice is made whenever the operation is traced, by the back end that the program is compiled for and by the
    dtype of the first argument.
    """

    @wraps(plain)
    def operation(x: Array, *args, **options) -> Array:
        if compiler.has_form(plain.__name__, x.dtype):
            return getattr(MODULES[compiler.backend()], plain.__name__)(x, *args, **options)
        return plain(x, *args, **options)

    return operation
