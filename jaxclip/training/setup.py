"""From a configuration to everything a run needs: data, tokenizer, towers, mesh, optimizer."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxclip.catalog import builder, groups, library
from jaxclip.catalog.builder import Source
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber
from jaxclip.losses.objective import Objective
from jaxclip.models.clip import CLIPConfig
from jaxclip.models.lora import NAME, LoRAConfig
from jaxclip.models.presets import CONTEXT_LENGTH, IMAGE_SIZE, PRESETS, clip_config
from jaxclip.models.views import Views
from jaxclip.pipeline import text
from jaxclip.pipeline.batches import Partners, training_batches
from jaxclip.pipeline.images import ImageAugmentation
from jaxclip.pipeline.preprocess import FILENAME, Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.training import distributed
from jaxclip.training import mesh as meshes
from jaxclip.training.optimizer import configured_optimizer
from jaxclip.training.pretrained import open_pretrained
from jaxclip.training.progress import bar
from jaxclip.training.queue import with_queue
from jaxclip.training.shape import TOKENIZER, load_shape, run_as_configured, save_shape
from jaxclip.training.state import Params, TrainState, abstract_state, make_model, narrowed
from jaxclip.training.trainable import Trainable, make_trainable

if TYPE_CHECKING:
    from jaxclip.config import Config

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Towers:
    """What it takes to restore and run the towers of a workdir."""

    preprocess: Preprocess
    tokenizer: PreTrainedTokenizerBase
    config: CLIPConfig
    graph: nnx.GraphDef
    mesh: Mesh
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    trainable: Trainable
    abstract: TrainState
    views: Views

    def stored(self, params: Params) -> Params:
        """Returns what a checkpoint holds of parameters: all, or where adapters are trained what is trained alone."""
        return self.trainable.stored(params) if self.config.lora else params

    def narrowed(self, params: Params) -> Params:
        """Returns parameters for encoders that see many batches (see `state.narrowed`)."""
        return narrowed(params, self.config.image.transformer.dtype)


def prepared_dataset(
    config: "Config",
    *,
    whole: bool,
    say: Callable[[str], None],
    runner: str = "",
    beam_options: Sequence[str] = (),
) -> Path:
    """Returns the folder of the configured catalogue's prepared dataset, preparing it first where there is none.

    `whole` asks for all of a catalogue, where no split is needed; `runner` and `beam_options` prepare it on Apache
    Beam. Of several processes the first prepares.

    Raises:
      UserError: there is nothing to prepare, or another process does not see what the first one prepared.
    """
    data = config.data
    columns = {role: name for role, name in vars(data.columns).items() if name}
    path = Path(data.path).expanduser().resolve() if data.path else Path()
    test = 0 if whole else data.test
    source = Source(data.reader, path, test, data.split_seed, columns, make_describer(config))
    drawn = (data.drawn_products, data.drawn_seed)

    def find_or_prepare() -> str:
        execution = {"runner": runner, "beam_options": beam_options}
        return str(library.find_or_prepare(source, data.prepared, drawn=drawn, progress=bar, say=say, **execution))

    prepared = Path(distributed.from_primary("prepare", find_or_prepare))
    if not builder.is_prepared(prepared):
        raise UserError(
            f"process {distributed.process_id()} sees no prepared dataset in {prepared}: name a folder that all "
            "processes share with --config.data.prepared or $JAXCLIP_CACHE, or copy it to each machine"
        )
    return prepared


def training_records(config: "Config", prepared: Path) -> tuple[Records, Records | None]:
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


def make_describer(config: "Config") -> ProductDescriber | None:
    """Returns what describes products in preparation, None where the configuration wants no features."""
    return None if config.features.detector == "none" else ProductDescriber(**vars(config.features))


def make_preprocess(config: "Config") -> Preprocess:
    """Returns what the configuration says of pictures and captions."""
    data = config.data
    return Preprocess(
        image_size=data.image_size or IMAGE_SIZE,
        resize=data.resize,
        mean=data.mean,
        std=data.std,
        caption_template=data.caption_template,
        lowercase=data.lowercase,
        context_length=data.context_length or CONTEXT_LENGTH,
        picture=data.picture or "whole",
    )


def make_tokenizer(config: "Config", preprocess: Preprocess, train: Records) -> PreTrainedTokenizerBase:
    """Returns the configured Hugging Face tokenizer, or a BPE trained on the captions of the training split."""
    if config.data.tokenizer:
        return text.load_tokenizer(Path(config.data.tokenizer).expanduser())
    captions = (
        text.caption(caption, product.attributes, preprocess)
        for product, _ in bar(train.products(), total=len(train), desc="reading captions", unit="product")
        for caption in product.captions
    )
    return text.train_tokenizer(captions, config.data.vocab_size)


def preset_shape(config: "Config", preprocess: Preprocess, tokenizer: PreTrainedTokenizerBase) -> CLIPConfig:
    """Returns the towers of config.model.preset for these pictures and captions."""
    preset = PRESETS[config.model.preset]
    return clip_config(
        replace(preset, patch=config.model.patch or preset.patch),
        image_size=preprocess.image_size,
        vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        context_length=preprocess.context_length,
        end_token=tokenizer.eos_token_id,
        mean=preprocess.mean,
        std=preprocess.std,
        temperature=config.loss.temperature,
        logit_bias=config.loss.bias if config.loss.name == "sigmoid" else None,
    )


def make_towers(
    config: "Config",
    preprocess: Preprocess,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    shape: CLIPConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Towers:
    """Returns the towers' configuration and shapes, the mesh (of all devices, or the given) and the optimizer.

    Nothing is allocated. The towers are those of `shape`, or of the configured preset.
    """
    towers = run_as_configured(shape or preset_shape(config, preprocess, tokenizer), config)
    rates = config.optimizer.rates
    if config.task == "adapter":
        towers = replace(towers, lora=LoRAConfig(**vars(config.lora)))
        rates = (*rates, (f"/{NAME}/", 1.0), ("", 0.0))
    if not config.loss.learned_temperature:
        rates = ((r"^logit_scale$", 0.0), *rates)
    graph, shapes = make_model(towers)
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    given = config.optimizer
    trainable = make_trainable(shapes, rates, layer_decay=given.layer_decay)
    schedule, optimizer = configured_optimizer(given, shapes, trainable, steps)
    if config.loss.queue:
        optimizer = with_queue(optimizer, config.loss.queue, towers.embedding)
    abstract = abstract_state(shapes, optimizer, mesh, trainable, ema=given.ema > 0)
    views = Views(config.evaluation.zooms, config.evaluation.mirror)
    return Towers(preprocess, tokenizer, towers, graph, mesh, optimizer, schedule, trainable, abstract, views)


def number_of_steps(config: "Config", train: Records) -> int:
    """Returns the length of the run: config.steps, or as many as config.epochs passes over the split take."""
    if config.batch_size > len(train):
        raise UserError(f"config.batch_size = {config.batch_size} is more than the {len(train)} training products")
    return config.steps or max(1, round(config.epochs * len(train) / config.batch_size))


def make_or_load_towers(config: "Config", workdir: Path, train: Records, steps: int) -> Towers:
    """Returns the towers of a workdir, made as configured where it has none yet; `save_towers` puts them there.

    Where config.model.init_from names a checkpoint, preprocessing and tokenizer are that one's.
    """
    if (workdir / FILENAME).exists():
        return load_towers(config, workdir, steps)
    if config.model.init_from:
        begun = open_pretrained(config)
        return make_towers(config, begun.preprocess, begun.tokenizer, steps, begun.config)
    preprocess = make_preprocess(config)
    tokenizer = make_tokenizer(config, preprocess, train)
    return make_towers(config, preprocess, tokenizer, steps)


def save_towers(towers: Towers, workdir: Path) -> None:
    """Writes tokenizer/, towers.json and then preprocess.json into a workdir that has none, in the first process."""
    if distributed.is_primary() and not (workdir / FILENAME).exists():
        text.save_tokenizer(towers.tokenizer, workdir / TOKENIZER)
        save_shape(replace(towers.config, lora=None), workdir)  # adapters are the configuration's
        towers.preprocess.save(workdir)


def load_towers(config: "Config", workdir: Path, steps: int = 1) -> Towers:
    """Returns the towers of a workdir as its own files describe them."""
    tokenizer = text.load_tokenizer(workdir / TOKENIZER)
    return make_towers(config, Preprocess.load(workdir), tokenizer, steps, load_shape(workdir))


def abstract_batch(config: "Config", towers: Towers) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and sharding of a training batch; UserError where the mesh does not divide it."""
    rows, size = meshes.rows(towers.mesh), towers.preprocess.image_size
    if config.batch_size < rows:
        raise UserError(
            f"config.batch_size = {config.batch_size} is smaller than the number of devices that share it, mesh data x "
            f"fsdp = {rows}: take a larger batch, or put devices on mesh.tensor"
        )
    for name, given in (("batch_size", config.batch_size), ("loss.microbatch", config.loss.microbatch)):
        meshes.check_divides(towers.mesh, name, given)
    tokens = ((towers.preprocess.context_length,), np.int32)
    shapes = {"image": ((size, size, 3), np.uint8), "text": tokens, "group": ((), np.int32)}
    if config.loss.name == "incorrect_pairs":
        shapes |= {"incorrect_text": tokens, "similarity": ((), np.float32), "has_incorrect": ((), np.bool_)}
    sharding = meshes.batch_sharding(towers.mesh)
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def image_augmentation(config: "Config") -> ImageAugmentation:
    """Returns what the configuration says of training pictures."""
    given = config.augmentation
    return ImageAugmentation(given.crop_area, given.crop_aspect, given.flip)


def device_batches(
    config: "Config",
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


def make_objective(config: "Config") -> Objective:
    """Returns the configured loss."""
    loss = config.loss
    return Objective(
        loss.name, loss.implementation, loss.tile, loss.alpha, loss.beta, loss.weighting, info_nce=loss.info_nce
    )


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns 12 hex digits that change with any token or its number."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:12]


def data_fingerprint(prepared: Path) -> str:
    """Returns the fingerprint of a prepared dataset's products and splits."""
    return builder.about(prepared)["fingerprint"]
