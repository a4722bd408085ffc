"""A run of a re-ranker in a workdir: sets up or resumes, trains, and evaluates both stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip import config as configs
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation import pairs, protocols
from jaxclip.evaluation.evaluator import EvaluatedRun
from jaxclip.evaluation.metrics_file import settings, write
from jaxclip.evaluation.protocols import GroupedEmbeddings, Result
from jaxclip.evaluation.queries import Queries
from jaxclip.pipeline import prepared_data, trained_groups
from jaxclip.pipeline.records import Records
from jaxclip.ranking.candidates import Candidates
from jaxclip.reranking.data import (
    Vocabulary,
    embedded,
    find_first_stage,
    find_querybank,
    find_vocabulary,
    retrieve,
    save_first_stage,
    training_records,
    with_features,
)
from jaxclip.reranking.first_stage import FirstStage, Split
from jaxclip.reranking.reranker import (
    Reranker,
    Scorer,
    Tables,
    batch_rows,
    contrastive_tables,
    make_recipe,
    make_reranker,
    make_tables,
)
from jaxclip.runtime import compiler, distributed
from jaxclip.runtime import mesh as meshes
from jaxclip.runtime.flops import model_flops
from jaxclip.towers.checkpoints import Checkpoints, resolve_step
from jaxclip.towers.load import chosen_on
from jaxclip.towers.params import Params
from jaxclip.training import loop
from jaxclip.training.recipe import Recipe, model_seconds
from jaxclip.training.run import Outcome, begin_or_resume, cadence, logged_metrics
from jaxclip.training.setup import Say
from jaxclip.training.state import TrainState, initial_state
from jaxclip.training.step import compile_step


class RerankEvaluator:
    """Evaluates a re-ranker on one split, which is embedded once.

    Attributes:
      records: the records of the split.
      queries: the captions and products of the split.
      towers: the towers of the first stage.
      split: the split as embedded by the first stage, with its features.
      settings: see `metrics_file.settings`.
      notes: sentences that must be shown with the metrics.
      last: result of the last evaluation; None before the first one.
    """

    def __init__(
        self,
        config: Config,
        stage: FirstStage,
        prepared: Path,
        workdir: Path,
        records: Records,
        notes: Sequence[str] = (),
    ):
        self.records, self.notes = records, list(notes)
        bank = find_querybank(config, stage, workdir)
        split = embedded(config, stage, prepared, self.records)
        self.split = with_features(split, stage, bank, find_vocabulary(split, workdir))
        products = [product for product, _ in self.records.products()]
        self.queries = Queries(products, split.groups, split.picture_owners, split.captions.tolist(), split.owners)
        self.towers = stage.towers
        self.settings = settings(config)
        self.last: Result | None = None
        self._config, self._scorer = config, None

    def rank(self, model: Reranker, params: Params) -> Result:
        """Returns the metrics and the rankings of the split with these parameters (see `protocols.evaluate`)."""

        def score(candidates: Candidates) -> np.ndarray:
            if self._scorer is None:
                self._scorer = Scorer(model, self.split, candidates, batch_size=self._config.evaluation.batch_size)
            return self._scorer(params)

        products = self.queries.products
        self.last = protocols.evaluate(
            *self._grouped,
            [products[owner].category for owner in self.split.owners],
            ks=self.settings["ks"],
            second_stage=score,
            candidates=self._config.rerank.candidates,
        )
        return self.last

    def complete(self, model: Reranker, params: Params) -> Result:
        """Returns the latest result of `rank`, extended by `pairs`; runs `rank` if there is none.

        The latest result must be of the same parameters. The protocols that rank other galleries or other queries than
        the re-ranker has candidates for say so as their "reason".
        """
        figures, details = self.last or self.rank(model, params)
        split = self.split
        by_pairs = pairs.evaluate_reranked(
            *self._grouped,
            split.owners,
            split.captions,
            lambda candidates: self._scorer.among(candidates)(params),
            ks=self.settings["ks"],
            candidates=self._config.rerank.candidates,
        )
        left_out = ["single", "image_to_image", *["judged"] * bool(self._config.data.queries)]
        reasons = {name: {"reason": f"its queries {protocols.BY_EMBEDDINGS}"} for name in left_out}
        return {**figures, "pairs": by_pairs, **reasons}, details

    @property
    def _grouped(self) -> tuple[GroupedEmbeddings, GroupedEmbeddings]:
        """The captions and the products of the split."""
        split = self.split
        texts = GroupedEmbeddings(split.queries, split.groups[split.owners])
        return texts, GroupedEmbeddings(split.images, split.groups, split.picture_owners)


@dataclass(frozen=True)
class _TrainingLists:
    """The training lists: captions of products that the towers were not trained on, with their candidates.

    Attributes:
      split: the products and their captions.
      vocabulary: the attribute values of the features.
      candidates: the candidates of every caption.
      queries: (N,) indices of the captions whose candidates include a relevant and a non-relevant product; nothing can
        be learned from other lists.
    """

    split: Split
    vocabulary: Vocabulary
    candidates: Candidates
    queries: np.ndarray

    def tables(self, config: Config, model: Reranker) -> Tables:
        """Returns the tables that a training step reads, replicated on every device."""
        tables = make_tables(self.split, self.candidates, model, self.queries)
        if config.rerank.loss == "contrastive":
            tables |= contrastive_tables(self.split, model, self.queries)
        return tables


def train_reranker(config: Config, workdir: Path, *, say: Say, profiled: range = range(0)) -> Outcome:
    """Trains the re-ranker of a workdir, from its newest checkpoint if there is one, and returns the outcome.

    A run that is not stopped by a signal is evaluated at the end. Writes config.json, first_stage.json, querybank.npy,
    attributes.json, checkpoints/, metrics.jsonl, tensorboard/ and eval/ to the workdir; the trace of the `profiled`
    steps is written to tensorboard/.

    Raises:
      UserError: there are several processes, the first stage differs from the one in first_stage.json, the towers were
        trained on the products, the batch is larger than the number of lists, the disk is full, or the loss is not
        finite.
    """
    distributed.require_one_process("a re-ranker")
    stage = find_first_stage(config, workdir)
    prepared = prepared_data.prepared_dataset(config, whole=False, say=say)
    say(f"re-ranking step {stage.step} of {stage.workdir} ({stage.fingerprint})")
    bank = find_querybank(config, stage, workdir)
    records = training_records(config, stage, prepared)
    trained = trained_groups.known_groups(config, workdir, prepared, records, say)
    trained = np.union1d(trained, trained_groups.of_runs([stage.workdir], say))
    test, notes, validation = trained_groups.evaluated_records(config, prepared, trained, say)
    lists = _training_lists(config, stage, prepared, records, bank, workdir, say)
    count = len(lists.queries)
    steps = config.steps or max(1, round(config.epochs * count / config.batch_size))
    model = make_reranker(config, lists.split, mesh=stage.towers.mesh, logit_scale=stage.logit_scale)
    recipe = make_recipe(config, model, steps)
    metadata = {
        "data_fingerprint": prepared_data.data_fingerprint(prepared),
        "config_fingerprint": configs.fingerprint(config),
        "first_stage_fingerprint": stage.fingerprint,
        "parameters": "raw",
    }
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    with jax.set_mesh(model.mesh):
        begin = partial(_begin, config, model, recipe)
        state, metadata, _ = begin_or_resume(recipe, checkpoints, metadata, begin, say)
        configs.save_config(config, workdir)
        trained_groups.write(workdir, trained)
        save_first_stage(stage, bank, lists.vocabulary, workdir)
        evaluator = RerankEvaluator(config, stage, prepared, workdir, test, notes)
        chooser = evaluator
        if validation not in (None, test):
            chooser = RerankEvaluator(config, stage, prepared, workdir, validation)
        stopped = None
        if int(state.step) < steps:
            step, seconds, place = _compile(config, model, recipe, lists.tables(config, model), say)
            run = loop.Run(
                workdir=workdir,
                state=state,
                step=step,
                batches=batch_rows(count, config.batch_size, config.seed, range(int(state.step), steps)),
                place=place,
                batch_size=config.batch_size,
                model_seconds=seconds,
                cadence=cadence(config, steps),
                checkpoints=checkpoints,
                metadata=metadata,
                evaluate=lambda state: logged_metrics(
                    {"raw": chooser.rank(model, state.params)}, chosen_by=validation is not None
                ),
                profiled=profiled,
            )
            state, stopped = loop.train(run)
        checkpoints.close()
        folder = workdir / "eval" / config.data.split
        if stopped is not None:
            return Outcome(stopped, int(state.step), None, folder)
        result, step = evaluator.complete(model, state.params), int(state.step)
        metrics = write(folder, result, evaluator, workdir=workdir, step=step, provenance=metadata)
    return Outcome(None, step, metrics, folder)


def _training_lists(
    config: Config, stage: FirstStage, prepared: Path, records: Records, bank: np.ndarray, workdir: Path, say: Say
) -> _TrainingLists:
    split = embedded(config, stage, prepared, records, wordings=config.rerank.wordings)
    vocabulary = find_vocabulary(split, workdir)
    split = with_features(split, stage, bank, vocabulary)
    candidates = retrieve(config, split)
    queries = np.flatnonzero(candidates.found & ~candidates.relevant.all(axis=1))
    say(
        f"{len(split.groups):,} products that the towers have not seen, {len(split.queries):,} queries, of which "
        f"{len(queries):,} have both answers and other products among their {candidates.items.shape[1]} candidates"
    )
    if len(queries) < config.batch_size:
        raise UserError(
            f"config.batch_size = {config.batch_size} is more than the {len(queries)} lists to train on: "
            "use a smaller batch"
        )
    return _TrainingLists(split, vocabulary, candidates, queries)


def _begin(config: Config, model: Reranker, recipe: Recipe) -> tuple[TrainState, dict[str, Any]]:
    state = initial_state(
        model.config, recipe.optimizer, recipe.state, model.trainable, seed=config.seed, model=model.model
    )
    return state, {}


def _compile(
    config: Config, model: Reranker, recipe: Recipe, tables: Tables, say: Say
) -> tuple[Callable, float | None, Callable]:
    """Returns the compiled step, the seconds of its FLOPs at the devices' peak, and a function that places a batch.

    A batch is given as indices of rows. The seconds are None if the peak is unknown.
    """
    for line in compiler.report():
        say(line)
    say(f"compiling the step of {config.batch_size} lists of {tables['items'].shape[1]} candidates")
    sharding = meshes.batch_sharding(model.mesh)
    meshes.check_divides(model.mesh, "batch_size", config.batch_size)

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    rows = jax.ShapeDtypeStruct((config.batch_size,), np.int32, sharding=sharding)
    batch = {"rows": rows, **jax.tree.map(shape, tables)}
    compiled = compile_step(recipe.step, recipe.state, batch)
    seconds = model_seconds(lambda: model_flops(jax.make_jaxpr(recipe.step)(recipe.state, batch)), "float32")
    return compiled, seconds, lambda rows: {"rows": jax.device_put(rows, sharding), **tables}


def evaluate_reranker(
    run: EvaluatedRun, step: str, folder: Path, *, parameters: str = "", say: Say
) -> tuple[dict[str, Any], Path]:
    """Evaluates a checkpoint of a re-ranker and returns (metrics of both stages, the folder with the results).

    Args:
      run: the re-ranker's workdir and its configuration.
      step: "latest", "best" or the number of a step.
      folder: folder to write the results to.
      parameters: "" or "raw"; a re-ranker has no moving average.
      say: receives progress messages.

    Raises:
      UserError: there is no such checkpoint, the first stage is not the one that the re-ranker was trained on, there
        are several processes, or `parameters` is "ema".
    """
    config, workdir = run.config, run.workdir
    distributed.require_one_process("a re-ranker")
    if parameters == "ema":
        raise UserError(f"{workdir} is a re-ranker, which keeps no moving average: leave --parameters out")
    checkpoints = Checkpoints(workdir, read_only=True)
    number = resolve_step(step, checkpoints)
    stage = find_first_stage(config, workdir)
    prepared = prepared_data.prepared_dataset(config, say=say)
    trained = trained_groups.of_runs([workdir, stage.workdir, *run.trained_by], say)
    records, notes = trained_groups.unseen_records(prepared, config.data.split, trained, say)
    notes += chosen_on(workdir, step, config, say)
    evaluator = RerankEvaluator(config, stage, prepared, workdir, records, notes)
    model = make_reranker(config, evaluator.split, mesh=stage.towers.mesh, logit_scale=stage.logit_scale)
    provenance = {
        "parameters": "raw",
        "config_fingerprint": run.fingerprint,
        "data_fingerprint": prepared_data.data_fingerprint(prepared),
        "first_stage_fingerprint": stage.fingerprint,
    }
    with jax.set_mesh(model.mesh):
        params = checkpoints.restore_params(model.shapes, number)
        result = evaluator.complete(model, params)
    metrics = write(folder, result, evaluator, workdir=workdir, step=number, provenance=provenance, command=run.command)
    return metrics, folder
