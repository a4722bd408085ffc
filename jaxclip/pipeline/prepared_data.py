"""Finds or prepares the dataset of the configured catalogue."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxclip.catalog import builder, groups, library
from jaxclip.catalog.builder import Source
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber
from jaxclip.pipeline.order import Mixture, Order, shuffled
from jaxclip.pipeline.records import Records
from jaxclip.runtime import distributed
from jaxclip.runtime.progress import bar

MIXTURE = "mixture"
"""Name of a dataset of several catalogues."""


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
    parts = {name: (reader, path) for name, (reader, path, _) in source_names(config).items()}
    path = Path(data.path).expanduser().resolve() if data.path else Path()
    if whole is None:
        whole = data.split == "all"
    test = 0 if whole else data.test
    source = Source(
        data.reader,
        Path(MIXTURE) if parts else path,
        test,
        data.split_seed,
        columns,
        make_describer(config),
        validation=0 if whole else data.validation,
        unit=data.product,
        parts=parts,
    )
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


def source_names(config: Config) -> dict[str, tuple[str, Path, float]]:
    """Returns name -> (reader, path, weight) of each catalogue of data.sources; empty if there is only one catalogue.

    The name is that of the file or folder; a number follows it if an earlier catalogue has the same.
    """
    named: dict[str, tuple[str, Path, float]] = {}
    for reader, location, weight in config.data.sources:
        path = Path(location).expanduser().resolve()
        name = next(n for n in itertools.chain([path.stem], map(f"{path.stem}-{{}}".format, itertools.count(2)))
                    if n not in named)  # fmt: skip
        named[name] = (reader, path, weight)
    return named


def training_order(config: Config, records: Records) -> Order:
    """Returns the order of the training records: by the weights of data.sources, if there are several catalogues.

    Raises:
      UserError: as `Mixture.of`.
    """
    sources = source_names(config)
    if not sources:
        return shuffled(len(records), config.seed)
    weights = [weight for _, _, weight in sources.values()]
    return Mixture.of(list(sources), weights, records.sources()).order(config.seed)


def training_records(config: Config, prepared: Path) -> tuple[Records, Records | None]:
    """Returns the records on which the towers are trained, and the records reserved for the second stage.

    Whole groups are reserved, chosen by `data.split_seed`. The second value is None if `data.second_stage` is 0.

    Raises:
      UserError: `data.second_stage` leaves no records for the towers, or is too small for a single group.
    """
    records = Records(prepared, "train", config.data.train)
    if not config.data.second_stage:
        return records, None
    names = [str(group) for group in records.groups()]
    reserved = np.asarray(groups.split(names, config.data.second_stage, config.data.split_seed, "data.second_stage"))
    return records.take(np.flatnonzero(~reserved)), records.take(np.flatnonzero(reserved))


def make_describer(config: Config) -> ProductDescriber | None:
    """Returns the describer that preparation uses; None if features.detector is "none"."""
    return None if config.features.detector == "none" else ProductDescriber(**vars(config.features))


def data_fingerprint(prepared: Path) -> str:
    """Returns the hash of a prepared dataset's products and splits; it does not cover computed features."""
    return builder.metadata(prepared)["fingerprint"]
