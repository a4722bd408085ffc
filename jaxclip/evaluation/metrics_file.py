"""The results folder of an evaluation: writes metrics.json and its report, and reads metrics.json back."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxclip.config import Config
from jaxclip.evaluation import pages, results
from jaxclip.evaluation.protocols import Details, Result
from jaxclip.evaluation.queries import Queries
from jaxclip.pipeline.records import Records
from jaxclip.runtime import distributed, metrics_log
from jaxclip.towers.checkpoints import Checkpoints, resolve_step

PROVENANCE = ("parameters", "config_fingerprint", "data_fingerprint", "first_stage_fingerprint")
"""The keys of metrics.json that, together with the step, identify what was evaluated."""


class EvaluatedSplit(Protocol):
    """The parts of an evaluator that the results folder is written from.

    Attributes:
      queries: the split's captions and products.
      records: the split's records.
      settings: the result of `settings`.
      notes: sentences that must be shown with the metrics.
    """

    queries: Queries
    records: Records
    settings: dict[str, Any]
    notes: list[str]


def settings(config: Config) -> dict[str, Any]:
    """Returns the settings that the metrics depend on, apart from the checkpoint and the catalogue, as JSON values."""
    evaluation = config.evaluation
    shared = {"split": config.data.split, "ks": sorted(evaluation.ks), "dtype": config.model.dtype}
    shared |= {"trial_size": evaluation.trial_size, "queries": _stamps(config.data.queries)}
    if config.task == "rerank":
        return shared | {"candidates": config.rerank.candidates, "segments": config.rerank.segments}
    return shared | {"zooms": list(evaluation.zooms), "mirror": evaluation.mirror}


def _stamps(location: str) -> list[list]:
    """Returns path, size and modification time of a file, or of each file in a folder; nothing for ""."""
    path = Path(location).expanduser()
    found = [] if not location else [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in found]


def write(
    folder: Path,
    result: Result,
    evaluator: EvaluatedSplit,
    *,
    workdir: Path,
    step: int,
    provenance: Mapping[str, str],
    command: str = "",
) -> dict[str, Any]:
    """Returns the content of metrics.json; the first process writes it, the CSV tables, queries.npz and report.html.

    If a second stage re-ordered the results, the first stage's rankings are written into first_stage/, and the report
    compares the two stages.

    Args:
      folder: the folder of the results.
      result: the metrics and the rankings.
      evaluator: the evaluator that computed them.
      workdir: the folder of the run.
      step: the step of the checkpoint.
      provenance: values of the keys in PROVENANCE; keys that do not apply are absent.
      command: the command line that reproduces the evaluation, without --step and --parameters. The default evaluates
        this workdir on its own catalogue.
    """
    figures, details = result
    metrics = {**figures, "checkpoint_step": step, "settings": evaluator.settings, "notes": evaluator.notes}
    metrics |= {"records_fingerprint": evaluator.records.fingerprint()}
    metrics |= {name: provenance[name] for name in PROVENANCE if name in provenance}
    if distributed.is_primary():
        command = command or shlex.join(["python", "-m", "jaxclip.evaluate", f"--workdir={workdir}"])
        command += f" --step={step} --parameters={metrics['parameters']}"
        metrics = _write(folder, metrics, details, evaluator, workdir, command)
    distributed.barrier("written")
    return metrics


def _write(
    folder: Path, metrics: dict[str, Any], details: Details, evaluator: EvaluatedSplit, workdir: Path, command: str
) -> dict[str, Any]:
    queries, baseline = evaluator.queries, None

    def write_queries(folder: Path, details: Details) -> results.StoredRankings:
        results.write_queries(
            folder,
            details,
            captions=queries.captions,
            owners=queries.caption_products,
            ids=[product.id for product in queries.products],
            data_fingerprint=metrics["data_fingerprint"],
        )
        return results.read_queries(folder)

    stored = write_queries(folder, details)
    if details.first_stage is not None:
        first_stage = dataclasses.replace(details, text_to_image=details.first_stage, first_stage=None)
        first = write_queries(folder / results.FIRST_STAGE, first_stage)
        compared = results.compare(first, stored)
        metrics["reranked"] = {**metrics["reranked"], "compared": compared["text_to_image"]}
        baseline = ("the first stage", first, compared)
    results.write_metrics(folder, metrics)
    pages.write_report(
        folder / "report.html",
        metrics,
        stored,
        pages.ProductPictures(queries.products, evaluator.records),
        title=f"{workdir.name}: {folder.name}",
        run={"workdir": workdir.name, **provenance(metrics), "command": command},
        curve=metrics_log.read(workdir),
        baseline=baseline,
    )
    return metrics


def provenance(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Returns the step and the provenance in `metrics`, by the labels that a page shows."""
    names = {"checkpoint_step": "step", **{name: name.replace("_", " ") for name in PROVENANCE}}
    return {label: str(metrics[name]) for name, label in names.items() if name in metrics}


def read(folder: Path) -> dict[str, Any] | None:
    """Returns the content of the folder's metrics.json, None if there is no such file."""
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else None


def load_if_current(
    config: Config, workdir: Path, step: str, folder: Path, *, data_fingerprint: str, records_fingerprint: str
) -> dict[str, Any] | None:
    """Returns the metrics stored in a folder, None if there are none or if they do not match the other arguments.

    The stored step, parameters, settings and fingerprints must equal those of the checkpoint `step` ("latest", "best"
    or a number), of the configuration, of the prepared dataset, and of the ranked records (`Records.fingerprint`).
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    number = resolve_step(step, checkpoints)
    current = {
        "checkpoint_step": number,
        "parameters": "ema" if checkpoints.keeps_average(number) else "raw",
        "settings": settings(config),
        "data_fingerprint": data_fingerprint,
        "records_fingerprint": records_fingerprint,
    }
    stored = read(folder)
    return stored if stored and all(stored.get(name) == value for name, value in current.items()) else None


def results_folder(folder: Path, parameters: str, *, averaged: bool) -> Path:
    """Returns the folder of the results: FOLDER, or FOLDER-raw for raw parameters of a run with a moving average."""
    return folder.with_name(f"{folder.name}-raw") if parameters == "raw" and averaged else folder
