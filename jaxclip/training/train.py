"""A whole training run in a workdir: set up or resume, train, evaluate."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxclip.errors import UserError
from jaxclip.pipeline.records import Records
from jaxclip.training import evaluation, loop, setup, writers
from jaxclip.training.checkpoint import BEST_BY, Checkpoints
from jaxclip.training.progress import Progress
from jaxclip.training.setup import Towers
from jaxclip.training.state import TrainState, initial_state
from jaxclip.training.step import make_loss, make_step

if TYPE_CHECKING:
    from jaxclip.config import Config

LOGGED = (BEST_BY, "hit@5", "hit@10", "mrr")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the signal that stopped it early (None = it is done), its last step, its final metrics."""

    signal: int | None
    step: int
    metrics: dict[str, Any] | None
    folder: Path


def train(config: "Config", workdir: Path, *, save_config: Callable[[], None], fingerprint: str, say: Say) -> Outcome:
    """Trains the towers in a workdir, from its newest checkpoint where it has one, and evaluates them at the end.

    Writes preprocess.json, tokenizer/, checkpoints/, metrics.jsonl, tensorboard/ and eval/ into the workdir.

    Raises:
      UserError: bad data, a full disk, a loss that is not finite.
    """
    prepared = setup.prepared_dataset(config, whole=False, say=say)
    train_records, test_records = Records(prepared, "train"), Records(prepared, config.data.split)
    steps = setup.number_of_steps(config, train_records)
    towers = setup.make_or_load_towers(config, workdir, train_records, steps)
    setup.abstract_batch(config, towers)
    beside = {"data_fingerprint": setup.data_fingerprint(prepared), "config_fingerprint": fingerprint}
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    with jax.set_mesh(towers.mesh):
        state, beside = _start(config, towers, checkpoints, beside, say)
        save_config()
        setup.save_towers(towers, workdir)
        evaluator = evaluation.Evaluator(
            towers, test_records, batch_size=config.evaluation.batch_size, workers=config.data.workers
        )
        stopped = None
        if int(state.step) < steps:
            state, stopped = _train(config, workdir, towers, train_records, state, beside, checkpoints, evaluator, say)
    checkpoints.close()
    folder = workdir / "eval" / config.data.split
    if stopped is not None:
        return Outcome(stopped, int(state.step), None, folder)
    with jax.set_mesh(towers.mesh):
        result = evaluator.complete(state.params)
    metrics = evaluation.write(folder, result, evaluator, workdir=workdir, step=int(state.step), fingerprints=beside)
    return Outcome(None, int(state.step), metrics, folder)


def _start(
    config: "Config", towers: Towers, checkpoints: Checkpoints, beside: dict[str, Any], say: Say
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state to go on from and what is to be saved beside it."""
    restored = checkpoints.restore_latest(towers.abstract, say)
    if restored is None:
        return initial_state(towers.config, towers.optimizer, towers.abstract, seed=config.seed), beside
    state, saved = restored
    if saved["data_fingerprint"] != beside["data_fingerprint"]:
        raise UserError(
            f"{checkpoints.folder} was trained on other data (fingerprint {saved['data_fingerprint']}, now "
            f"{beside['data_fingerprint']}): restore the catalogue or take another --workdir"
        )
    say(f"resuming from step {int(state.step)} of {checkpoints.folder}")
    return state, {**saved, **beside}


def _train(config, workdir, towers, records, state, beside, checkpoints, evaluator, say):
    first, steps = int(state.step), setup.number_of_steps(config, records)
    loss = make_loss(
        towers.graph, mask_groups=config.loss.mask_groups, learned_temperature=config.loss.learned_temperature
    )
    step = make_step(loss, towers.optimizer, towers.schedule, seed=config.seed)
    device = jax.devices()[0].device_kind
    say(f"compiling the step of {config.batch_size} pairs for {jax.device_count()} device(s) of kind {device}")
    compiled, flops = loop.compile_step(step, towers.abstract, setup.abstract_batch(config, towers))
    batches, place = setup.device_batches(config, towers, records, first=first, last=steps)
    written = writers.Writers(workdir, first=first)
    progress = Progress(
        first=first, steps=steps, batch_size=config.batch_size, flops=flops, saved=beside.get("progress", {})
    )

    def evaluate(state: TrainState) -> dict[str, float]:
        metrics, _ = evaluator.rank(state.params)
        return {name: metrics["text_to_image"][name]["value"] for name in LOGGED}

    try:
        return loop.run(
            state,
            compiled,
            batches,
            place,
            rhythm=loop.Rhythm(steps, config.log_every, config.evaluation.every, config.checkpoint.every),
            progress=progress,
            writers=written,
            checkpoints=checkpoints,
            beside=beside,
            evaluate=evaluate,
        )
    finally:
        progress.close()
        written.close()
