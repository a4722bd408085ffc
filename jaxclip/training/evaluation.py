"""A checkpoint's towers over a split: embeddings, metrics, the report with pictures."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.pipeline import text
from jaxclip.pipeline.batches import Shard, image_batches
from jaxclip.pipeline.records import Records
from jaxclip.retrieval import protocols, report
from jaxclip.retrieval.embed import embed, padded_blocks
from jaxclip.training import mesh as meshes
from jaxclip.training import setup, writers
from jaxclip.training.checkpoint import Checkpoints
from jaxclip.training.progress import bar
from jaxclip.training.setup import Towers
from jaxclip.training.state import Params, replicated

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
      last: the result of the newest ranking, None before the first.
    """

    def __init__(self, towers: Towers, records: Records, *, batch_size: int, workers: int = 0):
        self.towers, self.records, self.workers = towers, records, workers
        multiple = meshes.rows(towers.mesh)
        self.batch_size = -(-batch_size // multiple) * multiple
        self.queries = read_queries(records, towers)
        if not self.queries.captions:
            raise UserError(
                f"none of the {len(records):,} products has a caption: pictures alone can be a gallery, "
                "but there is nothing to train on and no query to rank"
            )
        self.last: Result | None = None
        graph, out = towers.graph, replicated(towers.mesh)
        self._encode_image = jax.jit(lambda params, x: nnx.merge(graph, params).encode_image(x), out_shardings=out)
        self._encode_text = jax.jit(lambda params, x: nnx.merge(graph, params).encode_text(x), out_shardings=out)

    def embed(self, params: Params) -> tuple[np.ndarray, np.ndarray]:
        """Returns the unit vectors of all captions (Q, D) and of all pictures (G, D)."""
        size, towers = self.batch_size, self.towers
        sharding = meshes.batch_sharding(towers.mesh)
        shard = Shard(jax.process_index(), jax.process_count())
        pictures = image_batches(self.records, towers.preprocess, batch_size=size, shard=shard, workers=self.workers)
        tokens = text.encode(towers.tokenizer, self.queries.captions, towers.preprocess.context_length)
        parts = (np.split(block, shard.count)[shard.index] for block in padded_blocks(tokens, size))

        def encoder(encode: Callable) -> Callable[[np.ndarray], jax.Array]:
            return lambda rows: encode(params, jax.make_array_from_process_local_data(sharding, rows))

        def shown(blocks: Iterable, rows: int, what: str) -> Iterable:
            return bar(blocks, total=-(-rows // size), desc=f"embedding {what}", unit="batch", leave=False)

        images = embed(encoder(self._encode_image), shown(pictures, len(self.records), "pictures"), len(self.records))
        texts = embed(encoder(self._encode_text), shown(parts, len(tokens), "captions"), len(tokens))
        return texts, images

    def rank(self, params: Params) -> "Result":
        """Returns the metrics of the split and the rankings behind them (see `protocols.evaluate`)."""
        texts, images = self.embed(params)
        queries = self.queries
        categories = [queries.products[owner].category for owner in queries.caption_products]
        groups = queries.product_groups
        self.last = protocols.evaluate(texts, images, groups[queries.caption_products], groups, categories)
        return self.last


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
    folder: Path, result: Result, evaluator: Evaluator, *, workdir: Path, step: int, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """Writes metrics.json and report.html into the folder; returns what metrics.json holds."""
    figures, details = result
    metrics = {**figures, "checkpoint_step": step}
    metrics |= {name: fingerprints[name] for name in ("config_fingerprint", "data_fingerprint")}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "metrics.json.tmp"
    temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(temporary, folder / "metrics.json")
    run = {
        "workdir": workdir.name,
        "step": str(step),
        "config": metrics["config_fingerprint"],
        "data": metrics["data_fingerprint"],
        "command": f"python -m jaxclip.evaluate --workdir={workdir} --step={step}",
    }
    report.write(
        folder / "report.html",
        metrics,
        title=f"{workdir.name}: {folder.name}",
        run=run,
        queries=_query_rows(details.text_to_image, evaluator.queries, evaluator.records),
        curve=writers.read(workdir),
    )
    return metrics


def evaluate_checkpoint(
    config: "Config", workdir: Path, which: str, folder: Path, *, fingerprint: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the metrics of a workdir's checkpoint on the configured catalogue, written into the folder.

    `which` is "latest", "best" or a step.

    Raises:
      UserError: there is no such checkpoint, or the catalogue is unreadable.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = chosen_step(which, checkpoints)
    prepared = setup.prepared_dataset(config, whole=config.data.split == "all", say=say)
    records = Records(prepared, config.data.split)
    towers = setup.load_towers(config, workdir)
    with jax.set_mesh(towers.mesh):
        params = checkpoints.restore_params(towers.abstract.params, step)
        evaluator = Evaluator(towers, records, batch_size=config.evaluation.batch_size, workers=config.data.workers)
        result = evaluator.rank(params)
    fingerprints = {"config_fingerprint": fingerprint, "data_fingerprint": setup.data_fingerprint(prepared)}
    return write(folder, result, evaluator, workdir=workdir, step=step, fingerprints=fingerprints)


def chosen_step(which: str, checkpoints: Checkpoints) -> int:
    """Returns the step of "latest", "best" or a number; UserError where there is no such checkpoint."""
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


def _query_rows(rankings: protocols.Rankings, queries: Queries, records: Records) -> list[report.QueryRow]:
    def item(number: int, *, relevant: bool, score: float) -> report.Item:
        picture = records.picture(number)
        mime = "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg"
        return report.Item(picture, mime, queries.products[number].title, relevant, score)

    rows = []
    for query in report.sample_queries(len(queries.captions)):
        found = zip(rankings.top_items[query], rankings.top_relevant[query], rankings.top_scores[query], strict=True)
        items = [item(int(number), relevant=bool(right), score=float(score)) for number, right, score in found]
        answer = None
        if not any(shown.relevant for shown in items):
            answer = item(int(queries.caption_products[query]), relevant=True, score=float("nan"))
        rows.append(report.QueryRow(queries.captions[query], int(rankings.best_ranks[query]), items, answer))
    return rows


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
