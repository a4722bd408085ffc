"""Finds the prepared dataset of a raw catalogue, and prepares it on first use."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxclip.catalog import builder
from jaxclip.catalog.builder import DESCRIBER_KEY, PARTS, Source
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.errors import UserError
from jaxclip.runtime.folders import cache, make_once

Progress = Callable[..., Iterable]


def drawn_path(products: int, seed: int) -> Path:
    """Returns the folder of the drawn catalogue of this size and seed."""
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
    """Returns the folder of the source's prepared dataset, preparing it first if there is none.

    Args:
      source: the raw catalogue; if its reader is "drawn", its path is ignored and the catalogue is drawn if missing.
      prepared: the folder of the prepared dataset, "" for a folder under `cache()`.
      drawn: number of products and seed of the drawn catalogue; ignored for other readers.
      progress: `progress(iterable, total=, desc=, unit=)` wraps the long loops.
      say: prints a line for the user.
      workers: see `builder.prepare`.
      runner: Apache Beam runner, see `builder.prepare`.
      beam_options: options of the runner, see `builder.prepare`.

    Raises:
      UserError: there is no catalogue at the path, the dataset in the folder was prepared with other settings, or
        preparing fails (see `builder.prepare`).
    """
    if prepared:
        check_format(Path(prepared), source)
    if source.reader == "drawn" and not source.parts:
        products, seed = drawn
        source = replace(source, path=drawn_path(products, seed))

        def draw() -> None:
            say(f"drawing a catalogue of {products:,} products into {source.path}")
            draw_catalogue(source.path, products, seed, lambda it: progress(it, desc="drawing", unit="img"))

        make_once(source.path.exists, draw, source.path.parent, "draws", say)
    if prepared and builder.is_prepared(Path(prepared)):
        _check_source(source, Path(prepared))
        return Path(prepared)
    if source.path == Path() and not source.parts:
        raise UserError(
            f"there is no prepared dataset in {prepared}: set --config.data.path to the catalogue to prepare"
        )
    for path in source.paths:
        if not path.exists():
            field = "data.sources" if source.parts else "data.path"
            raise UserError(f"there is no catalogue at {path}; set --config.{field} to one that exists")
    target = Path(prepared) if prepared else cache() / "prepared" / f"{source.path.name}-{source.key()}"

    def prepare() -> None:
        which = ", ".join(map(str, source.paths)) if source.parts else f"{source.path} ({source.reader})"
        say(f"preparing {which} into {target}")
        builder.prepare(source, target, progress=progress, workers=workers, runner=runner, beam_options=beam_options)
        say(summary(target))

    make_once(partial(builder.is_prepared, target), prepare, target.parent, "prepares", say)
    if prepared:  # another process may have prepared it with other settings meanwhile
        _check_source(source, target)
    return target


def check_format(prepared: Path, source: Source | None = None) -> None:
    """Raises UserError, with the command that prepares it again, if an earlier version prepared the dataset.

    With the source from which that version prepared it, it can be prepared anew, and nothing is raised.
    """
    recorded = builder.outdated(prepared)
    if recorded is None or (source is not None and _is_source(source, recorded)):
        return
    names = ("reader", "path", "test", "split_seed")
    fields = {name: recorded[name] for name in names if recorded["reader"] != "drawn" or name != "path"}
    fields |= {f"columns.{role}": column for role, column in recorded["columns"].items()}
    values = [f"--config.data.{name}={value}" for name, value in fields.items()]
    values.append(f"--config.features.detector={recorded.get(DESCRIBER_KEY, {}).get('detector', 'none')}")
    command = ["python", "-m", "jaxclip.prepare", *values, f"--config.data.prepared={prepared}"]
    raise UserError(
        f"{prepared} was prepared by an earlier version of jaxclip, whose format has one picture for each product: "
        f"prepare it again with {shlex.join(command)}"
    )


def _is_source(source: Source, recorded: Mapping[str, Any]) -> bool:
    """Returns whether a dataset with these recorded settings was prepared from a catalogue of this reader and path."""
    names = ("reader",) if source.reader == "drawn" else ("reader", "path")
    return not source.parts and all(source.settings()[name] == recorded[name] for name in names)


def reader_of(path: Path, default: str) -> str:
    """Returns the reader that a raw catalogue's styles.csv or file suffix implies, or `default` if neither does.

    "folder" replaces a `default` of "drawn", because that reader is only for drawn catalogues.
    """
    if (path / "styles.csv").exists():
        return "fashion_product_images"
    by_suffix = {".csv": "table", ".tsv": "table", ".tar": "webdataset", ".h5": "fashion_gen", ".hdf5": "fashion_gen"}
    return by_suffix.get(path.suffix.lower(), "folder" if default == "drawn" else default)


def summary(prepared: Path) -> str:
    """Returns one line with the numbers of products, groups, dropped and mended oddities, and the data card's path."""
    facts = builder.metadata(prepared)
    splits = ", ".join(f"{split} {count:,}" for split, count in facts["splits"].items())
    oddities = [f"{count:,} {kind}" for kind in ("dropped", "mended") if (count := sum(facts[kind].values()))]
    return (
        f"{facts['products']:,} products in {facts['groups']:,} groups ({splits})"
        + (f", {facts['pictures']:,} pictures" if facts["pictures"] > facts["products"] else "")
        + (f"; {', '.join(oddities)}: listed in" if oddities else "; data card:")
        + f" {prepared / builder.CARD}"
    )


def _check_source(source: Source, prepared: Path) -> None:
    recorded, current = builder.metadata(prepared)["source"], source.settings()
    if source.path == Path() or not all(path.exists() for path in source.paths):
        recorded, current = _without_paths(recorded), _without_paths(current)
    if source.test == 0:
        current |= {name: recorded[name] for name in ("test", "validation", "split_seed")}
    if differing := [key for key in current if current[key] != recorded.get(key)]:
        raise UserError(
            f"{prepared} was prepared with other settings: "
            + ", ".join(f"{_field(key)} was {recorded.get(key)!r}, is {current[key]!r}" for key in differing)
            + "; give another folder as --config.data.prepared, or leave data.prepared out"
        )


def _without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a source, of whose catalogues only the names and the readers are left."""
    kept = {key: value for key, value in settings.items() if key != "path"}
    if PARTS in kept:
        kept[PARTS] = {name: reader for name, (reader, _) in kept[PARTS].items()}
    return kept


def _field(key: str) -> str:
    """Returns the field of the configuration that a setting of a source comes from."""
    return {DESCRIBER_KEY: key, PARTS: "data.sources", "unit": "data.product"}.get(key, f"data.{key}")
