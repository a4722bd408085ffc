"""Finds or prepares the dataset of the configured catalogue."""

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

    If there are several processes, process 0 prepares it.

    Args:
      whole: whether the dataset is the entire catalogue without splits; None: only if data.split is "all".
      say: prints a line for the user.
      runner: Apache Beam runner that prepares the dataset; "" prepares it in this process.
      beam_options: options of the runner, as "--name=value".

    Raises:
      UserError: there is no catalogue to prepare, or a process cannot see the folder that process 0 prepared.
    """
    data = config.data
    columns = {role: name for role, name in vars(data.columns).items() if name}
    path = Path(data.path).expanduser().resolve() if data.path else Path()
    if whole is None:
        whole = data.split == "all"
    test = 0 if whole else data.test
    source = Source(data.reader, path, test, data.split_seed, columns, make_describer(config))
    drawn = (data.drawn_products, data.drawn_seed)

    def find_or_prepare() -> str:
        execution = {"workers": data.workers, "runner": runner, "beam_options": beam_options}
        return str(library.find_or_prepare(source, data.prepared, drawn=drawn, progress=bar, say=say, **execution))

    prepared = Path(distributed.broadcast("prepare", find_or_prepare))
    if not builder.is_prepared(prepared):
        raise UserError(
            f"process {distributed.process_id()} finds no prepared dataset in {prepared}: name a folder that all "
            "processes share with --config.data.prepared or $JAXCLIP_CACHE, or copy the dataset to each machine"
        )
    return prepared


def training_records(config: Config, prepared: Path) -> tuple[Records, Records | None]:
    """Returns the records on which the towers are trained, and the records reserved for the second stage.

    Whole groups are reserved, chosen by `data.split_seed`. The second value is None if `data.second_stage` is 0.

    Raises:
      UserError: `data.second_stage` leaves no records for the towers, or is too small for a single group.
    """
    records = Records(prepared, "train", config.data.train)
    if not config.data.second_stage:
        return records, None
    names = [product.group for product, _ in bar(records.products(), total=len(records), desc="reading groups")]
    reserved = np.asarray(groups.split(names, config.data.second_stage, config.data.split_seed))
    return records.take(np.flatnonzero(~reserved)), records.take(np.flatnonzero(reserved))


def make_describer(config: Config) -> ProductDescriber | None:
    """Returns the describer that preparation uses; None if features.detector is "none"."""
    return None if config.features.detector == "none" else ProductDescriber(**vars(config.features))


def data_fingerprint(prepared: Path) -> str:
    """Returns the hash of a prepared dataset's products and splits; it does not cover computed features."""
    return builder.metadata(prepared)["fingerprint"]
