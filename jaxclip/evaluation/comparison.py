"""Compares two workdirs' evaluations, and shows what several checkpoints find for sentences without known answers."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation import pages, report, results
from jaxclip.evaluation.metrics_file import load_if_current, provenance
from jaxclip.pipeline import prepared_data, text
from jaxclip.pipeline.records import Records
from jaxclip.ranking.index import NearestNeighbours
from jaxclip.runtime import distributed, files, metrics_log
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.load import load_checkpoint

COMPARISON = "comparison.json"
SHOWN = 10


@dataclass(frozen=True)
class EvaluatedRun:
    """A workdir and the configuration to evaluate it with.

    Attributes:
      workdir: the folder of the run.
      config: the configuration, with overrides applied.
      fingerprint: the fingerprint of the workdir's own configuration.
      command: the command line of this evaluation, without --step and --parameters.
    """

    workdir: Path
    config: Config
    fingerprint: str
    command: str


def compare(
    baseline: EvaluatedRun,
    run: EvaluatedRun,
    baseline_name: str,
    name: str,
    step: str,
    *,
    evaluate: Callable[[EvaluatedRun, str], tuple[dict[str, Any], Path]],
    command: str,
    say: Callable[[str], None],
) -> tuple[Mapping[str, Any], Path]:
    """Returns the result of `results.compare` for two workdirs, and the folder of the comparison's page.

    The first process writes comparison.json and report.html into WORKDIR/eval/NAME/against-BASELINE.

    Args:
      baseline: the run that `run` is compared with.
      baseline_name: the name of the baseline's evaluation.
      name: the name of the run's evaluation.
      step: the checkpoint of both: "latest", "best" or a number.
      evaluate: (run, name) -> the metrics and folder of a new evaluation; called if the stored metrics are of another
        checkpoint or catalogue.
      command: the command line that makes the page again.
      say: prints a line for the user.

    Raises:
      UserError: the runs rank different products, or a workdir has no such checkpoint.
    """
    folders = baseline.workdir / "eval" / baseline_name, run.workdir / "eval" / name
    prepared, data = _same_catalogue(baseline, run, say)
    metrics = []
    for each, called, folder in zip((baseline, run), (baseline_name, name), folders, strict=True):
        find = partial(load_if_current, each.config, each.workdir, step, folder, data)
        found = distributed.broadcast("kept", find)
        if found is None:
            say(f"evaluating {each.workdir} first")
            found, _ = evaluate(each, called)
        metrics.append(found)
    before, after = map(results.read_queries, folders)
    figures, place = results.compare(before, after), _folder(folders[1], baseline.workdir)
    if not distributed.is_primary():
        return figures, place
    origins = [provenance(figures_of_run) for figures_of_run in metrics]
    where = [{"workdir": str(each.workdir.resolve())} for each in (baseline, run)]
    place.mkdir(parents=True, exist_ok=True)
    compared = {"baseline": where[0] | origins[0], "run": where[1] | origins[1], **figures}
    files.write_json(place / COMPARISON, compared)
    titles = _names([baseline.workdir, run.workdir])
    of_baseline = {f"its {name}": value for name, value in origins[0].items()}
    records = Records(prepared, run.config.data.split)
    pages.write_report(
        place / "report.html",
        metrics[1],
        after,
        pages.ProductPictures([product for product, _ in records.products()], records),
        title=f"{titles[1]} against {titles[0]}: {name}",
        run={"workdir": titles[1], **origins[1], "baseline": titles[0], **of_baseline, "command": command},
        curve=metrics_log.read(run.workdir),
        baseline=(titles[0], before, figures),
    )
    return figures, place


def _same_catalogue(baseline: EvaluatedRun, run: EvaluatedRun, say: Callable[[str], None]) -> tuple[Path, str]:
    """Returns the prepared dataset that both runs rank, and its fingerprint; UserError where these are two."""
    one, other = (prepared_data.prepared_dataset(each.config, say=say) for each in (baseline, run))
    data, splits = prepared_data.data_fingerprint(other), (baseline.config.data.split, run.config.data.split)
    if prepared_data.data_fingerprint(one) != data or splits[0] != splits[1]:
        raise UserError(
            f"{baseline.workdir} and {run.workdir} rank other products: {splits[0]} of {one}, and {splits[1]} of "
            f"{other}; name one catalogue for both with --config.data.path and --config.data.split"
        )
    return other, data


def _folder(evaluated: Path, baseline: Path) -> Path:
    """Returns where the comparison with a baseline goes: never where that with another one of the same name is."""
    plain, where = evaluated / f"against-{baseline.name}", str(baseline.resolve())
    kept = plain / COMPARISON
    if not kept.exists() or json.loads(kept.read_text()).get("baseline", {}).get("workdir", where) == where:
        return plain
    return evaluated / f"{plain.name}-{hashlib.sha256(where.encode()).hexdigest()[:6]}"


def _names(workdirs: Sequence[Path]) -> list[str]:
    """Returns as much of the end of each path as tells them apart."""
    parts = [workdir.resolve().parts for workdir in workdirs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def write_sheet(
    path: Path,
    runs: Sequence[EvaluatedRun],
    step: str,
    sentences: Sequence[str],
    *,
    parameters: str = "",
    command: str,
    say: Callable[[str], None],
) -> None:
    """Writes the page of the ten pictures that each run's checkpoint finds for each sentence.

    Every run looks at the split that its configuration names; captions are not needed. `step` and `parameters` are
    as in `load_checkpoint`.

    Raises:
      UserError: as `load_checkpoint`, or a checkpoint gives vectors that are not finite.
    """
    sheet: dict[str, dict[str, list[report.Item]]] = {sentence: {} for sentence in sentences}
    facts = {}
    for run, name in zip(runs, _names([run.workdir for run in runs]), strict=True):
        config = run.config
        loaded = load_checkpoint(config, run.workdir, step, parameters=parameters, say=say)
        gallery = pages.ProductPictures([product for product, _ in loaded.records.products()], loaded.records)
        with jax.set_mesh(loaded.towers.mesh):
            encoders = Encoders(loaded.towers, batch_size=config.evaluation.batch_size, workers=config.data.workers)
            store = encoders.store(run.workdir, loaded.params, loaded.step, say=say)
            images = encoders.pictures(loaded.params, loaded.records, store=store)
            words = [text.caption(sentence, {}, loaded.towers.preprocess) for sentence in sentences]
            texts = encoders.captions(loaded.params, words)
        if not (np.isfinite(images).all() and np.isfinite(texts).all()):
            raise UserError(f"step {loaded.step} of {run.workdir} has vectors that are not finite: take another --step")
        found = NearestNeighbours(images, most=SHOWN, devices=jax.local_devices()[:1])(texts)
        for sentence, *best in zip(sentences, *found, strict=True):
            sheet[sentence][name] = [
                pages.picture(int(n), gallery, relevant=False, score=float(score))
                for score, n in zip(*best, strict=True)
            ]
        facts[name] = {
            "step": str(loaded.step),
            "parameters": loaded.parameters,
            "config fingerprint": run.fingerprint,
            "data fingerprint": loaded.data_fingerprint,
        }
    if distributed.is_primary():
        report.write(path, report.sheet_page(sheet, runs=facts, command=command))
