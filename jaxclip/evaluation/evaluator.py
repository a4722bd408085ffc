"""Embeds a split with a checkpoint's towers and computes its metrics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation import image_to_image, judged, labels, marqo, pairs, protocols, single
from jaxclip.evaluation.metrics_file import results_folder, settings, write
from jaxclip.evaluation.protocols import GroupedEmbeddings, Result
from jaxclip.evaluation.queries import read_queries
from jaxclip.evaluation.rows import DIRECTIONS
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
      notes: sentences that must be shown with the metrics.
      last: the latest result of `rank_all`, None before its first call.
    """

    def __init__(
        self, towers: Towers, records: Records, config: Config, notes: Sequence[str] = (), *, completed: bool = True
    ):
        """Reads the captions, and the judged queries unless evaluations are not `completed` (see `complete`)."""
        self.notes = list(notes)
        self.towers, self.records, self.settings = towers, records, settings(config)
        self.encoders = Encoders(towers, batch_size=config.evaluation.batch_size, workers=config.data.workers)
        self.queries = read_queries(records, towers)
        if not self.queries.captions:
            raise UserError(
                f"none of the {len(records):,} products has a caption, which training and ranking need; "
                "evaluate --query='...' can search pictures without captions"
            )
        self.last: dict[str, Result] | None = None
        self._judged = judged.find(config, [product.id for product in self.queries.products]) if completed else None
        if self._judged is not None:
            self.notes += self._judged.notes
        self._embedded: dict[str, Embedded] = {}

    def embed(self, params: Params, *, store: EmbeddingStore | None = None) -> Embedded:
        """Returns the unit vectors of all captions (Q, D) and of all pictures (P, D).

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

        They are `pairs`, `single`, `image_to_image` and `judged` (see the modules of these names), the figures of each
        catalogue of a mixture, Marqo's protocol (`evaluation.marqo`), and labels as queries and as classes
        (`evaluation.labels`). With a store, embeddings are reused as in `embed`.
        """
        embedded = self.embed(params, store=store)
        return self._complete(params, *embedded, self._rank(*embedded), store=store)

    def _rank(self, texts: np.ndarray, images: np.ndarray) -> Result:
        queries, groups = self.queries, self.queries.product_groups
        categories = [queries.products[product].category for product in queries.caption_products]

        return protocols.evaluate(
            GroupedEmbeddings(texts, groups[queries.caption_products]),
            GroupedEmbeddings(images, groups, queries.picture_owners),
            categories,
            ks=self.settings["ks"],
            trial_size=self.settings["trial_size"],
            progress=_progress("ranking"),
        )

    def _complete(
        self, params: Params, texts: np.ndarray, images: np.ndarray, result: Result, *, store: EmbeddingStore | None
    ) -> Result:
        figures, details = result
        queries, groups = self.queries, self.queries.product_groups
        captioned, first_captions = np.unique(queries.caption_products, return_index=True)
        titles = np.zeros((len(groups), images.shape[1]), images.dtype)  # zero for products without a caption
        titles[captioned] = texts[first_captions]
        grouped_texts = GroupedEmbeddings(texts, groups[queries.caption_products])
        products = GroupedEmbeddings(images, groups, queries.picture_owners)
        figures = {**figures, **self._further_protocols(grouped_texts, products)}
        if self._judged is not None:
            captions = [text.caption(query, {}, self.towers.preprocess) for query in self._judged.texts]
            asked = self.encoders.captions(params, captions, store=store)
            figures["judged"] = judged.evaluate(self._judged, asked, products, ks=self.settings["ks"])
        figures["marqo"] = marqo.evaluate(grouped_texts, products, titles)
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
            figures["label_queries"][field.name] = labels.retrieve(field, embeddings, images, owners=products.owners)
            figures["zero_shot"][field.name] = labels.classify(field, embeddings, images, owners=products.owners)
        return figures, details

    def _further_protocols(self, texts: GroupedEmbeddings, products: GroupedEmbeddings) -> dict[str, Any]:
        """Returns the figures of `pairs`, `single` and `image_to_image`, and of each catalogue of a mixture."""
        queries, ks, towers = self.queries, self.settings["ks"], self.towers
        owners = queries.caption_products
        # Captions of the same tokens have the same embedding, whatever else they say.
        tokens = text.encode(towers.tokenizer, queries.captions, towers.preprocess.context_length)
        keys = np.unique(tokens, axis=0, return_inverse=True)[1].reshape(-1)
        roles = [role for product in queries.products for role in product.roles or [""] * len(product.pictures)]
        figures = {
            "pairs": pairs.evaluate(texts, products, owners, keys, ks=ks, progress=_progress("ranking pairs")),
            "single": single.evaluate(texts, products, owners, ks=ks, progress=_progress("ranking draws", "draw")),
            "image_to_image": image_to_image.evaluate(products, roles, ks=ks, progress=_progress("ranking pictures")),
        }
        sources = np.array([product.source for product in queries.products])
        if not sources.any():
            return figures
        by_source = {
            str(name): self._of_source(np.flatnonzero(sources == name), texts, products, keys)
            for name in np.unique(sources)
        }
        return figures | {"sources": by_source, "mean_of_sources": _mean(list(by_source.values()), ks)}

    def _of_source(
        self, members: np.ndarray, texts: GroupedEmbeddings, products: GroupedEmbeddings, keys: np.ndarray
    ) -> dict[str, Any]:
        """Returns the figures of `groups` and `pairs` among the products of one catalogue, or why there are none."""
        owners, ks = self.queries.caption_products, self.settings["ks"]
        own = np.flatnonzero(np.isin(owners, members))
        shown, asked = products.take(members), texts.take(own)
        categories = [self.queries.products[owner].category for owner in owners[own]]
        try:
            result, _ = protocols.evaluate(asked, shown, categories, ks=ks, trial_size=self.settings["trial_size"])
        except UserError as error:
            return {"reason": str(error)}
        return {
            **result,
            "pairs": pairs.evaluate(asked, shown, np.searchsorted(members, owners[own]), keys[own], ks=ks),
        }


def _progress(description: str, unit: str = "block") -> Callable[[Iterable], Iterable]:
    return lambda blocks: bar(blocks, desc=description, unit=unit, leave=False)


def _mean(parts: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns protocol -> direction -> hit@k: the mean of the catalogues, each of which counts the same."""
    result: dict[str, dict[str, dict[str, float]]] = {"groups": {}, "pairs": {}}
    for protocol, by_direction in result.items():
        for direction in DIRECTIONS:
            found = [part if protocol == "groups" else part.get("pairs", {}) for part in parts]
            found = [one[direction] for one in found if direction in one]
            if found:
                hits = [f"hit@{k}" for k in ks]
                by_direction[direction] = {hit: float(np.mean([one[hit]["value"] for one in found])) for hit in hits}
    return result


@dataclass(frozen=True)
class EvaluatedRun:
    """A workdir and the configuration to evaluate it with.

    Attributes:
      workdir: the folder of the run.
      config: the configuration, with overrides applied.
      fingerprint: the fingerprint of the workdir's own configuration.
      command: the command line of this evaluation, without --step and --parameters.
      trained_by: other workdirs whose training products are left out too.
    """

    workdir: Path
    config: Config
    fingerprint: str
    command: str
    trained_by: tuple[Path, ...] = ()


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
    loaded = load_checkpoint(run.config, run.workdir, step, parameters=parameters, trained_by=run.trained_by, say=say)
    with jax.set_mesh(loaded.towers.mesh):
        evaluator = Evaluator(loaded.towers, loaded.records, run.config, loaded.notes)
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
