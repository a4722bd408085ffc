"""The layout of transformers' CLIPModel and SiglipModel: config.json and model.safetensors."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from jaxclip.errors import UserError
from jaxclip.models.clip import CLIPConfig, ImageConfig, TextConfig
from jaxclip.models.transformer import TransformerConfig
from jaxclip.models.weights.positions import resize_context, resize_grid
from jaxclip.models.weights.table import ForeignCheckpoint, TableRow, linear, linear_rows, norm_rows, patches, same
from jaxclip.models.weights.tensors import open_tensors, read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KINDS = {"clip": "CLIPConfig", "siglip": "SiglipConfig"}
"""model_type -> the class of its configuration in transformers."""
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our name of an activation -> its name in transformers."""
LEGACY_END_TOKEN = 2
"""An end token that early configurations have by mistake; CLIPModel then reads the token of the highest id instead."""


def read(folder: Path) -> ForeignCheckpoint:
    """Returns the checkpoint in a folder; UserError if it is broken or its towers are not supported."""
    config = read_config(folder)
    return ForeignCheckpoint(config, table(config), open_tensors(folder, WEIGHTS))


def read_config(folder: Path) -> CLIPConfig:
    """Returns the towers that a folder's config.json describes, with default `mean` and `std` of the pixels.

    Raises:
      UserError: the file is broken, or the towers are not supported.
    """
    import transformers

    path = folder / CONFIG
    settings = read_json(path)
    kind = settings.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{path}: model_type is {kind!r}; only {' and '.join(KINDS)} can be loaded")
    try:
        theirs = getattr(transformers, KINDS[kind]).from_dict(settings)
        return _clip_config(theirs) if kind == "clip" else _siglip_config(theirs)
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{path} does not describe a {kind} model: {str(error).strip().splitlines()[-1]}") from None


def table(config: CLIPConfig) -> list[TableRow]:
    """Returns transformers' layout of towers of this shape: a row per parameter, with our name and transformers'."""
    image = config.image
    sigmoid = config.logit_bias is not None
    tower, class_token = "vision_model", image.pooling == "class"
    grid = partial(resize_grid, class_token=class_token)
    rows = [
        TableRow("logit_scale", "logit_scale", same(leading=int(sigmoid))),
        TableRow("image/stem/projection/kernel", f"{tower}.embeddings.patch_embedding.weight", patches(image.patch)),
        TableRow("image/positions", f"{tower}.embeddings.position_embedding.weight", same(), resize=grid),
        *_blocks("image", tower),
        *norm_rows("image/last_norm", f"{tower}.post_layernorm"),
        TableRow("text/token_embedding/embedding", "text_model.embeddings.token_embedding.weight", same()),
        TableRow("text/positions", "text_model.embeddings.position_embedding.weight", same(), resize=resize_context),
        *_blocks("text", "text_model"),
        *norm_rows("text/last_norm", "text_model.final_layer_norm"),
    ]
    if sigmoid:
        return rows + [
            TableRow("logit_bias", "logit_bias", same(leading=1)),
            TableRow("image/stem/projection/bias", f"{tower}.embeddings.patch_embedding.bias", same()),
            TableRow("image/pool/probe", f"{tower}.head.probe", same(leading=2)),
            *linear_rows("image/pool/attention/qkv", f"{tower}.head.attention.in_proj", dot="_"),
            *linear_rows("image/pool/attention/out", f"{tower}.head.attention.out_proj", inputs=2),
            *norm_rows("image/pool/norm", f"{tower}.head.layernorm"),
            *linear_rows("image/pool/mlp_in", f"{tower}.head.mlp.fc1"),
            *linear_rows("image/pool/mlp_out", f"{tower}.head.mlp.fc2"),
            *linear_rows("text/projection", "text_model.head"),
        ]
    return rows + [
        TableRow("image/class_token", f"{tower}.embeddings.class_embedding", same()),
        *norm_rows("image/first_norm", f"{tower}.pre_layrnorm"),
        TableRow("image/projection/kernel", "visual_projection.weight", linear()),
        TableRow("text/projection/kernel", "text_projection.weight", linear()),
    ]


def write_config(config: CLIPConfig) -> dict[str, Any]:
    """Returns the contents of the config.json of these towers.

    Raises:
      UserError: neither CLIPModel nor SiglipModel can represent these towers; the message says why.
    """
    image, text = config.image, config.text
    vision = {**_block_settings(image.transformer), "image_size": image.size, "patch_size": image.patch}
    language = {
        **_block_settings(text.transformer),
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "eos_token_id": text.end_token,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    if is_clip(config):
        if text.end_token == LEGACY_END_TOKEN:
            raise UserError(
                "CLIPModel cannot read an end token whose id is 2, because it reads the token of the highest id "
                "instead: export with --layouts=stablehlo"
            )
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "projection_dim": config.embedding,
            "vision_config": {**vision, "projection_dim": config.embedding},
            "text_config": {**language, "projection_dim": config.embedding},
        }
    if is_siglip(config):
        return {
            "model_type": "siglip",
            "architectures": ["SiglipModel"],
            "vision_config": {**vision, "vision_use_head": True},
            "text_config": {**language, "projection_size": config.embedding},
        }
    layout = "open_clip" if is_clip(replace(config, logit_bias=None)) else "stablehlo"
    raise UserError(
        f"neither CLIPModel nor SiglipModel supports {unsupported_part(config)}: export with --layouts={layout}"
    )


def is_clip(config: CLIPConfig) -> bool:
    """Returns whether the towers have the architecture of CLIP, and no logit bias."""
    image, text = config.image, config.text
    image_parts = (image.stem, image.stem_bias, image.first_norm, image.pooling, image.projection)
    return (
        image_parts == ("patch", False, True, "class", True)
        and (text.pooling, text.projection_bias) == ("end", False)
        and config.logit_bias is None
    )


def is_siglip(config: CLIPConfig) -> bool:
    """Returns whether the towers have the architecture of SigLIP, and a logit bias."""
    image, text = config.image, config.text
    image_parts = (image.stem, image.stem_bias, image.first_norm, image.pooling, image.projection)
    return (
        image_parts == ("patch", True, False, "map", False)
        and (text.pooling, text.projection_bias) == ("last", True)
        and config.logit_bias is not None
    )


def unsupported_part(config: CLIPConfig) -> str:
    """Returns what keeps these towers from being those of CLIP or of SigLIP, in words for an error message."""
    if config.image.stem != "patch":
        return "a convolutional stem"
    if config.image.pooling == "mean":
        return "an image tower that averages its tokens"
    if config.text.pooling == "mean":
        return "a text tower that averages its tokens"
    if is_clip(replace(config, logit_bias=None)):
        return "a logit bias with CLIP's towers, as trained by the sigmoid loss"
    return "this combination of parts of CLIP and of SigLIP"


def _blocks(tower: str, prefix: str) -> list[TableRow]:
    ours, theirs = f"{tower}/transformer/blocks", f"{prefix}.encoder.layers.{{}}"
    return [
        *norm_rows(f"{ours}/attention_norm", f"{theirs}.layer_norm1"),
        *linear_rows(f"{ours}/attention/qkv", tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")),
        *linear_rows(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj", inputs=2),
        *norm_rows(f"{ours}/mlp_norm", f"{theirs}.layer_norm2"),
        *linear_rows(f"{ours}/mlp_in", f"{theirs}.mlp.fc1"),
        *linear_rows(f"{ours}/mlp_out", f"{theirs}.mlp.fc2"),
    ]


def transformer(theirs: Any) -> TransformerConfig:
    """Returns the blocks that a configuration of transformers describes; ValueError if their activation is unknown."""
    activations = {name: ours for ours, name in ACTIVATIONS.items()}
    if theirs.hidden_act not in activations:
        raise ValueError(f"hidden_act = {theirs.hidden_act!r} is not one of {', '.join(activations)}")
    return TransformerConfig(
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.intermediate_size / theirs.hidden_size,
        activations[theirs.hidden_act],
        theirs.layer_norm_eps,
    )


def _block_settings(blocks: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": blocks.width,
        "intermediate_size": round(blocks.width * blocks.mlp_ratio),
        "num_hidden_layers": blocks.layers,
        "num_attention_heads": blocks.heads,
        "hidden_act": ACTIVATIONS[blocks.activation],
        "layer_norm_eps": blocks.epsilon,
    }


def _clip_config(theirs: Any) -> CLIPConfig:
    vision, text = theirs.vision_config, theirs.text_config
    end = text.eos_token_id
    return CLIPConfig(
        ImageConfig(vision.image_size, vision.patch_size, transformer(vision)),
        TextConfig(
            text.vocab_size,
            text.max_position_embeddings,
            text.vocab_size - 1 if end == LEGACY_END_TOKEN else end,
            transformer(text),
        ),
        theirs.projection_dim,
    )


def _siglip_config(theirs: Any) -> CLIPConfig:
    vision, text = theirs.vision_config, theirs.text_config
    if not getattr(vision, "vision_use_head", True):
        raise ValueError("vision_use_head is false, but must be true")
    image = ImageConfig(
        vision.image_size,
        vision.patch_size,
        transformer(vision),
        pooling="map",
        stem_bias=True,
        first_norm=False,
        projection=False,
    )
    language = TextConfig(
        text.vocab_size,
        text.max_position_embeddings,
        text.eos_token_id,
        transformer(text),
        pooling="last",
        projection_bias=True,
    )
    return CLIPConfig(image, language, vision.hidden_size, logit_bias=0.0)
