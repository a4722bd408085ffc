"""Where prepared datasets are kept, and how a raw catalogue becomes one on first use."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from jaxclip.catalog import builder
from jaxclip.catalog.builder import DESCRIBED, Source
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.errors import UserError
from jaxclip.runtime.folders import cache, make_once

Progress = Callable[..., Iterable]


def drawn_path(products: int, seed: int) -> Path:
    """Returns where the drawn catalogue of this size and seed is kept."""
    return cache() / "drawn" / f"{products}-products-seed-{seed}"


def find_or_prepare(
    source: Source,
    prepared: str,
    *,
    drawn: tuple[int, int],
    progress: Progress,
    say: Callable[[str], None],
    workers: int = 0,
    runner: str = "",
    beam_options: Sequence[str] = (),
) -> Path:
    """Returns the folder of the source's prepared dataset, preparing it first (and saying so) where there is none.

    Args:
      source: the raw catalogue; of the drawn one the path is ignored.
      prepared: the folder the user names, "" for one under `cache()`.
      drawn: number of products and seed of the drawn catalogue.
      progress: wraps long loops, as tqdm does.
      say: takes a line for the user.
      workers: as `builder.prepare` takes it.
      runner: of Apache Beam and its options, as `builder.prepare` takes them.
      beam_options: see there.

    Raises:
      UserError: there is no catalogue at the path, or the folder holds a dataset prepared from something else.
    """
    if source.reader == "drawn":
        products, seed = drawn
        source = replace(source, path=drawn_path(products, seed))

        def draw() -> None:
            say(f"drawing a catalogue of {products:,} products into {source.path}")
            draw_catalogue(source.path, products, seed, lambda it: progress(it, desc="drawing", unit="img"))

        make_once(source.path.exists, draw, source.path.parent, "draws", say)
    if prepared and builder.is_prepared(Path(prepared)):
        _check_source(source, Path(prepared))
        return Path(prepared)
    if source.path == Path():
        raise UserError(f"there is no prepared dataset in {prepared}, and data.path names no catalogue to make it from")
    if not source.path.exists():
        raise UserError(f"there is no catalogue at {source.path}; set --config.data.path")
    target = Path(prepared) if prepared else cache() / "prepared" / f"{source.path.name}-{source.key()}"

    def prepare() -> None:
        say(f"preparing {source.path} ({source.reader}) into {target}")
        builder.prepare(source, target, progress=progress, workers=workers, runner=runner, beam_options=beam_options)
        say(summary(target))

    make_once(partial(builder.is_prepared, target), prepare, target.parent, "prepares", say)
    if prepared:  # perhaps by another process, from something else
        _check_source(source, target)
    return target


def reader_of(path: Path, otherwise: str) -> str:
    """Returns the reader of a raw catalogue by its layout where that is plain to see, else `otherwise`.

    Where that is "drawn", which reads only what it has drawn, it is "folder".
    """
    if (path / "styles.csv").exists():
        return "fashion_product_images"
    by_suffix = {".csv": "table", ".tsv": "table", ".tar": "webdataset", ".h5": "fashion_gen", ".hdf5": "fashion_gen"}
    return by_suffix.get(path.suffix.lower(), "folder" if otherwise == "drawn" else otherwise)


def summary(prepared: Path) -> str:
    """Returns the line that says what a preparation kept, dropped and mended."""
    facts = builder.metadata(prepared)
    splits = ", ".join(f"{split} {count:,}" for split, count in facts["splits"].items())
    oddities = [f"{count:,} {kind}" for kind in ("dropped", "mended") if (count := sum(facts[kind].values()))]
    return (
        f"{facts['products']:,} products in {facts['groups']:,} groups ({splits})"
        + (f"; {', '.join(oddities)}: listed in" if oddities else "; data card:")
        + f" {prepared / builder.CARD}"
    )


def _check_source(source: Source, prepared: Path) -> None:
    recorded, wanted = builder.metadata(prepared)["source"], source.settings()
    if source.path == Path() or not source.path.exists():
        recorded, wanted = ({k: v for k, v in d.items() if k != "path"} for d in (recorded, wanted))
    if source.test == 0:
        wanted = {**wanted, "test": recorded["test"], "split_seed": recorded["split_seed"]}
    if differing := [key for key in wanted if wanted[key] != recorded.get(key)]:
        raise UserError(
            f"{prepared} was prepared from other settings: "
            + ", ".join(
                f"{'' if key == DESCRIBED else 'data.'}{key} was {recorded.get(key)!r}, is {wanted[key]!r}"
                for key in differing
            )
            + "; name another folder with --config.data.prepared or leave it out"
        )
