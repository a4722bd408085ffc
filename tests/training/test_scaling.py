"""Pictures are scaled on the devices ahead of the step, where asked for or where devices are no CPUs."""

import jax
import numpy as np
import pytest

from jaxclip import config
from jaxclip.models import compiler, resampling
from jaxclip.pipeline.text import train_tokenizer
from jaxclip.training import mesh, scaling, setup

SMALL = {"steps": 1, "batch_size": 16, "model": {"preset": "tiny"}, "data": {"image_size": 32, "vocab_size": 258}}


@pytest.mark.parametrize(
    ("where", "platform", "size", "largest", "canvas"),
    [
        ("auto", "cpu", 224, 300, 0),
        ("host", "tpu", 224, 300, 0),
        ("auto", "gpu", 224, 300, 304),  # a multiple of 16
        ("device", "cpu", 224, 2400, 448),  # larger ones are reduced or scaled on the host
        ("auto", "tpu", 224, 80, 224),  # what is scaled on the host after all has a place
        ("auto", "tpu", 64, 0, 128),  # prepared by an older version
    ],
)
def test_the_canvas_holds_all_pictures_or_twice_the_towers_size(where, platform, size, largest, canvas):
    with compiler.made_for(platform):
        assert scaling.canvas_of(where, size, largest) == canvas


def test_each_device_scales_its_own_pictures_by_a_program_compiled_once():
    given = config.build(SMALL)
    towers = setup.make_towers(given, setup.make_preprocess(given), train_tokenizer(["a red shirt"], 258), 1)
    random, sharding = np.random.default_rng(0), mesh.batch_sharding(towers.mesh)
    scale, compiled = scaling.make_scaling(towers.preprocess, towers.mesh, 48), []

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for _ in range(3):
            pictures = random.integers(0, 256, (16, 48, 48, 3), dtype=np.uint8)
            batch = {"image": pictures, "extent": random.integers(1, 49, (16, 2), dtype=np.int32)}
            placed = {name: mesh.place_rows(sharding, 16, rows) for name, rows in batch.items()}
            found = scale({**placed, "group": np.arange(16)})
            before = len(compiled)
            assert found.keys() == {"image", "group"} and len(found["image"].sharding.device_set) == 8
            expected = resampling.scale(batch["image"], batch["extent"], 32, "bicubic")
            assert np.abs(np.asarray(found["image"], int) - expected).max() <= 1  # sums in another order
            del compiled[before:]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == 1


def test_training_on_them_takes_almost_the_steps_of_pictures_that_the_host_scales(
    run, trained, config_file, tmp_path, read_rows
):
    done = run("train", f"--config={config_file}", f"--workdir={tmp_path}", "--config.data.resize_on=device")
    assert done.returncode == 0, done.stderr
    found, expected = ([row["loss"] for row in read_rows(folder) if "loss" in row] for folder in (tmp_path, trained))
    assert len(found) == 12 and found != expected
    np.testing.assert_allclose(found, expected, rtol=0.01)
