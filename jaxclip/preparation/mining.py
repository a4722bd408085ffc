"""Mines the incorrect pairs of a dataset's training split and stores them as a table in its folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.catalog import builder, captions
from jaxclip.catalog.dataset import VERSION
from jaxclip.config import Config, load_config
from jaxclip.errors import UserError
from jaxclip.evaluation.evaluator import Evaluator
from jaxclip.features import classical, incorrect_pairs, pair_table
from jaxclip.features.pair_table import MinedPairs
from jaxclip.pipeline import prepared_data
from jaxclip.pipeline.records import Records
from jaxclip.preparation import single_encoders
from jaxclip.runtime import distributed, files
from jaxclip.runtime import mesh as meshes
from jaxclip.runtime.progress import bar
from jaxclip.towers.adapter_base import checkpoint_params
from jaxclip.towers.checkpoints import Checkpoints
from jaxclip.towers.pretrained import checkpoint_folder
from jaxclip.towers.towers import load_towers

FOLDER = "incorrect_pairs"
TRAIN = "train"
KEY = "incorrect_pairs.features"
CLASSICAL, TOWERS, ENCODERS = "classical", "towers", "encoders"
Features = tuple[np.ndarray, np.ndarray]


def find_or_mine(config: Config, prepared: Path, *, say: Callable[[str], None]) -> MinedPairs:
    """Returns the configured incorrect pairs of the training split, mining them first if they are not stored yet.

    Pairs are stored in a table under a hash of their `settings`, so other settings create another table; the dataset
    itself is never changed. Indices refer to `Records(prepared, "train")`.

    Raises:
      UserError: the dataset has no training split, the configured features cannot be computed from it, or no pairs can
        be mined from it.
    """
    pair_settings = settings(config, prepared)
    path = table(prepared, pair_settings)
    if not distributed.broadcast("mined", path.exists):
        _mine(config, Records(prepared, TRAIN), path, pair_settings, say)
        distributed.barrier("mined")
    return pair_table.load(path)[0]


def _mine(
    config: Config,
    records: Records,
    path: Path,
    pair_settings: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Mines the pairs and writes the table in the primary process; other processes only help to embed with towers."""
    rule = config.incorrect_pairs
    if not (distributed.is_primary() or rule.features.startswith(TOWERS)):
        return
    images, texts, groups = _features(config, records, say)
    if not distributed.is_primary():
        return
    say(f"mining incorrect pairs ({rule.variant}) of {len(records):,} training products")
    pairs = incorrect_pairs.mine(
        images, texts, groups, variant=rule.variant, clusters=rule.clusters, seed=rule.seed, progress=bar
    )
    path.parent.mkdir(exist_ok=True)
    pair_table.save(path, pairs, pair_settings)


def settings(config: Config, prepared: Path) -> dict[str, Any]:
    """Returns the settings by which a dataset's table of pairs is identified, as JSON values."""
    rule = config.incorrect_pairs
    pair_settings = {
        "variant": rule.variant,
        "seed": rule.seed,
        "features": rule.features,
        "data_fingerprint": prepared_data.data_fingerprint(prepared),
        "format": VERSION,  # another format may order the records otherwise
        "caption_template": config.data.caption_template,
        "describer": builder.metadata(prepared)["source"].get(builder.DESCRIBER_KEY),
    }
    if rule.variant == "clustered":
        pair_settings["clusters"] = rule.clusters
    kind, _, workdir = rule.features.partition(":")
    if kind == TOWERS:
        pair_settings["step"] = _newest_checkpoint(Path(workdir).expanduser())[1]
    return pair_settings


def table(prepared: Path, pair_settings: dict[str, Any]) -> Path:
    """Returns the path of the table of pairs with these settings; the file need not exist."""
    key = files.fingerprint(pair_settings, 8)
    return prepared / FOLDER / f"{pair_settings['variant'].replace(':', '-')}-{key}.npz"


def _features(
    config: Config,
    records: Records,
    say: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns picture features, text features and groups (integers), one row per product of `records`."""
    texts, groups = [], []
    for product, group in bar(records.products(), total=len(records), desc="reading captions", unit="product"):
        texts.append(_text(config, product))
        groups.append(group)
    kind, _, sources = config.incorrect_pairs.features.partition(":")
    if kind == TOWERS:
        workdir = Path(sources).expanduser()
        features = _embed_with_towers(replace(load_config(workdir), mesh=config.mesh), workdir, records, say)
    elif kind == ENCODERS:
        vit, bert = (checkpoint_folder(name, KEY) for name in sources.split(","))
        say(f"describing {len(records):,} training products with {vit.name} and {bert.name}")
        features = single_encoders.picture_features(vit, records), single_encoders.text_features(bert, texts)
    else:
        features = _classical(records, texts)
    return *features, np.asarray(groups)


def _text(config: Config, product: Any) -> str:
    """Returns the caption that the caption template builds from the first caption and the attributes of a product."""
    title = product.captions[0] if product.captions else ""
    return captions.build(title, product.attributes, config.data.caption_template)


def _classical(records: Records, texts: Sequence[str]) -> Features:
    """Returns picture features from the stored colours and textures, and text features from the words of `texts`."""
    columns = records.columns(("colour_histogram", "texture"))
    return (
        classical.image_features(columns["colour_histogram"], columns["texture"]),
        classical.text_features(texts),
    )


def _embed_with_towers(config: Config, workdir: Path, records: Records, say: Callable[[str], None]) -> Features:
    """Returns the embeddings of main pictures and of first captions, computed by the newest checkpoint of `workdir`."""
    checkpoints, step = _newest_checkpoint(workdir)
    say(f"embedding {len(records):,} training products with step {step} of {workdir}")
    towers = load_towers(config, workdir)
    meshes.open_collectives(towers.mesh)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, step)
        evaluator = Evaluator(towers, records.main_pictures(), config, completed=False)
        texts, images = evaluator.embed(params)
    first_captions = np.unique(evaluator.queries.caption_products, return_index=True)[1]
    if len(first_captions) != len(images):
        missing = len(images) - len(first_captions)
        raise UserError(
            f"{KEY}: {missing} training products have no caption, but the towers of {workdir} compare captions: add "
            f"captions, or set {KEY} = {CLASSICAL}"
        )
    return images, texts[first_captions]


def _newest_checkpoint(workdir: Path) -> tuple[Checkpoints, int]:
    """Returns a workdir's checkpoints and the newest step; raises UserError if there is none."""
    checkpoints = Checkpoints(workdir, read_only=True)
    if not checkpoints.steps():
        raise UserError(f"{KEY}: {workdir} has no complete checkpoint")
    return checkpoints, checkpoints.steps()[-1]
