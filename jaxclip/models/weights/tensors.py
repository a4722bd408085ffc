"""Tensors of safetensors files, read one at a time. Nothing is ever unpickled."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy has no bfloat16 without it
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxclip.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = {b"PK\x03\x04": "a zip archive", b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle"}
"""First bytes of a file written by torch.save or pickle -> what the file is."""


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint, not loaded; `read` loads one.

    Attributes:
      folder: folder of the checkpoint.
      locations: name -> the tensor's file and its name in that file.
      shapes: name -> shape.
    """

    folder: Path
    locations: Mapping[str, tuple[Path, str]]
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor with the dtype in which it is stored."""
        path, stored_name = self.locations[name]
        with _open(path) as file:
            return file.get_tensor(stored_name)

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """Returns the tensors under new names; those for which `rename` returns None are left out."""
        names = {name: new for name in self.locations if (new := rename(name)) is not None}
        locations = {new: self.locations[name] for name, new in names.items()}
        return Tensors(self.folder, locations, {new: self.shapes[name] for name, new in names.items()})


def open_tensors(folder: Path, name: str) -> Tensors:
    """Returns the tensors of FOLDER/NAME, or of the files that FOLDER/NAME.index.json lists; only headers are read.

    Raises:
      UserError: neither exists, a file is truncated or is not a safetensors file, a tensor does not hold floating-point
        numbers, or the index names a file outside the folder or disagrees with its files.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).exists():
        paths = [folder / name]
        expected = None
    elif index.exists():
        expected = _read_index(index)
        paths = [folder / file for file in sorted(set(expected.values()))]
    else:
        pickled = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))]
        hint = f", only {pickled[0]}, which would have to be unpickled: that can run any code" if pickled else ""
        raise UserError(f"{folder} has no {name}{hint}; give a folder with weights in {name}")
    locations: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with _open(path) as file:
            for tensor in file.keys():  # noqa: SIM118  not a dict
                view = file.get_slice(tensor)
                locations[tensor], shapes[tensor] = (path, tensor), tuple(view.get_shape())
                if view.get_dtype() not in FLOATS and not tensor.endswith("position_ids"):
                    raise UserError(f"{path}: {tensor} has dtype {view.get_dtype()}, not one of {', '.join(FLOATS)}")
    actual = {tensor: path.name for tensor, (path, _) in locations.items()}
    if expected not in (None, actual):
        wrong = sorted(tensor for tensor, _ in actual.items() ^ expected.items())
        raise UserError(
            f"{index} disagrees with the files that it lists, for example about {wrong[0]}: "
            "download the checkpoint again"
        )
    return Tensors(folder, locations, shapes)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; UserError if the file is missing or does not contain a JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give the folder of a complete checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} contains a value of type {type(value).__name__}, but must contain a JSON object")
    return value


def abbreviate(names: Sequence[str], limit: int = 3) -> str:
    """Returns the first `limit` names and the number of further ones, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read_index(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path} has no weight_map from tensors to files: download the checkpoint again")
    for file in files.values():
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise UserError(f"{path} names {file!r}: only safetensors files of the same folder are read")
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give the folder of a complete checkpoint") from None
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        for prefix, kind in PICKLES.items():
            if start.startswith(prefix):
                raise UserError(
                    f"{path} is {kind}, not a safetensors file, and is never unpickled: convert it to safetensors"
                ) from None
        raise UserError(
            f"{path} is not a safetensors file, or is truncated ({error}): download the file again"
        ) from None
