"""Named shapes of CLIP, from one that trains on a laptop to those of the original paper."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxclip.models.clip import CLIPConfig, ImageConfig, TextConfig
from jaxclip.models.transformer import TransformerConfig

IMAGE_SIZE, CONTEXT_LENGTH = 64, 32
"""Of towers that begin at random, where nothing says otherwise."""


@dataclass(frozen=True)
class Preset:
    """The shape of both towers, without what the data decides (picture size, vocabulary, context length).

    Widths, layers and heads are those of the towers' transformers; `embedding` is the dimension of the shared space.
    """

    patch: int
    image: tuple[int, int, int]  # width, layers, heads
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
    temperature: float,
    logit_bias: float | None = None,
    patch_dropout: float = 0.0,
    **execution,
) -> CLIPConfig:
    """Returns the full configuration of a preset for given data.

    `execution` holds the fields of TransformerConfig that do not shape the parameters (dropout, stochastic_depth,
    dtype, execution, remat), the same for both towers.
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
    return CLIPConfig(image, text, preset.embedding, temperature, logit_bias)


def run_as(config: CLIPConfig, *, patch_dropout: float, **execution) -> CLIPConfig:
    """Returns towers of the same parameters that are regularised and executed otherwise, as in `clip_config`."""
    image, text = (
        replace(tower, transformer=replace(tower.transformer, **execution)) for tower in (config.image, config.text)
    )
    return replace(config, image=replace(image, patch_dropout=patch_dropout), text=text)


def to_json(config: CLIPConfig) -> dict[str, Any]:
    """Returns a configuration as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_json(values: Mapping[str, Any]) -> CLIPConfig:
    """Returns the configuration that `to_json` wrote; TypeError or KeyError for anything else."""
    image, text = dict(values["image"]), dict(values["text"])
    for tower in (image, text):
        tower["transformer"] = TransformerConfig(**tower["transformer"])
    image |= {name: tuple(image[name]) for name in ("mean", "std")}
    return CLIPConfig(**{**values, "image": ImageConfig(**image), "text": TextConfig(**text)})
