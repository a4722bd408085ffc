"""A whole run of a second stage in a workdir: set up or resume, train, evaluate beside its first stage."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxclip.errors import UserError
from jaxclip.pipeline.records import Records
from jaxclip.retrieval import protocols, report, second_stage
from jaxclip.training import evaluation, loop, reranking, reranking_data, setup, writers
from jaxclip.training import mesh as meshes
from jaxclip.training.checkpoint import BEST_BY, Checkpoints
from jaxclip.training.first_stage import FirstStage
from jaxclip.training.progress import Progress
from jaxclip.training.reranking import Reranker
from jaxclip.training.state import Params, initial_state
from jaxclip.training.step import make_step
from jaxclip.training.train import Outcome, Say

if TYPE_CHECKING:
    from jaxclip.config import Config

LOGGED = (BEST_BY, "hit@5", "hit@10", "mrr")
PER_QUERY = "per_query.npz"
SHOWN = 4
Load = Callable[[Path], "Config"]


class Evaluator:
    """Re-ranks one split with whatever parameters it is given; embedded and retrieved once."""

    def __init__(self, config: "Config", first: FirstStage, prepared: Path, workdir: Path):
        self.records = Records(prepared, config.data.split)
        bank = reranking_data.find_querybank(config, first, prepared, workdir)
        split = reranking_data.embedded(config, first, prepared, self.records, bank=bank)
        vocabulary = reranking_data.find_vocabulary(split, workdir)
        self.split = reranking_data.with_attributes(split, vocabulary, first.towers.preprocess.caption_template)
        self.candidates = reranking_data.retrieve(config, self.split)
        self.products = [product for product, _ in self.records.products()]
        self.categories = [self.products[owner].category for owner in self.split.owners]
        self._batch_size, self._scorer = config.evaluation.batch_size, None

    def score(self, model: Reranker, params: Params) -> np.ndarray:
        """Returns the second stage's scores of all candidates, (Q, K)."""
        if self._scorer is None:
            self._scorer = reranking.Scorer(model, self.split, self.candidates, batch_size=self._batch_size)
        return self._scorer(params)

    def rank(self, model: Reranker, params: Params) -> tuple[dict, dict]:
        """Returns metrics and per-query values, as `second_stage.evaluate`."""
        return second_stage.evaluate(self.candidates, self.score(model, params), self.categories)


def train(
    config: "Config",
    workdir: Path,
    *,
    load_config: Load,
    save_config: Callable[[], None],
    fingerprint: str,
    say: Say,
) -> Outcome:
    """Trains a second stage in a workdir, from its newest checkpoint where it has one, and evaluates it at the end.

    Writes first_stage.json, querybank.npy, attributes.json, checkpoints/, metrics.jsonl, tensorboard/ and eval/ there.

    Raises:
      UserError: another first stage than the one begun with, products that its towers have seen, a full disk, a loss
        that is not finite.
    """
    first = reranking_data.find_first_stage(config, workdir, load_config)
    prepared = setup.prepared_dataset(config, whole=False, say=say)
    say(f"re-ranking step {first.step} of {first.workdir} ({first.fingerprint})")
    bank = reranking_data.find_querybank(config, first, prepared, workdir)
    split = reranking_data.training_split(config, first, prepared, bank)
    vocabulary = reranking_data.find_vocabulary(split, workdir)
    split = reranking_data.with_attributes(split, vocabulary, first.towers.preprocess.caption_template)
    candidates = reranking_data.retrieve(config, split)
    lists = np.flatnonzero(candidates.found & ~candidates.relevant.all(axis=1))
    say(
        f"{len(split.groups):,} products that the towers have not seen, {len(split.queries):,} queries, of which "
        f"{len(lists):,} have an answer among their {candidates.items.shape[1]} candidates"
    )
    if len(lists) < config.batch_size:
        raise UserError(f"config.batch_size = {config.batch_size} is more than the {len(lists)} lists to train on")
    steps = config.steps or max(1, round(config.epochs * len(lists) / config.batch_size))
    model = reranking.make_reranker(config, first, split, steps)
    beside = {
        "data_fingerprint": setup.data_fingerprint(prepared),
        "config_fingerprint": fingerprint,
        "first_stage": first.fingerprint,
    }
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    with jax.set_mesh(model.mesh):
        restored = checkpoints.restore_latest(model.abstract, say)
        if restored is None:
            state = initial_state(model.config, model.optimizer, model.abstract, seed=config.seed, model=model.model)
        else:
            state, saved = restored
            beside = {**saved, **beside}
            say(f"resuming from step {int(state.step)} of {checkpoints.folder}")
        save_config()
        reranking_data.save_first_stage(first, bank, vocabulary, workdir)
        evaluator = Evaluator(config, first, prepared, workdir)
        stopped = None
        if int(state.step) < steps:
            tables = reranking.make_tables(split, candidates, model, lists)
            state, stopped = _train(
                config, workdir, model, tables, len(lists), steps, state, beside, checkpoints, evaluator, say
            )
        checkpoints.close()
        folder = workdir / "eval" / config.data.split
        if stopped is not None:
            return Outcome(stopped, int(state.step), None, folder)
        metrics = write(
            folder, evaluator, first, model, state.params, workdir=workdir, step=int(state.step), fingerprints=beside
        )
    return Outcome(None, int(state.step), metrics, folder)


def _train(config, workdir, model, tables, lists, steps, state, beside, checkpoints, evaluator, say):
    first = int(state.step)
    loss = reranking.make_loss(
        model, loss=config.rerank.loss, negatives=config.rerank.negatives, sampled=config.rerank.sampled
    )
    step = make_step(loss, model.optimizer, model.schedule, seed=config.seed)
    say(f"compiling the step of {config.batch_size} lists of {tables['items'].shape[1]} candidates")
    where = meshes.batch_sharding(model.mesh)
    if config.batch_size % meshes.rows(model.mesh):
        raise UserError(
            f"config.batch_size = {config.batch_size} is no multiple of mesh data x fsdp = {meshes.rows(model.mesh)}"
        )

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    rows = jax.ShapeDtypeStruct((config.batch_size,), np.int32, sharding=where)
    compiled, flops = loop.compile_step(step, model.abstract, {"rows": rows, **jax.tree.map(shape, tables)})
    written = writers.Writers(workdir, first=first)
    progress = Progress(
        first=first, steps=steps, batch_size=config.batch_size, flops=flops, saved=beside.get("progress", {})
    )

    def evaluate(state):
        metrics, _ = evaluator.rank(model, state.params)
        return {name: metrics["text_to_image"][name]["value"] for name in LOGGED if name in metrics["text_to_image"]}

    try:
        return loop.run(
            state,
            compiled,
            reranking.batch_rows(lists, config.batch_size, config.seed, first=first, last=steps),
            lambda rows: {"rows": jax.device_put(rows, where), **tables},
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


def evaluate_checkpoint(
    config: "Config",
    workdir: Path,
    which: str,
    folder: Path,
    *,
    load_config: Load,
    fingerprint: str,
    say: Say,
) -> dict[str, Any]:
    """Returns the metrics of a re-ranker's checkpoint and of its first stage, written into the folder.

    `which` is "latest", "best" or a step.

    Raises:
      UserError: there is no such checkpoint, or the first stage is another one.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = evaluation.chosen(which, checkpoints)
    first = reranking_data.find_first_stage(config, workdir, load_config)
    prepared = setup.prepared_dataset(config, whole=config.data.split == "all", say=say)
    evaluator = Evaluator(config, first, prepared, workdir)
    model = reranking.make_reranker(config, first, evaluator.split, 1)
    fingerprints = {"config_fingerprint": fingerprint, "data_fingerprint": setup.data_fingerprint(prepared)}
    with jax.set_mesh(model.mesh):
        params = checkpoints.restore_params(model.abstract.params, step)
        return write(folder, evaluator, first, model, params, workdir=workdir, step=step, fingerprints=fingerprints)


def write(
    folder: Path,
    evaluator: Evaluator,
    first: FirstStage,
    model: Reranker,
    params: Params,
    *,
    workdir: Path,
    step: int,
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    """Writes metrics.json, report.html and per_query.npz into the folder; returns what metrics.json holds."""
    split, scores = evaluator.split, evaluator.score(model, params)
    found, per_query = second_stage.evaluate(evaluator.candidates, scores, evaluator.categories)
    groups = split.groups
    towers, _ = protocols.evaluate(
        split.queries, split.features["image"], groups[split.owners], groups, evaluator.categories
    )
    metrics = {
        **towers,
        **found,
        "trials": {"reason": "trials are of the first stage alone: see its own report"},
        "checkpoint_step": step,
        "first_stage_fingerprint": first.fingerprint,
        **{name: fingerprints[name] for name in ("config_fingerprint", "data_fingerprint")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / PER_QUERY,
        **{f"{stage}/{name}": values for stage, of_stage in per_query.items() for name, values in of_stage.items()},
    )
    temporary = folder / "metrics.json.tmp"
    temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(temporary, folder / "metrics.json")
    run = {
        "workdir": workdir.name,
        "step": str(step),
        "first stage": f"{first.workdir}, step {first.step}, {first.fingerprint}",
        "config": metrics["config_fingerprint"],
        "data": metrics["data_fingerprint"],
        "command": f"python -m jaxclip.evaluate --workdir={workdir} --step={step}",
    }
    report.write(
        folder / "report.html",
        metrics,
        title=f"{workdir.name}: {folder.name}, re-ranked",
        run=run,
        queries=_before_and_after(evaluator, scores, per_query),
        curve=writers.read(workdir),
    )
    return metrics


def _before_and_after(evaluator: Evaluator, scores: np.ndarray, per_query: dict) -> list[report.QueryRow]:
    """Returns two rows a query: those that moved up most, those that moved down most, then some drawn at random."""
    split, candidates = evaluator.split, evaluator.candidates
    before, after = (per_query[stage]["best_rank"] for stage in ("first_stage", "text_to_image"))
    by_gain = np.argsort(np.log(after) - np.log(before), kind="stable")
    chosen = {int(query): "improved most" for query in by_gain[:SHOWN] if after[query] < before[query]}
    chosen |= {int(query): "worsened most" for query in by_gain[::-1][:SHOWN] if after[query] > before[query]}
    for query in report.sample_queries(len(before))[: 2 * SHOWN]:
        chosen.setdefault(int(query), "at random")

    def item(number: int, *, relevant: bool, score: float) -> report.Item:
        picture = evaluator.records.picture(number)
        mime = "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg"
        return report.Item(picture, mime, evaluator.products[number].title, relevant, score)

    rows, keys = [], np.where(np.isnan(scores), -np.inf, scores)
    for query, why in chosen.items():
        stages = (("first stage", candidates.scores[query], before), ("re-ranked", keys[query], after))
        for stage, of_stage, ranks in stages:
            best = np.argsort(-of_stage, kind="stable")[:10]
            items = [
                item(
                    int(candidates.items[query, place]),
                    relevant=bool(candidates.relevant[query, place]),
                    score=float(of_stage[place]),
                )
                for place in best
            ]
            answer = None
            if not any(shown.relevant for shown in items):
                answer = item(int(split.owners[query]), relevant=True, score=float("nan"))
            caption = f"{split.captions[query]} ({stage}; {why})"
            rows.append(report.QueryRow(caption, int(ranks[query]), items, answer))
    return rows
