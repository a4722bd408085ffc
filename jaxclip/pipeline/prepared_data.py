"""Finds the configured catalogue's prepared dataset, or prepares it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxclip.catalog import builder, groups, library
from jaxclip.catalog.builder import Source
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber
from jaxclip.pipeline.records import Records
from jaxclip.runtime import distributed
from jaxclip.runtime.progress import bar


def prepared_dataset(
    config: Config,
    *,
    whole: bool | None = None,
    say: Callable[[str], None],
    runner: str = "",
    beam_options: Sequence[str] = (),
) -> Path:
    """Returns the folder of the configured catalogue's prepared dataset, preparing it if there is none.

    With `whole`, the dataset holds the entire catalogue without splits; the default is True if data.split is all. With
    `runner` and `beam_options`, Apache Beam prepares it. If there are several processes, the first one prepares it.

    Raises:
      UserError: there is nothing to prepare, or another process does not see what the first one prepared.
    """
    data = config.data
    columns = {role: name for role, name in vars(data.columns).items() if name}
    path = Path(data.path).expanduser().resolve() if data.path else Path()
    test = 0 if (data.split == "all" if whole is None else whole) else data.test
    source = Source(data.reader, path, test, data.split_seed, columns, make_describer(config))
    drawn = (data.drawn_products, data.drawn_seed)

    def find_or_prepare() -> str:
        execution = {"workers": data.workers, "runner": runner, "beam_options": beam_options}
        return str(library.find_or_prepare(source, data.prepared, drawn=drawn, progress=bar, say=say, **execution))

    prepared = Path(distributed.broadcast("prepare", find_or_prepare))
    if not builder.is_prepared(prepared):
        raise UserError(
            f"process {distributed.process_id()} sees no prepared dataset in {prepared}: name a folder that all "
            "processes share with --config.data.prepared or $JAXCLIP_CACHE, or copy it to each machine"
        )
    return prepared


def training_records(config: Config, prepared: Path) -> tuple[Records, Records | None]:
    """Returns the records on which the towers are trained, and those reserved for the second stage.

    Only complete groups are reserved, selected by `data.split_seed`; None if `data.second_stage` is 0.

    Raises:
      UserError: `data.second_stage` leaves no records for the towers, or is too small for a single group.
    """
    records = Records(prepared, "train", config.data.train)
    if not config.data.second_stage:
        return records, None
    names = [product.group for product, _ in bar(records.products(), total=len(records), desc="reading groups")]
    held = np.asarray(groups.split(names, config.data.second_stage, config.data.split_seed))
    return records.take(np.flatnonzero(~held)), records.take(np.flatnonzero(held))


def make_describer(config: Config) -> ProductDescriber | None:
    """Returns the describer that preparation uses, None if the configuration asks for no features."""
    return None if config.features.detector == "none" else ProductDescriber(**vars(config.features))


def data_fingerprint(prepared: Path) -> str:
    """Returns the hash of a prepared dataset's products and splits."""
    return builder.metadata(prepared)["fingerprint"]
