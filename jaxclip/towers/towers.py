"""Makes, saves and loads the towers, without the values of their parameters. Needs no TensorFlow."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
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
from jaxclip.runtime import distributed, files
from jaxclip.runtime import mesh as meshes
from jaxclip.runtime.progress import bar
from jaxclip.towers.params import Params, cast_kernels, make_model
from jaxclip.towers.pretrained import open_pretrained
from jaxclip.towers.shape import TOKENIZER, load_shape, run_as_configured, save_shape
from jaxclip.towers.sharding import place_shapes
from jaxclip.towers.trainable import Trainable, make_trainable

if TYPE_CHECKING:
    from jaxclip.pipeline.records import Records

VOCABULARY_MULTIPLE = 128
"""The number of rows of a preset's token embedding is rounded up to a multiple of this, for even shards."""


@dataclass(frozen=True)
class Towers:
    """The image tower and the text tower: everything about them except the values of their parameters.

    Attributes:
      preprocess: how a picture and a caption become arrays.
      tokenizer: the tokenizer of captions.
      config: the architecture.
      graph: the module without its parameters; `nnx.merge(graph, params)` gives the model.
      shapes: shape, dtype and sharding of each parameter.
      mesh: the devices that the towers run on.
      trainable: which parameters are trained, and at what factor of the learning rate.
      views: the enlarged and mirrored views over which a picture's embedding is averaged.
    """

    preprocess: Preprocess
    tokenizer: PreTrainedTokenizerBase
    config: CLIPConfig
    graph: nnx.GraphDef
    shapes: Params
    mesh: Mesh
    trainable: Trainable
    views: Views

    def stored(self, params: Params) -> Params:
        """Returns the parameters that a checkpoint holds: all, or only the trained ones if the towers have adapters."""
        return self.trainable.stored(params) if self.config.lora else params

    def cast_kernels(self, params: Params) -> Params:
        """Returns the parameters with kernels in the dtype that the towers compute in (see `params.cast_kernels`)."""
        return cast_kernels(params, self.config.image.transformer.dtype)


def make_preprocess(config: Config) -> Preprocess:
    """Returns the configured preprocessing of pictures and captions."""
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
    """Returns the tokenizer of config.data.tokenizer, or else a BPE tokenizer trained on the captions of `train`."""
    if config.data.tokenizer:
        return text.load_tokenizer(Path(config.data.tokenizer).expanduser())
    captions = (
        text.caption(caption, product.attributes, preprocess)
        for product, _ in bar(train.products(), total=len(train), desc="reading captions", unit="product")
        for caption in product.captions
    )
    return text.train_tokenizer(captions, config.data.vocab_size)


def preset_shape(config: Config, preprocess: Preprocess, tokenizer: PreTrainedTokenizerBase) -> CLIPConfig:
    """Returns the architecture of config.model.preset, for this preprocessing and tokenizer."""
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
    shape: CLIPConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Towers:
    """Returns the configured towers on a mesh of the devices (default: all); allocates no parameters.

    `shape` is their architecture (default: that of config.model.preset).
    """
    towers = run_as_configured(shape or preset_shape(config, preprocess, tokenizer), config)
    rates = config.optimizer.rates
    if config.task == "adapter":
        towers = replace(towers, lora=LoRAConfig(**vars(config.lora)))
        rates = (*rates, (f"/{NAME}/", 1.0), ("", 0.0))
    if not config.loss.learned_temperature:
        rates = ((r"^logit_scale$", 0.0), *rates)
    graph, shapes = make_model(towers)
    sizes = config.mesh
    mesh = meshes.make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices, slices=sizes.slices)
    trainable = make_trainable(shapes, rates, layer_decay=config.optimizer.layer_decay)
    views = Views(config.evaluation.zooms, config.evaluation.mirror)
    return Towers(preprocess, tokenizer, towers, graph, place_shapes(shapes, mesh), mesh, trainable, views)


def make_or_load_towers(config: Config, workdir: Path, train: "Records") -> Towers:
    """Returns the towers of a workdir, or makes them as configured if it has none yet; `save_towers` saves them.

    If config.model.init_from names a checkpoint, new towers have its architecture, preprocessing and tokenizer, with
    the changes that `open_pretrained` makes.
    """
    if (workdir / FILENAME).exists():
        return load_towers(config, workdir)
    if config.model.init_from:
        source = open_pretrained(config)
        return make_towers(config, source.preprocess, source.tokenizer, source.config)
    preprocess = make_preprocess(config)
    tokenizer = make_tokenizer(config, preprocess, train)
    return make_towers(config, preprocess, tokenizer)


def save_towers(towers: Towers, workdir: Path) -> None:
    """Writes tokenizer/, towers.json and, last, preprocess.json in the primary process, unless the workdir has them."""
    if distributed.is_primary() and not (workdir / FILENAME).exists():
        text.save_tokenizer(towers.tokenizer, workdir / TOKENIZER)
        save_shape(replace(towers.config, lora=None), workdir)  # adapters come from the configuration
        towers.preprocess.save(workdir)


def load_towers(config: Config, workdir: Path) -> Towers:
    """Returns the towers that a workdir's tokenizer/, towers.json and preprocess.json describe, run as configured.

    Without towers.json, which older versions did not write, the architecture is that of config.model.preset.
    """
    tokenizer = text.load_tokenizer(workdir / TOKENIZER)
    return make_towers(config, Preprocess.load(workdir), tokenizer, load_shape(workdir))


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns 12 hex digits that change with any token of the vocabulary or its id."""
    return files.fingerprint(tokenizer.get_vocab())
