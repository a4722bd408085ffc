"""A checkpoint's towers over a split: embeddings, metrics, and what is left in the folder of the results."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.catalog.product import Product
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation import labels, marqo, pages, protocols, results
from jaxclip.pipeline import text
from jaxclip.pipeline.records import Records
from jaxclip.runtime import distributed, metrics_log
from jaxclip.runtime.progress import bar
from jaxclip.towers.checkpoints import Checkpoints, resolve_step
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.load import load
from jaxclip.towers.params import Params
from jaxclip.towers.store import EmbeddingStore
from jaxclip.towers.towers import Towers

Result = tuple[dict[str, Any], protocols.Details]
Embedded = tuple[np.ndarray, np.ndarray]
PROVENANCE = ("parameters", "config_fingerprint", "data_fingerprint", "first_stage_fingerprint")
"""What metrics.json says of where its figures come from, beside the step."""


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
      settings: see `settings`.
      last: what the newest `rank_state` returned, None before the first.
    """

    def __init__(self, towers: Towers, records: Records, config: Config):
        self.towers, self.records, self.settings = towers, records, settings(config)
        self.encoders = Encoders(towers, batch_size=config.evaluation.batch_size, workers=config.data.workers)
        self.queries = read_queries(records, towers)
        if not self.queries.captions:
            raise UserError(
                f"none of the {len(records):,} products has a caption: pictures alone can be a gallery "
                "(evaluate --query='...' shows what is found there), but there is nothing to train on and no query to "
                "rank"
            )
        self.last: dict[str, Result] | None = None
        self._embedded: dict[str, Embedded] = {}

    def embed(self, params: Params, *, store: EmbeddingStore | None = None) -> Embedded:
        """Returns the unit vectors of all captions (Q, D) and of all pictures (G, D).

        They are kept in the store as they are made, and found there again.
        """
        images = self.encoders.pictures(params, self.records, store=store)
        return self.encoders.captions(params, self.queries.captions, store=store), images

    def rank(self, params: Params) -> Result:
        """Returns the metrics of the split and the rankings behind them (see `protocols.evaluate`)."""
        return self._rank(*self.embed(params))

    def rank_all(self, parameters: Mapping[str, Params]) -> dict[str, Result]:
        """Returns the ranking of each of several sets of parameters, by name ("raw", "ema")."""
        self._embedded = {name: self.embed(params) for name, params in parameters.items()}
        self.last = {name: self._rank(*embedded) for name, embedded in self._embedded.items()}
        return self.last

    def complete_all(self, parameters: Mapping[str, Params]) -> dict[str, Result]:
        """Returns the last result of `rank_all`, ranking first if it has none, with the rest of `complete`."""
        results = self.last or self.rank_all(parameters)
        return {
            name: self._complete(params, *self._embedded[name], results[name], store=None)
            for name, params in parameters.items()
        }

    def complete(self, params: Params, *, store: EmbeddingStore | None = None) -> Result:
        """Returns `rank`'s result with the protocols that are run once; `store` as in `embed`.

        Those are Marqo's, labels as queries and labels as classes (see `retrieval.marqo` and `retrieval.labels`).
        """
        embedded = self.embed(params, store=store)
        return self._complete(params, *embedded, self._rank(*embedded), store=store)

    def _rank(self, texts: np.ndarray, images: np.ndarray) -> Result:
        queries, groups = self.queries, self.queries.product_groups
        categories = [queries.products[owner].category for owner in queries.caption_products]

        def shown(blocks):
            return bar(blocks, desc="ranking", unit="block", leave=False)

        text_groups = groups[queries.caption_products]
        return protocols.evaluate(
            texts, images, text_groups, groups, categories, ks=self.settings["ks"], progress=shown
        )

    def _complete(
        self, params: Params, texts: np.ndarray, images: np.ndarray, result: Result, *, store: EmbeddingStore | None
    ) -> Result:
        figures, details = result
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
        if not fields:
            return figures, details
        prompts = [[text.prompts(label, self.towers.preprocess) for label in field.labels] for field in fields]
        flat = self.encoders.captions(params, list(chain.from_iterable(chain.from_iterable(prompts))), store=store)
        ends = np.cumsum([sum(map(len, of_field)) for of_field in prompts])
        for field, embedded in zip(fields, np.split(flat, ends[:-1]), strict=True):
            embeddings = labels.ensemble(embedded.reshape(len(field.labels), -1, flat.shape[1]))
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


def settings(config: Config) -> dict[str, Any]:
    """Returns what figures depend on beside the checkpoint and the catalogue, as JSON values."""
    given = config.evaluation
    found = {"split": config.data.split, "ks": sorted(given.ks), "dtype": config.model.dtype}
    if config.task == "rerank":
        return found | {"candidates": config.rerank.candidates, "segments": config.rerank.segments}
    return found | {"zooms": list(given.zooms), "mirror": given.mirror}


def write(
    folder: Path,
    result: Result,
    evaluator: Evaluator,
    *,
    workdir: Path,
    step: int,
    provenance: Mapping[str, str],
    command: str = "",
) -> dict[str, Any]:
    """Returns what metrics.json holds; the first process writes it, its tables, queries.npz and report.html.

    Where the rankings were re-ranked, those before go into first_stage/ and are what the report compares with.

    Args:
      provenance: of PROVENANCE what there is.
      command: what evaluates this but for the step and the parameters; default: this workdir on its own catalogue.
    """
    figures, details = result
    metrics = {**figures, "checkpoint_step": step, "settings": evaluator.settings}
    metrics |= {name: provenance[name] for name in PROVENANCE if name in provenance}
    if distributed.is_primary():
        command = command or shlex.join(["python", "-m", "jaxclip.evaluate", f"--workdir={workdir}"])
        command += f" --step={step} --parameters={metrics['parameters']}"
        metrics = _write(folder, metrics, details, evaluator, workdir, command)
    distributed.barrier("written")
    return metrics


def _write(
    folder: Path, metrics: dict[str, Any], details: protocols.Details, evaluator: Evaluator, workdir: Path, command: str
) -> dict[str, Any]:
    queries, baseline = evaluator.queries, None

    def write_queries(folder: Path, details: protocols.Details) -> results.Stored:
        results.write_queries(
            folder,
            details,
            captions=queries.captions,
            owners=queries.caption_products,
            ids=[product.id for product in queries.products],
            data_fingerprint=metrics["data_fingerprint"],
        )
        return results.read_queries(folder)

    found = write_queries(folder, details)
    if details.first_stage is not None:
        before = dataclasses.replace(details, text_to_image=details.first_stage, first_stage=None)
        first = write_queries(folder / results.FIRST_STAGE, before)
        compared = results.compare(first, found)
        metrics["reranked"] = {**metrics["reranked"], "compared": compared["text_to_image"]}
        baseline = ("the first stage", first, compared)
    results.write_metrics(folder, metrics)
    pages.write_report(
        folder / "report.html",
        metrics,
        found,
        queries.products,
        evaluator.records,
        title=f"{workdir.name}: {folder.name}",
        run={"workdir": workdir.name, **provenance(metrics), "command": command},
        curve=metrics_log.read(workdir),
        baseline=baseline,
    )
    return metrics


def provenance(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a page says of where the figures of a metrics.json come from."""
    names = {"checkpoint_step": "step", **{name: name.replace("_", " ") for name in PROVENANCE}}
    return {shown: str(metrics[name]) for name, shown in names.items() if name in metrics}


def read(folder: Path) -> dict[str, Any] | None:
    """Returns what a folder's metrics.json holds, None where it has none."""
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else None


def evaluate_checkpoint(
    config: Config,
    workdir: Path,
    which: str,
    folder: Path,
    *,
    parameters: str = "",
    fingerprint: str,
    say: Callable[[str], None],
    command: str = "",
) -> tuple[dict[str, Any], Path]:
    """Returns the metrics of a workdir's checkpoint on the configured catalogue, and the folder they were written into.

    `which` and `parameters` as in `load`; raw ones of a run that kept an average go into a folder of their own
    (see `results_folder`). What an interrupted evaluation has embedded is not embedded again. `command` as in `write`.

    Raises:
      UserError: as `load`.
    """
    loaded = load(config, workdir, which, parameters=parameters, say=say)
    with jax.set_mesh(loaded.towers.mesh):
        evaluator = Evaluator(loaded.towers, loaded.records, config)
        store = evaluator.encoders.store(workdir, loaded.params, loaded.step, say=say)
        result = evaluator.complete(loaded.params, store=store)
    folder = results_folder(folder, loaded.parameters, averaged=loaded.averaged)
    provenance = {
        "parameters": loaded.parameters,
        "config_fingerprint": fingerprint,
        "data_fingerprint": loaded.data_fingerprint,
    }
    metrics = write(
        folder, result, evaluator, workdir=workdir, step=loaded.step, provenance=provenance, command=command
    )
    return metrics, folder


def load_if_current(
    config: Config, workdir: Path, which: str, folder: Path, data_fingerprint: str
) -> dict[str, Any] | None:
    """Returns the metrics that a folder holds if an evaluation of the checkpoint `which` would write the same now."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = resolve_step(which, checkpoints)
    wanted = {
        "checkpoint_step": step,
        "parameters": "ema" if checkpoints.keeps_average(step) else "raw",
        "settings": settings(config),
        "data_fingerprint": data_fingerprint,
    }
    found = read(folder)
    return found if found and all(found.get(name) == value for name, value in wanted.items()) else None


def results_folder(folder: Path, which: str, *, averaged: bool) -> Path:
    """Returns where results go: into a folder of their own, where they are raw beside those of a moving average."""
    return folder.with_name(f"{folder.name}-raw") if which == "raw" and averaged else folder
