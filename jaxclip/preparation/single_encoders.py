"""Features from a separate ViT and BERT, with which Tagami et al. cluster products."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from transformers import AutoTokenizer

from jaxclip.errors import UserError, first_line
from jaxclip.models.weights.encoders import load_bert, load_vit
from jaxclip.models.weights.tensors import read_json
from jaxclip.pipeline import processor
from jaxclip.pipeline.batches import image_batches
from jaxclip.pipeline.records import Records
from jaxclip.runtime import compiler
from jaxclip.runtime.progress import bar
from jaxclip.towers.embed import embed, padded_blocks

BATCH = 64
LENGTH = 16  # token counts are rounded up to a multiple of this, so that few shapes are compiled


def picture_features(folder: Path, records: Records) -> np.ndarray:
    """Returns (N, W) the class token of every picture, by the ViT in a folder and with its preprocessing.

    Raises:
      UserError: the folder holds no ViT, or its preprocessing gives pictures of a size that the ViT does not take.
    """
    vit = load_vit(folder)
    path = folder / processor.PROCESSOR
    captions = {"caption_template": "", "lowercase": False, "context_length": 0}
    preprocess = processor.from_hugging_face(read_json(path), path, **captions)
    if preprocess.image_size != vit.config.size:
        raise UserError(f"{path} makes pictures of {preprocess.image_size} px, the ViT takes {vit.config.size}")
    batches = image_batches(records, preprocess, batch_size=BATCH)
    return _embed(vit, lambda model, pixels: model(pixels), batches, len(records), "pictures")


def text_features(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Returns (N, W) the [CLS] token of every text, by the BERT in a folder; long texts are truncated.

    Raises:
      UserError: the folder holds no BERT, or no tokenizer.
    """
    bert = load_bert(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no tokenizer: {first_line(error)}") from None
    longest = len(bert.positions[...])
    found = tokenizer(list(texts), padding="longest", truncation=True, max_length=longest, return_tensors="np")
    ids, inside = (np.asarray(found[name]) for name in ("input_ids", "attention_mask"))
    spare = min(-(-ids.shape[1] // LENGTH) * LENGTH, longest) - ids.shape[1]
    ids, inside = (np.pad(rows, ((0, 0), (0, spare))) for rows in (ids, inside))
    both = np.stack([ids, inside], axis=1).astype(np.int32)  # (N, 2, T)
    rows = padded_blocks(both, BATCH)
    return _embed(bert, lambda model, some: model.features(some[:, 0], some[:, 1] > 0), rows, len(both), "texts")


def _embed(model: nnx.Module, encode: Callable, batches: Iterable[np.ndarray], count: int, what: str) -> np.ndarray:
    graph, params = nnx.split(model)
    options = compiler.towers()
    compiled = jax.jit(lambda params, batch: encode(nnx.merge(graph, params), batch), compiler_options=options)
    shown = bar(batches, total=-(-count // BATCH), desc=f"describing {what}", unit="batch", leave=False)
    return embed(lambda batch: compiled(params, batch), shown, count)
