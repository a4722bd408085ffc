"""Examples are sorted on disk in the order of TFDS, without TensorFlow."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorflow_datasets.core import shuffle

from jaxclip.catalog.shuffler import Shuffler, on_disk

ROOT = Path(__file__).parents[2]
SIDE = 100  # pixels; noise, so that the PNG is as large as its pixels
FEW, MANY = 300, 3000
CODE = """
import re, sys
from pathlib import Path
from jaxclip.catalog import builder

source = builder.Source("table", Path(sys.argv[1]), 0, 0, {})
builder.prepare(source, Path(sys.argv[2]), progress=lambda items, **_: items, workers=1)
assert builder.metadata(Path(sys.argv[2]))["products"] == int(sys.argv[3])
print("tensorflow" in sys.modules, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@given(st.dictionaries(st.text(), st.binary(max_size=100)), st.sampled_from(["train", "test"]))
def test_the_order_equals_tfds(tmp_path_factory, examples, split):
    folder = tmp_path_factory.getbasetemp()
    ours, theirs = Shuffler(folder, split), shuffle.Shuffler(folder, split)
    assert type(theirs) is not Shuffler
    for key, data in examples.items():
        ours.add(key, data)
        theirs.add(key, data)
    assert (ours.size, ours.num_examples) == (theirs.size, theirs.num_examples)
    assert ours.bucket_lengths == theirs.bucket_lengths
    assert list(ours) == list(theirs)


def test_a_duplicate_key_is_reported_with_both_examples(tmp_path):
    shuffler = Shuffler(tmp_path, "train")
    for key, data in (("a", b"1"), ("b", b"2"), ("a", b"3")):
        shuffler.add(key, data)
    with pytest.raises(shuffle.DuplicatedKeysError) as error:
        list(shuffler)
    assert {error.value.item1, error.value.item2} == {b"1", b"3"}


def test_tfds_gets_its_shuffler_back_after_a_failure():
    theirs = shuffle.Shuffler
    with pytest.raises(KeyError), on_disk():
        assert shuffle.Shuffler is Shuffler
        raise KeyError
    assert shuffle.Shuffler is theirs


def peak_memory(folder, products):
    """Returns the peak memory in bytes of a process that prepares a catalogue; it must not import TensorFlow."""
    with (folder / f"{products}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "caption"])
        table.writerows([number, "noise.png", f"Shirt {number}"] for number in range(products))
    done = subprocess.run(
        [sys.executable, "-c", CODE, folder / f"{products}.csv", folder / str(products), str(products)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    imported, kilobytes = done.stdout.split()
    assert imported == "False"
    return 1024 * int(kilobytes)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_catalogue(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    more = (MANY - FEW) * (tmp_path / "noise.png").stat().st_size
    growth = peak_memory(tmp_path, MANY) - peak_memory(tmp_path, FEW)
    assert growth < more / 4, f"{growth / 2**20:.0f} MiB for {more / 2**20:.0f} MiB more pictures"
