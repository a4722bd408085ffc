"""A checkpoint's towers over a split: embeddings, metrics, and what is left in the folder of the results."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.pipeline import text
from jaxclip.pipeline.records import Records
from jaxclip.retrieval import labels, marqo, protocols, results
from jaxclip.training import pages, setup, writers
from jaxclip.training.checkpoint import Checkpoints
from jaxclip.training.encoders import Encoders
from jaxclip.training.progress import bar
from jaxclip.training.setup import Towers
from jaxclip.training.state import Params, checksum

if TYPE_CHECKING:
    from jaxclip.config import Config

Result = tuple[dict[str, Any], protocols.Details]


@dataclass(frozen=True)
class Queries:
    """Every caption of a split, and the products they and the gallery's pictures belong to."""

    products: list[Product]
    product_groups: np.ndarray  # (G,)
    captions: list[str]
    caption_products: np.ndarray  # (Q,) index into products


class Evaluator:
    """Ranks one split with whatever parameters it is given; encoders are compiled and captions are read once.

    Attributes:
      queries: the split's captions and products.
      encoders: the towers.
    """

    def __init__(self, towers: Towers, records: Records, *, batch_size: int, workers: int = 0):
        self.towers, self.records = towers, records
        self.encoders = Encoders(towers, batch_size=batch_size, workers=workers)
        self.queries = read_queries(records, towers)
        if not self.queries.captions:
            raise UserError(
                f"none of the {len(records):,} products has a caption: pictures alone can be a gallery "
                "(evaluate --query='...' shows what is found there), but there is nothing to train on and no query to "
                "rank"
            )
        self._last: tuple[np.ndarray, np.ndarray, Result] | None = None

    def rank(self, params: Params, *, store: Path | None = None) -> Result:
        """Returns the metrics of the split and the rankings behind them (see `protocols.evaluate`).

        Embeddings are kept in the folder `store` as they are made, and found there again.
        """
        queries, groups = self.queries, self.queries.product_groups
        images = self.encoders.pictures(params, self.records, store=store and store / "pictures")
        texts = self.encoders.captions(params, queries.captions, store=store and store / "captions")
        categories = [queries.products[owner].category for owner in queries.caption_products]

        def shown(blocks):
            return bar(blocks, desc="ranking", unit="block", leave=False)

        result = protocols.evaluate(texts, images, groups[queries.caption_products], groups, categories, progress=shown)
        self._last = texts, images, result
        return result

    def complete(self, params: Params, *, store: Path | None = None) -> Result:
        """Returns `rank`'s result, the newest one where there is one already, with the protocols that are run once.

        Those are Marqo's, labels as queries and labels as classes (see `retrieval.marqo` and `retrieval.labels`).
        """
        if self._last is None:
            self.rank(params, store=store)
        texts, images, (figures, details) = self._last
        queries, groups = self.queries, self.queries.product_groups
        owned, first = np.unique(queries.caption_products, return_index=True)
        titles = np.zeros_like(images)
        titles[owned] = texts[first]
        text_groups = groups[queries.caption_products]
        figures = {**figures, "marqo": marqo.evaluate(texts, images, titles, text_groups, groups)}
        names = ["category", *sorted({name for product in queries.products for name in product.attributes})]
        fields = labels.fields({
            name: [p.category if name == "category" else p.attributes.get(name, "") for p in queries.products]
            for name in names
        })  # fmt: skip
        figures |= {"label_queries": {}, "zero_shot": {}}
        for field in fields:
            wordings = [text.prompts(label, self.towers.preprocess) for label in field.labels]
            flat = self.encoders.captions(params, [wording for each in wordings for wording in each])
            embeddings = labels.ensemble(flat.reshape(len(wordings), -1, flat.shape[1]))
            figures["label_queries"][field.name] = labels.retrieve(field, embeddings, images)
            figures["zero_shot"][field.name] = labels.classify(field, embeddings, images)
        return figures, details


def read_queries(records: Records, towers: Towers) -> Queries:
    """Returns the captions of a split as evaluation words them."""
    products, product_groups, captions, owners = [], [], [], []
    for product, group in bar(records.products(), total=len(records), desc="reading captions", unit="product"):
        for caption in product.captions:
            captions.append(text.caption(caption, product.attributes, towers.preprocess))
            owners.append(len(products))
        products.append(product)
        product_groups.append(group)
    return Queries(products, np.asarray(product_groups), captions, np.asarray(owners))


def write(
    folder: Path,
    result: Result,
    evaluator: Evaluator,
    *,
    workdir: Path,
    step: int,
    fingerprints: Mapping[str, str],
    command: str = "",
) -> dict[str, Any]:
    """Writes metrics.json, its tables, queries.npz and report.html into the folder; returns what metrics.json holds.

    `command` is what reproduces the results; default: this workdir's checkpoint on its own data.
    """
    figures, details = result
    metrics = {**figures, "checkpoint_step": step}
    metrics |= {name: fingerprints[name] for name in ("config_fingerprint", "data_fingerprint")}
    queries = evaluator.queries
    results.write_metrics(folder, metrics)
    results.write_queries(
        folder,
        details,
        captions=queries.captions,
        owners=queries.caption_products,
        ids=[product.id for product in queries.products],
        data_fingerprint=metrics["data_fingerprint"],
    )
    run = {
        "workdir": workdir.name,
        "step": str(step),
        "config": metrics["config_fingerprint"],
        "data": metrics["data_fingerprint"],
        "command": command or f"python -m jaxclip.evaluate --workdir={workdir} --step={step}",
    }
    pages.write_report(
        folder / "report.html",
        metrics,
        results.read_queries(folder),
        queries.products,
        evaluator.records,
        title=f"{workdir.name}: {folder.name}",
        run=run,
        curve=writers.read(workdir),
    )
    return metrics


@dataclass(frozen=True)
class Loaded:
    """A workdir's checkpoint and the records that it is to look at."""

    towers: Towers
    params: Params
    records: Records
    step: int
    data_fingerprint: str


def load(config: "Config", workdir: Path, which: str, *, say: Callable[[str], None]) -> Loaded:
    """Returns the checkpoint `which` ("latest", "best" or a step) of a workdir and the configured split.

    Raises:
      UserError: there is no such checkpoint, or the catalogue is unreadable.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = _chosen(which, checkpoints)
    prepared = setup.prepared_dataset(config, whole=config.data.split == "all", say=say)
    records = Records(prepared, config.data.split)
    towers = setup.load_towers(config, workdir)
    with jax.set_mesh(towers.mesh):
        params = checkpoints.restore_params(towers.abstract.params, step)
    return Loaded(towers, params, records, step, setup.data_fingerprint(prepared))


def store_of(workdir: Path, loaded: Loaded, config: "Config", captions: list[str]) -> Path:
    """Returns the folder of a checkpoint's embeddings of some data; its name changes with all they depend on."""
    depends = {
        "parameters": int(jax.jit(checksum)(loaded.params)),
        "data": [loaded.data_fingerprint, config.data.split, len(loaded.records)],
        "preprocess": dataclasses.asdict(loaded.towers.preprocess),
        "dtype": config.model.dtype,
        "batch": config.evaluation.batch_size,
        "captions": hashlib.sha256("\0".join(captions).encode()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
    return workdir / "eval" / "embeddings" / f"step-{loaded.step}-{key}"


def evaluate_checkpoint(
    config: "Config",
    workdir: Path,
    which: str,
    folder: Path,
    *,
    fingerprint: str,
    say: Callable[[str], None],
    command: str = "",
) -> dict[str, Any]:
    """Returns the metrics of a workdir's checkpoint on the configured catalogue, written into the folder.

    What an interrupted evaluation has embedded is not embedded again. `command` as in `write`.

    Raises:
      UserError: as `load`.
    """
    loaded = load(config, workdir, which, say=say)
    with jax.set_mesh(loaded.towers.mesh):
        evaluator = Evaluator(
            loaded.towers, loaded.records, batch_size=config.evaluation.batch_size, workers=config.data.workers
        )
        store = store_of(workdir, loaded, config, evaluator.queries.captions)
        result = evaluator.complete(loaded.params, store=store)
    fingerprints = {"config_fingerprint": fingerprint, "data_fingerprint": loaded.data_fingerprint}
    return write(
        folder,
        result,
        evaluator,
        workdir=workdir,
        step=loaded.step,
        fingerprints=fingerprints,
        command=command,
    )


def _chosen(which: str, checkpoints: Checkpoints) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.folder} has no complete checkpoint")
    if which == "latest":
        return steps[-1]
    if which == "best":
        return checkpoints.best() or steps[-1]
    if not which.isdigit() or int(which) not in steps:
        raise UserError(f"--step={which} is none of latest, best, {', '.join(map(str, steps))}")
    return int(which)


def table(metrics: Mapping[str, Any]) -> str:
    """Returns the headline figures as lines for the terminal: value [95% interval] beside chance."""
    names = [name for name in metrics["text_to_image"] if name.startswith("hit@")]
    lines = [f"{'':16}" + "".join(f"{name:>24}" for name in names)]
    for direction in ("text_to_image", "image_to_text"):
        figures = [metrics[direction][name] for name in names]
        cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figures]
        lines.append(f"{direction.replace('_', '-'):16}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"{'chance':16}" + "".join(f"{metrics['chance'][name]:>24.4f}" for name in names))
    lines.append(f"{metrics['queries']:,} queries, {metrics['gallery']:,} pictures; 95% bootstrap intervals")
    return "\n".join(lines)
