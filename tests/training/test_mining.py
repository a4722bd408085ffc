"""Incorrect pairs are mined once a rule, beside a dataset that stays as it is, from features or from towers."""

import dataclasses
import hashlib

import numpy as np
import pytest

from jaxclip import config as configs
from jaxclip.catalog import builder
from jaxclip.catalog.builder import Source
from jaxclip.errors import UserError
from jaxclip.pipeline.records import Records
from jaxclip.training import mining, preparation


@pytest.fixture(scope="module")
def prepared(trained, cache):
    """The dataset that `trained` was trained on, as its training prepared it."""
    (folder,) = (cache / "prepared").glob("150-products*")
    return folder


def config_of(trained, **pairs):
    own = configs.load(trained)
    return dataclasses.replace(own, incorrect_pairs=dataclasses.replace(own.incorrect_pairs, **pairs))


def find_or_mine(config, prepared, said=None):
    said = [] if said is None else said
    return mining.find_or_mine(config, prepared, load_config=configs.load, say=said.append)


def bytes_of(folder):
    files = sorted(path for path in (folder / builder.NAME).rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_rule_is_mined_once_and_another_beside_it(trained, prepared):
    before, said = bytes_of(prepared), []
    first = find_or_mine(config_of(trained), prepared, said)
    assert sum("mining" in line for line in said) == 1
    again = find_or_mine(config_of(trained), prepared, said)
    assert sum("mining" in line for line in said) == 1 and (again.partner == first.partner).all()
    other = find_or_mine(config_of(trained, variant="below:0.2"), prepared, said)
    assert sum("mining" in line for line in said) == 2 and other.similarity[other.products].max() < 0.2
    assert len(list((prepared / mining.FOLDER).glob("*.npz"))) == 2
    assert bytes_of(prepared) == before


def test_pairs_are_of_the_training_split_and_never_of_one_group(trained, prepared):
    pairs, records = find_or_mine(config_of(trained), prepared), Records(prepared, "train")
    groups = np.array([group for _, group in records.products()])
    assert len(pairs.partner) == len(records) == 120
    assert (groups[pairs.products] != groups[pairs.partner[pairs.products]]).all()


def test_towers_of_a_workdir_can_be_what_products_are_compared_by(trained, prepared):
    said = []
    pairs = find_or_mine(config_of(trained, features=f"towers:{trained}", clusters=4), prepared, said)
    assert any("step 12" in line for line in said) and len(pairs.products) > 100
    classical = find_or_mine(config_of(trained, clusters=4), prepared)
    assert not np.array_equal(pairs.similarity, classical.similarity)
    with pytest.raises(UserError, match="no checkpoints"):
        find_or_mine(config_of(trained, features=f"towers:{prepared}"), prepared)


def test_a_dataset_without_features_says_how_to_get_them(trained, catalogue, tmp_path):
    builder.prepare(Source("drawn", catalogue, 20, 42, {}), tmp_path / "p", progress=lambda items, **_: items)
    with pytest.raises(UserError, match="features.detector"):
        find_or_mine(config_of(trained), tmp_path / "p")
    card = tmp_path / "p" / builder.CARD
    assert preparation.complete(config_of(trained), tmp_path / "p", load_config=configs.load, say=print) is None
    assert "Captions in tokens" in card.read_text() and "Incorrect pairs" not in card.read_text()


def test_prepare_completes_the_card_and_mines_another_rule_alone(run, config_file, tmp_path):
    folder = tmp_path / "p"
    settings = (f"--config={config_file}", f"--config.data.prepared={folder}")
    done = run("prepare", *settings)
    assert done.returncode == 0, done.stderr
    page = (folder / builder.CARD).read_text()
    assert all(f"<h2>{title}" in page for title in ("Captions in tokens", "Colours against", "Incorrect pairs"))
    assert page.count('class="crop"') == 48 and page.count("similarity ") == 24
    before = bytes_of(folder)
    done = run("prepare", *settings, "--config.incorrect_pairs.variant=random")
    assert done.returncode == 0, done.stderr
    assert "describing" not in done.stderr and bytes_of(folder) == before
    assert "<code>random</code>" in (folder / builder.CARD).read_text()
    assert len(list((folder / mining.FOLDER).glob("*.npz"))) == 2
