"""A checkpoint is restored exactly as it was saved or not at all, and an intact checkpoint is never lost."""

import gc
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.errors import UserError
from jaxclip.towers.checkpoints import Checkpoints, CorruptCheckpoint
from jaxclip.training.state import TrainState

SHAPE = (64, 96)


def state_at(step, shape=SHAPE):
    """Returns a state of random values that depend on the step."""
    rng = np.random.default_rng(step)
    kernel, moment = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    return TrainState(jnp.asarray(step, jnp.int32), {"image": {"kernel": kernel}}, ({"image": {"kernel": moment}},))


def abstract(shape=SHAPE):
    (device,) = jax.devices()[:1]
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(device)),
        state_at(0, shape),
    )


def save(workdir, *steps, keep=3, metrics=None):
    """Saves a checkpoint of each step, with its hit@1 if `metrics` has one; returns the steps that are then on disk."""
    checkpoints = Checkpoints(workdir, keep=keep)
    for step in steps:
        hit = (metrics or {}).get(step)
        checkpoints.save(state_at(step), {"saved_step": step}, None if hit is None else {"hit@1": hit})
        checkpoints.wait()
    steps_on_disk = checkpoints.steps()
    checkpoints.close()
    return steps_on_disk


def restore_latest(workdir, target=None):
    """Returns what `Checkpoints.restore_latest` returns, and the messages that it printed."""
    messages = []
    checkpoints = Checkpoints(workdir, keep=3)
    try:
        return checkpoints.restore_latest(target or abstract(), messages.append), messages
    finally:
        checkpoints.close()


def assert_is_step(restored, step):
    state, metadata = restored
    assert metadata["saved_step"] == step
    for actual, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True):
        np.testing.assert_array_equal(actual, expected)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bytes(folder):
    path = largest_file(folder / "params")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(255 - byte for byte in data[middle : middle + 16])
    path.write_bytes(data)


def truncate(folder):
    path = largest_file(folder / "params")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_data(folder):
    largest_file(folder / "params").unlink()


def delete_parameters(folder):
    shutil.rmtree(folder / "params")


def delete_moments(folder):
    largest_file(folder / "rest").unlink()


def garble_metadata(folder):
    (folder / "params" / "_METADATA").write_text('{"tree')


def delete_metadata(folder):
    (folder / "params" / "_METADATA").unlink()


def empty_checksums(folder):
    (folder / "beside" / "metadata").write_text("")


def remove_checksums(folder):
    (folder / "beside" / "metadata").write_text("{}")


DAMAGES = [
    flip_bytes, truncate, delete_data, delete_parameters, delete_moments, garble_metadata, delete_metadata,
    empty_checksums, remove_checksums,
]  # fmt: skip


def test_a_checkpoint_is_restored_bit_for_bit(tmp_path):
    save(tmp_path, 1, 2)
    restored, messages = restore_latest(tmp_path)
    assert_is_step(restored, 2)
    assert not messages


def test_a_new_workdir_has_no_checkpoint_to_restore(tmp_path):
    assert restore_latest(tmp_path) == (None, [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_corrupt_checkpoint_is_reported_and_moved_away_and_the_previous_one_restored(tmp_path, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "2")
    restored, messages = restore_latest(tmp_path)
    assert_is_step(restored, 1)
    assert len(messages) == 1 and "checkpoints/2 is corrupt" in messages[0] and "\n" not in messages[0]
    assert (tmp_path / "checkpoints.corrupt" / "2").is_dir()
    assert save(tmp_path, 2) == [1, 2]
    assert_is_step(restore_latest(tmp_path)[0], 2)


def test_a_checkpoint_with_many_unreadable_arrays_is_reported_in_one_line(tmp_path, caplog):
    kernels = {f"kernel_{i}": jnp.asarray(np.random.default_rng(i).normal(size=(128, 128))) for i in range(40)}
    state = TrainState(jnp.asarray(1, jnp.int32), kernels, ({"moment": jnp.zeros(3)},))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    data = largest_file(tmp_path / "checkpoints" / "1" / "params")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 50])
    for _ in range(5):  # the number of reads still running when the first one fails varies
        with pytest.raises(CorruptCheckpoint) as caught:
            checkpoints.restore(state, 1)
        assert "\n" not in str(caught.value)
        del caught
        gc.collect()
    checkpoints.close()
    assert not caplog.messages


@pytest.mark.parametrize(("item", "key"), [("params", "checksum"), ("rest", "optimizer_checksum")])
def test_values_that_orbax_reads_without_complaint_are_caught_by_the_checksum(tmp_path, item, key):
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "2" / "beside" / "metadata"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, key: metadata[key] ^ 1}))
    restored, messages = restore_latest(tmp_path)
    assert_is_step(restored, 1)
    assert f"the checksum of its {item} is wrong" in messages[0]


def test_arrays_of_another_step_are_caught_by_the_checksum(tmp_path):
    save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "rest")
    shutil.copytree(tmp_path / "checkpoints" / "1" / "rest", tmp_path / "checkpoints" / "2" / "rest")
    restored, messages = restore_latest(tmp_path)
    assert_is_step(restored, 1)
    assert "checksum" in messages[0]


@pytest.mark.parametrize("bit", [0, 22, 31])
def test_the_checksum_changes_with_a_single_bit_and_with_the_order_of_values(bit):
    from jaxclip.towers.params import checksum

    params = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(())}
    flipped = np.array(params["a"])
    flipped.view(np.uint32)[1, 2] ^= np.uint32(1 << bit)
    swapped = np.array(params["a"])[:, [1, 0, 2, 3]]
    sums = {int(checksum({**params, "a": jnp.asarray(a)})) for a in (params["a"], flipped, swapped)}
    assert len(sums) == 3


def test_it_is_an_error_if_every_checkpoint_is_corrupt_but_none_is_deleted(tmp_path):
    save(tmp_path, 1, 2)
    truncate(tmp_path / "checkpoints" / "1")
    delete_data(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="all checkpoints of .* were corrupt"):
        restore_latest(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints.corrupt").iterdir()} == {"1", "2"}


def test_a_checkpoint_of_another_architecture_is_neither_reported_as_corrupt_nor_moved(tmp_path):
    save(tmp_path, 1, 2)
    wider = abstract((64, 128))
    other = TrainState(wider.step, {"text": wider.params["image"]}, wider.optimizer)
    for target, words in ((wider, ["image/kernel", "(64, 96)", "(64, 128)"]), (other, ["text/kernel", "missing"])):
        with pytest.raises(UserError) as raised:
            restore_latest(tmp_path, target)
        assert not isinstance(raised.value, CorruptCheckpoint)
        assert all(word in str(raised.value) for word in ["arrays", "do not match", *words])
    assert not (tmp_path / "checkpoints.corrupt").exists()
    assert_is_step(restore_latest(tmp_path)[0], 2)


def test_the_newest_and_the_best_are_kept(tmp_path):
    assert save(tmp_path, 1, 2, 3, 4, keep=2, metrics={1: 0.1, 2: 0.9, 4: 0.3}) == [2, 3, 4]
    assert save(tmp_path, 5, 6, keep=2, metrics={6: 0.8}) == [2, 5, 6]
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.best() == 2 and checkpoints.steps() == [2, 5, 6]


def test_there_is_no_best_step_if_none_was_evaluated(tmp_path):
    assert save(tmp_path, 1, 2, 3, keep=1) == [3]
    assert Checkpoints(tmp_path, read_only=True).best() is None


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    poisoned = state_at(2)
    poisoned = poisoned._replace(params={"image": {"kernel": poisoned.params["image"]["kernel"].at[3, 4].set(jnp.inf)}})
    with pytest.raises(UserError, match="not finite at step 2.*the checkpoint of step 1 is intact"):
        checkpoints.save(poisoned, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_a_write_that_the_system_refuses_is_reported_and_the_previous_checkpoint_stays_intact(tmp_path):
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(UserError, match="could not .* a?.*checkpoint"):
            checkpoints.save(state_at(2), {"saved_step": 2})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    restored, messages = restore_latest(tmp_path)
    assert_is_step(restored, 1)
    assert not messages


def test_reading_from_a_workdir_without_checkpoints_is_an_error(tmp_path):
    with pytest.raises(UserError, match="has no checkpoints"):
        Checkpoints(tmp_path, read_only=True)
    save(tmp_path, 3)
    with pytest.raises(UserError, match=r"no checkpoint of step 2; it has \[3\]"):
        Checkpoints(tmp_path, read_only=True).restore(abstract(), 2)
