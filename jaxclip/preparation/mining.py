"""Mines the incorrect pairs of a dataset's training split and stores them as a table in its folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.catalog import captions
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

    A table is identified by everything that determines it: rule, seed, features and the dataset's fingerprint. A
    different rule creates a separate table; the dataset itself never changes. Indices refer to
    `Records(prepared, "train")`.

    Raises:
      UserError: the dataset has no training split or no features, or no pairs can be mined from it.
    """
    wanted = settings(config, prepared)
    path = table(prepared, wanted)
    if not distributed.broadcast("mined", path.exists):
        _mine(config, Records(prepared, TRAIN), path, wanted, say)
        distributed.barrier("mined")
    return pair_table.load(path)[0]


def _mine(
    config: Config,
    records: Records,
    path: Path,
    wanted: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Mines the pairs; only the first process writes the table, and the others only help to embed with towers."""
    given = config.incorrect_pairs
    if not (distributed.is_primary() or given.features.startswith(TOWERS)):
        return
    images, texts, groups = _features(config, records, say)
    if not distributed.is_primary():
        return
    say(f"mining incorrect pairs ({given.variant}) of {len(records):,} training products")
    pairs = incorrect_pairs.mine(
        images, texts, groups, variant=given.variant, clusters=given.clusters, seed=given.seed, progress=bar
    )
    path.parent.mkdir(exist_ok=True)
    pair_table.save(path, pairs, wanted)


def settings(config: Config, prepared: Path) -> dict[str, Any]:
    """Returns the settings that determine the pairs of a dataset, as JSON values."""
    given = config.incorrect_pairs
    wanted = {
        "variant": given.variant,
        "seed": given.seed,
        "features": given.features,
        "data_fingerprint": prepared_data.data_fingerprint(prepared),
    }
    if given.variant == "clustered":
        wanted["clusters"] = given.clusters
    kind, _, workdir = given.features.partition(":")
    if kind == TOWERS:
        wanted["step"] = _checkpoint(Path(workdir).expanduser())[1]
    return wanted


def table(prepared: Path, wanted: dict[str, Any]) -> Path:
    """Returns the path of the table with these settings."""
    key = files.fingerprint(wanted, 8)
    return prepared / FOLDER / f"{wanted['variant'].replace(':', '-')}-{key}.npz"


def _features(
    config: Config,
    records: Records,
    say: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns picture features, text features and groups, one row per product of the split."""
    worded, groups = [], []
    for product, group in bar(records.products(), total=len(records), desc="reading captions", unit="product"):
        worded.append(_text(config, product))
        groups.append(group)
    kind, _, where = config.incorrect_pairs.features.partition(":")
    if kind == TOWERS:
        workdir = Path(where).expanduser()
        images, texts = _from_towers(replace(load_config(workdir), mesh=config.mesh), workdir, records, say)
    elif kind == ENCODERS:
        vit, bert = (checkpoint_folder(name, KEY) for name in where.split(","))
        say(f"describing {len(records):,} training products with {vit.name} and {bert.name}")
        images, texts = single_encoders.picture_features(vit, records), single_encoders.text_features(bert, worded)
    else:
        images, texts = _classical(records, worded)
    return images, texts, np.asarray(groups)


def _text(config: Config, product: Any) -> str:
    title = product.captions[0] if product.captions else ""
    return captions.build(title, product.attributes, config.data.caption_template)


def _classical(records: Records, texts: Sequence[str]) -> Features:
    wanted = ("colour_histogram", "texture")
    stored = records.columns(wanted)
    return classical.image_features(*(stored[name] for name in wanted)), classical.text_features(texts)


def _from_towers(own: Config, workdir: Path, records: Records, say: Callable[[str], None]) -> Features:
    """Returns the embeddings of pictures and first captions, computed by a workdir's newest checkpoint."""
    checkpoints, step = _checkpoint(workdir)
    say(f"embedding {len(records):,} training products with step {step} of {workdir}")
    towers = load_towers(own, workdir)
    meshes.open_collectives(towers.mesh)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(own, towers, checkpoints, step)
        evaluator = Evaluator(towers, records, own)
        texts, images = evaluator.embed(params)
    firsts = np.unique(evaluator.queries.caption_products, return_index=True)[1]
    if len(firsts) != len(images):
        raise UserError(f"{len(images) - len(firsts)} training products have no caption: towers cannot compare texts")
    return images, texts[firsts]


def _checkpoint(workdir: Path) -> tuple[Checkpoints, int]:
    checkpoints = Checkpoints(workdir, read_only=True)
    if not checkpoints.steps():
        raise UserError(f"{KEY}: {workdir} has no complete checkpoint")
    return checkpoints, checkpoints.steps()[-1]
