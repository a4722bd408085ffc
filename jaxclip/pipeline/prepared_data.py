"""The configured catalogue's prepared dataset: found, or prepared first."""

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
    """Returns the folder of the configured catalogue's prepared dataset, preparing it first where there is none.

    `whole` asks for all of a catalogue, where no split is needed: by default where data.split is all. `runner` and
    `beam_options` prepare it on Apache Beam. Of several processes the first prepares.

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
    """Returns the training records that the towers see, and those held back from them for a second stage.

    Whole groups are held back, which ones depends on `data.split_seed` alone; None where `data.second_stage` is 0.

    Raises:
      UserError: `data.second_stage` leaves the towers nothing, or is too few for one group.
    """
    records = Records(prepared, "train", config.data.train)
    if not config.data.second_stage:
        return records, None
    names = [product.group for product, _ in bar(records.products(), total=len(records), desc="reading groups")]
    held = np.asarray(groups.split(names, config.data.second_stage, config.data.split_seed))
    return records.take(np.flatnonzero(~held)), records.take(np.flatnonzero(held))


def make_describer(config: Config) -> ProductDescriber | None:
    """Returns what describes products in preparation, None where the configuration wants no features."""
    return None if config.features.detector == "none" else ProductDescriber(**vars(config.features))


def data_fingerprint(prepared: Path) -> str:
    """Returns the fingerprint of a prepared dataset's products and splits."""
    return builder.metadata(prepared)["fingerprint"]
