"""The configuration of a trained run: what of it can still be set, and which catalogues are new to it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxclip.config.parse import load_config
from jaxclip.config.schema import Config, Data
from jaxclip.errors import UserError

OVERRIDABLE = re.compile(
    r"data\.(reader|path|prepared|split|test|split_seed|drawn_products|drawn_seed|workers|columns\..*)|features\..*"
    r"|evaluation\.(batch_size|ks|zooms|mirror)|mesh\..*|model\.(dtype|execution)"
    r"|first_stage|rerank\.(candidates|segments)"
)
"""Fields that say which products are looked at, and how; the workdir's own files say all else."""


def of_run(workdir: Path, overrides: Mapping[str, str]) -> Config:
    """Returns the configuration of a trained run with overrides on top.

    Raises:
      UserError: as `parse.load`, or overrides are of what the training has settled, all of them named.
    """
    wanted = load_config(workdir, overrides)
    base = "model.init_from" if wanted.task == "adapter" else ""  # of adapters it says where their base is now
    if settled := [f"--config.{name}" for name in overrides if not OVERRIDABLE.fullmatch(name) and name != base]:
        raise UserError(
            f"{', '.join(settled)} would change nothing: {workdir} is trained, and its own files say how. What can be "
            "set is the catalogue (data.reader, data.path, data.split, ...) and how it is looked at (evaluation, mesh)"
        )
    return wanted


def of_runs(workdirs: Sequence[Path], overrides: Mapping[str, str]) -> list[Config]:
    """Returns `of_run` of each: what only re-rankers have is left to them, where there is one beside towers."""
    rerankers = [load_config(workdir).task == "rerank" for workdir in workdirs]
    return [
        of_run(workdir, overrides if reranker or not any(rerankers) else for_towers(overrides))
        for workdir, reranker in zip(workdirs, rerankers, strict=True)
    ]


def for_towers(overrides: Mapping[str, str]) -> dict[str, str]:
    """Returns the overrides but for those of what re-rankers alone have."""
    return {name: value for name, value in overrides.items() if not name.startswith(("first_stage", "rerank."))}


def evaluation_name(workdir: Path, wanted: Config) -> str:
    """Returns what an evaluation of a run is called: its split, before it any catalogue that is not the run's own.

    Raises:
      UserError: the run's own catalogue is to be split anew, where what it was trained on would count as unseen.
    """
    own = load_config(workdir)
    _check_split(workdir, own, wanted)
    if wanted.task == "rerank":
        towers = Path(wanted.first_stage).expanduser()
        _check_split(towers, load_config(towers), wanted)
    if same_catalogue(own, wanted):
        return wanted.data.split
    if wanted.data.reader == "drawn":
        return f"drawn-{wanted.data.drawn_products}-seed-{wanted.data.drawn_seed}-{wanted.data.split}"
    return f"{Path(_origin(wanted.data)).name}-{wanted.data.split}"


def same_catalogue(one: Config, other: Config) -> bool:
    """Returns whether two configurations are of the same products, however these are split."""

    def identity(data: Data) -> tuple[Any, ...]:
        return _origin(data), data.reader, data.columns, data.drawn_products if data.reader == "drawn" else 0

    return identity(one.data) == identity(other.data)


def _check_split(workdir: Path, own: Config, wanted: Config) -> None:
    if wanted.data.split == "all" or _origin(own.data) != _origin(wanted.data):
        return
    names = ["test", "split_seed", "reader", "columns", *(["drawn_products"] if own.data.reader == "drawn" else [])]
    anew = [name for name in names if getattr(own.data, name) != getattr(wanted.data, name)]
    if anew:
        raise UserError(
            f"{' and '.join(f'data.{name}' for name in anew)} would split the catalogue that {workdir} was trained on "
            f"in another way: products of its training would be in the split {wanted.data.split}. Leave it out, or "
            "rank the whole of it with --config.data.split=all"
        )


def _origin(data: Data) -> str:
    """Returns where products come from. A larger drawn catalogue begins with the smaller one of its seed."""
    if data.reader == "drawn":
        return f"drawn, seed {data.drawn_seed}"
    return str(Path(data.path or data.prepared).expanduser().resolve())
