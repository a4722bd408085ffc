"""Classical features measure similarity, and no column, outlier or background dominates them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from threadpoolctl import threadpool_limits

from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.catalog.readers import fashion_product_images
from jaxclip.errors import UserError
from jaxclip.features.classical import image_features, text_features


def random_features(products=200, colours=64, textures=6, seed=0):
    random = np.random.default_rng(seed)
    return random.dirichlet(np.full(colours, 0.1), products), random.normal(size=(products, textures))


def is_unit_or_zero(features):
    lengths = np.linalg.norm(features.astype(np.float64), axis=1)
    return np.all((np.abs(lengths - 1) < 1e-4) | (lengths == 0))


NUMBERS = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(1, 5), st.integers(0, 4), st.sampled_from([None, 1, 3]))
def test_image_features_are_finite_rows_of_length_one_or_zero_for_any_input(
    data, products, colours, textures, dimensions
):
    histograms = data.draw(st.lists(NUMBERS.map(abs), min_size=products * colours, max_size=products * colours))
    numbers = data.draw(st.lists(NUMBERS, min_size=products * textures, max_size=products * textures))
    features = image_features(
        np.reshape(histograms, (products, colours)),
        np.reshape(numbers, (products, textures)),
        colour_weight=data.draw(st.floats(0, 1)),
        dimensions=dimensions,
    )
    columns = colours + textures
    size = columns if dimensions is None or dimensions >= min(products, columns) else dimensions
    assert features.shape == (products, size) and features.dtype == np.float32
    assert np.isfinite(features).all() and is_unit_or_zero(features)


def test_image_features_do_not_depend_on_units_or_picture_size_and_hardly_on_outliers():
    histograms, textures = random_features()
    features = image_features(histograms, textures)
    np.testing.assert_allclose(image_features(histograms * 4800, textures * 1000 + 7), features, atol=1e-4)
    textures[17, 2] = 1e9
    others = np.delete(np.arange(200), 17)
    assert (np.sum(image_features(histograms, textures) * features, axis=1)[others] > 0.98).all()


@pytest.mark.parametrize("weight", (0.0, 0.2, 0.5, 1.0))
def test_the_colour_weight_is_the_mean_share_of_colour_in_the_squared_length(weight):
    histograms, textures = random_features(2000, colours=8)
    features = image_features(histograms, textures, colour_weight=weight).astype(np.float64)
    assert np.square(features[:, :8]).sum(axis=1).mean() == pytest.approx(weight, abs=0.08)


def test_many_pairs_of_pictures_have_negative_cosines():
    histograms, textures = random_features(2000)
    cosines = image_features(histograms, textures) @ image_features(histograms, textures).T
    assert abs(np.median(cosines)) < 0.05 and (cosines < -0.1).mean() > 0.1


def test_principal_components_preserve_similarities_and_do_not_depend_on_the_number_of_cores():
    histograms, textures = random_features(500, colours=16)
    full, reduced = image_features(histograms, textures), image_features(histograms, textures, dimensions=10)
    assert reduced.shape == (500, 10)
    assert np.corrcoef((full @ full.T).ravel(), (reduced @ reduced.T).ravel())[0, 1] > 0.85
    with threadpool_limits(1):
        np.testing.assert_allclose(image_features(histograms, textures, dimensions=10), reduced, atol=1e-4)


@pytest.mark.parametrize(
    ("histograms", "textures", "weight", "message"),
    [
        (np.ones((3, 4)), np.ones((2, 4)), 0.5, r"\(3, 4\), \(2, 4\)"),
        (np.ones(3), np.ones((3, 4)), 0.5, "expected"),
        (-np.ones((3, 4)), np.ones((3, 4)), 0.5, "not negative"),
        (np.ones((3, 4)), np.full((3, 4), np.nan), 0.5, "finite"),
        (np.ones((3, 4)), np.ones((3, 4)), 1.5, "weight"),
    ],
)
def test_the_error_for_invalid_arrays_says_what_is_wrong(histograms, textures, weight, message):
    with pytest.raises(ValueError, match=message):
        image_features(histograms, textures, colour_weight=weight)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=10), st.integers(1, 5))
def test_text_features_are_finite_rows_of_length_one_or_zero_for_any_captions(captions, dimensions):
    try:
        features = text_features(captions, dimensions)
    except UserError as error:
        assert "contains a word" in str(error)
        return
    assert len(features) == len(captions) and 1 <= features.shape[1] <= dimensions and features.dtype == np.float32
    assert np.isfinite(features).all() and is_unit_or_zero(features)


def test_captions_with_common_words_are_similar_in_any_case_and_script():
    features = text_features(
        [
            "Puma Men Red Running Shoes",
            "PUMA men  red running SHOES",
            "Nike Men Red Running Shoes",
            "Titan Women Silver Watch",
            "Fossil Women Silver Watch",
            "ساعت مچی زنانه نقره",
            "ساعت مچی مردانه نقره",
            "!!",
        ],
        dimensions=6,
    )
    cosines = features @ features.T
    assert cosines[0, 1] == pytest.approx(1, abs=1e-5)
    assert cosines[0, 2] > 0.5 and cosines[3, 4] > 0.5 and cosines[5, 6] > 0.4
    assert np.abs(cosines[np.ix_([0, 1, 2], [3, 4, 5, 6])]).max() < 0.2
    assert not features[7].any()


def test_captions_without_any_word_are_an_error():
    for captions in ([], ["", "!!"]):
        with pytest.raises(UserError, match=f"none of the {len(captions)} captions"):
            text_features(captions)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The products of a drawn catalogue."""
    folder = tmp_path_factory.mktemp("drawn") / "catalogue"
    draw_catalogue(folder, 150, 0, lambda iterable: iterable)
    return list(fashion_product_images.read(folder, {}))


def test_captions_and_pictures_of_one_category_are_more_similar_than_those_of_others(drawn):
    pictures = [np.asarray(Image.open(product.pictures[0]).convert("RGB").resize((30, 40))) for product in drawn]
    histograms = np.stack(
        [np.histogramdd(pixels.reshape(-1, 3), bins=4, range=[(0, 256)] * 3)[0].ravel() for pixels in pictures]
    )
    grey = [pixels.mean(axis=2) for pixels in pictures]
    edges = np.stack([[np.abs(np.diff(picture, axis=axis)).mean() for axis in (0, 1)] for picture in grey])
    categories = np.array([product.category for product in drawn])
    same = (categories[:, None] == categories) & ~np.eye(len(drawn), dtype=bool)
    for features, margin in (
        (image_features(histograms, edges), 0.05),
        (text_features([product.captions[0] for product in drawn], 32), 0.1),
    ):
        cosines = features @ features.T
        assert cosines[same].mean() > cosines[categories[:, None] != categories].mean() + margin


def test_text_features_and_their_signs_do_not_depend_on_the_number_of_cores(drawn):
    captions = [product.captions[0] for product in drawn]
    features = text_features(captions, 16)
    with threadpool_limits(1):
        np.testing.assert_allclose(text_features(captions, 16), features, atol=1e-4)
