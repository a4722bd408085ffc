"""Text-to-image product retrieval with CLIP in JAX, from a laptop to a TPU pod."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxclip.serving.searcher import Searcher

__version__ = "0.1.0"


def load(
    workdir: str | Path,
    gallery: str | Path | None = None,
    *,
    step: str = "latest",
    rerank: str | Path | None = None,
    overrides: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> "Searcher":
    """Returns the searcher of a trained workdir: `jaxclip.load("runs/quickstart").search("blue ballet shoes", k=10)`.

    Args:
      workdir: folder of the run.
      gallery: catalogue to search, raw or prepared; None for the whole catalogue of the workdir, with all its splits.
      step: checkpoint: "latest", "best" or the number of a step. With `rerank`, "latest" means the step on which the
        re-ranker was trained, and another step is an error.
      rerank: workdir of a re-ranker that was trained on these towers.
      overrides: fields of the configuration, as text, such as {"data.reader": "folder"}.
      say: prints a line of progress; by default to standard error.

    Raises:
      jaxclip.errors.UserError: there is no such workdir, checkpoint or catalogue, or the re-ranker was trained on other
        towers.
    """
    from jaxclip import config  # imported here: these imports take seconds, which `jaxclip.__version__` does not need

    workdir, overrides = Path(workdir), {"data.split": "all", **(overrides or {})}
    trained = config.load_config(workdir)
    with_gallery = overrides if gallery is None else _with_gallery(Path(gallery), trained.data.reader, overrides)
    configuration = config.of_run(workdir, with_gallery)
    from jaxclip.catalog import builder, library
    from jaxclip.pipeline import prepared_data
    from jaxclip.serving.open import open_searcher

    if gallery is not None:
        library.check_format(Path(gallery))
    if gallery is not None and builder.is_prepared(Path(gallery)):
        prepared = Path(gallery)
    else:
        prepared = prepared_data.prepared_dataset(
            configuration, whole=not config.same_catalogue(trained, configuration), say=say
        )
    reranker = None if rerank is None else (Path(rerank), config.load_config(Path(rerank)))
    return open_searcher(configuration, workdir, prepared, step=step, rerank=reranker, say=say)


def _with_gallery(gallery: Path, own_reader: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """Returns the overrides that select a gallery, with the given overrides on top."""
    from jaxclip.catalog import library

    reader = library.reader_of(gallery, own_reader)
    return {"data.path": str(gallery), "data.reader": reader, "data.sources": "()", "data.prepared": "", **overrides}
