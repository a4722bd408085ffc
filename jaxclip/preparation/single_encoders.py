"""Picture and text features of separate encoders, a ViT and a BERT, by which Tagami et al. cluster products."""

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
LENGTH_MULTIPLE = 16  # numbers of tokens are rounded up to a multiple of this, so that few shapes are compiled


def picture_features(folder: Path, records: Records) -> np.ndarray:
    """Returns the class token of the ViT in a folder for the main picture of each product, (products, width).

    The pictures are preprocessed as the folder says.

    Raises:
      UserError: the folder holds no ViT, or its preprocessing makes pictures of another size than the ViT's input.
    """
    vit = load_vit(folder)
    path = folder / processor.PROCESSOR
    captions = {"caption_template": "", "lowercase": False, "context_length": 0}
    preprocess = processor.from_hugging_face(read_json(path), path, **captions)
    if preprocess.image_size != vit.config.size:
        raise UserError(
            f"{path} makes pictures of {preprocess.image_size} px, but the ViT needs {vit.config.size} px: "
            "give a ViT whose config.json and preprocessor_config.json have the same size"
        )
    batches = image_batches(records.main_pictures(), preprocess, batch_size=BATCH)
    return _embed(vit, lambda model, pixels: model(pixels), batches, len(records), "pictures")


def text_features(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Returns the [CLS] output of the BERT in a folder for each text, (texts, width); long texts are truncated.

    Raises:
      UserError: the folder holds no BERT or no tokenizer.
    """
    bert = load_bert(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no tokenizer: {first_line(error)}") from None
    max_length = len(bert.positions[...])
    tokens = tokenizer(list(texts), padding="longest", truncation=True, max_length=max_length, return_tensors="np")
    ids, mask = (np.asarray(tokens[name]) for name in ("input_ids", "attention_mask"))
    padding = min(-(-ids.shape[1] // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_length) - ids.shape[1]
    ids, mask = (np.pad(rows, ((0, 0), (0, padding))) for rows in (ids, mask))
    ids_and_masks = np.stack([ids, mask], axis=1).astype(np.int32)  # (texts, 2, tokens)
    batches = padded_blocks(ids_and_masks, BATCH)
    return _embed(bert, lambda model, batch: model.features(batch[:, 0], batch[:, 1] > 0), batches, len(texts), "texts")


def _embed(model: nnx.Module, encode: Callable, batches: Iterable[np.ndarray], count: int, kind: str) -> np.ndarray:
    """Returns the features of the first `count` inputs, (count, width); `kind` names the inputs in the progress bar."""
    graph, params = nnx.split(model)
    options = compiler.towers()
    compiled = jax.jit(lambda params, batch: encode(nnx.merge(graph, params), batch), compiler_options=options)
    batches = bar(batches, total=-(-count // BATCH), desc=f"describing {kind}", unit="batch", leave=False)
    return embed(lambda batch: compiled(params, batch), batches, count)
