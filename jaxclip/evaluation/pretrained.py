"""Evaluates the towers of config.model.init_from as they are: no workdir, no training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxclip import config as configs
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation.evaluator import Evaluator
from jaxclip.evaluation.metrics_file import write
from jaxclip.pipeline import prepared_data, trained_groups
from jaxclip.runtime import distributed
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.adapter_base import initial_params
from jaxclip.towers.pretrained import open_pretrained
from jaxclip.towers.towers import make_towers

EVALUATIONS = "evaluations"


def default_folder(config: Config) -> Path:
    """Returns evaluations/NAME-CATALOGUE-SPLIT, NAME being that of model.init_from."""
    data = config.data
    catalogue = Path(data.path or data.prepared).name
    catalogue = catalogue or ("mixture" if data.sources else f"{data.reader}-{data.drawn_products}")
    name = re.sub(r"[^\w.@-]+", "-", config.model.init_from.strip("/"))
    return Path(EVALUATIONS) / f"{name.strip('-')}-{catalogue}-{data.split}"


def evaluate_pretrained(
    config: Config, folder: Path, *, command: str, say: Callable[[str], None]
) -> tuple[dict[str, Any], Path]:
    """Returns the metrics of the towers of config.model.init_from, and the folder that they were written into.

    Args:
      config: the configuration; its catalogue, split and evaluation are used, and its training settings are not.
      folder: the folder for metrics.json, report.html and the embeddings.
      command: the command line that reproduces the evaluation.
      say: prints a line for the user.

    Raises:
      UserError: model.init_from is not set, there is no such checkpoint, or the catalogue is unreadable.
    """
    if not config.model.init_from:
        raise UserError(
            "there is nothing to evaluate: give the --workdir of a run, or a checkpoint with --config.model.init_from"
        )
    prepared = prepared_data.prepared_dataset(config, say=say)
    trained = trained_groups.of_checkpoint(config.model.init_from, say)
    records, notes = trained_groups.unseen_records(prepared, config.data.split, trained, say)
    data_fingerprint = prepared_data.data_fingerprint(prepared)
    facts = {"data fingerprint": data_fingerprint, "products": records.fingerprint()}
    distributed.check_identical("run", facts, "All need the same prepared dataset")
    source = open_pretrained(config)
    towers = make_towers(config, source.preprocess, source.tokenizer, source.config)
    meshes.open_collectives(towers.mesh)
    with jax.set_mesh(towers.mesh):
        params, about = initial_params(config, towers)
        evaluator = Evaluator(towers, records, config, notes)
        step = about["step"] or 0
        store = evaluator.encoders.store(folder, params, step, say=say)
        result = evaluator.complete(params, store=store)
    provenance = {
        "parameters": "raw",
        "config_fingerprint": configs.fingerprint(config),
        "data_fingerprint": data_fingerprint,
    }
    metrics = write(folder, result, evaluator, workdir=folder, step=step, provenance=provenance, command=command)
    return metrics, folder
