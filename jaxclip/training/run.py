"""A whole training run in a workdir: set up or resume, train, evaluate."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation import tables
from jaxclip.evaluation.evaluator import Evaluator, read, results_folder, write
from jaxclip.pipeline import prepared_data
from jaxclip.pipeline.batches import Partners
from jaxclip.pipeline.records import Records
from jaxclip.runtime import distributed
from jaxclip.runtime import mesh as meshes
from jaxclip.towers import sharding
from jaxclip.towers.adapter_base import initial_params, with_base_params
from jaxclip.towers.checkpoints import BASE, BEST_BY, Checkpoints
from jaxclip.towers.state import TrainState, initial_state
from jaxclip.towers.towers import Towers, make_or_load_towers, save_towers, vocabulary_fingerprint
from jaxclip.training import device_resize, inputs, loop, recipe
from jaxclip.training.optimizer import warmup_of
from jaxclip.training.step import compile_step

LOGGED = (BEST_BY, "hit@5", "hit@10", "mrr")
ZERO_SHOT = "zero_shot"
"""Folder under eval/ of what a pretrained checkpoint finds before it is trained."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      signal: that stopped it early, None = it is done.
      step: its last one.
      metrics: its final ones, of the moving average of the parameters where one was kept.
      folder: of metrics.json and report.html.
      raw: metrics of what was averaged, None where nothing was.
      zero_shot: metrics of model.init_from before the first step, None where there is none.
    """

    signal: int | None
    step: int
    metrics: dict[str, Any] | None
    folder: Path
    raw: dict[str, Any] | None = None
    zero_shot: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Run:
    """What is trained and on what: all that can be told to be wrong before anything is written.

    Attributes:
      prepared: the dataset. records: of it, what the towers see. test: what is ranked.
      partners: of the records, for incorrect pairs.
      steps: of the whole run.
      canvas: side of the squares in which the device gets unscaled pictures; 0 = the host scales them.
    """

    prepared: Path
    records: Records
    test: Records
    partners: Partners | None
    towers: Towers
    steps: int
    canvas: int


def train(
    config: Config,
    workdir: Path,
    *,
    save_config: Callable[[], None],
    load_config: Callable[[Path], Config],
    fingerprint: str,
    say: Say,
    profiled: range = range(0),
) -> Outcome:
    """Trains the towers in a workdir, from its newest checkpoint where it has one, and evaluates them at the end.

    `load_config` reads the configuration of another workdir, whose towers incorrect pairs may be mined with. Writes
    preprocess.json, tokenizer/, sharding.txt, checkpoints/, metrics.jsonl, tensorboard/ and eval/ into the workdir,
    and a trace of the `profiled` steps into its tensorboard/.

    Raises:
      UserError: bad data, a full disk, a loss that is not finite.
    """
    run = _set_up(config, workdir, load_config, say)
    towers = run.towers
    beside = {"data_fingerprint": prepared_data.data_fingerprint(run.prepared), "config_fingerprint": fingerprint}
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, stored=towers.stored)
    distributed.check_identical(
        "run",
        {
            "data fingerprint": beside["data_fingerprint"],
            "squares of unscaled pictures": run.canvas,
            "vocabulary": vocabulary_fingerprint(towers.tokenizer),
            "checkpoints in the workdir": checkpoints.steps(),
        },
        "All need the same prepared dataset and a workdir that they share",
    )
    meshes.open_collectives(towers.mesh)
    with jax.set_mesh(towers.mesh):
        state, beside = _start(config, towers, checkpoints, beside, say)
        if distributed.is_primary():
            save_config()
            _tell_sharding(towers, workdir, say)
        save_towers(towers, workdir)
        evaluator = Evaluator(towers, run.test, config)
        if config.model.init_from and not int(state.step):
            _rank_untrained(config, workdir, evaluator, state, beside, say)
        stopped = None
        if int(state.step) < run.steps:
            state, stopped = _train(config, workdir, run, state, checkpoints, beside, evaluator, profiled, say)
    checkpoints.close()
    folder = workdir / "eval" / config.data.split
    if stopped is not None:
        return Outcome(stopped, int(state.step), None, folder)
    with jax.set_mesh(towers.mesh):
        results = evaluator.complete_state(state)
    return _written(workdir, folder, results, evaluator, int(state.step), beside)


def _set_up(config: Config, workdir: Path, load_config: Callable[[Path], Config], say: Say) -> _Run:
    prepared = prepared_data.prepared_dataset(config, whole=False, say=say)
    records, _ = prepared_data.training_records(config, prepared)
    test = Records(prepared, config.data.split)
    steps = recipe.number_of_steps(config, records)
    towers = make_or_load_towers(config, workdir, records, steps)
    given, warmup = config.optimizer.warmup_steps, warmup_of(config.optimizer.warmup_steps, steps)
    if warmup < given:
        say(f"optimizer.warmup_steps = {given} is more than half of the {steps} steps of this run: it takes {warmup}")
    recipe.abstract_batch(config, towers)
    partners = _partners(config, prepared, records, load_config, say)
    canvas = device_resize.canvas_of(
        config.data.resize_on,
        towers.preprocess,
        config.augmentation,
        records.largest_side,
        prepared=str(prepared),
    )
    if canvas:
        say(f"training pictures are scaled on the device, which gets them in squares of {canvas} pixels")
    return _Run(prepared, records, test, partners, towers, steps, canvas)


def _written(workdir, folder, results, evaluator, step, beside) -> Outcome:
    """Returns the outcome of a run that is done, having written what was found with each of its parameters."""
    written = {}
    for which, result in results.items():
        place = results_folder(folder, which, averaged=len(results) > 1)
        provenance = beside | {"parameters": which}
        written[which] = write(place, result, evaluator, workdir=workdir, step=step, provenance=provenance)
    metrics, raw = written.get("ema", written["raw"]), written["raw"] if "ema" in written else None
    return Outcome(None, step, metrics, folder, raw, read(workdir / "eval" / ZERO_SHOT))


def _rank_untrained(config, workdir, evaluator, state, beside, say):
    say(f"ranking with {config.model.init_from} as it is")
    result, before = evaluator.rank(state.params), workdir / "eval" / ZERO_SHOT
    about = beside | {"parameters": "raw"}
    zero_shot = write(before, result, evaluator, workdir=workdir, step=0, provenance=about)
    say(tables.headline(zero_shot))


def _tell_sharding(towers: Towers, workdir: Path, say: Say) -> None:
    table = sharding.sharding_table(towers.abstract.params, towers.mesh)
    (workdir / "sharding.txt").write_text(table + "\n")
    if towers.mesh.size > 1:
        say(table)


def _start(
    config: Config, towers: Towers, checkpoints: Checkpoints, beside: dict[str, Any], say: Say
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state to go on from and what is to be saved beside it."""
    restored = checkpoints.restore_latest(towers.abstract, say)
    if restored is None:
        params = {}
        if config.model.init_from:
            say(f"beginning from {config.model.init_from}")
            params, about = initial_params(config, towers)
            beside |= {BASE: about} if towers.config.lora else {}
        start = initial_state(
            towers.config, towers.optimizer, towers.abstract, towers.trainable, seed=config.seed, base=params
        )
        return start, beside
    state, saved = restored
    state = state._replace(params=with_base_params(state.params, config, towers, saved))
    if saved["data_fingerprint"] != beside["data_fingerprint"]:
        raise UserError(
            f"{checkpoints.folder} was trained on other data (fingerprint {saved['data_fingerprint']}, now "
            f"{beside['data_fingerprint']}): restore the catalogue or take another --workdir"
        )
    say(f"resuming from step {int(state.step)} of {checkpoints.folder}")
    return state, {**saved, **beside}


def _partners(
    config: Config, prepared: Path, records: Records, load_config: Callable[[Path], Config], say: Say
) -> Partners | None:
    if config.loss.name != "incorrect_pairs":
        return None
    from jaxclip.preparation import mining  # with scikit-learn, which nothing else here needs

    pairs = mining.find_or_mine(config, prepared, load_config=load_config, say=say)
    return Partners(pairs.partner, pairs.similarity).among(records.numbers)


def _train(config, workdir, run, state, checkpoints, beside, evaluator, profiled, say):
    towers, canvas, first = run.towers, run.canvas, int(state.step)
    step = recipe.train_step(config, towers)
    device = jax.devices()[0].device_kind
    compiled_in = jax.config.jax_compilation_cache_dir
    say(
        f"compiling the step of {config.batch_size} pairs for {jax.device_count()} device(s) of kind {device}"
        + (f", or taking it from {compiled_in}" if compiled_in else "")
    )
    compiled, flops = compile_step(step, towers.abstract, recipe.abstract_batch(config, towers))
    scale = device_resize.make_device_resize(towers.preprocess, towers.mesh, canvas)
    batches, place = inputs.device_batches(
        config, towers, run.records, run.partners, first=first, last=run.steps, canvas=canvas
    )

    def evaluate(state: TrainState) -> dict[str, float]:
        return {
            f"{'ema/' if which == 'ema' else ''}{name}": metrics["text_to_image"][name]["value"]
            for which, (metrics, _) in evaluator.rank_state(state).items()
            for name in LOGGED
            if name in metrics["text_to_image"]
        }

    return loop.train(
        config,
        workdir,
        state,
        lambda state, batch: compiled(state, scale(batch)),
        batches,
        place,
        steps=run.steps,
        flops=flops,
        checkpoints=checkpoints,
        beside=beside,
        evaluate=evaluate,
        profiled=profiled,
    )
