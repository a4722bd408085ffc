"""A checkpoint's towers over a split: embeddings, metrics, the report with pictures."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from jaxclip.retrieval import protocols, report, significance
from jaxclip.retrieval.embed import embed, padded_blocks
from jaxclip.training import mesh as meshes
from jaxclip.training import setup, writers
from jaxclip.training.base import checkpoint_params
from jaxclip.training.checkpoint import Checkpoints, chosen
from jaxclip.training.progress import bar
from jaxclip.training.setup import Towers
from jaxclip.training.state import Params, TrainState, overlaid, replicated

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
      last: what the newest `rank_state` returned, None before the first.
    """

    def __init__(
        self,
        towers: Towers,
        records: Records,
        *,
        batch_size: int,
        workers: int = 0,
        ks: Sequence[int] = protocols.CATEGORY_KS,
    ):
        self.towers, self.records, self.workers, self.ks = towers, records, workers, sorted(ks)
        multiple = meshes.rows(towers.mesh)
        self.batch_size = -(-batch_size // multiple) * multiple
        self.queries = read_queries(records, towers)
        if not self.queries.captions:
            raise UserError(
                f"none of the {len(records):,} products has a caption: pictures alone can be a gallery, "
                "but there is nothing to train on and no query to rank"
            )
        self.last: dict[str, Result] | None = None
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
        texts_groups = groups[queries.caption_products]
        metrics, details = protocols.evaluate(texts, images, texts_groups, groups, categories, ks=self.ks)
        _deepen(metrics["by_category"], details.text_to_image.best_ranks, categories, self.ks)
        return metrics, details

    def rank_state(self, state: TrainState) -> dict[str, "Result"]:
        """Returns the ranking of the state's parameters as "raw" and, where it has one, of their average as "ema"."""
        self.last = {"raw": self.rank(state.params)}
        if state.ema is not None:
            self.last["ema"] = self.rank(overlaid(state.ema, state.params))
        return self.last


def _deepen(rows: dict[str, dict], best_ranks: np.ndarray, categories: Sequence[str], ks: Sequence[int]) -> None:
    """Adds hit@k at depths that the rows of categories lack, each with its interval."""
    of = np.asarray([name or protocols.UNCATEGORISED for name in categories])
    for name, row in rows.items():
        for k in ks:
            if f"hit@{k}" not in row:
                hits = (best_ranks[of == name] <= k).astype(np.float64)
                low, high = significance.bootstrap_interval(hits)
                row[f"hit@{k}"] = {"value": float(hits.mean()), "low": low, "high": high}


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
    metrics |= {name: fingerprints[name] for name in ("parameters", "config_fingerprint", "data_fingerprint")}
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


def read(folder: Path) -> dict[str, Any] | None:
    """Returns what a folder's metrics.json holds, None where it has none."""
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else None


def evaluate_checkpoint(
    config: "Config",
    workdir: Path,
    which: str,
    folder: Path,
    *,
    parameters: str = "",
    fingerprint: str,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], Path]:
    """Returns the metrics of a workdir's checkpoint on the configured catalogue, and the folder they were written into.

    `which` is "latest", "best" or a step; `parameters` is "raw", "ema" or "", which is ema where the run kept one. Raw
    ones of a run that kept an average go into a folder of their own (see `folder_of`).

    Raises:
      UserError: there is no such checkpoint or average, or the catalogue is unreadable.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = chosen(which, checkpoints)
    prepared = setup.prepared_dataset(config, whole=config.data.split == "all", say=say)
    records = Records(prepared, config.data.split)
    towers = setup.load_towers(config, workdir)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, step, parameters)
        given = config.evaluation
        evaluator = Evaluator(towers, records, batch_size=given.batch_size, workers=config.data.workers, ks=given.ks)
        result = evaluator.rank(params)
    averaged = checkpoints.keeps_average(step)
    taken = parameters or ("ema" if averaged else "raw")
    folder = folder_of(folder, taken, averaged=averaged)
    fingerprints = {
        "parameters": taken,
        "config_fingerprint": fingerprint,
        "data_fingerprint": setup.data_fingerprint(prepared),
    }
    return write(folder, result, evaluator, workdir=workdir, step=step, fingerprints=fingerprints), folder


def folder_of(folder: Path, which: str, *, averaged: bool) -> Path:
    """Returns where results go: into a folder of their own, where they are raw beside those of a moving average."""
    return folder.with_name(f"{folder.name}-raw") if which == "raw" and averaged else folder


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


def table(metrics: Mapping[str, Any], raw: Mapping[str, Any] | None = None) -> str:
    """Returns the headline figures as lines for the terminal: value [95% interval] beside chance.

    `raw` are the figures of the parameters themselves, where `metrics` are those of their moving average.
    """
    names = [name for name in metrics["text_to_image"] if name.startswith("hit@")]
    lines = [f"{'':16}" + "".join(f"{name:>24}" for name in names)]
    for direction in ("text_to_image", "image_to_text"):
        label = direction.replace("_", "-")
        for head, found in ((label, metrics), ("  not averaged", raw)):
            if found:
                figures = [found[direction][name] for name in names]
                cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figures]
                lines.append(f"{head:16}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"{'chance':16}" + "".join(f"{metrics['chance'][name]:>24.4f}" for name in names))
    lines.append(f"{metrics['queries']:,} queries, {metrics['gallery']:,} pictures; 95% bootstrap intervals")
    if metrics.get("parameters") == "ema":
        lines.append("of the moving average of the parameters (optimizer.ema), but for rows called otherwise")
    return "\n".join(lines)


def comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns text-to-image hit@k before and after training, then by category, as lines for the terminal.

    These are Tables 2 and 1 of the fit-aware paper, which calls hit@k R@k.
    """
    names = [name for name in after["text_to_image"] if name.startswith("hit@")]
    head = "".join(f"{name.replace('hit@', 'R@'):>8}" for name in names)
    width = max([24, *(len(category) + 10 for category in after["by_category"])])

    def line(title: str, *rows: Mapping[str, Any]) -> str:
        cells = ("".join(f"{row[name]['value']:8.3f}" for name in names) for row in rows)
        return f"{title:{width}}" + "   ".join(cells)

    lines = [f"{'':{width}}{head}"]
    lines += [line("zero-shot", before["text_to_image"]), line("fine-tuned", after["text_to_image"])]
    lines += ["", f"{'':{width}}{'zero-shot':<{len(head)}}   fine-tuned", f"{'':{width}}{head}   {head}"]
    for category, row in after["by_category"].items():
        lines.append(line(f"{category} ({row['queries']})", before["by_category"][category], row))
    lines.append("text to image; R@k is hit@k: the share of queries with a right picture in the top k")
    return "\n".join(lines)
