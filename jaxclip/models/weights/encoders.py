"""Loads published encoders in the layouts of transformers' ViTModel and BertModel; they are never written."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx
from huggingface_hub.errors import StrictDataclassError

from jaxclip.errors import UserError
from jaxclip.models.clip import ImageConfig, ImageTower
from jaxclip.models.encoders import BERT, BERTConfig, vit_config
from jaxclip.models.weights.hugging_face import CONFIG, WEIGHTS, transformer
from jaxclip.models.weights.positions import resize_grid
from jaxclip.models.weights.table import TableRow, linear_rows, load, norm_rows, patches, same
from jaxclip.models.weights.tensors import Tensors, open_tensors, read_json

HEADS = r"^(pooler|cls|classifier)\."
"""Pattern of the names of tensors of a pooler or a task head on top of an encoder, which are not loaded."""


def load_vit(folder: Path) -> ImageTower:
    """Returns the ViT in a checkpoint's folder; it maps uint8 RGB pictures to the class token after the last norm.

    The mean and standard deviation of the pixels come from preprocessor_config.json. For B pictures, the class tokens
    are (B, W), where W is the width of the tower.

    Raises:
      UserError: the checkpoint is broken or is not a ViT.
    """
    theirs = _config(folder, "vit", "ViTConfig")
    path = folder / "preprocessor_config.json"
    preprocessing = read_json(path)
    if not {"image_mean", "image_std"} <= preprocessing.keys():
        raise UserError(f"{path} must contain image_mean and image_std: add both, or give a complete checkpoint")
    config = vit_config(
        theirs.image_size,
        theirs.patch_size,
        transformer(theirs),
        mean=tuple(preprocessing["image_mean"]),
        std=tuple(preprocessing["image_std"]),
    )
    width = config.transformer.width
    return _load(lambda: ImageTower(config, width, rngs=nnx.Rngs(0)), _vit_table(config), _open(folder, "vit"))


def load_bert(folder: Path) -> BERT:
    """Returns the BERT in a checkpoint's folder; UserError if the checkpoint is broken or is not a BERT."""
    theirs = _config(folder, "bert", "BertConfig")
    blocks = replace(transformer(theirs), post_norm=True)
    config = BERTConfig(theirs.vocab_size, theirs.max_position_embeddings, blocks, theirs.type_vocab_size)
    return _load(lambda: BERT(config, rngs=nnx.Rngs(0)), _bert_table(), _open(folder, "bert"))


def _config(folder: Path, kind: str, class_name: str) -> Any:
    import transformers

    path = folder / CONFIG
    settings = read_json(path)
    if settings.get("model_type") != kind:
        raise UserError(f"{path}: model_type is {settings.get('model_type')!r}, but must be {kind!r}")
    try:
        return getattr(transformers, class_name).from_dict(settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{path} does not describe a {kind} model: {str(error).strip().splitlines()[-1]}") from None


def _open(folder: Path, prefix: str) -> Tensors:
    def rename(name: str) -> str | None:
        name = name.removeprefix(f"{prefix}.").replace(".gamma", ".weight").replace(".beta", ".bias")
        return None if re.match(HEADS, name) else name

    return open_tensors(folder, WEIGHTS).renamed(rename)


def _load(make: Callable[[], nnx.Module], table: list[TableRow], tensors: Tensors) -> Any:
    graph, shapes = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, load(table, tensors, nnx.to_pure_dict(shapes)))


def _vit_table(config: ImageConfig) -> list[TableRow]:
    ours, theirs = "transformer/blocks", "encoder.layer.{}"
    grid = partial(resize_grid, class_token=True)
    return [
        TableRow("class_token", "embeddings.cls_token", same(leading=2)),
        TableRow("positions", "embeddings.position_embeddings", same(leading=1), resize=grid),
        TableRow("stem/projection/kernel", "embeddings.patch_embeddings.projection.weight", patches(config.patch)),
        TableRow("stem/projection/bias", "embeddings.patch_embeddings.projection.bias", same()),
        *norm_rows(f"{ours}/attention_norm", f"{theirs}.layernorm_before"),
        *_attention(f"{ours}/attention", f"{theirs}.attention.attention", f"{theirs}.attention.output"),
        *norm_rows(f"{ours}/mlp_norm", f"{theirs}.layernorm_after"),
        *_mlp(ours, theirs),
        *norm_rows("last_norm", "layernorm"),
    ]


def _bert_table() -> list[TableRow]:
    ours, theirs = "transformer/blocks", "encoder.layer.{}"
    return [
        TableRow("token_embedding/embedding", "embeddings.word_embeddings.weight", same()),
        TableRow("positions", "embeddings.position_embeddings.weight", same()),
        TableRow("types", "embeddings.token_type_embeddings.weight", same()),
        *norm_rows("first_norm", "embeddings.LayerNorm"),
        *_attention(f"{ours}/attention", f"{theirs}.attention.self", f"{theirs}.attention.output"),
        *norm_rows(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm"),
        *_mlp(ours, theirs),
        *norm_rows(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm"),
    ]


def _attention(ours: str, theirs: str, output: str) -> list[TableRow]:
    return [
        *linear_rows(f"{ours}/qkv", tuple(f"{theirs}.{part}" for part in ("query", "key", "value"))),
        *linear_rows(f"{ours}/out", f"{output}.dense", inputs=2),
    ]


def _mlp(ours: str, theirs: str) -> list[TableRow]:
    return [
        *linear_rows(f"{ours}/mlp_in", f"{theirs}.intermediate.dense"),
        *linear_rows(f"{ours}/mlp_out", f"{theirs}.output.dense"),
    ]
