"""Reads a file of configs/: a Python file whose get_config returns an ml_collections.ConfigDict."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from jaxclip.errors import UserError


def read_file(location: str) -> ConfigDict:
    """Returns get_config() of "PATH", or get_config(VARIANT) of "PATH:VARIANT".

    Raises:
      UserError: there is no such file, it is not Python, it has no get_config, or the variant is missing, not accepted
        or unknown.
    """
    path, colon, variant = location.partition(":")
    get_config = getattr(_load(Path(path).expanduser()), "get_config", None)
    if get_config is None:
        raise UserError(f"{path} has no function get_config: --config takes a file such as configs/quickstart.py")
    arguments = (variant,) if colon else ()
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        problem = f"has no variants: leave :{variant} out" if colon else "needs a variant, as PATH:VARIANT"
        raise UserError(f"--config={location}: {path} {problem}") from None
    return get_config(*arguments)


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"--config={path}: there is no such file; give one of configs/, such as configs/quickstart.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise UserError(f"--config={path} is not a Python file: give one of configs/, such as configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path} is not valid Python, at line {error.lineno}: {error.msg}") from None
    return module
