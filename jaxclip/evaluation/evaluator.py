"""Embeds a split with a checkpoint's towers and computes its metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation import labels, marqo, protocols
from jaxclip.evaluation.metrics_file import results_folder, settings, write
from jaxclip.evaluation.protocols import GroupedEmbeddings, Result
from jaxclip.evaluation.queries import read_queries
from jaxclip.pipeline import text
from jaxclip.pipeline.records import Records
from jaxclip.runtime.progress import bar
from jaxclip.towers.encoders import Encoders
from jaxclip.towers.load import load_checkpoint
from jaxclip.towers.params import Params
from jaxclip.towers.store import EmbeddingStore
from jaxclip.towers.towers import Towers

Embedded = tuple[np.ndarray, np.ndarray]


class Evaluator:
    """Computes the metrics of one split for any parameters; compiles the encoders and reads the captions only once.

    Attributes:
      queries: the split's captions and products.
      encoders: the compiled encoders of captions and pictures.
      settings: the settings that the metrics depend on (`metrics_file.settings`).
      last: the latest result of `rank_all`, None before its first call.
    """

    def __init__(self, towers: Towers, records: Records, config: Config):
        self.towers, self.records, self.settings = towers, records, settings(config)
        self.encoders = Encoders(towers, batch_size=config.evaluation.batch_size, workers=config.data.workers)
        self.queries = read_queries(records, towers)
        if not self.queries.captions:
            raise UserError(
                f"none of the {len(records):,} products has a caption, which training and ranking need; "
                "evaluate --query='...' can search pictures without captions"
            )
        self.last: dict[str, Result] | None = None
        self._embedded: dict[str, Embedded] = {}

    def embed(self, params: Params, *, store: EmbeddingStore | None = None) -> Embedded:
        """Returns the unit vectors of all captions (Q, D) and of all pictures (G, D).

        With a store, embeddings already in it are reused and new ones are added to it.
        """
        images = self.encoders.pictures(params, self.records, store=store)
        return self.encoders.captions(params, self.queries.captions, store=store), images

    def rank(self, params: Params) -> Result:
        """Returns the metrics of the split and the rankings behind them (see `protocols.evaluate`)."""
        return self._rank(*self.embed(params))

    def rank_all(self, parameters: Mapping[str, Params]) -> dict[str, Result]:
        """Returns the result of `rank` for each of several sets of parameters, by name ("raw", "ema")."""
        self._embedded = {name: self.embed(params) for name, params in parameters.items()}
        self.last = {name: self._rank(*embedded) for name, embedded in self._embedded.items()}
        return self.last

    def complete_all(self, parameters: Mapping[str, Params]) -> dict[str, Result]:
        """Returns the latest results of `rank_all`, extended as in `complete`; runs `rank_all` if there are none."""
        results = self.last or self.rank_all(parameters)
        return {
            name: self._complete(params, *self._embedded[name], results[name], store=None)
            for name, params in parameters.items()
        }

    def complete(self, params: Params, *, store: EmbeddingStore | None = None) -> Result:
        """Returns the result of `rank`, extended by the protocols that evaluations during training leave out.

        They are Marqo's protocol (`evaluation.marqo`), and labels as queries and as classes (`evaluation.labels`).
        With a store, embeddings are reused as in `embed`.
        """
        embedded = self.embed(params, store=store)
        return self._complete(params, *embedded, self._rank(*embedded), store=store)

    def _rank(self, texts: np.ndarray, images: np.ndarray) -> Result:
        queries, groups = self.queries, self.queries.product_groups
        categories = [queries.products[product].category for product in queries.caption_products]

        def with_progress_bar(blocks):
            return bar(blocks, desc="ranking", unit="block", leave=False)

        return protocols.evaluate(
            GroupedEmbeddings(texts, groups[queries.caption_products]),
            GroupedEmbeddings(images, groups),
            categories,
            ks=self.settings["ks"],
            progress=with_progress_bar,
        )

    def _complete(
        self, params: Params, texts: np.ndarray, images: np.ndarray, result: Result, *, store: EmbeddingStore | None
    ) -> Result:
        figures, details = result
        queries, groups = self.queries, self.queries.product_groups
        captioned, first_captions = np.unique(queries.caption_products, return_index=True)
        titles = np.zeros_like(images)  # zero for products without a caption
        titles[captioned] = texts[first_captions]
        grouped_texts = GroupedEmbeddings(texts, groups[queries.caption_products])
        figures = {**figures, "marqo": marqo.evaluate(grouped_texts, GroupedEmbeddings(images, groups), titles)}
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
        ends = np.cumsum([sum(map(len, field_prompts)) for field_prompts in prompts])
        for field, embedded in zip(fields, np.split(flat, ends[:-1]), strict=True):
            embeddings = labels.ensemble(embedded.reshape(len(field.labels), -1, flat.shape[1]))
            figures["label_queries"][field.name] = labels.retrieve(field, embeddings, images)
            figures["zero_shot"][field.name] = labels.classify(field, embeddings, images)
        return figures, details


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


def evaluate_checkpoint(
    run: EvaluatedRun, step: str, folder: Path, *, parameters: str = "", say: Callable[[str], None]
) -> tuple[dict[str, Any], Path]:
    """Returns the metrics of a workdir's checkpoint on the configured catalogue, and the folder they were written into.

    Embeddings that an earlier, perhaps interrupted, evaluation stored in the workdir are reused.

    Args:
      run: the workdir and its configuration.
      step: the checkpoint: "latest", "best" or a number, as in `load_checkpoint`.
      folder: the folder for the results; see `results_folder` for raw parameters.
      parameters: "raw", "ema" or "", as in `load_checkpoint`.
      say: prints a line for the user.

    Raises:
      UserError: for the reasons given in `load_checkpoint`.
    """
    loaded = load_checkpoint(run.config, run.workdir, step, parameters=parameters, say=say)
    with jax.set_mesh(loaded.towers.mesh):
        evaluator = Evaluator(loaded.towers, loaded.records, run.config)
        store = evaluator.encoders.store(run.workdir, loaded.params, loaded.step, say=say)
        result = evaluator.complete(loaded.params, store=store)
    folder = results_folder(folder, loaded.parameters, averaged=loaded.averaged)
    provenance = {
        "parameters": loaded.parameters,
        "config_fingerprint": run.fingerprint,
        "data_fingerprint": loaded.data_fingerprint,
    }
    metrics = write(
        folder,
        result,
        evaluator,
        workdir=run.workdir,
        step=loaded.step,
        provenance=provenance,
        command=run.command,
    )
    return metrics, folder
