"""Checks of fixed dataset layouts, and white space clean-up, shared by the readers."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxclip.errors import UserError


def check(path: Path, columns: Mapping[str, str], required: Iterable[str], *, dataset: str, source: str) -> None:
    """Checks that a folder has the files and folders of a dataset's layout, and that no columns are configured.

    Args:
      path: the folder.
      columns: the reader's `columns`; must be empty, because a fixed layout has fixed columns.
      required: paths relative to the folder; the name of a folder ends in "/".
      dataset: name of the dataset for error messages.
      source: a sentence that says where to fetch the dataset and where to put each file.

    Raises:
      UserError: a path is missing, or `columns` is not empty; the message lists all missing paths and the source.
    """
    if any(columns.values()):
        raise UserError(f"{dataset} has fixed columns: leave --config.data.columns out.")
    missing = [name for name in required if not _exists(path / name, folder=name.endswith("/"))]
    if missing:
        raise UserError(f"{path} is not a copy of {dataset}: it lacks {', '.join(missing)}. {source}")


def collapse(text: str) -> str:
    """Returns the text stripped, with every run of white space replaced by one space."""
    return " ".join(text.split())


def _exists(path: Path, *, folder: bool) -> bool:
    return path.is_dir() if folder else path.is_file()
