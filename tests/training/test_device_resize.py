"""Pictures are scaled on the devices before the step, if that is configured or the devices are GPUs or TPUs."""

import jax
import numpy as np
import pytest

from jaxclip import config
from jaxclip.config.schema import Augmentation
from jaxclip.errors import UserError
from jaxclip.models import resampling
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.text import train_tokenizer
from jaxclip.runtime import compiler, mesh
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training import device_resize

SMALL = {"steps": 1, "batch_size": 16, "model": {"preset": "tiny"}, "data": {"image_size": 32, "vocab_size": 258}}


def canvas(where, size, largest, *, resize="squash", area=(0.6, 1.0)):
    preprocess = Preprocess(size, resize, (0.5,) * 3, (0.5,) * 3, "{name}", True, 16)
    augmentation = Augmentation(area, (1.0, 1.0), False)
    return device_resize.canvas_of(where, preprocess, augmentation, largest, prepared="SHOP")


@pytest.mark.parametrize(
    ("platform", "size", "largest", "expected"),
    [
        ("cpu", 224, 300, 0),
        ("gpu", 224, 300, 304),  # rounded up to a multiple of 16
        ("gpu", 224, 1300, 672),  # larger pictures are reduced while they are decoded
        ("tpu", 224, 1400, 0),
        ("tpu", 224, 80, 224),  # the square must hold pictures that the host has scaled
        ("tpu", 64, 0, 0),
    ],
)
def test_gpus_and_tpus_get_squares_that_hold_the_pictures(platform, size, largest, expected):
    with compiler.compiling_for(platform):
        assert canvas("auto", size, largest) == expected
        assert canvas("host", size, largest) == 0


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"largest": 2400}, "SHOP has pictures of 2400 pixels, more than 6 times data.image_size = 224"),
        (
            {"largest": 0},
            "SHOP was prepared by a version that did not record the size of its pictures: prepare the dataset",
        ),
        ({"largest": 300, "resize": "crop", "area": (1.0, 1.0)}, "data.resize = 'crop' crops pictures after"),
    ],
)
def test_pictures_that_devices_cannot_scale_are_an_error_only_if_device_is_configured(settings, problem):
    with pytest.raises(UserError, match=f"data.resize_on = 'device': {problem}"):
        canvas("device", 224, **settings)
    with compiler.compiling_for("gpu"):
        assert canvas("auto", 224, **settings) == 0


def test_each_device_scales_its_own_pictures_in_a_program_compiled_once():
    configuration = config.build(SMALL)
    towers = make_towers(configuration, make_preprocess(configuration), train_tokenizer(["a red shirt"], 258))
    random, sharding = np.random.default_rng(0), mesh.batch_sharding(towers.mesh)
    scale, compiled = device_resize.make_device_resize(towers.preprocess, towers.mesh, 48), []

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for _ in range(3):
            pictures = random.integers(0, 256, (16, 48, 48, 3), dtype=np.uint8)
            batch = {"image": pictures, "extent": random.integers(1, 49, (16, 2), dtype=np.int32)}
            placed = {name: mesh.place_rows(sharding, 16, rows) for name, rows in batch.items()}
            scaled = scale({**placed, "group": np.arange(16)})
            before = len(compiled)
            assert (
                scaled.keys() == {"image", "group"}
                and len(scaled["image"].sharding.device_set) == 8
                and scaled["image"].sharding.is_equivalent_to(sharding, 4)
            )
            expected = resampling.scale(batch["image"], batch["extent"], 32, "bicubic")
            assert np.abs(np.asarray(scaled["image"], int) - expected).max() <= 1  # sums are rounded in another order
            del compiled[before:]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == 1


def test_losses_nearly_equal_those_with_pictures_scaled_on_the_host(run, trained, config_file, tmp_path, read_rows):
    done = run("train", f"--config={config_file}", f"--workdir={tmp_path}", "--config.data.resize_on=device")
    assert done.returncode == 0, done.stderr
    actual, expected = ([row["loss"] for row in read_rows(folder) if "loss" in row] for folder in (tmp_path, trained))
    assert len(actual) == 12 and actual != expected
    np.testing.assert_allclose(actual, expected, rtol=0.01)
