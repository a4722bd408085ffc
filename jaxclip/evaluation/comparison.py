"""Comparison of two workdirs' evaluations, and of checkpoints on sentences without known relevant pictures."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.errors import UserError
from jaxclip.evaluation import pages, report, results
from jaxclip.evaluation.evaluator import EvaluatedRun
from jaxclip.evaluation.metrics_file import load_if_current, provenance
from jaxclip.pipeline import prepared_data, text, trained_groups
from jaxclip.pipeline.records import Records
from jaxclip.ranking.index import NearestNeighbours
from jaxclip.runtime import distributed, files, metrics_log
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.load import load_checkpoint

COMPARISON = "comparison.json"
SHOWN_PICTURES = 10


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
    """Returns the result of `results.compare` for two workdirs, with "queries", "gallery" and "notes", and the folder.

    The first process writes comparison.json and report.html into eval/NAME/against-BASELINE in the workdir of `run`,
    where BASELINE is the name of the baseline's workdir.

    Args:
      baseline: the run that `run` is compared with.
      baseline_name: the name of the baseline's evaluation.
      name: the name of the run's evaluation.
      step: the checkpoint of both: "latest", "best" or a number.
      evaluate: (run, name) -> the metrics and folder of a new evaluation; called if there are no stored metrics of this
        checkpoint, catalogue and configuration.
      command: the command line that reproduces the page.
      say: prints a line for the user.

    Raises:
      UserError: the runs rank different products, or a workdir has no such checkpoint.
    """
    prepared, data = _same_catalogue(baseline, run, say)
    workdirs, split = (baseline.workdir, run.workdir), run.config.data.split
    baseline, run = (dataclasses.replace(side, trained_by=workdirs) for side in (baseline, run))
    records, notes = trained_groups.unseen_records(prepared, split, trained_groups.of_runs(workdirs, say), say)
    titles = _names(workdirs)
    names = [
        _evaluation_name(own, prepared, workdir, other, records)
        for own, workdir, other in zip((baseline_name, name), workdirs, reversed(titles), strict=True)
    ]
    folders = tuple(side.workdir / "eval" / own for side, own in zip((baseline, run), names, strict=True))
    both_metrics = []
    for side, folder in zip((baseline, run), folders, strict=True):
        metrics = _stored_metrics(side, step, folder, data, records)
        if metrics is None:
            say(f"evaluating {side.workdir} first")
            metrics, _ = evaluate(side, folder.name)
        both_metrics.append(metrics)
    before, after = map(results.read_queries, folders)
    figures, page_folder = results.compare(before, after), _folder(folders[1], baseline.workdir)
    shown = {**figures, "queries": len(after.captions), "gallery": len(after.ids), "notes": notes}
    if not distributed.is_primary():
        return shown, page_folder
    baseline_facts, run_facts = map(provenance, both_metrics)
    page_folder.mkdir(parents=True, exist_ok=True)
    identities = {
        "baseline": {"workdir": str(baseline.workdir.resolve()), **baseline_facts},
        "run": {"workdir": str(run.workdir.resolve()), **run_facts},
    }
    files.write_json(page_folder / COMPARISON, identities | shown)
    labelled_facts = {f"its {label}": value for label, value in baseline_facts.items()}
    pages.write_report(
        page_folder / "report.html",
        both_metrics[1],
        after,
        pages.ProductPictures([product for product, _ in records.products()], records),
        title=f"{titles[1]} against {titles[0]}: {name}",
        run={"workdir": titles[1], **run_facts, "baseline": titles[0], **labelled_facts, "command": command},
        curve=metrics_log.read(run.workdir),
        baseline=(titles[0], before, figures),
    )
    return shown, page_folder


def _stored_metrics(
    run: EvaluatedRun, step: str, folder: Path, data_fingerprint: str, records: Records
) -> dict[str, Any] | None:
    """Returns what the first process finds by `metrics_file.load_if_current`, in every process."""
    fingerprints = {"data_fingerprint": data_fingerprint, "records_fingerprint": records.fingerprint()}
    load = partial(load_if_current, run.config, run.workdir, step, folder, **fingerprints)
    return distributed.broadcast("stored_metrics", load)


def _same_catalogue(baseline: EvaluatedRun, run: EvaluatedRun, say: Callable[[str], None]) -> tuple[Path, str]:
    """Returns the prepared dataset that both runs rank, and its fingerprint.

    Raises:
      UserError: the runs rank different datasets or splits.
    """
    first, second = (prepared_data.prepared_dataset(side.config, say=say) for side in (baseline, run))
    data, splits = prepared_data.data_fingerprint(second), (baseline.config.data.split, run.config.data.split)
    if prepared_data.data_fingerprint(first) != data or splits[0] != splits[1]:
        raise UserError(
            f"{baseline.workdir} and {run.workdir} rank different products: {splits[0]} of {first}, and "
            f"{splits[1]} of {second}; give both one catalogue, split in one way, with --config.data.path, data.split, "
            "data.test, data.validation and data.split_seed"
        )
    return second, data


def _evaluation_name(name: str, prepared: Path, workdir: Path, other: str, records: Records) -> str:
    """Returns the name of a run's evaluation on `records`, which lack the training products of the run `other`, too.

    It is another name if the run's own evaluation ranks more products, whose figures it must not replace.
    """
    keys = trained_groups.of_runs([workdir], lambda line: None)
    alone, _ = trained_groups.unseen_records(prepared, records.split, keys, lambda line: None)
    return name if len(alone) == len(records) else f"{name}-unseen-by-{other.replace('/', '-')}"


def _folder(evaluation: Path, baseline: Path) -> Path:
    """Returns the folder of the comparison with a baseline; another baseline of the same name gets another folder."""
    plain, workdir = evaluation / f"against-{baseline.name}", str(baseline.resolve())
    stored = plain / COMPARISON
    if not stored.exists() or json.loads(stored.read_text()).get("baseline", {}).get("workdir", workdir) == workdir:
        return plain
    return evaluation / f"{plain.name}-{hashlib.sha256(workdir.encode()).hexdigest()[:6]}"


def _names(workdirs: Sequence[Path]) -> list[str]:
    """Returns a short name for each workdir: the fewest trailing parts of the paths that make the names distinct."""
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
    """Writes a page with the ten pictures that each run's checkpoint ranks first for each sentence.

    Every run searches the split that its configuration names, which needs no captions.

    Args:
      path: the HTML file.
      runs: the runs to show.
      step: the checkpoint, as in `load_checkpoint`.
      sentences: the queries.
      parameters: "raw", "ema" or "", as in `load_checkpoint`.
      command: the command line that reproduces the page.
      say: prints a line for the user.

    Raises:
      UserError: for the reasons given in `load_checkpoint`, or if a checkpoint gives vectors that are not finite.
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
            captions = [text.caption(sentence, {}, loaded.towers.preprocess) for sentence in sentences]
            texts = encoders.captions(loaded.params, captions)
        if not (np.isfinite(images).all() and np.isfinite(texts).all()):
            raise UserError(
                f"step {loaded.step} of {run.workdir} gives vectors that are not finite: choose another --step"
            )
        nearest = NearestNeighbours(
            images, max_k=SHOWN_PICTURES, owners=loaded.records.picture_owners, devices=jax.local_devices()[:1]
        )(texts)
        for sentence, scores, numbers in zip(sentences, *nearest, strict=True):
            sheet[sentence][name] = [
                pages.picture(int(number), gallery, relevant=False, score=float(score))
                for score, number in zip(scores, numbers, strict=True)
            ]
        facts[name] = {
            "step": str(loaded.step),
            "parameters": loaded.parameters,
            "config fingerprint": run.fingerprint,
            "data fingerprint": loaded.data_fingerprint,
        }
    if distributed.is_primary():
        report.write(path, report.sheet_page(sheet, runs=facts, command=command))
