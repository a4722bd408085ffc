"""Converts the preprocessing configurations of transformers and open_clip to `Preprocess` and back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxclip.errors import UserError
from jaxclip.pipeline.preprocess import Preprocess

PROCESSOR, ALL_PROCESSORS = "preprocessor_config.json", "processor_config.json"
FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's number of a resizing filter -> the filter's name in `Preprocess`."""
RESIZE_MODES = {"shortest": "crop", "squash": "squash"}
"""open_clip's name of a resizing policy -> the policy's name in `Preprocess`."""


def from_hugging_face(settings: Mapping[str, Any], path: Path, **captions: Any) -> Preprocess:
    """Returns the preprocessing that a preprocessor_config.json describes.

    Args:
      settings: contents of the file.
      path: path of the file, for error messages.
      captions: the fields of Preprocess that the file does not contain: caption_template, lowercase, context_length.

    Raises:
      UserError: the file asks for preprocessing that is not supported.
    """
    config = settings.get("image_processor", settings)
    crops = config.get("do_center_crop", "crop_size" in config)
    size, crop = config.get("size"), config.get("crop_size") if crops else None
    size = {"shortest_edge": size} if isinstance(size, int) and crops else _square(size)
    crop = _square(crop) if crops else {"height": size.get("height"), "width": size.get("width")}
    side = crop.get("height")
    expected = {"shortest_edge": side} if crops else {"height": side, "width": side}
    problems = [
        f"{name} = {config.get(name)!r}"
        for name, unsupported in {
            "size": not side or size != expected or crop.get("width") != side,
            "resample": config.get("resample", 3) not in FILTERS,
            "rescale_factor": not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6),
            "image_mean": len(config.get("image_mean") or ()) != 3,
            "image_std": len(config.get("image_std") or ()) != 3,
            **{step: not config.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize")},
        }.items()
        if unsupported
    ]
    if problems:
        raise UserError(f"{path} asks for preprocessing that is not supported: {', '.join(problems)}")
    return Preprocess(
        image_size=side,
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
        filter=FILTERS[config.get("resample", 3)],
        resize="crop" if crops else "squash",
        **captions,
    )


def to_hugging_face(preprocess: Preprocess, kind: str) -> dict[str, Any]:
    """Returns the contents of a preprocessor_config.json; `kind` is CLIP or Siglip."""
    square = {"height": preprocess.image_size, "width": preprocess.image_size}
    crops = preprocess.resize == "crop"
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.image_size} if crops else square,
        "do_center_crop": crops,
        "crop_size": square,
        "resample": {name: number for number, name in FILTERS.items()}[preprocess.filter],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def from_open_clip(settings: Mapping[str, Any], path: Path, *, image_size: int, **captions: Any) -> Preprocess:
    """Returns the preprocessing in an open_clip_config.json's preprocess_cfg, `settings`; see `from_hugging_face`."""
    mode, filter = settings.get("resize_mode", "shortest"), settings.get("interpolation", "bicubic")
    if mode not in RESIZE_MODES or filter not in FILTERS.values():
        raise UserError(f"{path}: resize_mode = {mode!r} with interpolation = {filter!r} is not supported")
    if not all(len(settings.get(name) or ()) == 3 for name in ("mean", "std")):
        raise UserError(f"{path}: preprocess_cfg should have a mean and a std of three channels")
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    return Preprocess(image_size=image_size, resize=RESIZE_MODES[mode], mean=mean, std=std, filter=filter, **captions)


def to_open_clip(preprocess: Preprocess) -> dict[str, Any]:
    """Returns the preprocess_cfg of an open_clip_config.json."""
    return {
        "size": preprocess.image_size,
        "mode": "RGB",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.filter,
        "resize_mode": {ours: theirs for theirs, ours in RESIZE_MODES.items()}[preprocess.resize],
        "fill_color": 0,
    }


def _square(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    return dict(size) if isinstance(size, Mapping) else {}
