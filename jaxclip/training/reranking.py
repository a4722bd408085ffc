"""A second stage over stored embeddings: its data, its model and how it scores."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxclip.errors import UserError
from jaxclip.losses import ranking
from jaxclip.models import reranker
from jaxclip.models.reranker import RerankerConfig
from jaxclip.pipeline.records import Records
from jaxclip.retrieval import second_stage
from jaxclip.retrieval.second_stage import Candidates
from jaxclip.training import first_stage, setup
from jaxclip.training import mesh as meshes
from jaxclip.training.first_stage import FirstStage, Split
from jaxclip.training.optimizer import make_optimizer, make_schedule
from jaxclip.training.state import Params, TrainState, abstract_state, make_model, replicated

if TYPE_CHECKING:
    from jaxclip.config import Config

FILENAME, QUERYBANK = "first_stage.json", "querybank.npy"
Tables = dict[str, Any]


@dataclass(frozen=True)
class Reranker:
    """What it takes to restore and run a second stage."""

    config: RerankerConfig
    model: type[nnx.Module]
    graph: nnx.GraphDef
    mesh: Mesh
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: TrainState


def find_first_stage(config: "Config", workdir: Path, load_config: Callable[[Path], "Config"]) -> FirstStage:
    """Returns the configured first stage: for a workdir that has begun, only the one that it was begun with.

    Raises:
      UserError: it is another one (with both fingerprints), or it has not the checkpoint that was trained on.
    """
    where = Path(config.first_stage).expanduser()
    own = load_config(where)
    path = workdir / FILENAME
    if not path.exists():
        return first_stage.load(where, own)
    begun = json.loads(path.read_text())
    try:
        found = first_stage.load(where, own, begun["step"])
    except UserError as error:
        raise UserError(f"{workdir} re-ranks step {begun['step']} of {begun['path']}: {error}") from None
    if found.fingerprint != begun["fingerprint"]:
        raise UserError(
            f"{workdir} was trained on the first stage {begun['fingerprint']} ({begun['path']}, step {begun['step']}), "
            f"and first_stage = {where} is {found.fingerprint}: its scores mean something else; name the right "
            "one with --config.first_stage"
        )
    return found


def save_first_stage(first: FirstStage, bank: np.ndarray, workdir: Path) -> None:
    """Writes querybank.npy and then first_stage.json: path, step and fingerprint of the towers that are re-ranked."""
    if (workdir / FILENAME).exists():
        return
    np.save(workdir / QUERYBANK, bank)
    facts = {"path": str(first.workdir.resolve()), "step": first.step, "fingerprint": first.fingerprint}
    temporary = workdir / f"{FILENAME}.tmp"
    temporary.write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(temporary, workdir / FILENAME)


def find_querybank(config: "Config", first: FirstStage, prepared: Path, workdir: Path) -> np.ndarray:
    """Returns the workdir's bank of queries, drawn from the captions that the towers were trained on where it has none.

    Raises:
      UserError: there is none to be drawn, for the dataset is not the one the towers were trained on.
    """
    if (workdir / FILENAME).exists():
        return np.load(workdir / QUERYBANK)
    _check_dataset(first, prepared)
    return first_stage.querybank(first, prepared, batch_size=config.evaluation.batch_size)


def training_split(config: "Config", first: FirstStage, prepared: Path, bank: np.ndarray) -> Split:
    """Returns the products to train a second stage on: those of the training split that the towers never saw.

    On products the towers were trained on they rank the answer first because they remember it. A re-ranker trained
    there learns to trust their order, and its own figures on such rankings mean nothing.

    Raises:
      UserError: the towers saw them all, or the dataset is not the one they were trained on.
    """
    wanted, own = config.data.second_stage, first.config.data.second_stage
    if not own or wanted != own or config.data.split_seed != first.config.data.split_seed:
        raise UserError(
            f"data.second_stage = {wanted:g} (split_seed {config.data.split_seed}), and first_stage = {first.workdir} "
            f"held back {own:g} (split_seed {first.config.data.split_seed}): a re-ranker is trained on exactly the "
            "products that its towers did not see; train them with --config.data.second_stage=0.1, or more"
        )
    _check_dataset(first, prepared)
    _, held = setup.training_records(first.config, prepared)
    return embedded(config, first, prepared, held, bank=bank, wordings=config.rerank.wordings)


def _check_dataset(first: FirstStage, prepared: Path) -> None:
    trained_on, here = first_stage.data_fingerprint(first), setup.data_fingerprint(prepared)
    if trained_on != here:
        raise UserError(
            f"{prepared} has the fingerprint {here}, and the towers in {first.workdir} were trained on {trained_on}: "
            "which of its products they saw cannot be told"
        )


def embedded(
    config: "Config", first: FirstStage, prepared: Path, records: Records, *, bank: np.ndarray, wordings: int = 1
) -> Split:
    """Returns the records as the first stage embeds them, kept under the cache, with their hubness by the bank."""
    with jax.set_mesh(first.towers.mesh):
        split = first_stage.embed_split(
            first,
            prepared,
            records,
            wordings=wordings,
            seed=config.seed if wordings > 1 else 0,
            batch_size=config.evaluation.batch_size,
            workers=config.data.workers,
        )
    hubness = first_stage.hubness(split.features["image"], bank, first.logit_scale)
    features = {"hubness": hubness, **split.features}
    return replace(split, features=features, present={"hubness": np.ones(len(hubness), bool), **split.present})


def make_reranker(config: "Config", first: FirstStage, split: Split, steps: int) -> Reranker:
    """Returns the model's configuration and shapes, the mesh and the optimizer, allocating nothing."""
    given, mesh = config.rerank, first.towers.mesh
    model = reranker.PRESETS[given.preset]
    names = features(config)
    settings = RerankerConfig(
        embedding=split.queries.shape[1],
        features=tuple((name, split.features[name].shape[1]) for name in names),
        logit_scale=first.logit_scale,
        hidden=given.hidden,
        matching=given.matching,
        dropout=given.dropout,
        combine=given.combine,
        batch_norm=given.batch_norm,
    )
    graph, shapes = make_model(settings, model)
    of_optimizer = config.optimizer
    schedule = make_schedule(
        of_optimizer.learning_rate, of_optimizer.schedule, warmup_steps=of_optimizer.warmup_steps, steps=steps
    )
    frozen = {rf"^{reranker.STATISTICS}$": 0.0} if reranker.STATISTICS in shapes else {}
    optimizer = make_optimizer(
        shapes,
        schedule,
        name=of_optimizer.name,
        weight_decay=of_optimizer.weight_decay,
        beta1=of_optimizer.beta1,
        beta2=of_optimizer.beta2,
        epsilon=of_optimizer.epsilon,
        clip_norm=of_optimizer.clip_norm,
        rates=frozen | dict(of_optimizer.rates),
    )
    abstract = abstract_state(shapes, optimizer, mesh)
    return Reranker(settings, model, graph, mesh, optimizer, schedule, abstract)


def features(config: "Config") -> tuple[str, ...]:
    """Returns the names of the features that the configured model reads."""
    if config.rerank.preset == "paper":
        return reranker.Paper.FEATURES
    return tuple(name.strip() for name in config.rerank.features.split(",") if name.strip())


def make_tables(split: Split, candidates: Candidates, model: Reranker, queries: np.ndarray) -> Tables:
    """Returns, on every device, what the lists of these (N,) queries need: a step is then sent row numbers alone."""
    names = [name for name, _ in model.config.features]
    tables = {
        "query": split.queries[queries],
        "items": candidates.items[queries].astype(np.int32),
        "first": candidates.scores[queries],
        "relevant": candidates.relevant[queries],
        "features": {name: split.features[name] for name in names},
        "present": {name: split.present[name] for name in names},
    }
    return jax.device_put(tables, replicated(model.mesh))


def batch_rows(total: int, batch_size: int, seed: int, *, first: int, last: int) -> Iterator[np.ndarray]:
    """Yields the rows of steps first to last - 1, (B,) int32: every pass over them in another order.

    A pure function of seed and step, so that any step is resumed at once.
    """
    epoch, order = -1, np.empty(0, np.int64)
    for step in range(first, last):
        positions = step * batch_size + np.arange(batch_size)
        rows = np.empty(batch_size, np.int32)
        for number in np.unique(positions // total):
            if number != epoch:
                epoch, order = number, np.random.default_rng([seed & 0xFFFFFFFF, number]).permutation(total)
            inside = positions // total == number
            rows[inside] = order[positions[inside] % total]
        yield rows


def make_loss(model: Reranker, *, loss: str, negatives: str) -> Callable:
    """Returns loss(params, batch, rng) -> (value, metrics) for batches of tables and the rows to take from them."""

    def of_lists(params: Params, batch: Tables, rng: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
        network, (query, first, relevant, known, there) = nnx.merge(model.graph, params), gather(batch)
        if loss == "binary":
            model_rng, pair_rng = jax.random.split(rng)
            pair = ranking.choose_pair(relevant, negatives, pair_rng)  # (B, 2)
            take = lambda x: jnp.take_along_axis(x, pair.reshape(*pair.shape, *[1] * (x.ndim - 2)), axis=1)  # noqa: E731
            first, relevant = take(first), take(relevant)
            known, there = jax.tree.map(take, (known, there))
        else:
            model_rng = rng
        extra = {}
        if model.config.batch_norm:
            scores, statistics = network.train(query, first, known, there, rng=model_rng)
            extra = {"statistics": {reranker.STATISTICS: statistics}}
        else:
            scores = network(query, first, known, there, rng=model_rng)
        hit = jnp.take_along_axis(relevant, jnp.argmax(scores, axis=1)[:, None], axis=1)
        return LOSSES[loss](network.logits(scores), relevant), {"hit_at_1": jnp.mean(hit), **extra}

    return of_lists


LOSSES = {"softmax": ranking.list_softmax, "lambda": ranking.lambda_loss, "binary": ranking.binary_cross_entropy}


def gather(batch: Tables) -> tuple:
    """Returns query (B, D), first-stage scores (B, K), relevance (B, K), features and their presence of some rows."""
    rows = batch["rows"]
    items = batch["items"][rows]  # (B, K)
    known, there = (jax.tree.map(lambda table: table[items], batch[part]) for part in ("features", "present"))
    return batch["query"][rows], batch["first"][rows], batch["relevant"][rows], known, there


class Scorer:
    """Scores lists with whatever parameters it is given, in blocks of one shape: compiled once."""

    def __init__(self, model: Reranker, split: Split, candidates: Candidates, *, batch_size: int):
        self.count, multiple = len(split.queries), meshes.rows(model.mesh)
        self.size = -(-min(batch_size, self.count) // multiple) * multiple
        self.tables = make_tables(split, candidates, model, np.arange(self.count))
        self._where = meshes.batch_sharding(model.mesh)

        def score(params: Params, batch: Tables) -> jax.Array:
            query, first, _, known, there = gather(batch)
            return nnx.merge(model.graph, params)(query, first, known, there)

        self._score = jax.jit(score, out_shardings=replicated(model.mesh))

    def __call__(self, params: Params) -> np.ndarray:
        """Returns the second stage's scores, (Q, K) float32."""
        running = []
        for start in range(0, self.count, self.size):
            rows = np.minimum(np.arange(start, start + self.size), self.count - 1).astype(np.int32)
            running.append(self._score(params, {"rows": jax.device_put(rows, self._where), **self.tables}))
        return np.concatenate([np.asarray(block) for block in running])[: self.count]


def retrieve(config: "Config", split: Split) -> Candidates:
    """Returns the first stage's top K for every query of a split."""
    owners = split.groups[split.owners]
    return second_stage.retrieve(split.queries, split.features["image"], owners, split.groups, config.rerank.candidates)
