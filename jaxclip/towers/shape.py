"""Reads and writes a workdir's towers.json, the architecture; `run_as_configured` applies a run's own settings."""

import json
from pathlib import Path

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.models.clip import CLIPConfig
from jaxclip.models.presets import from_json, to_json, with_execution
from jaxclip.runtime import files

SHAPE, TOKENIZER = "towers.json", "tokenizer"


def save_shape(towers: CLIPConfig, workdir: Path) -> None:
    """Writes towers.json into the workdir."""
    files.write_json(workdir / SHAPE, to_json(towers))


def load_shape(workdir: Path) -> CLIPConfig | None:
    """Returns the architecture of a workdir's towers, or None if it has no towers.json; UserError if that is broken."""
    path = workdir / SHAPE
    if not path.exists():
        return None
    try:
        return from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a {SHAPE} of this version ({error}): restore the file, or train the run again"
        ) from None


def run_as_configured(towers: CLIPConfig, config: Config) -> CLIPConfig:
    """Returns the towers with the regularisation, dtype, execution and rematerialisation of config.model."""
    model = config.model
    return with_execution(
        towers,
        patch_dropout=model.patch_dropout,
        dropout=model.dropout,
        stochastic_depth=model.stochastic_depth,
        dtype=model.dtype,
        execution=model.execution,
        remat=model.remat,
        attention=model.attention,
    )
