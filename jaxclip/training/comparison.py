"""Two workdirs' evaluations side by side, and several checkpoints on sentences to which no right answer is known."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxclip.errors import UserError
from jaxclip.pipeline import text
from jaxclip.pipeline.records import Records
from jaxclip.retrieval import report, results, tiles
from jaxclip.training import distributed, evaluation, inputs, pages, writers
from jaxclip.training.encoders import Encoders

if TYPE_CHECKING:
    from jaxclip.config import Config

SHOWN = 10


def compare(
    config: "Config", baseline: Path, workdir: Path, name: str, *, command: str, say: Callable[[str], None]
) -> tuple[Mapping[str, Any], Path]:
    """Returns what `results.compare` says of the evaluations called `name` of two workdirs, and the folder of its page.

    The first process writes comparison.json and report.html into `workdir`/eval/NAME/against-BASELINE. `config` is of
    `workdir`.

    Raises:
      UserError: one of them has no such evaluation, or they ranked other products.
    """
    before, after = (results.read_queries(folder / "eval" / name) for folder in (baseline, workdir))
    figures = results.compare(before, after)
    folder = workdir / "eval" / name / f"against-{baseline.name}"
    prepared = inputs.prepared_dataset(config, whole=config.data.split == "all", say=say)
    if inputs.data_fingerprint(prepared) != after.data_fingerprint:
        raise UserError(
            f"{workdir}/eval/{name} is of another catalogue than the configured one: name that with --config"
        )
    if not distributed.is_primary():
        return figures, folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(figures, indent=2) + "\n")
    records = Records(prepared, config.data.split)
    metrics = json.loads((workdir / "eval" / name / "metrics.json").read_text())
    run = {
        "workdir": workdir.name,
        "baseline": baseline.name,
        "step": str(metrics["checkpoint_step"]),
        "config": metrics["config_fingerprint"],
        "data": metrics["data_fingerprint"],
        "command": command,
    }
    pages.write_report(
        folder / "report.html",
        metrics,
        after,
        [product for product, _ in records.products()],
        records,
        title=f"{workdir.name} against {baseline.name}: {name}",
        run=run,
        curve=writers.read(workdir),
        baseline=(baseline.name, before, figures),
    )
    return figures, folder


def write_sheet(
    path: Path,
    runs: Mapping[Path, "Config"],
    which: str,
    sentences: Sequence[str],
    *,
    parameters: str = "",
    command: str,
    say: Callable[[str], None],
) -> None:
    """Writes the page of the ten pictures that each workdir's checkpoint finds for each sentence.

    Every workdir looks at the split that its configuration names; captions are not needed. `which` and `parameters` as
    in `evaluation.load`.
    """
    sheet: dict[str, dict[str, list[report.Item]]] = {sentence: {} for sentence in sentences}
    for workdir, config in runs.items():
        loaded = evaluation.load(config, workdir, which, parameters=parameters, say=say)
        products = [product for product, _ in loaded.records.products()]
        with jax.set_mesh(loaded.towers.mesh):
            encoders = Encoders(loaded.towers, batch_size=config.evaluation.batch_size, workers=config.data.workers)
            store = encoders.store(workdir, loaded.params, loaded.step, say=say)
            images = encoders.pictures(loaded.params, loaded.records, store=store)
            words = [text.caption(sentence, {}, loaded.towers.preprocess) for sentence in sentences]
            texts = encoders.captions(loaded.params, words)
        scores = np.asarray(tiles.product_keys(texts, images, finite=False))  # (sentences, G)
        name = workdir.name if workdir.name not in sheet[sentences[0]] else str(workdir)
        for sentence, row in zip(sentences, scores, strict=True):
            best = np.argsort(-row, kind="stable")[:SHOWN]
            sheet[sentence][name] = [
                pages.picture(int(n), products, loaded.records, relevant=False, score=float(row[n])) for n in best
            ]
    if distributed.is_primary():
        report.write_sheet(path, sheet, command=command)
