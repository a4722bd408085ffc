"""The experiment's configuration: frozen dataclasses, filled from a file of configs/ and from the command line.

Every mistake (an unknown key, a wrong type, values that cannot go together) is reported at once.
"""

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxclip.catalog import captions
from jaxclip.catalog.readers import READERS
from jaxclip.errors import UserError
from jaxclip.models.clip import CLIP_MEAN, CLIP_STD
from jaxclip.models.presets import PRESETS
from jaxclip.models.transformer import EXECUTIONS, REMAT_POLICIES

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Columns:
    """Column names of a table (reader "table"); an empty one is looked for under its usual names."""

    id: str = ""
    image: str = ""
    caption: str = ""
    category: str = ""


@dataclass(frozen=True)
class Data:
    """Where the products come from and how a picture and a caption reach the towers."""

    reader: str = "drawn"  # layout of the raw catalogue: a key of jaxclip.catalog.readers.READERS
    path: str = ""  # raw catalogue; the drawn one needs none
    prepared: str = ""  # folder of the prepared dataset; "" = under $JAXCLIP_CACHE, found again by its content
    split: str = "test"  # what evaluation ranks: train, test or all
    test: float = 0.1  # products held back for testing: a number (>= 1) or a share (< 1); whole groups only
    split_seed: int = 42  # of the split alone, so that runs with other seeds share their test products
    columns: Columns = field(default_factory=Columns)
    drawn_products: int = 4000  # size of the drawn catalogue
    drawn_seed: int = 0
    image_size: int = 64  # side of the towers' square pictures, pixels
    resize: str = "squash"  # squash: to a square, whatever the shape; crop: shorter side, then the centre (CLIP)
    mean: RGB = CLIP_MEAN  # of the pixels, per channel, in [0, 1]
    std: RGB = CLIP_STD
    caption_template: str = captions.DEFAULT_TEMPLATE
    lowercase: bool = True
    tokenizer: str = ""  # folder of a Hugging Face tokenizer; "" = a byte-level BPE trained on the training captions
    vocab_size: int = 8192  # of the trained BPE
    context_length: int = 32  # tokens of a caption, both special ones included
    workers: int = 0  # parallel decoders; 0 = as tf.data sees fit


@dataclass(frozen=True)
class Augmentation:
    """What training does to a pair; evaluation never does."""

    crop_area: tuple[float, float] = (0.6, 1.0)  # share of the picture a random crop keeps; (1, 1) = none
    crop_aspect: tuple[float, float] = (0.8, 1.25)  # of the crop, relative to the picture's own
    flip: bool = False  # mirror half of the pictures; leave off where captions name sides
    keep_attributes: float = 1.0  # probability with which a caption keeps each of its attributes
    keep_words: float = 1.0  # probability with which a caption keeps each word of the name
    prompts: bool = False  # draw the caption's wording from OpenFashionCLIP's prompt templates


@dataclass(frozen=True)
class Model:
    """The towers."""

    preset: str = "laptop"  # a key of jaxclip.models.presets.PRESETS
    dropout: float = 0.0  # share of features zeroed after attention and MLP
    stochastic_depth: float = 0.0  # share of examples that skip the last block, linear in depth
    patch_dropout: float = 0.0  # share of a picture's patches that training leaves out
    dtype: str = "float32"  # of the computation: float32 or bfloat16; parameters are float32
    execution: str = "auto"  # scan (one compiled layer), unroll (faster steps on CPU), auto
    remat: str = "none"  # what the backward pass recomputes: none, dots (all but matrix products), full


@dataclass(frozen=True)
class Loss:
    """The contrastive loss."""

    name: str = "info_nce"
    temperature: float = 0.07  # of the softmax; where training starts if it is learned
    learned_temperature: bool = True  # clipped so that logits are scaled by at most 100
    mask_groups: bool = True  # rows of one group are not each other's negatives


@dataclass(frozen=True)
class Optimizer:
    """The optimizer and its schedule."""

    name: str = "adamw"  # adamw or adam
    learning_rate: float = 1e-3  # at the peak
    schedule: str = "cosine"  # after warm-up: cosine (to zero) or constant
    warmup_steps: int = 100
    weight_decay: float = 0.1  # of matrices and embeddings; biases, norms and the temperature have none
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    clip_norm: float = 1.0  # of the global gradient; 0 = never
    rates: dict[str, float] = field(default_factory=dict)  # regex of parameter names -> factor of the rate; 0 = frozen


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh; one of them may be -1 = all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved."""

    every: int = 500  # steps
    keep: int = 2  # newest checkpoints kept; the best by hit@1 is kept beside them


@dataclass(frozen=True)
class Evaluation:
    """When the test split is ranked during training."""

    every: int = 0  # steps; 0 = only after the last one
    batch_size: int = 256


@dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: int = 0
    task: str = "towers"
    batch_size: int = 256  # pairs of a step, over all devices
    steps: int = 0  # length of the run, in steps ...
    epochs: float = 0.0  # ... or in passes over the training split; exactly one of the two
    log_every: int = 20  # steps between lines of metrics.jsonl
    data: Data = field(default_factory=Data)
    augmentation: Augmentation = field(default_factory=Augmentation)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)


CHOICES: dict[str, Sequence[str]] = {
    "task": ("towers",),
    "data.reader": tuple(READERS),
    "data.split": ("train", "test", "all"),
    "data.resize": ("squash", "crop"),
    "model.preset": tuple(PRESETS),
    "model.dtype": ("float32", "bfloat16"),
    "model.execution": EXECUTIONS,
    "model.remat": tuple(REMAT_POLICIES),
    "loss.name": ("info_nce",),
    "optimizer.name": ("adamw", "adam"),
    "optimizer.schedule": ("cosine", "constant"),
}
AT_LEAST: dict[str, float] = {
    "batch_size": 1, "steps": 0, "epochs": 0, "log_every": 1, "data.drawn_products": 1, "data.image_size": 8,
    "data.vocab_size": 258, "data.context_length": 4, "data.workers": 0, "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0, "optimizer.clip_norm": 0, "checkpoint.every": 1,
    "checkpoint.keep": 1, "evaluation.every": 0, "evaluation.batch_size": 1, "loss.temperature": 0.01,
}  # fmt: skip
PROBABILITIES = ("augmentation.keep_attributes", "augmentation.keep_words")
BELOW_ONE = (
    "model.dropout", "model.stochastic_depth", "model.patch_dropout", "optimizer.beta1", "optimizer.beta2",
)  # fmt: skip


def build(settings: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Returns the configuration that a nested mapping of settings and then `--config.` overrides describe.

    Args:
      settings: section -> field -> value, as a config file's get_config() or a workdir's config.json gives it; what it
        leaves out keeps its default.
      overrides: dotted field -> its text on the command line.

    Raises:
      UserError: naming every unknown key (with the nearest right one), wrong type and impossible value at once.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    kinds = fields()
    for name, value in [*_flatten(settings, kinds), *(overrides or {}).items()]:
        if name not in kinds:
            problems.append(_unknown(name, kinds))
            continue
        text = isinstance(value, str) and name in (overrides or {})
        try:
            values[name] = _convert(value, kinds[name], literal=text)
        except (TypeError, ValueError, SyntaxError, OverflowError):
            problems.append(f"{name} = {value!r} is not {_describe(kinds[name])}")
    config = _assemble(Config, values)
    problems += _contradictions(config, skip={p.split(" ", 1)[0] for p in problems})
    if problems:
        raise UserError(_listed(problems))
    return config


def load(workdir: Path, overrides: Mapping[str, str] | None = None) -> Config:
    """Returns the configuration saved in a workdir; UserError where there is none or it cannot be read."""
    path = workdir / "config.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a workdir: it has no config.json; give the --workdir of a run") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a configuration: it holds {type(settings).__name__}, not an object")
    return build(settings, overrides)


def dump(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dicts of JSON values; `build` of it gives the configuration back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(config: Config) -> str:
    """Returns 12 hex digits that change with any field."""
    return hashlib.sha256(json.dumps(dump(config), sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Config, new: Config) -> list[str]:
    """Returns one line "field: old -> new" for each field in which two configurations differ."""
    before, after = (dict(_flatten(dump(c), fields())) for c in (old, new))
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in before if before[name] != after[name]]


def fields() -> dict[str, Any]:
    """Returns every configurable field by its dotted name, with its type."""
    return dict(_fields(Config))


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _flatten(settings: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    settings = settings.to_dict() if isinstance(settings, ConfigDict) else settings
    flat = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in kinds:
            flat += _flatten(value, kinds, name + ".")
        else:
            flat.append((name, value))
    return flat


def _unknown(name: str, kinds: Mapping[str, Any]) -> str:
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in kinds}
    leaf = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, kinds, 1) or [
        by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, 1)
    ]
    sections = sorted({known.rsplit(".", 1)[0] for known in kinds if "." in known})
    if name in sections:
        return (
            f"{name} is a section: set its fields, as {next(known for known in kinds if known.startswith(name + '.'))}"
        )
    return f"{name} is not a key" + (f"; did you mean {near[0]}?" if near else "; --help lists all")


def _convert(value: Any, kind: Any, *, literal: bool) -> Any:
    origin = typing.get_origin(kind)
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if literal:
        text = value.strip()
        value = (
            {"true": True, "false": False}[text.lower()]
            if text.lower() in ("true", "false")
            else (ast.literal_eval(text))
        )
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError
        if kind is int and value != int(value):
            raise TypeError
        return kind(value)
    if origin is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise TypeError
        return tuple(_convert(item, item_kind, literal=False) for item, item_kind in zip(value, inner, strict=True))
    if origin is dict:
        key_kind, value_kind = typing.get_args(kind)
        pairs = dict(value).items()
        return {_convert(k, key_kind, literal=False): _convert(v, value_kind, literal=False) for k, v in pairs}
    raise TypeError(f"config field of unsupported type {kind}")


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if isinstance(kind, types.GenericAlias) and typing.get_origin(kind) is tuple:
        return f"{len(typing.get_args(kind))} numbers, as (0.5, 1.0)"
    return names.get(kind, "a mapping, as {'^text': 0.1}")


def _assemble(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    arguments = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            arguments[name] = _assemble(kind, values, f"{prefix}{name}.")
        elif prefix + name in values:
            arguments[name] = values[prefix + name]
    return cls(**arguments)


def _contradictions(config: Config, *, skip: set[str]) -> list[str]:
    flat = {name: _get(config, name) for name in fields() if name not in skip}
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
    if not skip & {"steps", "epochs"} and (config.steps > 0) == (config.epochs > 0):
        problems.append("set exactly one of steps and epochs" + (": both are set" if config.steps else ": neither is"))
    if config.data.test <= 0:
        problems.append(f"data.test = {config.data.test} must be a number of products >= 1 or a share in (0, 1)")
    if config.data.reader in READERS.keys() - {"drawn"} and not config.data.path and not config.data.prepared:
        problems.append(f"data.reader = {config.data.reader!r} needs data.path, the folder of the raw catalogue")
    if config.data.reader != "table" and config.data.columns != Columns():
        problems.append(f"data.columns is for data.reader = 'table', not {config.data.reader!r}")
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
    return problems


def _nearest(value: Any, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), choices, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _get(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _listed(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"config: {problems[0]}"
    return f"config: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)
