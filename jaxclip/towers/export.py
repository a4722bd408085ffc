"""Exports a workdir's checkpoint to a folder that transformers, open_clip, or JAX without this package can load."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.models import lora, stablehlo
from jaxclip.models.weights import hugging_face, open_clip, peft
from jaxclip.models.weights.table import save
from jaxclip.pipeline import processor, text, trained_groups
from jaxclip.runtime import files
from jaxclip.towers.adapter_base import checkpoint_params
from jaxclip.towers.checkpoints import Checkpoints, resolve_step
from jaxclip.towers.towers import Towers, load_towers

Params = dict[str, Any]
# transformers rejects a safetensors file whose metadata does not name the framework that its tensors follow.
METADATA = {"format": "pt"}
LOGIT_PARAMETERS = ("logit_scale", "logit_bias")


def export_checkpoint(
    config: Config, workdir: Path, step: str, output: Path, layouts: Sequence[str], *, merge: bool = True
) -> tuple[int, list[Path]]:
    """Writes a workdir's checkpoint into a new folder; returns its step and the paths written.

    Args:
      config: the configuration of the workdir.
      workdir: where the checkpoint is.
      step: "latest", "best" or a number.
      output: the new folder; it may exist if it is empty.
      layouts: keys of LAYOUTS; ignored if `merge` is false.
      merge: whether adapters are merged into the towers. Otherwise the only weights written are those of the adapters,
        in PEFT's layout.

    Raises:
      UserError: the folder is not empty, or a layout cannot represent these towers. Nothing is written then.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output={output} is not empty: give a new folder")
    checkpoints = Checkpoints(workdir, read_only=True)
    number = resolve_step(step, checkpoints)
    towers = load_towers(config, workdir)
    if not merge:
        _check_only_adapters_trained(towers, workdir)
    settings = {layout: LAYOUTS[layout][0](towers) for layout in (layouts if merge else ["transformers"])}
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, number)
        if towers.config.lora and merge:
            params = lora.merge(params, towers.config.lora.scale)
            towers = replace(towers, config=replace(towers.config, lora=None))
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.atomically(output) as folder:
        folder.mkdir()
        text.save_tokenizer(_tokenizer(towers), folder)
        if merge:
            for layout in layouts:
                LAYOUTS[layout][1](towers, settings[layout], params, folder)
        else:
            _write_adapters(towers, config.model.init_from, params, folder)
        trained_groups.copy(workdir, folder)
        if output.exists():
            output.rmdir()
    return number, sorted(output.iterdir())


def _transformers_settings(towers: Towers) -> dict[str, Any]:
    settings, tokenizer = hugging_face.write_config(towers.config), towers.tokenizer
    settings["text_config"] |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return settings


def _write_transformers(towers: Towers, settings: dict[str, Any], params: Params, folder: Path) -> None:
    _write_json(folder / hugging_face.CONFIG, settings)
    _write_processor(towers, folder)
    tensors = save(hugging_face.table(towers.config), params)
    save_file(tensors, folder / hugging_face.WEIGHTS, METADATA)


def _open_clip_settings(towers: Towers) -> dict[str, Any]:
    model = open_clip.write_config(towers.config)
    return {"model_cfg": model, "preprocess_cfg": processor.to_open_clip(towers.preprocess)}


def _write_open_clip(towers: Towers, settings: dict[str, Any], params: Params, folder: Path) -> None:
    _write_json(folder / open_clip.CONFIG, settings)
    table = open_clip.table(towers.config, nested=hugging_face.is_siglip(towers.config))
    save_file(save(table, params), folder / open_clip.WEIGHTS, METADATA)


def _write_stablehlo(towers: Towers, settings: None, params: Params, folder: Path) -> None:
    stablehlo.write(towers.config, params, folder)
    towers.preprocess.save(folder)


def _check_only_adapters_trained(towers: Towers, workdir: Path) -> None:
    """Raises UserError if there are no adapters, or if parameters were trained that PEFT's layout cannot hold.

    It holds the adapters; a trained logit scale and logit bias are accepted, but not written.
    """
    if not towers.config.lora:
        raise UserError(f"--nomerge is for adapters, and {workdir} has none: leave --nomerge out")
    trained = flatten_dict(towers.stored(towers.shapes), sep="/")
    others = [name for name in trained if f"/{lora.NAME}/" not in name and name not in LOGIT_PARAMETERS]
    if others:
        raise UserError(
            f"{', '.join(others)} were trained in addition to the adapters, and PEFT's layout cannot hold "
            "these parameters: leave --nomerge out"
        )


def _write_adapters(towers: Towers, base: str, params: Params, folder: Path) -> None:
    """Writes the adapters in PEFT's layout, for a base loaded by transformers; no learned logit scale or bias."""
    tensors = peft.tensors(hugging_face.table(replace(towers.config, lora=None)), params)
    save_file(tensors, folder / peft.WEIGHTS, METADATA)
    _write_json(folder / peft.CONFIG, peft.settings(towers.config.lora, base, list(tensors)))
    _write_processor(towers, folder)


LAYOUTS: dict[str, tuple[Callable[[Towers], Any], Callable[..., None]]] = {
    "transformers": (_transformers_settings, _write_transformers),
    "open_clip": (_open_clip_settings, _write_open_clip),
    "stablehlo": (lambda towers: None, _write_stablehlo),
}
"""Layout -> (towers -> settings, or UserError if the layout cannot represent the towers; writer of the folder)."""


def _tokenizer(towers: Towers) -> PreTrainedTokenizerBase:
    """Returns the towers' tokenizer, changed to have their context length and to lowercase if `Preprocess` does."""
    tokenizer = towers.tokenizer
    tokenizer.model_max_length = towers.preprocess.context_length
    if towers.preprocess.lowercase:
        backend = tokenizer.backend_tokenizer
        before = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([*before, normalizers.Lowercase()])
    return tokenizer


def _write_processor(towers: Towers, folder: Path) -> None:
    kind = "CLIP" if hugging_face.is_clip(towers.config) else "Siglip"
    _write_json(folder / processor.PROCESSOR, processor.to_hugging_face(towers.preprocess, kind))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
