"""Which values a field may have, and which may not go together."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxclip.catalog import captions
from jaxclip.catalog.readers import READERS
from jaxclip.config.schema import Columns, Config, Loss
from jaxclip.losses import objective
from jaxclip.losses.incorrect_pairs import WEIGHTINGS
from jaxclip.models.presets import PRESETS
from jaxclip.models.transformer import EXECUTIONS, REMAT_POLICIES

CHOICES: dict[str, Sequence[str]] = {
    "task": ("towers",),
    "data.reader": tuple(READERS),
    "data.split": ("train", "test", "all"),
    "data.resize": ("squash", "crop"),
    "model.preset": tuple(PRESETS),
    "model.dtype": ("float32", "bfloat16"),
    "model.execution": EXECUTIONS,
    "model.remat": tuple(REMAT_POLICIES),
    "loss.name": objective.NAMES,
    "loss.implementation": objective.IMPLEMENTATIONS,
    "loss.weighting": WEIGHTINGS,
    "optimizer.name": ("adamw", "adam"),
    "optimizer.schedule": ("cosine", "constant"),
}
AT_LEAST: dict[str, float] = {
    "batch_size": 1, "steps": 0, "epochs": 0, "log_every": 1, "data.drawn_products": 1, "data.image_size": 8,
    "data.vocab_size": 258, "data.context_length": 4, "data.workers": 0, "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0, "optimizer.clip_norm": 0, "checkpoint.every": 1,
    "checkpoint.keep": 1, "evaluation.every": 0, "evaluation.batch_size": 1, "loss.temperature": 0.01,
    "loss.tile": 1, "loss.microbatch": 0, "loss.queue": 0, "loss.alpha": 0, "loss.beta": 0, "loss.info_nce": 0,
}  # fmt: skip
PROBABILITIES = ("augmentation.keep_attributes", "augmentation.keep_words")
BELOW_ONE = (
    "model.dropout", "model.stochastic_depth", "model.patch_dropout", "optimizer.beta1", "optimizer.beta2",
)  # fmt: skip
WITH_COLUMNS = ("table", "tfds", "webdataset")
"""Readers of layouts whose columns have names of their own."""
ONLY_FOR = {"bias": "sigmoid", **dict.fromkeys(("alpha", "beta", "weighting", "info_nce"), "incorrect_pairs")}
"""Fields of the loss that only one of the losses reads."""


def contradictions(config: Config, flat: Mapping[str, Any]) -> list[str]:
    """Returns a line for each value that cannot be, or cannot go with another.

    Args:
      config: all fields have their types.
      flat: dotted name -> value of the fields to look at one by one; a field whose given value was no value of its type
        is left out.
    """
    problems = [
        f"{name} = {flat[name]!r} is none of {', '.join(choices)}" + _nearest(flat[name], choices)
        for name, choices in CHOICES.items()
        if name in flat and flat[name] not in choices
    ]
    problems += [
        f"{n} = {flat[n]} must be at least {low:g}" for n, low in AT_LEAST.items() if n in flat and flat[n] < low
    ]
    problems += [f"{n} = {flat[n]} must be in [0, 1]" for n in PROBABILITIES if n in flat and not 0 <= flat[n] <= 1]
    problems += [f"{n} = {flat[n]} must be in [0, 1)" for n in BELOW_ONE if n in flat and not 0 <= flat[n] < 1]
    if not -(2**31) <= config.seed < 2**31:
        problems.append(f"seed = {config.seed} must be a 32-bit number: from {-(2**31)} to {2**31 - 1}")
    if config.optimizer.epsilon <= 0:
        problems.append(f"optimizer.epsilon = {config.optimizer.epsilon} must be greater than 0")
    if min(config.data.std) <= 0:
        problems.append(f"data.std = {config.data.std}: each must be greater than 0")
    if {"steps", "epochs"} <= flat.keys() and (config.steps > 0) == (config.epochs > 0):
        problems.append("set exactly one of steps and epochs" + (": both are set" if config.steps else ": neither is"))
    if config.data.test <= 0:
        problems.append(f"data.test = {config.data.test} must be a number of products >= 1 or a share in (0, 1)")
    if config.data.reader in READERS.keys() - {"drawn"} and not config.data.path and not config.data.prepared:
        problems.append(f"data.reader = {config.data.reader!r} needs data.path, the folder of the raw catalogue")
    if config.data.reader not in WITH_COLUMNS and config.data.columns != Columns():
        problems.append(f"data.columns is for data.reader = {' or '.join(WITH_COLUMNS)}, not {config.data.reader!r}")
    preset = PRESETS.get(config.model.preset)
    if preset and config.data.image_size % preset.patch:
        size, patch = config.data.image_size, preset.patch
        problems.append(
            f"data.image_size = {size} is no multiple of the patch of model.preset = {config.model.preset!r}, {patch}; "
            f"the nearest is {max(1, round(size / patch)) * patch}"
        )
    problems += [f"data.caption_template: {p}" for p in captions.check(config.data.caption_template)]
    for name in ("crop_area", "crop_aspect"):
        low, high = getattr(config.augmentation, name)
        if not 0 < low <= high or (name == "crop_area" and high > 1):
            problems.append(
                f"augmentation.{name} = ({low:g}, {high:g}) must be an interval of positive numbers, low first"
            )
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
        problems.append(f"mesh = {sizes} (data, fsdp, tensor): each is >= 1, and at most one is -1 for what is left")
    return problems + _of_loss(config)


def _nearest(value: Any, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), choices, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _of_loss(config: Config) -> list[str]:
    loss, problems = config.loss, []
    if loss.microbatch and config.batch_size % loss.microbatch:
        problems.append(f"loss.microbatch = {loss.microbatch} does not divide batch_size = {config.batch_size}")
    for name, owner in ONLY_FOR.items():
        if getattr(loss, name) != getattr(Loss(), name) and loss.name != owner:
            problems.append(f"loss.{name} is for loss.name = {owner!r}, not {loss.name!r}")
    has_info_nce = loss.name == "info_nce" or (loss.name == "incorrect_pairs" and loss.info_nce > 0)
    if loss.queue and not (has_info_nce and loss.mask_groups):
        problems.append(
            f"loss.queue = {loss.queue} needs InfoNCE and loss.mask_groups: without groups a product would become its "
            "own negative"
        )
    if loss.name == "incorrect_pairs" and not (loss.alpha or loss.beta or loss.info_nce):
        problems.append("loss.alpha, loss.beta and loss.info_nce are all 0: nothing would be learned")
    return problems
