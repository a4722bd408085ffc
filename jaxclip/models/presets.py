"""Presets: named sizes of CLIP, from one that trains on a laptop to those of the original paper."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxclip.models.clip import CLIPConfig, ImageConfig, TextConfig
from jaxclip.models.transformer import TransformerConfig

IMAGE_SIZE, CONTEXT_LENGTH = 64, 32
"""Defaults for towers that are trained from random weights."""


@dataclass(frozen=True)
class Preset:
    """The size of both towers, without what the data decides (picture size, vocabulary, context length).

    Attributes:
      patch: side of a patch, in pixels.
      image: width, layers and heads of the image tower's transformer.
      text: width, layers and heads of the text tower's transformer.
      embedding: dimension of the space that both towers share.
      stem: how the image tower makes tokens of pixels, as in `ImageConfig`.
      image_pooling: how the image tower makes one vector of its tokens, as in `ImageConfig`.
      text_pooling: how the text tower makes one vector of its tokens, as in `TextConfig`.
      activation: of the transformers' hidden layers, as in `TransformerConfig`.
    """

    patch: int
    image: tuple[int, int, int]
    text: tuple[int, int, int]
    embedding: int
    stem: str = "patch"
    image_pooling: str = "class"
    text_pooling: str = "end"
    activation: str = "gelu"


PRESETS: dict[str, Preset] = {
    "tiny": Preset(16, (128, 2, 2), (128, 2, 2), 128, "conv", "mean", "mean", "gelu_tanh"),
    "laptop": Preset(16, (256, 4, 4), (192, 3, 3), 256, "residual_conv", "mean", "mean", "gelu_tanh"),
    "vit_b_32": Preset(32, (768, 12, 12), (512, 12, 8), 512, activation="quick_gelu"),
    "vit_b_16": Preset(16, (768, 12, 12), (512, 12, 8), 512, activation="quick_gelu"),
    "vit_l_14": Preset(14, (1024, 24, 16), (768, 12, 12), 768, activation="quick_gelu"),
}


def clip_config(
    preset: Preset,
    *,
    image_size: int,
    vocab_size: int,
    context_length: int,
    end_token: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    patch_dropout: float = 0.0,
    **execution,
) -> CLIPConfig:
    """Returns the full configuration of a preset; temperature and logit bias are those of a plain CLIPConfig.

    Args:
      preset: the size of the towers.
      image_size: side of the pictures, in pixels.
      vocab_size: number of the tokenizer's tokens.
      context_length: tokens of a caption.
      end_token: id of the token that ends a caption.
      mean, std: of the pixels' channels after scaling to [0, 1].
      patch_dropout: share of patches that training leaves out.
      execution: fields of TransformerConfig that leave the shapes of the parameters as they are (dropout,
        stochastic_depth, dtype, execution, remat), for both towers.
    """

    def transformer(shape: tuple[int, int, int]) -> TransformerConfig:
        width, layers, heads = shape
        return TransformerConfig(width, layers, heads, activation=preset.activation, **execution)

    image = ImageConfig(
        image_size,
        preset.patch,
        transformer(preset.image),
        preset.stem,
        preset.image_pooling,
        patch_dropout,
        tuple(mean),
        tuple(std),
    )
    text = TextConfig(vocab_size, context_length, end_token, transformer(preset.text), preset.text_pooling)
    return CLIPConfig(image, text, preset.embedding)


def run_as(config: CLIPConfig, *, patch_dropout: float, **execution) -> CLIPConfig:
    """Returns the configuration with other regularisation and execution (see `clip_config`)."""
    image, text = (
        replace(tower, transformer=replace(tower.transformer, **execution)) for tower in (config.image, config.text)
    )
    return replace(config, image=replace(image, patch_dropout=patch_dropout), text=text)


def to_json(config: CLIPConfig) -> dict[str, Any]:
    """Returns a configuration as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_json(values: Mapping[str, Any]) -> CLIPConfig:
    """Returns the configuration that `to_json` wrote.

    Raises:
      TypeError, KeyError: the values are not those that `to_json` wrote.
    """
    image, text = dict(values["image"]), dict(values["text"])
    for tower in (image, text):
        tower["transformer"] = TransformerConfig(**tower["transformer"])
    image |= {name: tuple(image[name]) for name in ("mean", "std")}
    return CLIPConfig(**{**values, "image": ImageConfig(**image), "text": TextConfig(**text)})
