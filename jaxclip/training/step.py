"""The training step, a pure function of (state, batch), and its compilation."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from jaxclip.losses.contrastive import Queue, QueueWithQueries
from jaxclip.losses.labels import Labels
from jaxclip.losses.objective import Incorrect, Objective
from jaxclip.models.clip import MAX_LOGIT_SCALE
from jaxclip.models.transformer import example_keys, shard_batch, split_each
from jaxclip.runtime import compiler
from jaxclip.towers.params import Params
from jaxclip.towers.trainable import EVERYTHING, Trainable
from jaxclip.training.negative_queue import OptimizerWithQueue, push
from jaxclip.training.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]


def make_loss(
    graph: nnx.GraphDef,
    *,
    mask_groups: bool,
    learned_temperature: bool,
    objective: Callable = Objective(),  # noqa: B008 an Objective is frozen
    microbatch: int = 0,
) -> Callable:
    """Returns loss(params, batch, rng) -> (value, metrics) for batches of image, text and group.

    `rng` is the key of dropout and other regularisation, which None switches off. Batches for incorrect pairs also have
    incorrect_text, similarity and has_incorrect. Batches with judged queries also have query and weight (`Labels`). An
    optional fourth argument is the queue of earlier embeddings; its
    pairs are further negatives, and metrics["queue"] is the queue with this batch.

    Args:
      graph: the towers without their parameters.
      mask_groups: whether pairs of one group are left out of each other's negatives.
      learned_temperature: whether the logit scale gets gradients.
      objective: the loss as a function of embeddings.
      microbatch: rows that the towers process at a time; 0 = all. The loss is still that of the whole batch, and
        activations are recomputed for the gradient (GradCache, Gao et al. 2021, arXiv:2101.06983). Each example has its
        own random key, so the result depends on the microbatch only by rounding.
    """

    def embed(params: Params, rows: Batch, keys: Array | None) -> dict[str, Array]:
        model = nnx.merge(graph, params)
        image_keys, text_keys, incorrect_keys = (None,) * 3 if keys is None else split_each(keys, 3)
        embedded = {
            "image": model.encode_image(rows["image"], rng=image_keys),
            "text": model.encode_text(rows["text"], rng=text_keys),
        }
        if "incorrect_text" in rows:
            embedded["incorrect_text"] = model.encode_text(rows["incorrect_text"], rng=incorrect_keys)
        return embedded

    def loss(
        params: Params, batch: Batch, rng: Array | None, queue: Queue | QueueWithQueries | None = None
    ) -> tuple[Array, Metrics]:
        rows = {name: batch[name] for name in ("image", "text", "incorrect_text") if name in batch}
        keys = None if rng is None else example_keys(rng, len(batch["image"]))
        run = partial(_by_microbatch, embed, size=microbatch) if microbatch else embed
        embedded = run(params, rows, keys)
        model = nnx.merge(graph, params)
        scale = model.scale() if learned_temperature else jax.lax.stop_gradient(model.scale())
        incorrect = None
        if "incorrect_text" in batch:
            incorrect = Incorrect(embedded["incorrect_text"], batch["similarity"], batch["has_incorrect"])
        value, metrics = objective(
            embedded["image"],
            embedded["text"],
            scale,
            logit_bias=model.bias(),
            labels=Labels(batch["group"] if mask_groups else None, batch.get("query"), batch.get("weight")),
            incorrect_texts=incorrect,
            queue=queue,
        )
        if queue is not None:
            metrics["queue"] = push(queue, embedded["image"], embedded["text"], batch["group"], batch.get("query"))
        return value, {"logit_scale": scale, **metrics}

    return loss


def _by_microbatch(embed: Callable, params: Params, rows: Batch, keys: Array | None, *, size: int) -> dict[str, Array]:
    """Returns the embeddings of all rows, with the activations of only `size` rows in memory at a time."""
    total = len(rows["image"])
    if total % size:
        raise ValueError(f"microbatches of {size} rows do not divide a batch of {total}")
    count = total // size

    def divide(x: Array) -> Array:
        # A microbatch is every count-th row, so that each device already holds its part of every microbatch.
        return x.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)  # (count, size, ...)

    def body(_: None, part: tuple[Batch, Array | None]) -> tuple[None, dict[str, Array]]:
        return None, jax.checkpoint(embed, prevent_cse=False)(params, *jax.tree.map(shard_batch, part))

    _, embedded = jax.lax.scan(body, None, jax.tree.map(divide, (rows, keys)))
    return jax.tree.map(lambda x: shard_batch(x.swapaxes(0, 1).reshape(total, *x.shape[2:])), embedded)


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    trainable: Trainable = EVERYTHING,
    *,
    seed: int,
    ema: float = 0.0,
):
    """Returns step(state, batch) -> (state, metrics), to be jitted with the state donated.

    The metrics are float32 scalars: loss, gradient_norm (before clipping), learning_rate, finite (1 if loss and
    gradient_norm are finite, else 0) and those of the loss function. If the loss function returns
    metrics["statistics"], parameters by name that have no gradients, they replace the old values in the state.

    Args:
      loss: (params, batch, rng) -> (value, metrics); see `make_loss`.
      optimizer: optimizer of the trained parameters.
      schedule: learning rate by step.
      trainable: which parameters get gradients.
      seed: seed of dropout and other regularisation, whose draws depend only on it and on the step.
      ema: largest decay of the moving average (see `_decay`), if the state has one.
    """

    @jax.jit  # `model_flops` leaves this part out by the name of the jitted function
    def optimize(gradients: Params, state: optax.OptState, trained: Params) -> tuple[Params, optax.OptState]:
        return optimizer.update(gradients, state, trained)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        queue = state.optimizer.queue if isinstance(state.optimizer, OptimizerWithQueue) else None
        queue_argument = () if queue is None else (queue,)
        trained = trainable.pick(state.params)

        def loss_of(trained: Params) -> tuple[Array, Metrics]:
            return loss(trainable.assemble(trained, state.params), batch, rng, *queue_argument)

        (value, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, optimizer_state = optimize(gradients, state.optimizer, trained)
        if queue is not None:
            optimizer_state = optimizer_state._replace(queue=metrics.pop("queue"))
        statistics = metrics.pop("statistics", {})
        trained = _clip_logit_scale(optax.apply_updates(trained, updates))
        average = None if state.ema is None else _averaged(state.ema, trained, trainable, _decay(ema, state.step))
        norm = optax.tree.norm(gradients)
        metrics = {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "finite": (jnp.isfinite(value) & jnp.isfinite(norm)).astype(jnp.float32),
            **metrics,
        }
        params = trainable.put(trained, state.params) | statistics
        return TrainState(state.step + 1, params, optimizer_state, average), metrics

    return step


def _averaged(average: Params, trained: Params, trainable: Trainable, decay: Array) -> Params:
    """Returns decay * average + (1 - decay) * trained; entries that are not trained are unchanged."""
    return trainable.put(optax.incremental_update(trained, trainable.pick(average), 1 - decay), average)


def _decay(limit: float, step: Array) -> Array:
    """Returns min(limit, (1 + step) / (10 + step)), so that the average soon forgets the initial parameters.

    This is the formula of TensorFlow's ExponentialMovingAverage with num_updates.
    """
    return jnp.minimum(limit, (1 + step) / (10 + step)).astype(jnp.float32)


def _clip_logit_scale(params: Params) -> Params:
    """Returns the parameters with the logit scale limited to log(MAX_LOGIT_SCALE).

    The model limits it as well (`CLIP.scale`), so beyond the limit it would get no gradient that brings it back. With a
    logit bias (the sigmoid loss) it has no limit.
    """
    if "logit_scale" not in params or "logit_bias" in params:
        return params
    return {**params, "logit_scale": jnp.minimum(params["logit_scale"], jnp.log(MAX_LOGIT_SCALE))}


def compile_step(step: Callable, abstract: TrainState, batch: Batch) -> Callable:
    """Returns the step, compiled ahead of time with the state donated.

    Batches of another shape are an error, since they would need a second compilation.
    """
    compiled = jax.jit(step, donate_argnums=0).lower(abstract, batch).compile(compiler_options=compiler.towers())
    compiler.release_memory()
    return compiled
