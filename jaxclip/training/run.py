"""A complete training run of towers in a workdir: set up or resume, train, evaluate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxclip import config as configs
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation import tables
from jaxclip.evaluation.evaluator import Evaluator
from jaxclip.evaluation.metrics_file import read, results_folder, write
from jaxclip.pipeline import prepared_data, trained_groups
from jaxclip.runtime import compiler, distributed
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.adapter_base import initial_params, with_base_params
from jaxclip.towers.checkpoints import BASE, BEST_BY, Checkpoints
from jaxclip.towers.sharding import sharding_table
from jaxclip.towers.towers import Towers, save_towers, vocabulary_fingerprint
from jaxclip.training import device_resize, inputs, loop
from jaxclip.training.recipe import (
    Recipe,
    abstract_batch,
    make_recipe,
    model_seconds,
    step_model_flops,
)
from jaxclip.training.setup import Say, Setup, attention_of, set_up
from jaxclip.training.state import TrainState, initial_state
from jaxclip.training.step import Batch, Metrics, compile_step

LOGGED = (BEST_BY, "hit@5", "hit@10", "mrr")
"""Text-to-image metrics that are logged after each evaluation."""
ZERO_SHOT = "zero_shot"
"""Folder in eval/ with the metrics of model.init_from before training."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      signal: signal that stopped it early; None if it reached its last step.
      step: last step taken.
      metrics: final metrics, of the moving average if there is one; None if the run was stopped early.
      folder: folder of the metrics.json and report.html of `metrics`.
      raw: final metrics of the parameters without averaging; None if there is no moving average.
      zero_shot: metrics of model.init_from before training; None if the initial parameters were random.

    `raw` and `zero_shot` are also None if the run was stopped early.
    """

    signal: int | None
    step: int
    metrics: dict[str, Any] | None
    folder: Path
    raw: dict[str, Any] | None = None
    zero_shot: dict[str, Any] | None = None


def train_towers(config: Config, workdir: Path, *, say: Say, profiled: range = range(0)) -> Outcome:
    """Trains the towers of a workdir, from its newest intact checkpoint if it has one.

    Evaluates them before training if they come from model.init_from, and after it unless a signal stopped the run.
    Writes config.json, preprocess.json, towers.json, tokenizer/, sharding.txt, checkpoints/, metrics.jsonl,
    tensorboard/ and eval/ into the workdir, and the trace of the `profiled` steps into tensorboard/.

    Raises:
      UserError: the configuration or the data is invalid, the disk is full, or the loss or a gradient is not finite.
    """
    setup = set_up(config, workdir, say)
    towers = setup.towers
    recipe = make_recipe(config, towers, setup.steps)
    metadata = _metadata(config, setup)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, stored=towers.stored)
    distributed.check_identical(
        "run",
        {
            "data fingerprint": metadata["data_fingerprint"],
            "side of the squares of unscaled pictures": setup.canvas,
            "judged queries": metadata.get("queries_fingerprint"),
            "vocabulary": vocabulary_fingerprint(towers.tokenizer),
            "steps of checkpoints in the workdir": checkpoints.steps(),
        },
        "All processes need the same prepared dataset and a shared workdir",
    )
    meshes.open_collectives(towers.mesh)
    with jax.set_mesh(towers.mesh):
        begin = partial(_begin, config, towers, recipe, say)
        state, metadata, resumed = begin_or_resume(recipe, checkpoints, metadata, begin, say)
        if resumed:
            state = state._replace(params=with_base_params(state.params, config, towers, metadata))
        if distributed.is_primary():
            configs.save_config(config, workdir)
            trained_groups.write(workdir, setup.trained)
            _write_sharding(towers, workdir, say)
        save_towers(towers, workdir)
        evaluator = Evaluator(towers, setup.test, config, setup.notes)
        evaluate = _evaluations(config, setup, evaluator)
        if config.model.init_from and not int(state.step):
            _evaluate_before_training(config, workdir, evaluator, state, metadata, say)
        stopped = None
        if int(state.step) < setup.steps:
            step, batches, place = _compile(config, setup, recipe, range(int(state.step), setup.steps), say)
            run = loop.Run(
                workdir=workdir,
                state=state,
                step=step,
                batches=batches,
                place=place,
                batch_size=config.batch_size,
                model_seconds=model_seconds(lambda: step_model_flops(config, towers), config.model.dtype),
                cadence=cadence(config, setup.steps),
                checkpoints=checkpoints,
                metadata=metadata,
                evaluate=evaluate,
                profiled=profiled,
            )
            state, stopped = loop.train(run)
    checkpoints.close()
    folder = workdir / "eval" / config.data.split
    if stopped is not None:
        return Outcome(stopped, int(state.step), None, folder)
    with jax.set_mesh(towers.mesh):
        results = evaluator.complete_all(state.parameters())
    return _write_results(workdir, folder, results, evaluator, int(state.step), metadata)


def _metadata(config: Config, setup: Setup) -> dict[str, Any]:
    """Returns the metadata of the run's checkpoints, which say what it is trained on."""
    fingerprints = {
        "data_fingerprint": prepared_data.data_fingerprint(setup.prepared),
        "config_fingerprint": configs.fingerprint(config),
    }
    return fingerprints | ({"queries_fingerprint": setup.judged.fingerprint()} if setup.judged is not None else {})


def _evaluations(config: Config, setup: Setup, evaluator: Evaluator) -> Callable[[TrainState], dict[str, float]]:
    """Returns the function that ranks a state during training: on validation, or without it with `evaluator`."""
    chooser = evaluator
    if setup.validation not in (None, setup.test):
        chooser = Evaluator(setup.towers, setup.validation, config, completed=False)
    return lambda state: logged_metrics(chooser.rank_all(state.parameters()), chosen_by=setup.validation is not None)


def begin_or_resume(
    recipe: Recipe,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    begin: Callable[[], tuple[TrainState, dict[str, Any]]],
    say: Say,
) -> tuple[TrainState, dict[str, Any], bool]:
    """Returns the state to train from, the metadata to save with it, and whether it was restored from a checkpoint.

    Args:
      recipe: `recipe.state` has the shapes and shardings of the state.
      checkpoints: checkpoints of the workdir.
      metadata: metadata of this run, with its data_fingerprint and, if it trains on queries, their
        queries_fingerprint.
      begin: returns the state of step 0 and additional metadata.
      say: prints a line.

    Raises:
      UserError: the checkpoint was trained on other data; or as `Checkpoints.restore_latest`.
    """
    restored = checkpoints.restore_latest(recipe.state, say)
    if restored is None:
        state, added = begin()
        return state, metadata | added, False
    state, saved = restored
    for name, source in (("data_fingerprint", "the catalogue"), ("queries_fingerprint", "the file data.queries")):
        if saved.get(name) != metadata.get(name):
            raise UserError(
                f"{checkpoints.folder} was trained on other data ({name} {saved.get(name)}, now {metadata.get(name)}): "
                f"restore {source} or use another --workdir"
            )
    say(f"resuming from step {int(state.step)} of {checkpoints.folder}")
    return state, {**saved, **metadata}, True


def cadence(config: Config, steps: int) -> loop.Cadence:
    """Returns the configured cadence of a run that is `steps` long."""
    return loop.Cadence(steps, config.log_every, config.evaluation.every, config.checkpoint.every)


def logged_metrics(results: Mapping[str, Any], *, chosen_by: bool) -> dict[str, float]:
    """Returns the metrics in LOGGED by name, with the prefix "ema/" for the moving average.

    Args:
      results: "raw" and, with a moving average, "ema" -> (metrics, rankings) of these parameters.
      chosen_by: whether the best checkpoint may be chosen by them; if not, they also have the prefix "test/".
    """
    prefix = "" if chosen_by else "test/"
    return {
        f"{prefix}{'ema/' if parameters == 'ema' else ''}{name}": metrics["text_to_image"][name]["value"]
        for parameters, (metrics, _) in results.items()
        for name in LOGGED
        if name in metrics["text_to_image"]
    }


def _begin(config: Config, towers: Towers, recipe: Recipe, say: Say) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state of step 0, and metadata that names the base checkpoint if there are adapters."""
    params, metadata = {}, {}
    if config.model.init_from:
        say(f"beginning from {config.model.init_from}")
        params, base = initial_params(config, towers)
        metadata = {BASE: base} if towers.config.lora else {}
    state = initial_state(
        towers.config, recipe.optimizer, recipe.state, towers.trainable, seed=config.seed, base=params
    )
    return state, metadata


def _compile(config: Config, setup: Setup, recipe: Recipe, steps: range, say: Say) -> tuple[Callable, Any, Callable]:
    """Returns the compiled step, the host batches, and the function that places a host batch."""
    towers = setup.towers
    for line in compiler.report():
        say(line)
    if not compiler.on_cpu():
        say(f"attention by {attention_of(towers)}")
    cache = jax.config.jax_compilation_cache_dir
    say(
        f"compiling the step of {config.batch_size} pairs for {jax.device_count()} device(s) of kind "
        f"{jax.devices()[0].device_kind}" + (f", or taking it from {cache}" if cache else "")
    )
    compiled = compile_step(recipe.step, recipe.state, abstract_batch(config, towers))
    resize = device_resize.make_device_resize(towers.preprocess, towers.mesh, setup.canvas)
    captions = inputs.caption_tokens(config, towers, setup.records, setup.prepared, steps=setup.steps, say=say)
    placed = {"captions": captions, "steps": steps, "canvas": setup.canvas, "judged": setup.judged}
    batches, place = inputs.device_batches(config, towers, setup.records, setup.partners, **placed)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = compiled(state, resize(batch))
        return state, metrics | {"bytes_per_pair": inputs.bytes_per_pair(batch, config.batch_size)}

    return step, batches, place


def _write_results(
    workdir: Path, folder: Path, results: Mapping[str, Any], evaluator: Evaluator, step: int, metadata: dict[str, Any]
) -> Outcome:
    """Writes the results of each set of parameters, and returns the outcome of the finished run."""
    written = {}
    for parameters, result in results.items():
        results_path = results_folder(folder, parameters, averaged=len(results) > 1)
        provenance = metadata | {"parameters": parameters}
        written[parameters] = write(results_path, result, evaluator, workdir=workdir, step=step, provenance=provenance)
    metrics, raw = written.get("ema", written["raw"]), written["raw"] if "ema" in written else None
    return Outcome(None, step, metrics, folder, raw, read(workdir / "eval" / ZERO_SHOT))


def _evaluate_before_training(
    config: Config, workdir: Path, evaluator: Evaluator, state: TrainState, metadata: dict[str, Any], say: Say
) -> None:
    say(f"evaluating {config.model.init_from} before training")
    result, folder = evaluator.complete(state.params), workdir / "eval" / ZERO_SHOT
    provenance = metadata | {"parameters": "raw"}
    metrics = write(folder, result, evaluator, workdir=workdir, step=0, provenance=provenance)
    say(tables.headline(metrics))


def _write_sharding(towers: Towers, workdir: Path, say: Say) -> None:
    table = sharding_table(towers.shapes, towers.mesh)
    (workdir / "sharding.txt").write_text(table + "\n")
    if towers.mesh.size > 1:
        say(table)
