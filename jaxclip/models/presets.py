"""Presets: named sizes of CLIP, from one that can be trained on a laptop to those of the original paper."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxclip.models.clip import CLIPConfig, ImageConfig, TextConfig
from jaxclip.models.transformer import TransformerConfig

IMAGE_SIZE, CONTEXT_LENGTH = 64, 32
"""Defaults, in pixels and in tokens, for towers that are trained from random weights."""


@dataclass(frozen=True)
class Preset:
    """The architecture of both towers, without what depends on the data (picture size, vocabulary, context length).

    Attributes:
      patch: side of a patch, in pixels.
      image: width, layers and heads of the image tower's transformer.
      text: width, layers and heads of the text tower's transformer.
      embedding: dimension of the shared space.
      stem: how the image tower turns pixels into tokens; see `ImageConfig`.
      image_pooling: how the image tower reduces its tokens to one vector; see `ImageConfig`.
      text_pooling: how the text tower reduces its tokens to one vector; see `TextConfig`.
      activation: activation of the MLPs in both transformers; see `TransformerConfig`.
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
) -> CLIPConfig:
    """Returns the full configuration of a preset; fields that are not given here have the defaults of their classes.

    Args:
      preset: the architecture of the towers.
      image_size: side of the pictures, in pixels.
      vocab_size: number of token ids of the tokenizer.
      context_length: number of tokens per caption.
      end_token: id of the token that ends a caption.
      mean, std: mean and standard deviation of each channel, with pixels scaled to [0, 1].
    """

    def transformer(shape: tuple[int, int, int]) -> TransformerConfig:
        width, layers, heads = shape
        return TransformerConfig(width, layers, heads, activation=preset.activation)

    image = ImageConfig(
        image_size,
        preset.patch,
        transformer(preset.image),
        preset.stem,
        preset.image_pooling,
        mean=tuple(mean),
        std=tuple(std),
    )
    text = TextConfig(vocab_size, context_length, end_token, transformer(preset.text), preset.text_pooling)
    return CLIPConfig(image, text, preset.embedding)


def with_execution(
    config: CLIPConfig,
    *,
    patch_dropout: float = 0.0,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    dtype: str = "float32",
    execution: str = "auto",
    remat: str = "none",
    attention: str = "auto",
) -> CLIPConfig:
    """Returns the configuration with another regularisation, dtype and execution of both towers.

    A setting that is not given gets its default, not its previous value. None of the settings changes the shapes of the
    parameters. `patch_dropout` is a field of ImageConfig, the others are fields of TransformerConfig.
    """
    image, text = (
        replace(
            tower.transformer,
            dropout=dropout,
            stochastic_depth=stochastic_depth,
            dtype=dtype,
            execution=execution,
            remat=remat,
            attention=attention,
        )
        for tower in (config.image, config.text)
    )
    return replace(
        config,
        image=replace(config.image, patch_dropout=patch_dropout, transformer=image),
        text=replace(config.text, transformer=text),
    )


def to_json(config: CLIPConfig) -> dict[str, Any]:
    """Returns a configuration as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_json(values: Mapping[str, Any]) -> CLIPConfig:
    """Returns the configuration, without adapters, from the values that `to_json` returned.

    Raises:
      TypeError, KeyError: a field is missing or unknown, or a value that should contain others does not.
    """
    image, text = dict(values["image"]), dict(values["text"])
    for tower in (image, text):
        tower["transformer"] = TransformerConfig(**tower["transformer"])
    image |= {name: tuple(image[name]) for name in ("mean", "std")}
    return CLIPConfig(**{**values, "image": ImageConfig(**image), "text": TextConfig(**text)})
