"""The layout of open_clip, for CLIP and SigLIP: open_clip_config.json and open_clip_model.safetensors.

open_clip builds SigLIP's image towers with timm.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxclip.errors import UserError
from jaxclip.models.clip import CLIPConfig, ImageConfig, TextConfig
from jaxclip.models.transformer import TransformerConfig
from jaxclip.models.weights.hugging_face import is_clip, is_siglip, unsupported_part
from jaxclip.models.weights.positions import resize_context, resize_grid
from jaxclip.models.weights.table import ForeignCheckpoint, TableRow, linear_rows, norm_rows, patches, same
from jaxclip.models.weights.tensors import open_tensors, read_json

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

# Fields of open_clip's CLIPVisionCfg and CLIPTextCfg that are read; any other field, except IGNORED_FIELDS, must be
# null, false or the value in DEFAULTS.
VISION_FIELDS = {"width", "layers", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs", "norm_kwargs"}
TEXT_FIELDS = {"width", "layers", "heads", "mlp_ratio", "vocab_size", "context_length", "act_kwargs", "norm_kwargs",
               "pool_type", "eos_id", "no_causal_mask", "proj_bias"}  # fmt: skip
TIMM_FIELDS = {"timm_model_name", "image_size"}
# Fields that do not change the towers (training, return values) or are checked elsewhere (`cleaning`, `_timm_config`).
IGNORED_FIELDS = {"patch_dropout", "output_tokens", "hf_tokenizer_name", "tokenizer_kwargs", "pad_id",
                  "timm_model_pretrained", "timm_drop", "timm_drop_path", "timm_proj_bias", "hf_model_pretrained",
                  "hf_proj_type", "hf_pooler_type", "attn_pooler_queries", "attn_pooler_heads", "timm_pool",
                  "timm_proj"}  # fmt: skip
DEFAULTS = {"pos_embed_type": "learnable", "pool_type": "tok", "proj_type": "linear"}
CLEANINGS = ("whitespace", "lower", "canonicalize")
DEFAULT_HEAD_WIDTH = 64
"""Width of an attention head of the image tower if head_width is not given."""
TIMM_SHAPES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
"""Name of the size of a SigLIP image tower in timm -> its width, layers, heads and hidden features of the MLP."""
TIMM_IMAGE_SIZES = {
    ("base", 32): (256,),
    ("base", 16): (224, 256, 384, 512),
    ("large", 16): (256, 384, 512),
    ("so400m", 14): (224, 378, 384),
    ("so400m", 16): (256, 384, 512),
    ("giantopt", 16): (256, 384),
}
"""Name of the size, and patch in pixels -> the sizes of pictures, in pixels, for which timm has such a tower."""
TIMM_NAME = r"vit_(\w+)_patch(\d+)_siglip_(\d+)"
# Towers whose activation is the exact GELU; the others use its tanh approximation.
TIMM_EXACT_GELU = r"vit_(base_patch16_siglip_\d+|large_patch16_siglip_(256|384)|so400m_patch14_siglip_\d+)"


def read(folder: Path) -> ForeignCheckpoint:
    """Returns the checkpoint in a folder; UserError if it is broken or its towers are not supported."""
    path = folder / CONFIG
    tensors = open_tensors(folder, WEIGHTS)
    try:
        model = read_json(path)["model_cfg"]
        vision, text = model["vision_cfg"], model["text_cfg"]
        timm = vision.get("timm_model_name")
        _reject_unsupported(path, "vision_cfg", vision, TIMM_FIELDS if timm else VISION_FIELDS)
        _reject_unsupported(path, "text_cfg", text, TEXT_FIELDS)
        image = _timm_config(path, vision) if timm else _vit_config(vision, model)
        config = CLIPConfig(
            image, _text_config(path, text, model), model["embed_dim"], logit_bias=model.get("init_logit_bias")
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} does not describe a CLIP model: {type(error).__name__} {error}") from None
    return ForeignCheckpoint(config, table(config, nested="text.positional_embedding" in tensors.shapes), tensors)


def cleaning(settings: Mapping[str, Any], path: Path) -> str:
    """Returns how open_clip cleans captions before the tokenizer: "whitespace", "lower" or "canonicalize".

    Args:
      settings: the contents of an open_clip_config.json that `read` accepts.
      path: the file, for error messages.

    Raises:
      UserError: the settings ask for another cleaning, or for other changes of the tokenizer.
    """
    tokenizer = settings["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {"clean": CLEANINGS[0]}
    if tokenizer not in [{"clean": cleaning} for cleaning in CLEANINGS]:
        raise UserError(f"{path}: text_cfg.tokenizer_kwargs = {tokenizer!r} is not supported")
    return tokenizer["clean"]


def table(config: CLIPConfig, *, nested: bool) -> list[TableRow]:
    """Returns open_clip's layout of towers of this shape: a row per parameter, with our name and open_clip's.

    With `nested`, the names of the text tower's tensors begin with "text.".
    """
    prefix = "text." if nested else ""
    rows = [
        TableRow("logit_scale", "logit_scale", same()),
        TableRow("text/token_embedding/embedding", f"{prefix}token_embedding.weight", same()),
        TableRow("text/positions", f"{prefix}positional_embedding", same(), resize=resize_context),
        *_blocks("text", f"{prefix}transformer"),
        *norm_rows("text/last_norm", f"{prefix}ln_final"),
    ]
    if config.text.projection_bias:
        rows += linear_rows("text/projection", f"{prefix}text_projection")
    else:
        rows.append(TableRow("text/projection/kernel", f"{prefix}text_projection", same()))
    if config.logit_bias is not None:
        rows.append(TableRow("logit_bias", "logit_bias", same()))
    return rows + (_clip_image(config.image) if config.image.projection else _timm_image(config.image))


def write_config(config: CLIPConfig) -> dict[str, Any]:
    """Returns the model_cfg of open_clip_config.json; UserError, with the reason, if open_clip has no such towers."""
    image, text = config.image, config.text
    if not (is_clip(replace(config, logit_bias=None)) or is_siglip(config)):
        raise UserError(f"open_clip does not support {unsupported_part(config)}: export with --layouts=stablehlo")
    quick = {blocks.activation == "quick_gelu" for blocks in (image.transformer, text.transformer)}
    if len(quick) > 1:
        raise UserError(
            "open_clip uses quick-GELU in both towers or in neither, but only one of these towers has it: "
            "leave open_clip out of --layouts"
        )
    language = {
        **_block_settings(text.transformer),
        "heads": text.transformer.heads,
        "vocab_size": text.vocab_size,
        "context_length": text.context_length,
        "hf_tokenizer_name": "tokenizer",
    }
    if is_siglip(config):
        vision = {
            "timm_model_name": _timm_name(image),
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": image.size,
        }
        language |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        # The initial bias for training; the trained bias is one of the weights.
        extra = {"custom_text": True, "init_logit_bias": config.logit_bias}
    else:
        vision = {
            **_block_settings(image.transformer),
            "head_width": image.transformer.width // image.transformer.heads,
            "patch_size": image.patch,
            "image_size": image.size,
        }
        if text.end_token != text.vocab_size - 1:
            language |= {"pool_type": "eos", "eos_id": text.end_token}
        extra = {"quick_gelu": True} if quick == {True} else {}
        extra |= {} if config.logit_bias is None else {"init_logit_bias": config.logit_bias}
    return {"embed_dim": config.embedding, "vision_cfg": vision, "text_cfg": language, **extra}


def _reject_unsupported(path: Path, section: str, settings: Mapping[str, Any], fields: set[str]) -> None:
    for name, value in settings.items():
        if name not in fields | IGNORED_FIELDS and value not in (None, False, DEFAULTS.get(name)):
            raise UserError(f"{path}: {section}.{name} = {value!r} is not supported")


def _transformer_config(
    settings: Mapping[str, Any], model: Mapping[str, Any], *, width: int, heads: int
) -> TransformerConfig:
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    if (settings.get("act_kwargs") or {}).get("approximate") == "tanh":
        activation = "gelu_tanh"
    epsilon = (settings.get("norm_kwargs") or {}).get("eps", 1e-5)
    return TransformerConfig(
        width, settings.get("layers", 12), heads, settings.get("mlp_ratio", 4.0), activation, epsilon
    )


def _vit_config(vision: Mapping[str, Any], model: Mapping[str, Any]) -> ImageConfig:
    width = vision.get("width", 768)
    heads = width // vision.get("head_width", DEFAULT_HEAD_WIDTH)
    blocks = _transformer_config(vision, model, width=width, heads=heads)
    return ImageConfig(vision.get("image_size", 224), vision.get("patch_size", 16), blocks)


def _timm_config(path: Path, vision: Mapping[str, Any]) -> ImageConfig:
    name = vision["timm_model_name"]
    parts = re.fullmatch(TIMM_NAME, name)
    pools_by_attention = (vision.get("timm_pool"), vision.get("timm_proj")) == ("map", "none")
    if not parts or parts[1] not in TIMM_SHAPES or not pools_by_attention:
        raise UserError(
            f"{path}: {name} is not supported; of timm's image towers, only SigLIP's with attention pooling are"
        )
    width, layers, heads, hidden = TIMM_SHAPES[parts[1]]
    activation = "gelu" if re.fullmatch(TIMM_EXACT_GELU, name) else "gelu_tanh"
    return ImageConfig(
        vision.get("image_size", int(parts[3])),
        int(parts[2]),
        TransformerConfig(width, layers, heads, hidden / width, activation, 1e-6),
        pooling="map",
        stem_bias=True,
        first_norm=False,
        projection=False,
    )


def _timm_name(image: ImageConfig) -> str:
    blocks = image.transformer
    shape = (blocks.width, blocks.layers, blocks.heads, round(blocks.width * blocks.mlp_ratio))
    size = {known_shape: size for size, known_shape in TIMM_SHAPES.items()}.get(shape)
    name = f"vit_{size}_patch{image.patch}_siglip_{image.size}"
    activation = "gelu" if re.fullmatch(TIMM_EXACT_GELU, name) else "gelu_tanh"
    known = image.size in TIMM_IMAGE_SIZES.get((size, image.patch), ())
    if not known or (blocks.activation, blocks.epsilon) != (activation, 1e-6):
        raise UserError(
            f"open_clip builds SigLIP's image tower with timm, which has no tower of width {blocks.width}, "
            f"{blocks.layers} layers, {blocks.heads} heads, MLP ratio {blocks.mlp_ratio:g}, patch {image.patch} and "
            f"size {image.size} with {blocks.activation} and epsilon {blocks.epsilon:g}: "
            "leave open_clip out of --layouts"
        )
    return name


def _text_config(path: Path, text: Mapping[str, Any], model: Mapping[str, Any]) -> TextConfig:
    blocks = _transformer_config(text, model, width=text.get("width", 512), heads=text.get("heads", 8))
    vocab_size, pool = text.get("vocab_size", 49408), text.get("pool_type", "argmax")
    ends = {"argmax": vocab_size - 1, "eos": text.get("eos_id", 2), "last": vocab_size - 1}
    no_causal_mask = text.get("no_causal_mask", False)
    if pool not in ends or no_causal_mask != (pool == "last"):
        raise UserError(
            f"{path}: text_cfg.pool_type = {pool!r} with no_causal_mask = {no_causal_mask!r} is not supported"
        )
    return TextConfig(
        vocab_size,
        text.get("context_length", 77),
        ends[pool],
        blocks,
        "last" if pool == "last" else "end",
        text.get("proj_bias", False),
    )


def _block_settings(blocks: TransformerConfig) -> dict[str, Any]:
    settings = {"width": blocks.width, "layers": blocks.layers, "mlp_ratio": blocks.mlp_ratio}
    if blocks.activation == "gelu_tanh":
        settings["act_kwargs"] = {"approximate": "tanh"}
    return settings if blocks.epsilon == 1e-5 else {**settings, "norm_kwargs": {"eps": blocks.epsilon}}


def _blocks(tower: str, prefix: str) -> list[TableRow]:
    ours, theirs = f"{tower}/transformer/blocks", f"{prefix}.resblocks.{{}}"
    return [
        *norm_rows(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        *linear_rows(f"{ours}/attention/qkv", f"{theirs}.attn.in_proj", dot="_"),
        *linear_rows(f"{ours}/attention/out", f"{theirs}.attn.out_proj", inputs=2),
        *norm_rows(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
        *linear_rows(f"{ours}/mlp_in", f"{theirs}.mlp.c_fc"),
        *linear_rows(f"{ours}/mlp_out", f"{theirs}.mlp.c_proj"),
    ]


def _clip_image(image: ImageConfig) -> list[TableRow]:
    grid = partial(resize_grid, class_token=True)
    return [
        TableRow("image/stem/projection/kernel", "visual.conv1.weight", patches(image.patch)),
        TableRow("image/class_token", "visual.class_embedding", same()),
        TableRow("image/positions", "visual.positional_embedding", same(), resize=grid),
        *norm_rows("image/first_norm", "visual.ln_pre"),
        *_blocks("image", "visual.transformer"),
        *norm_rows("image/last_norm", "visual.ln_post"),
        TableRow("image/projection/kernel", "visual.proj", same()),
    ]


def _timm_image(image: ImageConfig) -> list[TableRow]:
    trunk, pool, ours = "visual.trunk", "visual.trunk.attn_pool", "image/transformer/blocks"
    theirs = f"{trunk}.blocks.{{}}"
    grid = partial(resize_grid, class_token=False)
    return [
        TableRow("image/stem/projection/kernel", f"{trunk}.patch_embed.proj.weight", patches(image.patch)),
        TableRow("image/stem/projection/bias", f"{trunk}.patch_embed.proj.bias", same()),
        TableRow("image/positions", f"{trunk}.pos_embed", same(leading=1), resize=grid),
        *norm_rows(f"{ours}/attention_norm", f"{theirs}.norm1"),
        *linear_rows(f"{ours}/attention/qkv", f"{theirs}.attn.qkv"),
        *linear_rows(f"{ours}/attention/out", f"{theirs}.attn.proj", inputs=2),
        *norm_rows(f"{ours}/mlp_norm", f"{theirs}.norm2"),
        *linear_rows(f"{ours}/mlp_in", f"{theirs}.mlp.fc1"),
        *linear_rows(f"{ours}/mlp_out", f"{theirs}.mlp.fc2"),
        *norm_rows("image/last_norm", f"{trunk}.norm"),
        TableRow("image/pool/probe", f"{pool}.latent", same(leading=2)),
        *linear_rows("image/pool/attention/qkv", (f"{pool}.q", f"{pool}.kv"), parts=(1, 2)),
        *linear_rows("image/pool/attention/out", f"{pool}.proj", inputs=2),
        *norm_rows("image/pool/norm", f"{pool}.norm"),
        *linear_rows("image/pool/mlp_in", f"{pool}.mlp.fc1"),
        *linear_rows("image/pool/mlp_out", f"{pool}.mlp.fc2"),
    ]
