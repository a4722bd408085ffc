"""A table of incorrect pairs is read as it was written, or refused."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.errors import UserError
from jaxclip.features import pair_table
from jaxclip.features.pair_table import NONE, MinedPairs, load, save

SETTINGS = {"variant": "clustered", "clusters": 10, "seed": 0, "image_features": "colour"}


def features(products):
    """Returns image features, text features and groups."""
    random = np.random.default_rng(products)
    images, texts = random.normal(size=(2, products, 32)).astype(np.float32)
    return images, texts, random.integers(0, products, products)


def pairs_of(products, clustered=True):
    """Returns pairs in which every seventh product is left out."""
    random = np.random.default_rng(products)
    partner = random.permutation(products)
    partner[::7] = NONE
    similarity = np.where(partner == NONE, np.nan, random.random(products)).astype(np.float32)
    clusters = [random.integers(0, 10, products) if clustered else None for _ in range(2)]
    return MinedPairs(partner, similarity, *clusters, pair_table.fingerprint(*features(products)))


@pytest.mark.parametrize("clustered", (True, False))
def test_a_table_is_read_as_it_was_written_and_equal_pairs_give_equal_bytes(clustered, tmp_path):
    pairs = pairs_of(200, clustered)
    path = tmp_path / "pairs.npz"
    save(path, pairs, SETTINGS)
    loaded, loaded_settings = load(path)
    assert loaded_settings == SETTINGS
    for name, value in vars(pairs).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
    assert loaded.fingerprint == pair_table.fingerprint(*features(200))
    save(tmp_path / "again.npz", pairs_of(200, clustered), dict(reversed(SETTINGS.items())))
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.npz", "pairs.npz"]


def test_other_features_groups_or_orders_have_another_fingerprint():
    images, texts, groups = features(20)
    swapped = np.r_[1, 0, 2:20]
    inputs = [
        (images, texts, groups),
        (images + np.float32(1e-6), texts, groups),
        (images, texts[swapped], groups),
        (images, texts, groups + 1),
        (texts, images, groups),
        (images.reshape(40, 16), texts, groups),
    ]
    assert len({pair_table.fingerprint(*arrays) for arrays in inputs}) == len(inputs)


def test_a_table_truncated_anywhere_is_refused(tmp_path):
    save(tmp_path / "whole.npz", pairs_of(60), SETTINGS)
    whole, cut = (tmp_path / "whole.npz").read_bytes(), tmp_path / "cut.npz"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.npz is not a complete table"):
            load(cut)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Returns a path, and the pairs that were saved there."""
    path, pairs = tmp_path_factory.mktemp("tables") / "whole.npz", pairs_of(40)
    save(path, pairs, SETTINGS)
    return path, pairs


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_table_is_refused_or_read_unchanged(table, data):
    path, pairs = table
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = path.with_name("damaged.npz")
    damaged.write_bytes(content)
    try:
        loaded, loaded_settings = load(damaged)
    except UserError:
        return
    assert loaded_settings == SETTINGS
    for name, value in vars(pairs).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)


def test_a_failed_write_keeps_the_previous_table_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "pairs.npz"
    save(path, pairs_of(60), SETTINGS)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="No space left"):
        save(path, pairs_of(70), SETTINGS)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_tables_are_refused(tmp_path):
    with pytest.raises(UserError, match="missing"):
        load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", partner=np.arange(3))
    (tmp_path / "text.npz").write_text("partner,similarity\n1,0.5\n")
    np.save(tmp_path / "array.npy", np.arange(3))
    pairs = pairs_of(60)
    save(tmp_path / "beyond.npz", MinedPairs(pairs.partner + 60, *list(vars(pairs).values())[1:]), {})
    save(tmp_path / "short.npz", MinedPairs(pairs.partner[1:], *list(vars(pairs).values())[1:]), {})
    for name in ("other.npz", "text.npz", "array.npy", "beyond.npz", "short.npz"):
        with pytest.raises(UserError, match="not a complete table"):
            load(tmp_path / name)
