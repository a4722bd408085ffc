"""From a configuration to what is trained: tokenizer, towers, mesh, optimizer, step. Needs no TensorFlow."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.losses.objective import Objective
from jaxclip.models.clip import CLIPConfig
from jaxclip.models.lora import NAME, LoRAConfig
from jaxclip.models.presets import CONTEXT_LENGTH, IMAGE_SIZE, PRESETS, clip_config
from jaxclip.models.views import Views
from jaxclip.pipeline import text
from jaxclip.pipeline.preprocess import FILENAME, Preprocess
from jaxclip.training import distributed
from jaxclip.training import mesh as meshes
from jaxclip.training.optimizer import configured_optimizer
from jaxclip.training.pretrained import open_pretrained
from jaxclip.training.progress import bar
from jaxclip.training.queue import with_queue
from jaxclip.training.shape import TOKENIZER, load_shape, run_as_configured, save_shape
from jaxclip.training.state import Params, TrainState, abstract_state, make_model, narrowed
from jaxclip.training.step import make_loss, make_step
from jaxclip.training.trainable import Trainable, make_trainable

if TYPE_CHECKING:
    from jaxclip.pipeline.records import Records

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


def make_preprocess(config: Config) -> Preprocess:
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


def make_tokenizer(config: Config, preprocess: Preprocess, train: "Records") -> PreTrainedTokenizerBase:
    """Returns the configured Hugging Face tokenizer, or a BPE trained on the captions of the training split."""
    if config.data.tokenizer:
        return text.load_tokenizer(Path(config.data.tokenizer).expanduser())
    captions = (
        text.caption(caption, product.attributes, preprocess)
        for product, _ in bar(train.products(), total=len(train), desc="reading captions", unit="product")
        for caption in product.captions
    )
    return text.train_tokenizer(captions, config.data.vocab_size)


def preset_shape(config: Config, preprocess: Preprocess, tokenizer: PreTrainedTokenizerBase) -> CLIPConfig:
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
    config: Config,
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


def number_of_steps(config: Config, train: "Records") -> int:
    """Returns the length of the run: config.steps, or as many as config.epochs passes over the split take."""
    if config.batch_size > len(train):
        raise UserError(f"config.batch_size = {config.batch_size} is more than the {len(train)} training products")
    return config.steps or max(1, round(config.epochs * len(train) / config.batch_size))


def make_or_load_towers(config: Config, workdir: Path, train: "Records", steps: int) -> Towers:
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


def load_towers(config: Config, workdir: Path, steps: int = 1) -> Towers:
    """Returns the towers of a workdir as its own files describe them."""
    tokenizer = text.load_tokenizer(workdir / TOKENIZER)
    return make_towers(config, Preprocess.load(workdir), tokenizer, steps, load_shape(workdir))


def abstract_batch(config: Config, towers: Towers) -> dict[str, jax.ShapeDtypeStruct]:
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


def make_objective(config: Config) -> Objective:
    """Returns the configured loss."""
    loss = config.loss
    return Objective(
        loss.name, loss.implementation, loss.tile, loss.alpha, loss.beta, loss.weighting, info_nce=loss.info_nce
    )


def train_step(config: Config, towers: Towers) -> Callable:
    """Returns the configured step(state, batch) -> (state, metrics), to be compiled."""
    loss = make_loss(
        towers.graph,
        mask_groups=config.loss.mask_groups,
        learned_temperature=config.loss.learned_temperature,
        objective=make_objective(config),
        microbatch=config.loss.microbatch,
    )
    return make_step(
        loss, towers.optimizer, towers.schedule, towers.trainable, seed=config.seed, ema=config.optimizer.ema
    )


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns 12 hex digits that change with any token or its number."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:12]
