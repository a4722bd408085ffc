"""Checks of a configuration: each value by its field's declaration, and the values that contradict each other."""

from collections.abc import Collection
from typing import Any

from jaxclip.catalog.readers import READERS
from jaxclip.config.declare import Key, Only, keys, members, value_of
from jaxclip.config.schema import Config
from jaxclip.config.values import NO_DETECTOR, not_one_of
from jaxclip.errors import UserError
from jaxclip.features import crop
from jaxclip.models.presets import IMAGE_SIZE, PRESETS


def find_problems(config: Config, wrong_types: Collection[str] = ()) -> list[str]:
    """Returns one sentence for each value that is not allowed, and for each that contradicts another.

    Args:
      config: the configuration; every value has its field's type.
      wrong_types: dotted names of fields that were set to a value of another type. They have their default in `config`
        and are not reported again.
    """
    fields = [key for key in keys(Config) if key.name not in wrong_types]
    problems = [problem for key in fields for problem in _check_value(key, value_of(config, key.name))]
    if not {"steps", "epochs"} & set(wrong_types) and (config.steps > 0) == (config.epochs > 0):
        neither = (
            ": neither is; to evaluate a checkpoint without training, use python -m jaxclip.evaluate with --config and "
            "--config.model.init_from"
        )
        problems.append("set exactly one of steps and epochs" + (": both are set" if config.steps else neither))
    problems += _check_unused(config)
    problems += _check_data(config)
    problems += _check_features(config)
    problems += _check_init_from(config)
    problems += _check_rerank(config)
    problems += _check_mesh(config)
    return problems + _check_loss(config)


def is_used(only: Only | None, config: Config) -> bool:
    """Returns whether a field or section with this `only` is read; True if the other field's value is not valid."""
    if only is None:
        return True
    name, values = only
    choices = next(key.declaration.choices for key in keys(Config) if key.name == name)
    return value_of(config, name) in values or value_of(config, name) not in choices


def _check_value(key: Key, value: Any) -> list[str]:
    """Returns the problems of a field's value by its declaration; the default is always allowed."""
    name, declaration, problems = key.name, key.declaration, []
    if value == key.default:
        return []
    if declaration.choices and value not in declaration.choices:
        problems.append(f"{name} = {value!r} {not_one_of(value, declaration.choices)}")
    if declaration.limits is not None:
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number not in declaration.limits for number in numbers):
            subject = ": each" if isinstance(value, tuple) else ""
            problems.append(f"{name} = {value}{subject} must be {allowed_numbers(key)}")
    return problems + (declaration.check(name, value) if declaration.check else [])


def allowed_numbers(key: Key) -> str:
    """Returns the limits of a field in words, such as "0 or at least 8" if its default, 0, lies outside them."""
    limits = key.declaration.limits
    if limits is None or isinstance(key.default, tuple) or key.default in limits:
        return str(limits or "")
    return f"{key.default} or {limits}"


def _check_unused(config: Config, cls: type = Config, prefix: str = "") -> list[str]:
    """Returns a sentence for each field or section that is set although the choice it depends on ignores it."""
    problems = []
    for member in members(cls, prefix):
        declaration, value = member.declaration, value_of(config, member.name)
        if is_used(declaration.only, config):
            if member.is_section:
                problems += _check_unused(config, member.kind, f"{member.name}.")
            continue
        unset = member.default if declaration.otherwise is None else declaration.otherwise
        if value != unset:
            name, values = declaration.only
            needed = " or ".join(filter(None, [", ".join(map(repr, values[:-1])), repr(values[-1])]))
            problems.append(f"{member.name} applies only with {name} = {needed}, not {value_of(config, name)!r}")
    return problems


def _check_data(config: Config) -> list[str]:
    data, problems = config.data, []
    if data.sources and (data.path or data.reader != "drawn"):
        remedy = "leave data.path out and data.reader at drawn, or set data.sources=() for one catalogue"
        problems.append(f"data.sources names several catalogues: {remedy}")
    if data.reader in READERS.keys() - {"drawn"} and not data.path and not data.prepared:
        problems.append(f"data.reader = {data.reader!r} needs data.path, the file or folder of the raw catalogue")
    if data.reader == "drawn" and data.path:
        others = ", ".join(name for name in READERS if name != "drawn")
        problems.append(
            f"data.path = {data.path!r} is not read by data.reader = 'drawn', which draws its own catalogue: "
            f"set data.reader to the layout of that folder ({others})"
        )
    if data.picture == "crop" and config.features.detector == NO_DETECTOR:
        problems.append("data.picture = 'crop' needs crops: set features.detector to a detector")
    return problems


def _check_features(config: Config) -> list[str]:
    try:
        crop.check(config.features.policy, config.features.padding)
    except UserError as error:
        return [f"features.policy and features.padding: {error}"]
    return []


def _check_init_from(config: Config) -> list[str]:
    """Checks the fields that depend on whether the towers come from a checkpoint (model.init_from)."""
    if config.model.init_from:
        return [
            f"{key.name} comes from model.init_from: leave it out"
            for key in keys(Config)
            if key.declaration.from_checkpoint and value_of(config, key.name) != key.default
        ]
    problems = []
    if config.task == "adapter":
        problems.append("task = 'adapter' needs model.init_from, the workdir with the towers to adapt")
    return problems if config.task == "rerank" else problems + _check_patches(config)


def _check_patches(config: Config) -> list[str]:
    preset, size, problems = PRESETS.get(config.model.preset), config.data.image_size or IMAGE_SIZE, []
    patch = config.model.patch or (preset.patch if preset else 1)
    patch_name = "model.patch" if config.model.patch else f"the patch of model.preset = {config.model.preset!r}"
    if patch > 0 and size % patch:
        problems.append(
            f"data.image_size = {size} is not a multiple of {patch_name}, {patch}; "
            f"the nearest is {max(1, round(size / patch)) * patch}"
        )
    if preset and preset.stem != "patch" and patch & (patch - 1):
        problems.append(
            f"model.patch = {patch} must be a power of two: the stem of model.preset = {config.model.preset!r} halves "
            "the picture repeatedly"
        )
    return problems


def _check_rerank(config: Config) -> list[str]:
    if config.task != "rerank":
        return []
    rerank, problems = config.rerank, []
    if not config.first_stage:
        problems.append("first_stage is missing: set --config.first_stage, the workdir of the towers to re-rank")
    if config.features.detector == NO_DETECTOR:
        problems.append(
            "features.detector = 'none' computes no features of the products, which a re-ranker needs: set a detector"
        )
    if rerank.seeds > 1 and not rerank.ablation:
        problems.append("rerank.seeds applies only with rerank.ablation: a single run has one seed")
    if rerank.preset == "cross_attention" and rerank.heads > 0 and rerank.hidden % rerank.heads:
        problems.append(f"rerank.hidden = {rerank.hidden} is not a multiple of rerank.heads = {rerank.heads}")
    return problems


def _check_mesh(config: Config) -> list[str]:
    sizes, slices = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor], config.mesh.slices
    if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
        return [
            f"mesh = {sizes} (data, fsdp, tensor): each must be >= 1; at most one may be -1, for all remaining devices"
        ]
    if slices > 0 and sizes[0] % slices and sizes[0] != -1:
        return [f"mesh.data = {sizes[0]} is not a multiple of mesh.slices = {slices}, over which it is split"]
    return []


def _check_loss(config: Config) -> list[str]:
    loss, problems = config.loss, []
    if loss.microbatch and config.batch_size % loss.microbatch:
        problems.append(f"loss.microbatch = {loss.microbatch} does not divide batch_size = {config.batch_size}")
    has_info_nce = loss.name == "info_nce" or (loss.name == "incorrect_pairs" and loss.info_nce > 0)
    if loss.queue and not (has_info_nce and loss.mask_groups):
        problems.append(
            f"loss.queue = {loss.queue} needs InfoNCE and loss.mask_groups: without groups a product can be its "
            "own negative"
        )
    if loss.name == "incorrect_pairs" and not (loss.alpha or loss.beta or loss.info_nce):
        problems.append("loss.alpha, loss.beta and loss.info_nce are all 0: nothing would be learned")
    return problems
