"""The configuration of a trained run: which fields can be overridden, and whether a catalogue is the run's own."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxclip.config.parse import load_config
from jaxclip.config.schema import Config, Data
from jaxclip.errors import UserError

OVERRIDABLE = re.compile(
    r"data\.(reader|path|sources|product|prepared|split|test|validation|split_seed|queries|drawn_products|drawn_seed"
    r"|workers|columns\..*)|features\..*"
    r"|evaluation\.(batch_size|ks|trial_size|zooms|mirror)|mesh\..*|model\.(dtype|execution|attention)"
    r"|first_stage|rerank\.(candidates|segments)"
)
"""Fields that select the products and say how they are embedded and ranked; training has fixed all others."""
TRAINED_GROUPS = "trained_groups.npy"
"""File of a workdir by which products that the run was trained on are recognised (see `pipeline.trained_groups`)."""
SPLIT = ("test", "validation", "split_seed")
"""Fields of the section data that choose the products of each split."""


def of_run(workdir: Path, overrides: Mapping[str, str]) -> Config:
    """Returns the configuration of a trained run with overrides on top.

    Raises:
      UserError: `parse.load_config` raises it, or training fixed some of the overridden fields; it names all of these.
    """
    config = load_config(workdir, overrides)
    if "model.attention" not in overrides:  # this machine may not have what the machine of the training had
        config = replace(config, model=replace(config.model, attention="auto"))
    base = "model.init_from" if config.task == "adapter" else ""  # the base's folder may have moved since training
    if fixed := [f"--config.{name}" for name in overrides if not OVERRIDABLE.fullmatch(name) and name != base]:
        raise UserError(
            f"{', '.join(fixed)} cannot be changed after training ({workdir}). You can set the catalogue (data.reader, "
            "data.path, data.split, ...) and how it is embedded and ranked (evaluation, mesh)"
        )
    return config


def of_runs(workdirs: Sequence[Path], overrides: Mapping[str, str]) -> list[Config]:
    """Returns the configuration of each run, as `of_run` does.

    If one of them is a re-ranker, overrides that only re-rankers read are kept from the towers.
    """
    rerankers = [load_config(workdir).task == "rerank" for workdir in workdirs]
    return [
        of_run(workdir, overrides if reranker or not any(rerankers) else for_towers(overrides))
        for workdir, reranker in zip(workdirs, rerankers, strict=True)
    ]


def for_towers(overrides: Mapping[str, str]) -> dict[str, str]:
    """Returns the overrides of fields that are not only for re-rankers."""
    return {name: value for name, value in overrides.items() if not name.startswith(("first_stage", "rerank."))}


def evaluation_name(workdir: Path, config: Config) -> str:
    """Returns the name of an evaluation of a run.

    It is the split, followed by the fields that split the run's own catalogue in another way, or prefixed with the name
    of another catalogue.

    Raises:
      UserError: the catalogue of the run, or of its first stage, would be split differently, and an earlier version
        trained the run, so that training products would not be recognised.
    """
    trained = load_config(workdir)
    _check_split(workdir, trained, config)
    if config.task == "rerank":
        towers = Path(config.first_stage).expanduser()
        _check_split(towers, load_config(towers), config)
    if same_catalogue(trained, config):
        changed = [name for name in SPLIT if getattr(trained.data, name) != getattr(config.data, name)]
        return "-".join([config.data.split, *(f"{name}-{getattr(config.data, name):g}" for name in changed)])
    if config.data.sources:
        return f"mixture-{config.data.split}"
    if config.data.reader == "drawn":
        return f"drawn-{config.data.drawn_products}-seed-{config.data.drawn_seed}-{config.data.split}"
    return f"{Path(_origin(config.data)).name}-{config.data.split}"


def same_catalogue(one: Config, other: Config) -> bool:
    """Returns whether two configurations name the same catalogue, perhaps with other splits or other features."""

    def identity(data: Data) -> tuple[Any, ...]:
        return (
            _origin(data),
            data.reader,
            data.product,
            data.columns,
            data.drawn_products if data.reader == "drawn" else 0,
        )

    return identity(one.data) == identity(other.data)


def _check_split(workdir: Path, trained: Config, config: Config) -> None:
    if config.data.split == "all" or _origin(trained.data) != _origin(config.data):
        return
    if (workdir / TRAINED_GROUPS).exists():
        return  # training products are recognised and left out
    names = ["test", "split_seed", "reader", "columns", *(["drawn_products"] if trained.data.reader == "drawn" else [])]
    changed = [f"data.{name}" for name in names if getattr(trained.data, name) != getattr(config.data, name)]
    if changed:
        fields = " and ".join(changed)
        raise UserError(
            f"{fields} would split the catalogue that {workdir} was trained on in another way: "
            f"training products would be in the split {config.data.split}, and {workdir} has no {TRAINED_GROUPS} by "
            f"which they could be recognised; leave {fields} out, or rank the whole catalogue with "
            "--config.data.split=all"
        )


def _origin(data: Data) -> str:
    """Returns where the products come from: the path of the catalogue, or the seed of a drawn one."""
    # The size of a drawn catalogue is left out: a larger one begins with the products of a smaller one with its seed.
    if data.sources:
        return ", ".join(f"{reader}:{Path(path).expanduser().resolve()}" for reader, path, _ in data.sources)
    if data.reader == "drawn":
        return f"drawn, seed {data.drawn_seed}"
    return str(Path(data.path or data.prepared).expanduser().resolve())
