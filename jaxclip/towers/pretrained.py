"""Opens the checkpoint of config.model.init_from: of a workdir, or published, in a folder or on Hugging Face's hub."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from jaxclip.config import Config
from jaxclip.errors import UserError, first_line
from jaxclip.models.clip import CLIPConfig
from jaxclip.models.weights import hugging_face, open_clip
from jaxclip.models.weights.positions import resize_context, resize_grid
from jaxclip.models.weights.table import load
from jaxclip.models.weights.tensors import read_json
from jaxclip.pipeline import processor, text
from jaxclip.pipeline.preprocess import FILENAME, Preprocess
from jaxclip.towers.checkpoints import BASE, Checkpoints, resolve_step
from jaxclip.towers.params import Params, make_model, replicated
from jaxclip.towers.shape import SHAPE, TOKENIZER, load_shape

# The files downloaded from a repository on the hub: no pickles and no code, because both could run anything.
DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors"]
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?"


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint whose weights have not been read yet.

    Attributes:
      config: the architecture of its towers, at the configured size of pictures and length of captions.
      preprocess: how a picture and a caption become arrays.
      tokenizer: the tokenizer of captions.
      load: abstract parameters -> the parameters, sharded as those.
      step: the step of a workdir's checkpoint; None for a published one.
    """

    config: CLIPConfig
    preprocess: Preprocess
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[Params], Params]
    step: int | None = None


def open_pretrained(config: Config, step: int | None = None) -> Pretrained:
    """Returns the checkpoint that config.model.init_from names; `step` selects one of a workdir (default: the newest).

    config.data.image_size, context_length and picture, if set, replace those of the checkpoint: the position embeddings
    of the image tower are interpolated (`resize_grid`) and those of the text tower are stretched or cut
    (`resize_context`). The caption template is always that of config.data, and config.data.tokenizer, if set, replaces
    the tokenizer of a published checkpoint, but not that of a workdir. For the sigmoid loss, towers that have no logit
    bias get one that starts at config.loss.bias.

    Raises:
      UserError: there is no such checkpoint, it is broken, or its towers cannot be built here.
    """
    folder = checkpoint_folder(config.model.init_from, "model.init_from")
    source = _workdir(folder, step) if (folder / FILENAME).exists() else _published(folder, config)
    size, length = config.data.image_size, config.data.context_length
    own = source.config
    image = replace(own.image, size=size or own.image.size, mean=source.preprocess.mean, std=source.preprocess.std)
    text_config = replace(own.text, context_length=length or own.text.context_length)
    if image.size % image.patch:
        nearest = max(1, round(image.size / image.patch)) * image.patch
        raise UserError(
            f"data.image_size = {image.size} is not a multiple of the checkpoint's patch, {image.patch}: set it to "
            f"{nearest}"
        )
    if own.text.pooling == "last" and text_config.context_length < own.text.context_length:
        raise UserError(
            f"data.context_length = {length} is less than the checkpoint's {own.text.context_length}, whose text tower "
            "reads the last position: leave data.context_length out"
        )
    preprocess = replace(
        source.preprocess,
        image_size=image.size,
        context_length=text_config.context_length,
        caption_template=config.data.caption_template,
        picture=config.data.picture or source.preprocess.picture,
    )
    towers, load = replace(own, image=image, text=text_config), source.load
    if config.loss.name == "sigmoid" and own.logit_bias is None:
        towers, load = replace(towers, logit_bias=config.loss.bias), partial(_with_bias, load, config.loss.bias)
    return replace(source, config=towers, preprocess=preprocess, load=load)


def pretrained_params(config: Config, abstract: Params, step: int | None = None) -> tuple[Params, int | None]:
    """Returns the parameters of config.model.init_from, sharded as `abstract`, and their step (see `open_pretrained`).

    If the temperature is not learned, it is the configured one instead of the checkpoint's.

    Raises:
      UserError: as `open_pretrained`, or the weights are not those of `abstract`.
    """
    source = open_pretrained(config, step)
    params = source.load(abstract)
    if not config.loss.learned_temperature:
        scale = jnp.log(jnp.float32(1 / config.loss.temperature))
        params["logit_scale"] = jax.device_put(scale, abstract["logit_scale"].sharding)
    return params, source.step


def checkpoint_folder(name: str, key: str) -> Path:
    """Returns the folder `name`, or else a local copy of the repository `name` on the Hugging Face hub.

    A repository is OWNER/NAME or OWNER/NAME@REVISION; its files are downloaded unless the hub's local cache has them.

    Raises:
      UserError: it is neither, or the download failed; the message names `key`, the field of the configuration that
        has the name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(HUB_NAME, name):
        raise UserError(f"{key} = {name!r} is neither a folder nor a name on the Hugging Face hub")
    repository, _, revision = name.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{key} = {name!r} is no folder and could not be downloaded from the hub: {reason}") from None


def _with_bias(load: Callable[[Params], Params], bias: float, abstract: Params) -> Params:
    """Returns the parameters that `load` reads plus the logit bias, which the checkpoint does not have."""
    leaf = abstract["logit_bias"]
    params = load({name: leaf for name, leaf in abstract.items() if name != "logit_bias"})
    return params | {"logit_bias": jax.device_put(jnp.asarray(bias, leaf.dtype), leaf.sharding)}


def _published(folder: Path, config: Config) -> Pretrained:
    """Returns a checkpoint in the layout of transformers or of open_clip, as the files in the folder imply."""
    captions = {"caption_template": config.data.caption_template, "lowercase": False}
    settings = read_json(folder / hugging_face.CONFIG) if (folder / hugging_face.CONFIG).exists() else {}
    in_open_clip = (folder / open_clip.CONFIG).exists()
    if in_open_clip and (settings.get("model_type") not in hugging_face.KINDS or "auto_map" in settings):
        checkpoint = open_clip.read(folder)
        path = folder / open_clip.CONFIG
        settings = read_json(path)
        cleaning = open_clip.cleaning(settings, path)
        captions["context_length"] = checkpoint.config.text.context_length
        preprocess = processor.from_open_clip(
            settings.get("preprocess_cfg") or {}, path, image_size=checkpoint.config.image.size, **captions
        )
    else:
        checkpoint, cleaning = hugging_face.read(folder), "whitespace"
        path = folder / processor.PROCESSOR
        path = path if path.exists() else folder / processor.ALL_PROCESSORS
        captions["context_length"] = checkpoint.config.text.context_length
        preprocess = processor.from_hugging_face(read_json(path), path, **captions)
    tokenizer = text.load_tokenizer(Path(config.data.tokenizer).expanduser() if config.data.tokenizer else folder)
    tokenizer = text.add_cleaning(tokenizer, cleaning)
    towers = checkpoint.config
    if len(tokenizer) > towers.text.vocab_size:
        raise UserError(
            f"the tokenizer of {config.data.tokenizer or folder} has {len(tokenizer):,} tokens, the text tower of "
            f"{folder} only {towers.text.vocab_size:,}: set data.tokenizer to the tokenizer of the towers"
        )
    if towers.text.pooling == "end" and towers.text.end_token != tokenizer.eos_token_id:
        raise UserError(
            f"the towers of {folder} read the token {towers.text.end_token} as the end of a caption, but the "
            f"tokenizer of {config.data.tokenizer or folder} ends captions with {tokenizer.eos_token_id}: set "
            "data.tokenizer to the tokenizer of the towers"
        )
    towers = replace(towers, text=replace(towers.text, end_token=tokenizer.eos_token_id))
    return Pretrained(towers, preprocess, tokenizer, partial(load, checkpoint.table, checkpoint.tensors))


def _workdir(folder: Path, step: int | None) -> Pretrained:
    """Returns the checkpoint of a workdir at `step` (default: the newest)."""
    towers = load_shape(folder)
    if towers is None:
        raise UserError(
            f"config.model.init_from: {folder} has no {SHAPE}, because an older version trained it, so no run can "
            f"start from {folder}: train it again, or name another run"
        )
    checkpoints = Checkpoints(folder, read_only=True)
    step = int(resolve_step("latest" if step is None else str(step), checkpoints))
    if BASE in checkpoints.metadata(step):
        raise UserError(
            f"config.model.init_from: {folder} holds only adapters; name the base that the adapters were trained on"
        )
    tokenizer = text.load_tokenizer(folder / TOKENIZER)
    load = partial(_restore, checkpoints, step, towers)
    return Pretrained(towers, Preprocess.load(folder), tokenizer, load, step)


def _restore(checkpoints: Checkpoints, step: int, towers: CLIPConfig, abstract: Params) -> Params:
    """Returns a workdir's parameters (their moving average if there is one), with positions resized to `abstract`."""
    resizing = {
        ("image", "positions"): partial(resize_grid, class_token=towers.image.pooling == "class"),
        ("text", "positions"): resize_context,
    }
    shapes, target = flatten_dict(make_model(towers)[1]), flatten_dict(abstract)
    stored = {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=replicated(target[name].sharding.mesh))
        if name in resizing
        else target[name]
        for name, shape in shapes.items()
    }
    params = flatten_dict(checkpoints.restore_params(unflatten_dict(stored), step))
    for name, resize in resizing.items():
        value = resize(np.asarray(params[name]), target[name].shape)
        params[name] = jax.make_array_from_callback(value.shape, target[name].sharding, value.__getitem__)
    return unflatten_dict(params)
