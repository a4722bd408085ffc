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
from jaxclip.models.attention import resolve
from jaxclip.pipeline import prepared_data
from jaxclip.pipeline.batches import Partners
from jaxclip.pipeline.records import Records
from jaxclip.runtime import compiler, distributed
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.adapter_base import initial_params, with_base_params
from jaxclip.towers.checkpoints import BASE, BEST_BY, Checkpoints
from jaxclip.towers.sharding import sharding_table
from jaxclip.towers.towers import Towers, make_or_load_towers, save_towers, vocabulary_fingerprint
from jaxclip.training import device_resize, inputs, loop
from jaxclip.training.optimizer import capped_warmup
from jaxclip.training.recipe import (
    Recipe,
    abstract_batch,
    make_recipe,
    model_seconds,
    number_of_steps,
    step_model_flops,
)
from jaxclip.training.state import TrainState, initial_state
from jaxclip.training.step import Batch, Metrics, compile_step

LOGGED = (BEST_BY, "hit@5", "hit@10", "mrr")
"""Text-to-image metrics that are logged after each evaluation."""
ZERO_SHOT = "zero_shot"
"""Folder in eval/ with the metrics of model.init_from before training."""
Say = Callable[[str], None]


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


@dataclass(frozen=True)
class _Setup:
    """What a run needs; everything is validated before the workdir is written to.

    Attributes:
      prepared: folder of the prepared dataset.
      records: training records, without products that are held back for a re-ranker.
      test: records that an evaluation ranks.
      partners: incorrect pairs of the training records; None if the loss does not need them.
      towers: towers to train.
      steps: length of the run in steps.
      canvas: side, in pixels, of the squares in which devices receive unscaled pictures; 0 = the host scales them.
    """

    prepared: Path
    records: Records
    test: Records
    partners: Partners | None
    towers: Towers
    steps: int
    canvas: int


def train_towers(config: Config, workdir: Path, *, say: Say, profiled: range = range(0)) -> Outcome:
    """Trains the towers of a workdir, from its newest intact checkpoint if it has one.

    Evaluates them before training if they come from model.init_from, and after it unless a signal stopped the run.
    Writes config.json, preprocess.json, towers.json, tokenizer/, sharding.txt, checkpoints/, metrics.jsonl,
    tensorboard/ and eval/ into the workdir, and the trace of the `profiled` steps into tensorboard/.

    Raises:
      UserError: the configuration or the data is invalid, the disk is full, or the loss or a gradient is not finite.
    """
    setup = _set_up(config, workdir, say)
    towers = setup.towers
    recipe = make_recipe(config, towers, setup.steps)
    metadata = {
        "data_fingerprint": prepared_data.data_fingerprint(setup.prepared),
        "config_fingerprint": configs.fingerprint(config),
    }
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, stored=towers.stored)
    distributed.check_identical(
        "run",
        {
            "data fingerprint": metadata["data_fingerprint"],
            "side of the squares of unscaled pictures": setup.canvas,
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
            _write_sharding(towers, workdir, say)
        save_towers(towers, workdir)
        evaluator = Evaluator(towers, setup.test, config)
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
                evaluate=lambda state: logged_metrics(evaluator.rank_all(state.parameters())),
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
      metadata: metadata of this run, with its data_fingerprint.
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
    if saved["data_fingerprint"] != metadata["data_fingerprint"]:
        raise UserError(
            f"{checkpoints.folder} was trained on other data (fingerprint {saved['data_fingerprint']}, now "
            f"{metadata['data_fingerprint']}): restore the catalogue or use another --workdir"
        )
    say(f"resuming from step {int(state.step)} of {checkpoints.folder}")
    return state, {**saved, **metadata}, True


def cadence(config: Config, steps: int) -> loop.Cadence:
    """Returns the configured cadence of a run that is `steps` long."""
    return loop.Cadence(steps, config.log_every, config.evaluation.every, config.checkpoint.every)


def logged_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics in LOGGED by name, with the prefix "ema/" for the moving average.

    `results`: "raw" and, with a moving average, "ema" -> (metrics, rankings) of these parameters.
    """
    return {
        f"{'ema/' if parameters == 'ema' else ''}{name}": metrics["text_to_image"][name]["value"]
        for parameters, (metrics, _) in results.items()
        for name in LOGGED
        if name in metrics["text_to_image"]
    }


def _set_up(config: Config, workdir: Path, say: Say) -> _Setup:
    prepared = prepared_data.prepared_dataset(config, whole=False, say=say)
    records, _ = prepared_data.training_records(config, prepared)
    test = Records(prepared, config.data.split)
    steps = number_of_steps(config, records)
    towers = make_or_load_towers(config, workdir, records)
    configured, warmup = config.optimizer.warmup_steps, capped_warmup(config.optimizer.warmup_steps, steps)
    if warmup < configured:
        say(f"optimizer.warmup_steps = {configured} is more than half of this run's {steps} steps: {warmup} are used")
    abstract_batch(config, towers)
    _attention(towers)
    partners = _partners(config, prepared, records, say)
    canvas = device_resize.choose_canvas(config.data.resize_on, records, towers.preprocess, config.augmentation)
    if canvas.line:
        say(canvas.line)
    return _Setup(prepared, records, test, partners, towers, steps, canvas.side)


def _attention(towers: Towers) -> str:
    """Returns the implementation of attention in the towers; raises UserError if it does not exist on this machine."""
    blocks = (towers.config.image.transformer, towers.config.text.transformer)
    found = (resolve(x.attention, x.dtype, queries=2, head=x.width // x.heads) for x in blocks)
    return ", ".join(dict.fromkeys(found))


def _partners(config: Config, prepared: Path, records: Records, say: Say) -> Partners | None:
    if config.loss.name != "incorrect_pairs":
        return None
    from jaxclip.preparation import mining  # imports scikit-learn, which only this loss needs

    pairs = mining.find_or_mine(config, prepared, say=say)
    return Partners(pairs.partner, pairs.similarity).take(records.numbers)


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


def _compile(config: Config, setup: _Setup, recipe: Recipe, steps: range, say: Say) -> tuple[Callable, Any, Callable]:
    """Returns the compiled step, the host batches, and the function that places a host batch."""
    towers = setup.towers
    for line in compiler.report():
        say(line)
    if not compiler.on_cpu():
        say(f"attention by {_attention(towers)}")
    cache = jax.config.jax_compilation_cache_dir
    say(
        f"compiling the step of {config.batch_size} pairs for {jax.device_count()} device(s) of kind "
        f"{jax.devices()[0].device_kind}" + (f", or taking it from {cache}" if cache else "")
    )
    compiled = compile_step(recipe.step, recipe.state, abstract_batch(config, towers))
    resize = device_resize.make_device_resize(towers.preprocess, towers.mesh, setup.canvas)
    captions = inputs.caption_tokens(config, towers, setup.records, setup.prepared, steps=setup.steps, say=say)
    batches, place = inputs.device_batches(
        config, towers, setup.records, setup.partners, captions=captions, steps=steps, canvas=setup.canvas
    )

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
    result, folder = evaluator.rank(state.params), workdir / "eval" / ZERO_SHOT
    provenance = metadata | {"parameters": "raw"}
    metrics = write(folder, result, evaluator, workdir=workdir, step=0, provenance=provenance)
    say(tables.headline(metrics))


def _write_sharding(towers: Towers, workdir: Path, say: Say) -> None:
    table = sharding_table(towers.shapes, towers.mesh)
    (workdir / "sharding.txt").write_text(table + "\n")
    if towers.mesh.size > 1:
        say(table)
