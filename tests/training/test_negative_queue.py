"""The queue holds the newest pairs in order, gives the loss more negatives, and is restored exactly."""

import jax
import numpy as np
import optax
import pytest

from jaxclip.losses.contrastive import Queue
from jaxclip.losses.objective import Objective
from jaxclip.models.presets import Preset, clip_config, with_execution
from jaxclip.runtime import mesh
from jaxclip.towers.checkpoints import Checkpoints
from jaxclip.towers.params import make_model
from jaxclip.training.negative_queue import EMPTY, push, with_queue
from jaxclip.training.state import abstract_state, initial_state
from jaxclip.training.step import make_loss, make_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONTEXT, END, ROWS, QUEUED = 8, 63, 4, 10
CONFIG = with_execution(
    clip_config(
        Preset(8, (16, 1, 1), (16, 1, 1), 16, "conv", "mean", "mean", "gelu_tanh"),
        image_size=16,
        vocab_size=64,
        context_length=CONTEXT,
        end_token=END,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    ),
    dropout=0.1,
)


def batch_of(step):
    random = np.random.default_rng(step)
    tokens = random.integers(0, END, (ROWS, CONTEXT), dtype=np.int32)
    tokens[:, -1] = END
    pictures = random.integers(0, 256, (ROWS, 16, 16, 3), dtype=np.uint8)
    return {"image": pictures, "text": tokens, "group": ROWS * step + np.arange(ROWS, dtype=np.int32)}


def test_the_newest_pairs_are_in_front_and_the_oldest_are_dropped():
    queue = Queue(np.zeros((5, 1), np.float32), np.zeros((5, 1), np.float32), np.full(5, EMPTY, np.int32))
    for step in range(3):
        rows = np.asarray([[2 * step], [2 * step + 1]], np.float32)
        queue = push(queue, rows, -rows, rows[:, 0].astype(np.int32))
        assert queue.group.tolist() == [[0, 1, -1, -1, -1], [2, 3, 0, 1, -1], [4, 5, 2, 3, 0]][step]
    np.testing.assert_array_equal(queue.image[:, 0], [4, 5, 2, 3, 0])
    np.testing.assert_array_equal(queue.text, -queue.image)


def test_the_queue_remembers_the_queries_of_its_pairs():
    state = with_queue(optax.sgd(0.1), 3, 1, queries=True).init({"w": np.zeros(2, np.float32)})
    assert state.queue.query.tolist() == [EMPTY] * 3
    rows = np.ones((2, 1), np.float32)
    queue = push(state.queue, rows, rows, np.asarray([8, 9], np.int32), np.asarray([5, -1], np.int32))
    assert with_queue(optax.sgd(0.1), 3, 1).init({"w": rows}).queue._fields == ("image", "text", "group")  # as ever
    assert queue.group.tolist() == [8, 9, EMPTY] and queue.query.tolist() == [5, -1, EMPTY]


@pytest.mark.slow
def test_training_with_a_queue_resumes_exactly_and_its_pairs_are_negatives(tmp_path):
    graph, shapes = make_model(CONFIG)
    optimizer = with_queue(optax.adam(1e-3), QUEUED, CONFIG.embedding)
    devices = mesh.make_mesh(1, 1, 1, jax.devices("cpu")[:1])
    abstract = abstract_state(shapes, optimizer, devices)
    loss = make_loss(graph, mask_groups=True, learned_temperature=True, objective=Objective())
    step = jax.jit(make_step(loss, optimizer, optax.constant_schedule(1e-3), seed=0))
    with jax.set_mesh(devices):
        state = initial_state(CONFIG, optimizer, abstract, seed=0)
        for number in range(5):
            if number == 3:
                checkpoints = Checkpoints(tmp_path)
                checkpoints.save(state, {})
                checkpoints.close()
            state, _ = step(state, batch_of(number))
        assert state.optimizer.queue.group.tolist() == [16, 17, 18, 19, 12, 13, 14, 15, 8, 9]
        restored, _ = Checkpoints(tmp_path, read_only=True).restore(abstract, 3)
        for number in (3, 4):
            restored, _ = step(restored, batch_of(number))
        arguments = state.params, batch_of(9), jax.random.key(0)
        without_queue, with_pairs = (
            float(jax.jit(loss)(*arguments, queue)[0]) for queue in (None, state.optimizer.queue)
        )
        assert with_pairs > without_queue + 0.5  # 14 candidates instead of 4
    assert step._cache_size() <= 2  # 2 if the restored state has another sharding
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(actual, expected)
