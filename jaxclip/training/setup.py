"""From a configuration to everything a run needs: data, tokenizer, towers, mesh, optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from jaxclip.catalog import builder, groups, library
from jaxclip.catalog.builder import Source
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber
from jaxclip.models.clip import CLIPConfig
from jaxclip.models.presets import PRESETS, clip_config
from jaxclip.pipeline import text
from jaxclip.pipeline.batches import Shard, training_batches
from jaxclip.pipeline.images import ImageAugmentation
from jaxclip.pipeline.preprocess import FILENAME, Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.training import mesh as meshes
from jaxclip.training.optimizer import make_optimizer, make_schedule
from jaxclip.training.progress import bar
from jaxclip.training.state import TrainState, abstract_state, make_model

if TYPE_CHECKING:
    from jaxclip.config import Config

TOKENIZER = "tokenizer"
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Towers:
    """What it takes to restore and run the towers of a workdir."""

    preprocess: Preprocess
    tokenizer: PreTrainedTokenizerFast
    config: CLIPConfig
    graph: nnx.GraphDef
    mesh: Mesh
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: TrainState


def prepared_dataset(config: "Config", *, whole: bool, say: Callable[[str], None]) -> Path:
    """Returns the folder of the configured catalogue's prepared dataset, preparing it first where there is none.

    `whole` asks for all of a catalogue, where no split is needed.
    """
    data = config.data
    columns = {role: name for role, name in vars(data.columns).items() if name}
    path = Path(data.path).expanduser().resolve() if data.path else Path()
    test = 0 if whole else data.test
    source = Source(data.reader, path, test, data.split_seed, columns, make_describer(config))
    drawn = (data.drawn_products, data.drawn_seed)
    return library.find_or_prepare(source, data.prepared, drawn=drawn, progress=bar, say=say)


def training_records(config: "Config", prepared: Path) -> tuple[Records, Records | None]:
    """Returns the training records that the towers see, and those held back from them for a second stage.

    Whole groups are held back, which ones depends on `data.split_seed` alone; None where `data.second_stage` is 0.

    Raises:
      UserError: `data.second_stage` leaves the towers nothing, or is too few for one group.
    """
    records = Records(prepared, "train")
    if not config.data.second_stage:
        return records, None
    names = [product.group for product, _ in bar(records.products(), total=len(records), desc="reading groups")]
    held = np.asarray(groups.split(names, config.data.second_stage, config.data.split_seed))
    return records.take(np.flatnonzero(~held)), records.take(np.flatnonzero(held))


def make_describer(config: "Config") -> ProductDescriber | None:
    """Returns what describes products in preparation, None where the configuration wants no features."""
    return None if config.features.detector == "none" else ProductDescriber(**vars(config.features))


def make_preprocess(config: "Config") -> Preprocess:
    """Returns what the configuration says of pictures and captions."""
    data = config.data
    return Preprocess(
        image_size=data.image_size,
        resize=data.resize,
        mean=data.mean,
        std=data.std,
        caption_template=data.caption_template,
        lowercase=data.lowercase,
        context_length=data.context_length,
    )


def make_tokenizer(config: "Config", preprocess: Preprocess, train: Records) -> PreTrainedTokenizerFast:
    """Returns the configured Hugging Face tokenizer, or a BPE trained on the captions of the training split."""
    if config.data.tokenizer:
        return text.load_tokenizer(Path(config.data.tokenizer).expanduser())
    captions = (
        text.caption(caption, product.attributes, preprocess)
        for product, _ in bar(train.products(), total=len(train), desc="reading captions", unit="product")
        for caption in product.captions
    )
    return text.train_tokenizer(captions, config.data.vocab_size)


def make_towers(config: "Config", preprocess: Preprocess, tokenizer: PreTrainedTokenizerFast, steps: int) -> Towers:
    """Returns the towers' configuration and shapes, the mesh and the optimizer, allocating nothing."""
    model = config.model
    towers = clip_config(
        PRESETS[model.preset],
        image_size=preprocess.image_size,
        vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        context_length=preprocess.context_length,
        end_token=tokenizer.eos_token_id,
        mean=preprocess.mean,
        std=preprocess.std,
        temperature=config.loss.temperature,
        patch_dropout=model.patch_dropout,
        dropout=model.dropout,
        stochastic_depth=model.stochastic_depth,
        dtype=model.dtype,
        execution=model.execution,
        remat=model.remat,
    )
    graph, shapes = make_model(towers)
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    rates = dict(config.optimizer.rates)
    if not config.loss.learned_temperature:
        rates = {r"^logit_scale$": 0.0, **rates}
    given = config.optimizer
    schedule = make_schedule(given.learning_rate, given.schedule, warmup_steps=given.warmup_steps, steps=steps)
    optimizer = make_optimizer(
        shapes,
        schedule,
        name=given.name,
        weight_decay=given.weight_decay,
        beta1=given.beta1,
        beta2=given.beta2,
        epsilon=given.epsilon,
        clip_norm=given.clip_norm,
        rates=rates,
    )
    return Towers(
        preprocess, tokenizer, towers, graph, mesh, optimizer, schedule, abstract_state(shapes, optimizer, mesh)
    )


def number_of_steps(config: "Config", train: Records) -> int:
    """Returns the length of the run: config.steps, or as many as config.epochs passes over the split take."""
    if config.batch_size > len(train):
        raise UserError(f"config.batch_size = {config.batch_size} is more than the {len(train)} training products")
    return config.steps or max(1, round(config.epochs * len(train) / config.batch_size))


def make_or_load_towers(config: "Config", workdir: Path, train: Records, steps: int) -> Towers:
    """Returns the towers of a workdir, made as configured where it has none yet; `save_towers` puts them there."""
    if (workdir / FILENAME).exists():
        return load_towers(config, workdir, steps)
    preprocess = make_preprocess(config)
    tokenizer = make_tokenizer(config, preprocess, train)
    return make_towers(config, preprocess, tokenizer, steps)


def save_towers(towers: Towers, workdir: Path) -> None:
    """Writes tokenizer/ and then preprocess.json into a workdir that has none yet."""
    if not (workdir / FILENAME).exists():
        towers.tokenizer.save_pretrained(workdir / TOKENIZER)
        towers.preprocess.save(workdir)


def load_towers(config: "Config", workdir: Path, steps: int = 1) -> Towers:
    """Returns the towers of a workdir as its own files describe them."""
    return make_towers(config, Preprocess.load(workdir), text.load_tokenizer(workdir / TOKENIZER), steps)


def abstract_batch(config: "Config", towers: Towers) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and sharding of a training batch; UserError where the mesh does not divide it."""
    rows, size = meshes.rows(towers.mesh), towers.preprocess.image_size
    if config.batch_size % rows:
        raise UserError(f"config.batch_size = {config.batch_size} is no multiple of mesh data x fsdp = {rows}")
    shapes = {
        "image": ((size, size, 3), np.uint8),
        "text": ((towers.preprocess.context_length,), np.int32),
        "group": ((), np.int32),
    }
    sharding = meshes.batch_sharding(towers.mesh)
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def device_batches(config: "Config", towers: Towers, train: Records, *, first: int, last: int) -> tuple[Any, Callable]:
    """Returns the batches of steps first to last - 1 on the host, and the function that places one on the devices."""
    given = config.augmentation
    batches = training_batches(
        train,
        towers.tokenizer,
        towers.preprocess,
        ImageAugmentation(given.crop_area, given.crop_aspect, given.flip),
        text.TextAugmentation(given.keep_attributes, given.keep_words, given.prompts),
        batch_size=config.batch_size,
        seed=config.seed,
        first_step=first,
        last_step=last,
        shard=Shard(jax.process_index(), jax.process_count()),
        workers=config.data.workers,
    )
    sharding = meshes.batch_sharding(towers.mesh)

    def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}

    return batches, place


def data_fingerprint(prepared: Path) -> str:
    """Returns the fingerprint of a prepared dataset's products and splits."""
    return builder.about(prepared)["fingerprint"]
