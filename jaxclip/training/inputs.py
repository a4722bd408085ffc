"""From a configuration to what a run reads: the prepared dataset, its records, and batches on the devices."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.catalog import builder, groups, library
from jaxclip.catalog.builder import Source
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber
from jaxclip.pipeline import text
from jaxclip.pipeline.batches import Partners, training_batches
from jaxclip.pipeline.images import ImageAugmentation
from jaxclip.pipeline.records import Records
from jaxclip.training import distributed
from jaxclip.training import mesh as meshes
from jaxclip.training.progress import bar
from jaxclip.training.setup import Towers


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

    prepared = Path(distributed.from_primary("prepare", find_or_prepare))
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


def image_augmentation(config: Config) -> ImageAugmentation:
    """Returns what the configuration says of training pictures."""
    given = config.augmentation
    return ImageAugmentation(given.crop_area, given.crop_aspect, given.flip)


def device_batches(
    config: Config,
    towers: Towers,
    train: Records,
    partners: Partners | None = None,
    *,
    first: int,
    last: int,
    canvas: int = 0,
) -> tuple[Any, Callable]:
    """Returns the batches of steps first to last - 1 on the host, and the function that places one on the devices."""
    given, sharding = config.augmentation, meshes.batch_sharding(towers.mesh)
    batches = training_batches(
        train,
        towers.tokenizer,
        towers.preprocess,
        image_augmentation(config),
        text.TextAugmentation(given.keep_attributes, given.keep_words, given.prompts),
        partners,
        batch_size=config.batch_size,
        seed=config.seed,
        first_step=first,
        last_step=last,
        rows=meshes.process_rows(sharding, config.batch_size),
        workers=config.data.workers,
        canvas=canvas,
    )

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: meshes.place_rows(sharding, config.batch_size, rows) for name, rows in batch.items()}

    return batches, place


def data_fingerprint(prepared: Path) -> str:
    """Returns the fingerprint of a prepared dataset's products and splits."""
    return builder.about(prepared)["fingerprint"]
