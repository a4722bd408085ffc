"""From a configuration to what is trained: tokenizer, towers, mesh, optimizer, step. Needs no TensorFlow."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxclip.config import Config
from jaxclip.models.clip import CLIPConfig
from jaxclip.models.lora import NAME, LoRAConfig
from jaxclip.models.presets import CONTEXT_LENGTH, IMAGE_SIZE, PRESETS, clip_config
from jaxclip.models.views import Views
from jaxclip.pipeline import text
from jaxclip.pipeline.preprocess import FILENAME, Preprocess
from jaxclip.runtime import distributed
from jaxclip.runtime import mesh as meshes
from jaxclip.runtime.progress import bar
from jaxclip.towers.pretrained import open_pretrained
from jaxclip.towers.shape import TOKENIZER, load_shape, run_as_configured, save_shape
from jaxclip.towers.state import Params, TrainState, abstract_state, cast_kernels, make_model
from jaxclip.towers.trainable import Trainable, make_trainable
from jaxclip.training.negative_queue import with_queue
from jaxclip.training.optimizer import configured_optimizer

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

    def cast_kernels(self, params: Params) -> Params:
        """Returns parameters for encoders that see many batches (see `state.narrowed`)."""
        return cast_kernels(params, self.config.image.transformer.dtype)


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
    shape = clip_config(
        replace(preset, patch=config.model.patch or preset.patch),
        image_size=preprocess.image_size,
        vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        context_length=preprocess.context_length,
        end_token=tokenizer.eos_token_id,
        mean=preprocess.mean,
        std=preprocess.std,
    )
    logit_bias = config.loss.bias if config.loss.name == "sigmoid" else None
    return replace(shape, temperature=config.loss.temperature, logit_bias=logit_bias)


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


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns 12 hex digits that change with any token or its number."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:12]
