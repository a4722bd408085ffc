"""Which values a field may have, and which may not go together."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxclip.catalog import captions
from jaxclip.catalog.readers import READERS
from jaxclip.config.schema import Augmentation, Columns, Config, LoRA, Loss, Model, Rerank
from jaxclip.errors import UserError
from jaxclip.features import crop
from jaxclip.features.detect import DETECTORS
from jaxclip.losses import objective
from jaxclip.losses.incorrect_pairs import WEIGHTINGS
from jaxclip.models.presets import IMAGE_SIZE, PRESETS
from jaxclip.models.transformer import EXECUTIONS, REMAT_POLICIES

CHOICES: dict[str, Sequence[str]] = {
    "task": ("towers", "adapter", "rerank"),
    "data.reader": tuple(READERS),
    "data.split": ("train", "test", "all"),
    "data.picture": ("", "whole", "crop"),
    "data.resize": ("squash", "crop"),
    "data.resize_on": ("auto", "host", "device"),
    "model.preset": tuple(PRESETS),
    "model.dtype": ("float32", "bfloat16"),
    "model.execution": EXECUTIONS,
    "model.remat": tuple(REMAT_POLICIES),
    "loss.name": objective.NAMES,
    "loss.implementation": objective.IMPLEMENTATIONS,
    "loss.weighting": WEIGHTINGS,
    "rerank.preset": ("gated", "paper", "cross_attention"),
    "rerank.loss": ("softmax", "lambda", "binary", "contrastive"),
    "rerank.negatives": ("random", "worst", "top", "mixed"),
    "rerank.combine": ("add", "concatenate"),
    "optimizer.name": ("adamw", "adam", "muon"),
    "optimizer.schedule": ("cosine", "constant"),
}
AT_LEAST: dict[str, float] = {
    "batch_size": 1, "steps": 0, "epochs": 0, "log_every": 1, "data.drawn_products": 1, "data.image_size": 8,
    "data.train": 0, "data.second_stage": 0, "data.vocab_size": 258, "data.context_length": 4, "data.workers": 0,
    "features.colours": 1,
    "incorrect_pairs.clusters": 2, "optimizer.learning_rate": 0, "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0, "optimizer.clip_norm": 0, "checkpoint.every": 1,
    "checkpoint.keep": 1, "evaluation.every": 0, "evaluation.batch_size": 1, "loss.temperature": 0.01,
    "lora.rank": 1, "model.patch": 0,
    "rerank.candidates": 2, "rerank.wordings": 1, "rerank.hidden": 1, "rerank.matching": 1, "rerank.seeds": 1,
    "rerank.layers": 1, "rerank.heads": 1, "rerank.sampled": 0, "rerank.segments": 1,
    "loss.tile": 1, "loss.microbatch": 0, "loss.queue": 0, "loss.alpha": 0, "loss.beta": 0, "loss.info_nce": 0,
}  # fmt: skip
PROBABILITIES = ("augmentation.keep_attributes", "augmentation.keep_words")
BELOW_ONE = (
    "model.dropout", "model.stochastic_depth", "model.patch_dropout", "optimizer.beta1", "optimizer.beta2",
    "optimizer.ema", "lora.dropout", "rerank.dropout",
)  # fmt: skip
NO_DETECTOR = "none"
RERANK_FEATURES = ("hubness", "image", "crop", "colour", "geometry", "texture", "attributes", "caption_attributes")
TAKEN_FROM_CHECKPOINT_UNLESS_SET = ("data.image_size", "data.context_length")
TAKEN_FROM_CHECKPOINT = (
    "model.preset", "model.patch", "data.resize", "data.mean", "data.std", "data.lowercase", "data.vocab_size",
)  # fmt: skip
"""What model.init_from brings and nothing else may set."""
IMPLIED: dict[tuple[str, Any], dict[str, Any]] = {("optimizer.name", "adam"): {"optimizer.weight_decay": 0.0}}
"""(field, its value) -> fields that then have another default."""
WITH_COLUMNS = ("table", "tfds", "webdataset")
"""Readers of layouts whose columns have names of their own."""
Readers = Mapping[str, Sequence[str]]
"""Field -> the choices, of another field of its section, that read it."""
OF_LOSSES: Readers = {
    "bias": ("sigmoid",),
    **dict.fromkeys(("alpha", "beta", "weighting", "info_nce"), ("incorrect_pairs",)),
}
OF_PRESETS: Readers = {
    **dict.fromkeys(("features", "ablation", "matching"), ("gated",)),
    "hidden": ("gated", "cross_attention"),
    **dict.fromkeys(("layers", "heads"), ("cross_attention",)),
    **dict.fromkeys(("combine", "batch_norm"), ("paper",)),
}
OF_LIST_LOSSES: Readers = {"negatives": ("binary",)}


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
        f"{n} = {flat[n]} must be at least {low:g}"
        for n, low in AT_LEAST.items()
        if n in flat and flat[n] < low and (flat[n] or n not in TAKEN_FROM_CHECKPOINT_UNLESS_SET)
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
    problems += check_optimizer(config)
    problems += check_adapter(config)
    if config.data.test <= 0:
        problems.append(f"data.test = {config.data.test} must be a number of products >= 1 or a share in (0, 1)")
    if config.data.reader in READERS.keys() - {"drawn"} and not config.data.path and not config.data.prepared:
        problems.append(f"data.reader = {config.data.reader!r} needs data.path, the folder of the raw catalogue")
    if config.data.reader == "drawn" and config.data.path:
        others = ", ".join(name for name in READERS if name != "drawn")
        problems.append(
            f"data.path = {config.data.path!r} is not read by data.reader = 'drawn', which draws its own catalogue: "
            f"set data.reader to the layout of that folder ({others})"
        )
    if config.data.reader not in WITH_COLUMNS and config.data.columns != Columns():
        problems.append(f"data.columns is for data.reader = {' or '.join(WITH_COLUMNS)}, not {config.data.reader!r}")
    problems += check_features(config)
    problems += check_second_stage(config)
    if config.model.init_from:
        defaults = Config()
        for name in TAKEN_FROM_CHECKPOINT:
            section, field = name.split(".")
            if getattr(getattr(config, section), field) != getattr(getattr(defaults, section), field):
                problems.append(f"{name} comes from model.init_from: leave it out")
    problems += check_evaluation(config)
    if config.task != "rerank" and not config.model.init_from:
        problems += check_patches(config)
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
    return problems + check_loss(config)


def check_patches(config: Config) -> list[str]:
    preset, size, problems = PRESETS.get(config.model.preset), config.data.image_size or IMAGE_SIZE, []
    patch = config.model.patch or (preset.patch if preset else 1)
    owner = "model.patch" if config.model.patch else f"the patch of model.preset = {config.model.preset!r}"
    if patch > 0 and size % patch:
        problems.append(
            f"data.image_size = {size} is no multiple of {owner}, {patch}; "
            f"the nearest is {max(1, round(size / patch)) * patch}"
        )
    if preset and preset.stem != "patch" and patch & (patch - 1):
        problems.append(
            f"model.patch = {patch} must be a power of two: the stem of model.preset = {config.model.preset!r} halves "
            "pictures"
        )
    return problems


def check_optimizer(config: Config) -> list[str]:
    given, problems = config.optimizer, []
    if given.name == "adam" and given.weight_decay:
        problems.append(
            f"optimizer.weight_decay = {given.weight_decay} is for adamw and muon: optimizer.name = 'adam' has none"
        )
    if not 0 < given.layer_decay <= 1:
        problems.append(f"optimizer.layer_decay = {given.layer_decay} must be in (0, 1]")
    if min((factor for _, factor in given.rates), default=0) < 0:
        problems.append(f"optimizer.rates = {given.rates}: no factor may be negative")
    return problems


def check_evaluation(config: Config) -> list[str]:
    given, problems = config.evaluation, []
    if not given.ks or min(given.ks) < 1 or 1 not in given.ks:
        problems.append(f"evaluation.ks = {given.ks} must be depths >= 1, and 1 among them")
    if not given.zooms or min(given.zooms) < 1:
        problems.append(f"evaluation.zooms = {given.zooms} must be factors >= 1, one at least")
    return problems


def check_features(config: Config) -> list[str]:
    features, pairs = config.features, config.incorrect_pairs
    problems = []
    name = features.detector.partition(":")[0]
    if name not in (names := (NO_DETECTOR, *DETECTORS)):
        problems.append(
            f"features.detector = {features.detector!r} is none of {', '.join(names)}" + _nearest(name, names)
        )
    if config.data.picture == "crop" and name == NO_DETECTOR:
        problems.append("data.picture = 'crop' needs crops: set features.detector to something else than 'none'")
    try:
        crop.check(features.policy, features.padding)
    except UserError as error:
        problems.append(f"features.policy and features.padding: {error}")
    if pairs.variant not in ("clustered", "random"):
        from jaxclip.features import incorrect_pairs  # takes a second to load

        try:
            incorrect_pairs.threshold(pairs.variant)
        except UserError as error:
            problems.append(f"incorrect_pairs.variant: {error}")
    kind, _, where = pairs.features.partition(":")
    encoders = kind == "encoders" and all(where.split(",")) and where.count(",") == 1
    if not (pairs.features == "classical" or encoders or (kind == "towers" and where)):
        problems.append(
            f"incorrect_pairs.features = {pairs.features!r} must be classical, towers:WORKDIR with a trained run, or "
            "encoders:VIT,BERT with folders or names of a ViT and a BERT"
        )
    return problems


def check_adapter(config: Config) -> list[str]:
    if config.task != "adapter":
        return [] if config.lora == LoRA() else [f"lora is for task = 'adapter', not {config.task!r}"]
    problems = [] if config.model.init_from else ["task = 'adapter' needs model.init_from, the workdir it stands on"]
    if config.lora.alpha <= 0:
        problems.append(f"lora.alpha = {config.lora.alpha} must be greater than 0")
    return problems


def check_second_stage(config: Config) -> list[str]:
    if config.task != "rerank":
        problems = [f"rerank is for task = 'rerank', not {config.task!r}"] if config.rerank != Rerank() else []
        if config.first_stage:
            problems.append(f"first_stage = {config.first_stage!r} is for task = 'rerank'")
        return problems
    problems = [
        f"{name} is of towers: a re-ranker takes those of first_stage as they are"
        for name, given, default in (
            ("model", config.model, Model()),
            ("loss", config.loss, Loss()),
            ("augmentation", config.augmentation, Augmentation()),
            ("optimizer.ema", config.optimizer.ema, 0.0),
            ("optimizer.layer_decay", config.optimizer.layer_decay, 1.0),
            ("evaluation.zooms", config.evaluation.zooms, (1.0,)),
            ("evaluation.mirror", config.evaluation.mirror, False),
        )
        if given != default
    ]
    if not config.first_stage:
        problems.append("first_stage is missing: set --config.first_stage, the workdir of the towers to re-rank")
    if config.features.detector == NO_DETECTOR:
        problems.append("features.detector = 'none': a re-ranker needs the features of the products")
    for field, features in {
        "features": config.rerank.features,
        **{f"ablation[{name!r}]": features for name, features in config.rerank.ablation},
    }.items():
        names = [name.strip() for name in features.split(",") if name.strip()]
        problems += [
            f"rerank.{field}: {name!r} is none of {', '.join(RERANK_FEATURES)}" + _nearest(name, RERANK_FEATURES)
            for name in names
            if name not in RERANK_FEATURES
        ]
        if not names or len(set(names)) < len(names):
            problems.append(f"rerank.{field} = {features!r} must name features, each once")
    if config.rerank.seeds > 1 and not config.rerank.ablation:
        problems.append("rerank.seeds is for rerank.ablation: one run has one seed")
    problems += _unread("rerank", config.rerank, "preset", OF_PRESETS)
    problems += _unread("rerank", config.rerank, "loss", OF_LIST_LOSSES)
    if config.rerank.preset == "cross_attention" and config.rerank.hidden % config.rerank.heads:
        problems.append(
            f"rerank.hidden = {config.rerank.hidden} is no multiple of rerank.heads = {config.rerank.heads}"
        )
    if config.rerank.sampled and config.rerank.loss in ("binary", "contrastive"):
        problems.append(f"rerank.sampled is of lists: rerank.loss = {config.rerank.loss!r} takes none")
    if config.rerank.sampled == 1:
        problems.append("rerank.sampled = 1 leaves an answer nothing to be told from: 0 for all, or 2 and more")
    return problems


def _nearest(value: Any, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), choices, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _unread(section: str, given: Any, choice: str, readers: Readers) -> list[str]:
    """Returns a line for each field of a section that is set, and that what its field `choice` says does not read."""
    chosen, defaults = getattr(given, choice), type(given)()
    return [
        f"{section}.{name} is for {section}.{choice} = {' or '.join(map(repr, by))}, not {chosen!r}"
        for name, by in readers.items()
        if chosen not in by and getattr(given, name) != getattr(defaults, name)
    ]


def check_loss(config: Config) -> list[str]:
    loss, problems = config.loss, []
    if loss.microbatch and config.batch_size % loss.microbatch:
        problems.append(f"loss.microbatch = {loss.microbatch} does not divide batch_size = {config.batch_size}")
    problems += _unread("loss", loss, "name", OF_LOSSES)
    has_info_nce = loss.name == "info_nce" or (loss.name == "incorrect_pairs" and loss.info_nce > 0)
    if loss.queue and not (has_info_nce and loss.mask_groups):
        problems.append(
            f"loss.queue = {loss.queue} needs InfoNCE and loss.mask_groups: without groups a product would become its "
            "own negative"
        )
    if loss.name == "incorrect_pairs" and not (loss.alpha or loss.beta or loss.info_nce):
        problems.append("loss.alpha, loss.beta and loss.info_nce are all 0: nothing would be learned")
    return problems
