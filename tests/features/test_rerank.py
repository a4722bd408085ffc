"""The features of candidates: right values for every product, and all of them documented."""

from pathlib import Path

import numpy as np
import pytest

import jaxclip
from jaxclip.features import rerank
from jaxclip.features.palette import PROTOTYPES

README = Path(jaxclip.__file__).parent / "reranking" / "README.md"


@pytest.fixture
def sources():
    """Three products: the first was not cropped, the last has no attribute that is known."""
    random = np.random.default_rng(0)
    colours = list(PROTOTYPES)
    return rerank.FeatureSources(
        images=random.normal(size=(3, 8)).astype(np.float32),
        crops=random.normal(size=(3, 8)).astype(np.float32),
        colour_names=random.normal(size=(len(colours), 8)).astype(np.float32),
        columns={
            "crops": np.asarray([[0, 0, 1, 1], [0.1, 0, 0.5, 1], [0, 0.4, 1, 0.6]], np.float32),
            "texture": np.tile(np.float32([0.25] * 10 + [225.0] * 4), (3, 1)),
            "colour_names": np.asarray([[colours[5], colours[1]], [colours[0], colours[2]], [colours[3], colours[3]]]),
            "colour_shares": np.asarray([[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]], np.float32),
        },
        attributes=[{"sleeve": "long", "colour": "red"}, {"sleeve": "short"}, {"sleeve": "odd"}],
        bank=random.normal(size=(50, 8)).astype(np.float32),
        logit_scale=5.0,
        vocabulary={"colour": ["red"], "sleeve": ["long", "short"]},
        in_captions=["colour"],
    )


def test_every_feature_has_a_float32_row_per_product(sources):
    features, present = rerank.compute(sources)
    assert features.keys() == present.keys() == rerank.FEATURES.keys()
    for name, values in features.items():
        assert values.dtype == np.float32 and values.ndim == 2 and len(values) == 3, name
        assert present[name].dtype == bool and present[name].shape == (3,), name


def test_a_crop_of_the_whole_picture_is_no_crop(sources):
    _, present = rerank.compute(sources)
    assert present["crop"].tolist() == present["geometry"].tolist() == [False, True, True]
    assert all(present[name].all() for name in ("hubness", "image", "colour", "colour_embedding", "texture"))


def test_attributes_are_multi_hot_in_the_columns_that_captions_do_not_mention(sources):
    features, present = rerank.compute(sources)
    assert features["attributes"].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert present["attributes"].tolist() == [True, True, False]
    assert features["caption_attributes"].tolist() == [[1], [0], [0]]


def test_the_main_colour_is_embedded_and_contrasts_are_scaled_to_one(sources):
    features, _ = rerank.compute(sources)
    np.testing.assert_array_equal(features["colour_embedding"], sources.colour_names[[5, 0, 3]])
    np.testing.assert_array_equal(features["texture"][0], [0.25] * 10 + [1.0] * 4)
    assert sources.columns["texture"][0, 10] == 225.0


def test_the_readme_explains_every_feature():
    text = README.read_text()
    assert [name for name in rerank.FEATURES if f"`{name}`" not in text] == []


def test_hubness_is_the_log_mean_exp_over_the_bank():
    random = np.random.default_rng(0)
    images, bank = (random.normal(size=(count, 8)).astype(np.float32) for count in (7, 50))
    found = rerank.hubness(images, bank, 5.0)
    for column, sharp in enumerate((2.5, 5.0, 10.0)):
        expected = np.log(np.exp(sharp * (images @ bank.T).astype(np.float64)).mean(axis=1)) / sharp * 5.0
        np.testing.assert_allclose(found[:, column], expected - expected.mean(), atol=1e-4)
