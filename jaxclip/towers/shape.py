"""The towers' shape as a workdir holds it, beside how it is run, which a configuration may change at any time."""

import json
from pathlib import Path

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.models.clip import CLIPConfig
from jaxclip.models.presets import from_json, run_as, to_json
from jaxclip.runtime import files

SHAPE, TOKENIZER = "towers.json", "tokenizer"


def save_shape(towers: CLIPConfig, workdir: Path) -> None:
    """Writes towers.json into the workdir."""
    files.write_json(workdir / SHAPE, to_json(towers))


def load_shape(workdir: Path) -> CLIPConfig | None:
    """Returns the towers of a workdir, None where it has no towers.json; UserError where that cannot be read."""
    path = workdir / SHAPE
    if not path.exists():
        return None
    try:
        return from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a {SHAPE} of this version: {error}") from None


def run_as_configured(towers: CLIPConfig, config: Config) -> CLIPConfig:
    """Returns the towers as config.model has them regularised and executed."""
    model = config.model
    return run_as(
        towers,
        patch_dropout=model.patch_dropout,
        dropout=model.dropout,
        stochastic_depth=model.stochastic_depth,
        dtype=model.dtype,
        execution=model.execution,
        remat=model.remat,
    )
