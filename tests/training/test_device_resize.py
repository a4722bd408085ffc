"""Pictures are scaled on the devices before the step, if that is configured or the devices are GPUs or TPUs."""

from functools import cache
from io import BytesIO

import jax
import numpy as np
import pytest
from PIL import Image

from jaxclip import config
from jaxclip.catalog import builder
from jaxclip.config.schema import Augmentation
from jaxclip.errors import UserError
from jaxclip.models import resampling
from jaxclip.pipeline.batches import training_batches
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.text import train_tokenizer
from jaxclip.pipeline.words import TokenizedByCaption
from jaxclip.runtime import compiler, mesh
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training import device_resize

SMALL = {"steps": 1, "batch_size": 16, "model": {"preset": "tiny"}, "data": {"image_size": 32, "vocab_size": 258}}


BATCH = 12


def jpeg(width, height, seed):
    small = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def records_of(tmp_path_factory):
    """Returns the records of JPEGs of these (width, height)."""

    @cache
    def prepare(*sizes):
        raw, prepared = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "shop"
        rows = ["id,image,caption,category"]
        for number, size in enumerate(sizes):
            (raw / f"{number}.jpg").write_bytes(jpeg(*size, number))
            rows.append(f"{number},{number}.jpg,shirt number {number},Shirts")
        (raw / "products.csv").write_text("\n".join(rows))
        source = builder.Source("table", raw / "products.csv", 0, 0, {})
        builder.prepare(source, prepared, progress=lambda items, **_: items, workers=1)
        return Records(prepared, "all")

    return prepare


def preprocess_of(size, resize="squash"):
    return Preprocess(size, resize, (0.5,) * 3, (0.5,) * 3, "{name}", True, 16)


def canvas(where, size, records, *, resize="squash", area=(1.0, 1.0)):
    augmentation = Augmentation(area, (1.0, 1.0), False)
    return device_resize.choose_canvas(where, records, preprocess_of(size, resize), augmentation)


@pytest.mark.parametrize(
    ("platform", "size", "area", "sizes", "expected"),
    [
        ("cpu", 64, 1.0, [(90, 70)], 0),
        ("gpu", 64, 1.0, [(90, 70)], 96),  # rounded up to a multiple of 16
        ("tpu", 64, 1.0, [(40, 30)], 64),  # the square must hold pictures that the host has scaled
        ("gpu", 64, 1.0, [(90, 70)] * 39 + [(600, 900)], 96),  # 95 % fit
        ("gpu", 64, 1.0, [(90, 70)] * 3 + [(150, 40)], 160),
        ("gpu", 64, 1.0, [(190, 70)] * 3 + [(600, 900)] * 2, 192),  # at most three image sizes
        ("gpu", 64, 1.0, [(190, 70)] * 2 + [(600, 900)] * 3, 0),  # most would be scaled on the host
        ("gpu", 64, 0.999, [(300, 300)], 160),  # large crops are reduced by two while they are decoded
    ],
)
def test_gpus_and_tpus_get_squares_that_hold_most_crops_as_they_are_decoded(
    records_of, platform, size, area, sizes, expected
):
    records = records_of(*sizes)
    with compiler.compiling_for(platform):
        chosen = canvas("auto", size, records, area=(area, area))
        assert chosen.side == expected and canvas("host", size, records).side == 0
        if platform != "cpu":
            where = f"on the device, where they arrive in squares of {expected} pixels" if expected else "on the host:"
            assert f"training pictures are scaled {where}" in chosen.line


def test_the_share_of_pictures_that_the_host_scales_is_said(records_of):
    chosen = canvas("device", 64, records_of(*[(90, 70)] * 39, (600, 900)))
    assert chosen.line.endswith("in squares of 96 pixels; the host scales the 2.5% of them that are larger")
    chosen = canvas("device", 64, records_of((190, 70), (190, 70), (600, 900), (600, 900), (600, 900)))
    assert chosen.side == 192 and "scales the 60.0% of them" in chosen.line
    with compiler.compiling_for("gpu"):
        chosen = canvas("auto", 64, records_of((190, 70), (190, 70), (600, 900), (600, 900), (600, 900)))
    assert chosen.line == "training pictures are scaled on the host: 60% of them are larger than 192 pixels"


def test_pictures_cropped_after_scaling_are_an_error_only_if_device_is_configured(records_of):
    problem = "data.resize = 'crop' crops pictures after they are scaled"
    with pytest.raises(UserError, match=f"data.resize_on = 'device': {problem}; leave data.resize_on out"):
        canvas("device", 64, records_of((90, 70)), resize="crop")
    with compiler.compiling_for("gpu"):
        chosen = canvas("auto", 64, records_of((90, 70)), resize="crop")
    assert chosen == device_resize.Canvas(0, f"training pictures are scaled on the host: {problem}")


def test_a_batch_with_an_oversized_picture_stays_on_the_device(records_of):
    """The oversized picture has the pixels of the host's own resizing, the others are unscaled and differ by one."""
    ordinary = [(60 + number, 80 - number) for number in range(BATCH - 1)]
    records = records_of(*ordinary, (700, 500))
    chosen = canvas("device", 32, records)
    assert chosen.side == 96  # three image sizes
    tokenizer = TokenizedByCaption(train_tokenizer(["a shirt"], 258), 16)
    settings = config.build(
        {"steps": 1, "batch_size": BATCH, "augmentation": {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)}}
    )

    def batch(records, side):
        steps = range(1)
        return next(training_batches(records, tokenizer, preprocess_of(32), settings, steps=steps, canvas=side))

    on_host, unscaled = batch(records, 0), batch(records, chosen.side)
    assert unscaled["image"].shape == (BATCH, 96, 96, 3)
    scaled = np.asarray(resampling.scale(unscaled["image"], unscaled["extent"], 32, "bicubic"), int)
    groups = {group: product.id for product, group in records.products()}
    oversized = [groups[group] == str(BATCH - 1) for group in unscaled["group"].tolist()]
    assert sum(oversized) == 1
    for row, big in enumerate(oversized):
        height, width = unscaled["extent"][row]
        stored = np.asarray(Image.open(BytesIO(records.pictures(number_of(records, groups, unscaled, row))[0])))
        if big:
            np.testing.assert_array_equal(scaled[row], on_host["image"][row])
            assert (height, width) == (32, 32)
        else:
            np.testing.assert_array_equal(unscaled["image"][row, :height, :width], stored)
            assert np.abs(scaled[row] - on_host["image"][row].astype(int)).max() <= 1
        assert not unscaled["image"][row, height:].any() and not unscaled["image"][row, :, width:].any()


def number_of(records, groups, batch, row):
    ids = [product.id for product, _ in records.products()]
    return ids.index(groups[int(batch["group"][row])])


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
    rows = [[row for row in read_rows(folder) if "loss" in row] for folder in (tmp_path, trained)]
    actual, expected = ([row["loss"] for row in of_run] for of_run in rows)
    assert len(actual) == 12 and actual != expected
    np.testing.assert_allclose(actual, expected, rtol=0.01)
    preprocess = Preprocess.load(trained)
    (sent,) = {row["bytes_per_pair"] for row in rows[1]}
    assert sent == 3 * preprocess.image_size**2 + 4 * preprocess.context_length + 4
    (unscaled,) = {row["bytes_per_pair"] for row in rows[0]}
    side = ((unscaled - sent - 8) / 3 + preprocess.image_size**2) ** 0.5
    assert side % device_resize.MULTIPLE == 0 and f"arrive in squares of {side:.0f} pixels" in done.stdout + done.stderr
