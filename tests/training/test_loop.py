"""The training loop with a quadratic loss: what it refuses to save, what it writes and how it stops."""

import gzip
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxclip.errors import UserError
from jaxclip.runtime.metrics_log import MetricsLog, read
from jaxclip.towers.checkpoints import Checkpoints
from jaxclip.training import loop
from jaxclip.training.profile import parse_steps
from jaxclip.training.state import TrainState
from jaxclip.training.step import make_step

STEPS = 8
OPTIMIZER = optax.adam(0.1)


def initial_state():
    params = {"kernel": jnp.zeros((4, 3), jnp.float32)}
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))


def loss(params, batch, rng):
    return jnp.mean((params["kernel"] - batch["target"]) ** 2), {}


def batches(first=0, poisoned=None):
    """Yields the batches after step `first`; the target of the step `poisoned` is NaN."""
    for step in range(first, STEPS):
        yield {"target": np.full((4, 3), np.nan if step + 1 == poisoned else step, np.float32)}


def train(
    workdir,
    host_batches,
    state=None,
    *,
    save=2,
    evaluate=0,
    log=1,
    step=None,
    rank=lambda _: {"hit@1": 0.5},
    profiled=range(0),
):
    checkpoints = Checkpoints(workdir, keep=2)
    step = step or jax.jit(make_step(loss, OPTIMIZER, optax.constant_schedule(0.1), seed=0), donate_argnums=0)
    run = loop.Run(
        workdir=workdir,
        state=state or initial_state(),
        step=step,
        batches=host_batches,
        place=lambda batch: jax.tree.map(jnp.asarray, batch),
        batch_size=4,
        model_seconds=None,
        cadence=loop.Cadence(STEPS, log, evaluate, save),
        checkpoints=checkpoints,
        metadata={},
        evaluate=rank,
        profiled=profiled,
    )
    try:
        return loop.train(run)
    finally:
        checkpoints.close()


def saved_states(workdir):
    """Returns step -> state for the checkpoints of a workdir."""
    checkpoints = Checkpoints(workdir, read_only=True)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), initial_state()
    )
    return {step: checkpoints.restore(abstract, step)[0] for step in checkpoints.steps()}


@pytest.mark.parametrize(("poisoned", "good"), [(5, 4), (6, 4), (8, 6)])
@pytest.mark.parametrize("log", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_step_and_the_last_good_checkpoint(
    tmp_path, poisoned, good, log
):
    with pytest.raises(UserError) as raised:
        train(tmp_path, batches(poisoned=poisoned), log=log)
    assert f"at step {poisoned} are not finite" in str(raised.value) and "loss nan" in str(raised.value)
    assert f"the checkpoint of step {good} is the last good one" in str(raised.value)
    states = saved_states(tmp_path)
    assert max(states) == good
    assert all(np.isfinite(leaf).all() for state in states.values() for leaf in jax.tree.leaves(state))


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_is_reported(tmp_path):
    with pytest.raises(UserError, match="at step 1 are not finite; no checkpoint was saved before"):
        train(tmp_path, batches(poisoned=1))
    assert not saved_states(tmp_path)


def test_parameters_that_an_update_made_infinite_are_not_saved_although_the_loss_was_finite(tmp_path):
    exploding = jax.jit(make_step(loss, optax.sgd(1e39), optax.constant_schedule(1e39), seed=0))
    params = initial_state().params
    state = TrainState(jnp.zeros((), jnp.int32), params, optax.sgd(1e39).init(params))
    with pytest.raises(UserError, match="not finite"):
        train(tmp_path, batches(first=1), state, save=1, step=exploding)
    assert not Checkpoints(tmp_path, read_only=True).steps()


def test_every_logged_step_has_the_share_of_time_spent_waiting_for_data(tmp_path):
    train(tmp_path, batches(), log=2)
    rows = [row for row in read(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(0 <= row["data_wait"] <= 1 and row["pairs_per_second"] > 0 for row in rows)


def test_slow_data_increases_the_share_of_time_spent_waiting(tmp_path):
    def slow_batches():
        import time

        for batch in batches():
            time.sleep(0.2)
            yield batch

    train(tmp_path, slow_batches(), log=4, save=100)
    assert read(tmp_path)[1]["step"] == 8 and read(tmp_path)[1]["data_wait"] > 0.5


def test_rows_after_the_restored_step_are_removed_and_a_row_cut_off_by_a_kill_is_left_out(tmp_path):
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "lo')
    log = MetricsLog(tmp_path, start=4)
    log.write(5, {"loss": 9.0})
    log.close()
    assert read(tmp_path) == [*rows[:4], {"step": 5, "loss": 9.0}]


def test_a_signal_saves_the_current_step_and_the_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    plain = jax.jit(make_step(loss, OPTIMIZER, optax.constant_schedule(0.1), seed=0))

    def interrupted(state, batch):
        if int(state.step) == 4:
            signal.raise_signal(signal.SIGTERM)
        return plain(state, batch)

    before = signal.getsignal(signal.SIGTERM)
    expected, _ = train(tmp_path / "whole", batches(), step=plain, save=100)
    _, number = train(tmp_path / "stopped", batches(), step=interrupted, save=100)
    assert number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    ((step, state),) = saved_states(tmp_path / "stopped").items()
    assert step == 5
    state, number = train(tmp_path / "stopped", batches(first=5), state, step=plain, save=100)
    assert number is None
    for leaf, expected_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf)


def test_a_signal_during_the_last_step_does_not_stop_the_run_or_its_evaluation(tmp_path):
    plain, evaluated_steps = jax.jit(make_step(loss, OPTIMIZER, optax.constant_schedule(0.1), seed=0)), []

    def interrupted(state, batch):
        if int(state.step) == STEPS - 1:
            signal.raise_signal(signal.SIGTERM)
        return plain(state, batch)

    def rank(state):
        evaluated_steps.append(int(state.step))
        return {"hit@1": 0.5}

    _, number = train(tmp_path, batches(), step=interrupted, evaluate=3, rank=rank)
    assert number is None and evaluated_steps == [3, 6, 8]


def test_the_requested_steps_are_traced_with_the_named_sections_of_the_loop(tmp_path):
    train(tmp_path, batches(), profiled=parse_steps("3:4"))
    (folder,) = (tmp_path / "tensorboard" / "plugins" / "profile").iterdir()
    assert len(list(folder.glob("*.xplane.pb"))) == 1  # for TensorBoard; the other file is for Perfetto
    events = json.loads(gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert {int(step) for step in steps} == {3, 4}
    assert {"wait for data", "save"} <= {event.get("name") for event in events}


@pytest.mark.parametrize("text", ["3", "4:3", "0:2", "a:b", "1:2:3"])
def test_an_invalid_range_of_profiled_steps_is_refused(text):
    with pytest.raises(UserError, match="--profile_steps="):
        parse_steps(text)
