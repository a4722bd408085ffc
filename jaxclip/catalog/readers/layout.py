"""What readers of fixed layouts share: is everything there, and where does one get it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxclip.errors import UserError


def check(path: Path, columns: Mapping[str, str], needed: Iterable[str], *, dataset: str, source: str) -> None:
    """Checks that a folder holds the files and folders of a dataset's layout.

    Args:
      path: the folder.
      columns: as a reader gets it; a fixed layout has none to name.
      needed: paths relative to the folder; a folder's end in "/".
      dataset: the dataset's name, for the error.
      source: where to fetch it and what to put where, as a sentence.

    Raises:
      UserError: names everything that is missing, with the source; or `columns` is not empty.
    """
    if any(columns.values()):
        raise UserError(f"{dataset} has fixed columns: leave --config.data.columns out.")
    missing = [name for name in needed if not _present(path / name, folder=name.endswith("/"))]
    if missing:
        raise UserError(f"{path} is no {dataset}: it lacks {', '.join(missing)}. {source}")


def collapse(text: str) -> str:
    """Returns the text without blanks around it or doubled in it."""
    return " ".join(text.split())


def _present(path: Path, *, folder: bool) -> bool:
    return path.is_dir() if folder else path.is_file()
